"""A matrix rounded to FP8 (e4m3) with one scale a row, in PyTorch alone, the same bits on every device, and the proof that it
was. No gradient passes.

Shape legend: R rows and C columns of the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # that e4m3 holds
LEAST_SCALE = 2.0**-126  # a row of zeros has one too
HALF_STEP, HALF_SUBNORMAL = 2.0**-4, 2.0**-10  # of a value, and of those nearest to zero
AT_ONCE = 1 << 23  # elements: what is widened to float32 at a time takes 32 MiB, five times over where it is proven
HELD_BYTES = 512 << 20  # of matrices that wait to be rounded: beyond it no other is begun while one of them is under way


def rounded_rows(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """(rows, their values [r, C] in FP8, their scales [r, 1] in float32) of weight [R, C], a few rows at a time. A scale is the
    row's largest magnitude over 448; a value is the nearest of e4m3's to weight / scale, ties to even."""
    for rows in _pieces(weight):
        wide = weight[rows].float()
        scale = (wide.abs().amax(1, keepdim=True) / LARGEST).clamp_min(LEAST_SCALE)
        yield rows, (wide / scale).clamp_(-LARGEST, LARGEST).to(FP8), scale


def num_strayed(weight: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """How many elements of quantized [R, C] times scale [R, 1] are further from weight [R, C] than half of an FP8 step, or are
    not numbers: an int64 tensor [], on the weight's device; 0 where it was rounded right."""
    found = torch.zeros((), dtype=torch.int64, device=weight.device)
    for rows in _pieces(weight):
        exact = weight[rows].float() / scale[rows]
        near = torch.maximum(exact.abs() * HALF_STEP, exact.new_full((), HALF_SUBNORMAL)) * (1 + 1e-6)
        found += ((quantized[rows].float() - exact).abs() <= near).logical_not_().sum()
    return found


def _pieces(weight: torch.Tensor) -> Iterator[slice]:
    step = max(1, AT_ONCE // max(1, weight.size(1)))
    for start in range(0, weight.size(0), step):
        yield slice(start, start + step)
