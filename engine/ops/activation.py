"""SwiGLU, the activation of Llama's feed-forward layers: on a CPU in one pass over the row and one back (csrc/activation),
elsewhere by torch's own operators.

Shape legend: T tokens of a packed row, F feed-forward columns of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

FUSED = (torch.float32, torch.bfloat16, torch.float16)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up [..., F] of x [..., 2 F], whose first half is the gate; it keeps x alone for the backward."""
    if x.is_cpu and x.dtype in FUSED:
        rows = x.flatten(0, -2).contiguous()
        flat: torch.Tensor = _Swiglu.apply(rows) if torch.is_grad_enabled() else torch.ops.semion.swiglu(rows)
        return flat.view(*x.shape[:-1], x.size(-1) // 2)
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        out: torch.Tensor = torch.ops.semion.swiglu(x)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        out: torch.Tensor = torch.ops.semion.swiglu_backward(gradients[0].contiguous(), x)
        return out
