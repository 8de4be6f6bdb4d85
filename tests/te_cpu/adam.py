"""Transformer Engine's kernels over lists of tensors, in plain torch: AdamW in its two forms, norms and scaled copies."""

from __future__ import annotations

from typing import Any

import torch

Lists = list[list[torch.Tensor]]


def _stepped(
    gradient: torch.Tensor,
    weight: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    rates: tuple[float, float, float, float, int, int, int, float],
) -> torch.Tensor:
    """The weight after a step, in float32; the moments move in place."""
    learning_rate, beta1, beta2, eps, step, decoupled, corrected, decay = rates
    assert decoupled, "AdamW"
    gradient, weight = gradient.float(), weight.float()
    first.copy_(beta1 * first.float() + (1 - beta1) * gradient)
    second.copy_(beta2 * second.float() + (1 - beta2) * gradient * gradient)
    scale1, scale2 = (1 - beta1**step, 1 - beta2**step) if corrected else (1.0, 1.0)
    update = (first.float() / scale1) / ((second.float() / scale2).sqrt() + eps) + decay * weight
    return weight - learning_rate * update


def multi_tensor_adam(chunk: int, noop: torch.Tensor, lists: Lists, *rates: Any) -> None:
    """Gradients, weights, moments, and where there are five lists the float32 weights."""
    for gradient, weight, first, second, *main in zip(*lists, strict=True):
        found = _stepped(gradient, main[0] if main else weight, first, second, rates)
        weight.copy_(found)
        if main:
            main[0].copy_(found)


def multi_tensor_adam_param_remainder(chunk: int, noop: torch.Tensor, lists: Lists, *rates: Any) -> None:
    """The same where of float32 weights only the lower 16 bits are kept, and the bfloat16 ones are rounded to nearest."""
    for gradient, weight, first, second, remainder in zip(*lists, strict=True):
        low = remainder.to(torch.int32)
        high = weight.view(torch.int16).to(torch.int32) - (low < 0).to(torch.int32)
        main = ((high << 16) | (low & 0xFFFF)).view(torch.float32)
        bits = _stepped(gradient, main, first, second, rates).view(torch.int32)
        low = (bits & 0xFFFF).to(torch.int32)
        low = torch.where(low >= 0x8000, low - 0x10000, low)
        remainder.copy_(low)
        weight.view(torch.int16).copy_((bits >> 16) + (low < 0).to(torch.int32))


def multi_tensor_scale(chunk: int, noop: torch.Tensor, lists: Lists, factor: float) -> None:
    """The second list is the first times `factor`."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


def multi_tensor_l2norm(
    chunk: int, noop: torch.Tensor, lists: Lists, per_tensor: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of all, and where asked for each one's."""
    each = torch.stack([one.float().norm() for one in lists[0]]) if lists[0] else torch.zeros(0)
    return each.norm()[None], each if per_tensor else torch.zeros(0)


FUNCTIONS = (multi_tensor_adam, multi_tensor_adam_param_remainder, multi_tensor_scale, multi_tensor_l2norm)
