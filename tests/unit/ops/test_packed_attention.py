"""The CPU's attention and SwiGLU: against the definition in float64 for every shape of heads and segments, the same bits at any
number of threads, and errors that name argument, rule and value. What layers make of it: tests/unit/megatron."""

from __future__ import annotations

import random
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ops import packed_attention, swiglu
from tests import reference_ops

TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 0.03, torch.float16: 0.004}


def a_row(draw: random.Random, longest: int) -> tuple[list[int], list[int]]:
    """Bounds and parents of a few prompts, some with samples, some empty."""
    lengths: list[int] = []
    parents: list[int] = []
    for _ in range(draw.randint(1, 4)):
        prompt = len(lengths)
        lengths.append(draw.randint(0, longest))
        parents.append(-1)
        for _ in range(draw.choice([0, 1, 5])):
            lengths.append(draw.randint(0, longest))
            parents.append(prompt)
    return [0, *accumulate(lengths)], parents


def inputs(num_tokens: int, groups: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Queries, keys and values in one tensor, as layers have them, and angles."""
    torch.manual_seed(num_tokens)
    q = torch.randn(num_tokens, groups * heads, dim).to(dtype).requires_grad_()
    keys_and_values = torch.randn(num_tokens, 2 * groups, dim).to(dtype).requires_grad_()
    angles = 6 * torch.rand(num_tokens, dim // 2)
    return q, keys_and_values, (angles.cos().to(dtype), angles.sin().to(dtype))


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@given(
    st.integers(0, 9999),
    st.sampled_from([2, 8, 10, 16, 32, 48, 64, 80, 128]),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 20, 150]),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_values_and_gradients_are_those_of_the_definition(
    dtype: torch.dtype, seed: int, dim: int, groups: int, heads: int, longest: int, rotates: bool
) -> None:
    bounds, parents = a_row(random.Random(seed), longest)
    q, keys_and_values, rotary = inputs(bounds[-1], groups, heads, dim, dtype)
    rotary = rotary if rotates else None
    k, v = keys_and_values.split(groups, 1)
    row = torch.tensor(bounds, dtype=torch.int32), torch.tensor(parents)
    found = packed_attention(q, k, v, *row, rotary=rotary, scale=dim**-0.5)
    exact, wide = (x.detach().double().requires_grad_() for x in (q, keys_and_values))
    keys, values = wide.split(groups, 1)
    wanted = reference_ops.packed_attention(exact, keys, values, bounds, parents, rotary, dim**-0.5)
    slope = torch.randn_like(wanted)
    ours = (found, *torch.autograd.grad(found, (q, keys_and_values), slope.to(dtype)))
    theirs = (wanted, *torch.autograd.grad(wanted, (exact, wide), slope))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype
        if one.numel():
            assert (one.double() - other).abs().max() <= TOLERANCES[dtype] * max(1.0, float(other.detach().abs().max()))


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    """Scores of hundreds, as an untrained model has them: a softmax of one."""
    q = torch.tensor([[[300.0, 0.0]], [[300.0, 0.0]], [[-300.0, 1.0]]])
    found = packed_attention(q, q, q, torch.tensor([0, 3], dtype=torch.int32), torch.tensor([-1]), scale=1.0)
    assert torch.equal(found, torch.tensor([[[300.0, 0.0]], [[300.0, 0.0]], [[-300.0, 1.0]]]))
    q[1, 0, 0] = torch.nan
    found = packed_attention(q, q, q, torch.tensor([0, 3], dtype=torch.int32), torch.tensor([-1]), scale=1.0)
    assert found[1:].isnan().any(-1).all(), "a NaN is not lost"


def test_bits_are_the_same_at_any_number_of_threads() -> None:
    bounds, parents = a_row(random.Random(5), 60)
    q, keys_and_values, rotary = inputs(bounds[-1], 2, 2, 32, torch.float32)
    k, v = keys_and_values.split(2, 1)
    row = torch.tensor(bounds, dtype=torch.int32), torch.tensor(parents)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output = packed_attention(q, k, v, *row, rotary=rotary, scale=0.2)
            found.append((output, *torch.autograd.grad(output.square().sum(), (q, keys_and_values))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bounds": [0, 2, 1, 6]}, r"cu_seqlens\[2\] must be at least cu_seqlens\[1\] = 2; found 1"),
        ({"bounds": [0, 2, 3, 5]}, r"cu_seqlens\[3\] must be the length of q = 6; found 5"),
        ({"parents": [-1, 1, -1]}, r"parents\[1\] must be -1 or a segment before it that goes on from none; found 1"),
        ({"parents": [-1, 0, 1]}, r"parents\[2\] must be -1 or a segment before it that goes on from none; found 1"),
        ({"parents": [-1, 0]}, r"parents must have shape \[B\] = \[3\]; found \[2\]"),
        ({"q": torch.zeros(6, 3, 4)}, r"q must have a multiple of k's heads = 2; found 3"),
        ({"q": torch.zeros(6, 4, 4).double()}, r"q must be float32 or bfloat16 or float16; found float64"),
        ({"v": torch.zeros(6, 2, 5)}, r"v must have shape \[T, heads, D\] = \[6, 2, 4\]; found \[6, 2, 5\]"),
        ({"v": torch.zeros(6, 2, 8)[..., ::2]}, r"v must have a stride of 1 inside a head; found 2"),
        ({"rotary": (torch.ones(6, 4), torch.ones(6, 4))}, r"cosines must have shape \[T, D / 2\] = \[6, 2\]; found \[6, 4\]"),
        ({"scale": 0.0}, r"scale must be greater than 0; found 0"),
    ],
)
def test_what_it_refuses(changes: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {"q": torch.zeros(6, 4, 4), "k": torch.zeros(6, 2, 4), "v": torch.zeros(6, 2, 4), "scale": 0.5}
    asked = {**right, "bounds": [0, 2, 3, 6], "parents": [-1, 0, 0], **changes}
    bounds, parents = torch.tensor(asked.pop("bounds"), dtype=torch.int32), torch.tensor(asked.pop("parents"))
    with pytest.raises(ValueError, match=message):
        packed_attention(**asked, cu_seqlens=bounds, parents=parents)


def test_samples_of_one_prompt_must_follow_one_another() -> None:
    x = torch.zeros(4, 1, 2)
    bounds, parents = torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32), torch.tensor([-1, 0, -1, 0])
    with pytest.raises(ValueError, match=r"segments of one parent must follow one another; found others before parents\[3\]"):
        packed_attention(x, x, x, bounds, parents, scale=1.0)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@given(st.integers(0, 9), st.integers(1, 70), st.sampled_from([0.1, 3.0, 60.0]))
@settings(max_examples=25, deadline=None)
def test_swiglu_is_its_definition(dtype: torch.dtype, num_tokens: int, width: int, size: float) -> None:
    """Values and gradients, gates of sixty included, whose sigmoid is 0 or 1."""
    torch.manual_seed(width)
    x = (size * torch.randn(num_tokens, 1, 2 * width)).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    found, wanted = swiglu(x), reference_ops.swiglu(exact)
    slope = torch.randn_like(wanted)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=rounding, atol=1e-6)
    (back,), (want_back,) = torch.autograd.grad(found, x, slope.to(dtype)), torch.autograd.grad(wanted, exact, slope)
    torch.testing.assert_close(back.double(), want_back, rtol=4 * rounding, atol=1e-5)


def test_swiglu_in_float64_is_torch_s_own() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(swiglu(x), reference_ops.swiglu(x))
