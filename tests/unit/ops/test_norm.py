"""RMSNorm against float64, values and both gradients, and by any number of threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ops import rms_norm
from tests import reference_ops

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@given(st.integers(0, 200), st.integers(1, 70), st.sampled_from([0.01, 1.0, 60.0]))
@settings(max_examples=25, deadline=None)
def test_it_is_its_definition(dtype: torch.dtype, num_tokens: int, width: int, size: float) -> None:
    torch.manual_seed(width)
    x = (size * torch.randn(num_tokens, 1, width)).to(dtype).requires_grad_()
    weight = torch.randn(width).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    found, wanted = rms_norm(x, weight, 1e-5), reference_ops.rms_norm(exact[0], exact[1], 1e-5)
    slope = torch.randn(wanted.shape).to(dtype)
    torch.testing.assert_close(found.double(), wanted, rtol=ROUNDING[dtype], atol=1e-6)
    back, want_back = torch.autograd.grad(found, (x, weight), slope), torch.autograd.grad(wanted, exact, slope.double())
    for one, want, terms in zip(back, want_back, (1 / size, num_tokens**0.5), strict=True):
        torch.testing.assert_close(one.double(), want, rtol=4 * ROUNDING[dtype], atol=8 * ROUNDING[dtype] * terms + 1e-5)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, 1e-5), found)


def test_heads_of_a_wider_row_and_a_gradient_that_repeats_one_number() -> None:
    """As a layer's queries and keys come, one beside the other, and as a sum sends its gradient back."""
    torch.manual_seed(0)
    both, weight = torch.randn(7, 4, 3 * 24).requires_grad_(), torch.randn(24).requires_grad_()
    exact = both.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    found = rms_norm(both[..., 24:48], weight, 1e-6)
    wanted = reference_ops.rms_norm(exact[0][..., 24:48], exact[1], 1e-6)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=1e-6)
    back, want_back = torch.autograd.grad(found.sum(), (both, weight)), torch.autograd.grad(wanted.sum(), exact)
    for one, want in zip(back, want_back, strict=True):
        torch.testing.assert_close(one.double(), want, rtol=1e-5, atol=2e-5)


def test_threads_change_no_bit() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5000, 96).requires_grad_(), torch.randn(96).requires_grad_()
    slope, before = torch.randn(5000, 96), torch.get_num_threads()

    def found(threads: int) -> tuple[torch.Tensor, ...]:
        torch.set_num_threads(threads)
        out = rms_norm(x, weight, 1e-6)
        return out, *torch.autograd.grad(out, (x, weight), slope)

    try:
        assert all(map(torch.equal, found(1), found(3)))
    finally:
        torch.set_num_threads(before)


def test_in_float64_and_in_mixed_types_it_is_torch_s_own() -> None:
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    assert torch.equal(rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (8,), weight, 1e-5))
    mixed = x.bfloat16(), weight.float()
    assert torch.equal(rms_norm(*mixed, 1e-5), torch.nn.functional.rms_norm(mixed[0], (8,), mixed[1], 1e-5))


@pytest.mark.parametrize(
    ("shape", "width", "epsilon", "message"),
    [
        ((2, 8), 7, 1e-5, r"weight must have shape \[H\] = \[8\]"),
        ((2, 8), 8, -1.0, "epsilon must be at least 0; found -1"),
    ],
)
def test_wrong_arguments_are_refused(shape: tuple[int, ...], width: int, epsilon: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(torch.ones(shape), torch.ones(width), epsilon)
