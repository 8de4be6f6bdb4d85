"""RMSNorm: on a CPU in one pass over a row and one back (csrc/norm), elsewhere by torch's own operator.

Shape legend: T rows, H their width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

FUSED = (torch.float32, torch.bfloat16, torch.float16)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x * weight / sqrt(mean(x^2) + epsilon) [..., H] of x [..., H] and a weight [H], with the mean over the last dimension;
    computed in float32 and rounded once. It keeps x and a number a row for the backward."""
    if x.is_cpu and x.dtype in FUSED and weight.dtype == x.dtype:
        rows = x.flatten(0, -2).contiguous()
        flat: torch.Tensor
        if torch.is_grad_enabled():
            flat = _RmsNorm.apply(rows, weight, epsilon)
        else:  # autograd's own way costs twice the kernel, on the few rows of a decoding step
            flat, _ = torch.ops.semion.rms_norm(rows, weight, epsilon)
        return flat.view(x.shape)
    return F.rms_norm(x, (x.size(-1),), weight, epsilon)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        out: torch.Tensor
        out, scales = torch.ops.semion.rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scales = ctx.saved_tensors
        of_x, of_weight = torch.ops.semion.rms_norm_backward(gradients[0].contiguous(), x, weight, scales)
        return of_x, of_weight, None
