"""A linear layer's product against float64; of few rows the kernel's, whose numbers depend on their own row alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ops import linear
from engine.ops.products import MOST_ROWS

SIZES = st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 513, 1030]))  # around vectors, tiles and blocks


@given(st.integers(0, 9), SIZES, SIZES, st.sampled_from([1e-3, 1.0, 1e3]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_it_is_its_definition(num_rows: int, width: int, depth: int, size: float, biased: bool) -> None:
    torch.manual_seed(width)
    x, weight = size * torch.randn(num_rows, depth), torch.randn(width, depth)
    bias = size * torch.randn(width) if biased else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    bound = 1e-6 * (F.linear(x.abs(), weight.abs()).double() + size)  # of a sum's terms
    found = torch.ops.semion.few_rows_product(x, weight) if bias is None else linear(x, weight, bias)
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("depth", [64, 700])
def test_rows_beside_it_and_threads_change_no_bit(depth: int) -> None:
    torch.manual_seed(0)
    x, weight, before = torch.randn(MOST_ROWS, depth), torch.randn(9001, depth), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = linear(x, weight)
        for rows in (1, 2, 7, 32, 100):
            assert torch.equal(linear(x[:rows], weight), whole[:rows])
        assert torch.equal(linear(x, weight[3:8]), whole[:, 3:8])
        torch.set_num_threads(3)
        assert torch.equal(linear(x, weight), whole)
    finally:
        torch.set_num_threads(before)


def test_what_the_kernel_is_not_for_is_torch_s_own() -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 40)
    many, doubles = torch.randn(MOST_ROWS + 1, 40), torch.randn(3, 40, dtype=torch.float64)
    assert torch.equal(linear(many, weight), F.linear(many, weight))
    assert torch.equal(linear(doubles, weight.double()), F.linear(doubles, weight.double()))
    few = torch.randn(2, 1, 40, requires_grad=True)
    found = linear(few, weight)
    assert found.shape == (2, 1, 24)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), few)[0], weight.sum(0).expand(2, 1, 40), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        turned = torch.randn(40, 24).t()
        assert torch.equal(linear(few, turned), F.linear(few, turned))
        torch.testing.assert_close(linear(few, weight), found)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(2, 8), torch.ones(3, 7), r"weight must have shape \[N, H\] = \[3, 8\]; found \[3, 7\]"),
        (torch.ones(8), torch.ones(3, 8), r"x must have shape \[T, H\]; found \[8\]"),
        (torch.ones(2, 8, dtype=torch.float64), torch.ones(3, 8), "x must be float32; found float64"),
        (torch.ones(2, 8), torch.ones(3, 8).bfloat16(), "weight must be float32; found bfloat16"),
    ],
)
def test_wrong_arguments_are_refused(x: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.semion.few_rows_product(x, weight)
