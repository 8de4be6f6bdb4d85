"""Attention of rows where samples share prompts, against a mask over the whole row in float64: values and gradients, of the
CPU's kernel, of the plain one and of what is asked of a GPU's; that nothing as large as a mask or a copy of the prompt is made;
rotary positions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.config.options import Trainer
from engine.core.types import Microbatch
from engine.megatron import attention
from engine.megatron.attention import FLASH, PLAIN, PackedAttention, Pieces, Row, layout_of, row_of
from engine.megatron.packing import make_batch
from tests.rollouts import make_sequence

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
TOLERANCES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.06)]


def row_with(draw: random.Random, num_prompts: int, samples: int, prompt: int, completion: int) -> Microbatch:
    """Samples of up to so many tokens, of some prompts one; a row that ends in padding."""
    made = []
    for number in range(num_prompts):
        ids = (number, *[1] * draw.randint(0, prompt - 1))
        made += [make_sequence(ids, (2,) * draw.randint(1, completion), ()) for _ in range(draw.choice([1, samples, samples]))]
    trainer = Trainer(microbatch_tokens=4096, sequence_parallel=True, tensor_parallel=4)
    (row,) = make_batch(made, step=0, num_prompts=num_prompts, trainer=trainer, dp_rank=0).microbatches
    return row


def mask_of(microbatch: Microbatch) -> torch.Tensor:
    """Which token of a row attends to which, by the definition."""
    size = microbatch.token_ids.numel()
    seen = torch.zeros(size, size, dtype=torch.bool)
    segments = [slice(start, end) for start, end in pairwise(microbatch.cu_seqlens.tolist())]
    for segment, parent in zip(segments, microbatch.parents.tolist(), strict=True):
        seen[segment, segment] = torch.ones(segment.stop - segment.start, segment.stop - segment.start).tril().bool()
        if parent >= 0:
            seen[segment, segments[parent]] = True
    return seen


def by_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = torch.einsum("lnd,snd->nls", q, k) / HEAD_DIM**0.5
    return torch.einsum("nls,snd->lnd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).flatten(1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: Row) -> torch.Tensor:
    """The layers' attention, without rotation."""
    one, zero = torch.ones(q.size(0), 1, HEAD_DIM // 2, dtype=q.dtype), torch.zeros(q.size(0), 1, HEAD_DIM // 2, dtype=q.dtype)
    row.rotary = (one, zero)
    core: Any = SimpleNamespace(scale=None)
    return PackedAttention.forward(core, q, k, v, packed_seq_params=row)


def tensors(num_tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(num_tokens)
    return [
        torch.randn(num_tokens, heads, HEAD_DIM, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def flash_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    of_queries: torch.Tensor,
    of_keys: torch.Tensor,
    longest_query: int,
    longest_key: int,
    dropout: float,
    causal: bool,
    mask: bool,
    *,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """What torch's flash attention of GPUs does with pieces that bounds tell, by the plain kernel."""
    pieces = pieces_of(of_queries, of_keys)
    assert (longest_query, longest_key) == (max(pieces.query_lengths), max(pieces.key_lengths))
    assert (dropout, mask) == (0.0, False)
    output, sums = PLAIN.forward(q, k, v, pieces, causal, scale)
    return output, sums, torch.zeros(()), torch.zeros(()), torch.zeros(())


def flash_backward(*known: Any, scale: float) -> tuple[torch.Tensor, ...]:
    *tensors, of_queries, of_keys, _longest_query, _longest_key, dropout, causal, _seed, _offset = known
    assert dropout == 0.0 and all(x.is_contiguous() for x in tensors)
    return PLAIN.backward(*tensors, pieces_of(of_queries, of_keys), causal, scale)


def pieces_of(of_queries: torch.Tensor, of_keys: torch.Tensor) -> Pieces:
    return Pieces(of_queries, of_keys, *(bounds.diff().tolist() for bounds in (of_queries, of_keys)))


@contextmanager
def taking(kernel: str) -> Iterator[None]:
    """Layers take the kernel of CPUs, the plain one, or that of GPUs with a stand-in for torch's."""
    if kernel == "cpu":
        yield
        return
    chosen = {"plain": PLAIN, "flash": FLASH}[kernel]
    aten = SimpleNamespace(_flash_attention_forward=flash_forward, _flash_attention_backward=flash_backward)
    with (
        patch.object(attention, "kernel_of", return_value=chosen),
        patch.object(attention, "on_cpu", return_value=False),
        patch.object(torch.ops, "aten", aten) if kernel == "flash" else nullcontext(),
    ):
        yield


@pytest.mark.parametrize("kernel", ["cpu", "plain", "flash"])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=12, deadline=None)
def test_a_shared_prompt_is_attended_to_as_one_of_its_own(
    dtype: torch.dtype,
    tolerance: float,
    kernel: str,
    seed: int,
    num_prompts: int,
    samples: int,
    prompt: int,
    completion: int,
) -> None:
    """Outputs and the gradients of queries, keys and values, prompts included, within the type's rounding."""
    microbatch = row_with(random.Random(seed), num_prompts, samples, prompt, completion)
    row, inputs = row_of(microbatch, layout_of(microbatch)), tensors(microbatch.token_ids.numel(), dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = by_mask(exact[0], exact[1], exact[2], mask_of(microbatch))
    slope = torch.randn_like(wanted)
    with taking(kernel):
        found = attend(inputs[0], inputs[1], inputs[2], row)
        gradients = torch.autograd.grad(found, inputs, slope.to(dtype))
    for ours, theirs in zip((found, *gradients), (wanted, *torch.autograd.grad(wanted, exact, slope)), strict=True):
        assert (ours.double() - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))


class Largest(TorchDispatchMode):
    """The most elements of a tensor that was made while it is entered."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.most = max(self.most, *sizes, 0)
        return result


def test_a_long_prompt_with_samples_of_all_lengths_makes_nothing_larger_than_the_row() -> None:
    """700 tokens of a prompt, sixteen samples of 5 to 200: no mask, no copy of the prompt's keys for a sample, no padding."""
    made = [make_sequence((1,) * 700, (2,) * (5 + 13 * i), ()) for i in range(16)]
    (microbatch,) = make_batch(made, step=0, num_prompts=1, trainer=Trainer(), dp_rank=0).microbatches
    row, inputs = row_of(microbatch, layout_of(microbatch)), tensors(microbatch.token_ids.numel(), torch.float32)
    with Largest() as largest:
        attend(inputs[0], inputs[1], inputs[2], row).sum().backward()
    assert microbatch.token_ids.numel() == 699 + sum(5 + 13 * i for i in range(16))
    assert largest.most == inputs[0].numel()


def test_the_kernel_of_gpus_takes_and_gives_what_torch_declares() -> None:
    """No GPU is needed for shapes and types: torch's own rules for them, of tensors without contents."""
    with FakeTensorMode():
        bounds = torch.empty(4, dtype=torch.int32, device="meta")
        pieces = Pieces(bounds, bounds, [3, 3, 1], [1, 1, 3])
        q = torch.empty(7, HEADS, 64, dtype=torch.bfloat16, device="meta")
        k, v = (torch.empty(5, KV_HEADS, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
        output, sums = FLASH.forward(q, k, v, pieces, False, 0.125)
        assert (output.shape, sums.shape, sums.dtype) == (q.shape, (HEADS, 7), torch.float32)
        found = FLASH.backward(output, q, k, v, output, sums, pieces, False, 0.125)
        assert [x.shape for x in found] == [q.shape, k.shape, v.shape]


def test_what_a_gpu_takes() -> None:
    """Flash attention in half precision with heads that it can; anything else the plain kernel."""
    for dtype, dim, wanted in ((torch.bfloat16, 128, FLASH), (torch.float32, 128, PLAIN), (torch.bfloat16, 512, PLAIN)):
        with FakeTensorMode():
            q = torch.empty(3, HEADS, dim, dtype=dtype, device="cuda")
        assert attention.kernel_of(q) is wanted and not attention.on_cpu(q)


def test_positions_go_on_from_the_prompt() -> None:
    """Rotated queries of a sample are those of the whole sequence, to the bit megatron-core's."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    positions, frequencies = torch.tensor([0, 1, 2, 2, 3]), torch.tensor([1.0, 0.3, 0.01, 0.002])
    x = torch.randn(5, HEADS, HEAD_DIM, requires_grad=True)
    cosines, sines = attention.rotary_of(frequencies, positions, torch.float32)
    angles = torch.outer(positions.float(), frequencies)
    wanted = _apply_rotary_pos_emb_bshd(x.unsqueeze(1), torch.cat((angles, angles), -1)[:, None, None]).squeeze(1)
    found = attention._Rotated.apply(x, cosines, sines)
    slope = torch.randn_like(x)
    assert torch.equal(found, wanted)
    assert torch.equal(*(torch.autograd.grad(y, x, slope)[0] for y in (found, wanted)))
