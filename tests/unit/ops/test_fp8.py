"""Matrices rounded to FP8 with a scale a row, against the nearest of all e4m3 values in float64; and the proof of it."""

from __future__ import annotations

import pytest
import torch

from engine.ops import fp8
from engine.ops.fp8 import FP8, LARGEST, LEAST_SCALE, num_strayed, rounded_rows

ALL = torch.arange(256, dtype=torch.uint8).view(FP8).double()
VALUES = ALL[ALL.isfinite()].unique()  # sorted


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pieces = list(rounded_rows(weight))
    return torch.cat([quantized for _, quantized, _ in pieces]), torch.cat([scale for *_, scale in pieces])


def nearest(exact: torch.Tensor) -> torch.Tensor:
    """The distance of each value to the nearest of e4m3's."""
    above = torch.searchsorted(VALUES, exact).clamp(1, len(VALUES) - 1)
    return torch.minimum((exact - VALUES[above - 1]).abs(), (VALUES[above] - exact).abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_value_becomes_the_nearest_that_e4m3_has_at_its_rows_scale(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-6, 4, 64, dtype=torch.float64)[:, None]
    weight = (torch.randn(64, 96, generator=draw, dtype=torch.float64) ** 3 * sizes).to(dtype)
    quantized, scale = rounded(weight)
    assert torch.equal(scale[:, 0], weight.float().abs().amax(1) / LARGEST)
    exact = weight.double() / scale.double()
    assert torch.equal(quantized.double().abs().amax(1), torch.full((64,), LARGEST, dtype=torch.float64)), "nothing is clipped"
    assert ((quantized.double() - exact).abs() <= nearest(exact) + 2e-7 * exact.abs()).all()
    assert int(num_strayed(weight, quantized, scale)) == 0


def test_every_value_of_e4m3_stays_itself_whatever_the_scale() -> None:
    for scale in (0.5, 1.0, 2.0**-20):
        weight = (VALUES[None] * scale).float()
        quantized, found = rounded(weight)
        assert torch.equal(quantized.double(), VALUES[None]) and float(found) == scale


def test_rows_that_are_taken_a_few_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 16, generator=torch.Generator().manual_seed(2))
    at_once = rounded(weight)
    monkeypatch.setattr(fp8, "AT_ONCE", 80)
    in_turn = rounded(weight)
    assert len(list(rounded_rows(weight))) == 8
    assert torch.equal(at_once[0].view(torch.uint8), in_turn[0].view(torch.uint8)) and torch.equal(at_once[1], in_turn[1])
    assert int(num_strayed(weight, *in_turn)) == 0


def test_a_row_of_zeros_stays_zero() -> None:
    quantized, scale = rounded(torch.zeros(2, 8))
    assert not quantized.float().any() and torch.equal(scale, torch.full((2, 1), LEAST_SCALE))
    assert int(num_strayed(torch.zeros(2, 8), quantized, scale)) == 0


def test_what_was_rounded_from_something_else_is_counted() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(torch.bfloat16)
    quantized, scale = rounded(weight)
    flipped = quantized.clone()
    flipped.view(torch.uint8)[3, 5] ^= 0x40  # an exponent bit
    assert int(num_strayed(weight, flipped, scale)) == 1
    assert int(num_strayed(weight, quantized, scale * 1.2)) > 100
    assert int(num_strayed(weight.roll(1, 0), quantized, scale)) > 100
    for broken in (float("nan"), float("inf")):
        other = weight.clone()
        other[2, 7] = broken
        assert int(num_strayed(other, *rounded(other))) > 0
