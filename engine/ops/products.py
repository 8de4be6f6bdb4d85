"""The product of a linear layer. For a few float32 rows on a CPU, as an engine decodes, a kernel that reads the weight once as
it lies (csrc/linear); elsewhere torch's own, whose libraries pack the weight first, which pays for many rows.

Shape legend: T rows, H their width, N width of the result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

MOST_ROWS = 128  # above, packing the weight has paid for itself: docs/kernels.md has the figures


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias [..., N] of x [..., H], a weight [N, H] and a bias [N]; no gradient of it is kept by the kernel.

    Of up to MOST_ROWS rows each number is summed in one order, so that it depends on its own row and not on how many rows
    stand beside it, nor on threads. Above that, and for other types, it is F.linear.
    """
    if not (x.is_cpu and x.dtype == weight.dtype == torch.float32 and weight.is_contiguous()):
        return F.linear(x, weight, bias)
    if x.numel() > MOST_ROWS * x.size(-1) or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return F.linear(x, weight, bias)
    out: torch.Tensor = torch.ops.semion.few_rows_product(x.reshape(-1, x.size(-1)).contiguous(), weight)
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], weight.size(0))
