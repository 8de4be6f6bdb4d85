"""Sums of token values over the sequences of a packed row; it allocates nothing of row length besides the gradient."""

from __future__ import annotations

from typing import Any

import torch


def sequence_log_probs(
    token_log_probs: torch.Tensor, cu_seqlens: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Per-sequence sums [B] of token_log_probs [T] (float32) between the boundaries cu_seqlens [B + 1] (int32).

    With `mask` [T] (bool) only its tokens count. Deterministic (each sum in order, in float64, no atomics); an empty
    sequence sums to 0. Differentiable in token_log_probs. Raises ValueError naming argument, rule and value for a wrong
    shape or type, and (on the CPU) for boundaries that do not rise from 0 to T.
    """
    sums: torch.Tensor = _SequenceSums.apply(token_log_probs, cu_seqlens, mask)
    return sums


class _SequenceSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, cu_seqlens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(cu_seqlens, mask)
        ctx.num_tokens = values.numel()
        sums: torch.Tensor = torch.ops.semion.sequence_sums(values, cu_seqlens, mask)
        return sums

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cu_seqlens, mask = ctx.saved_tensors
        back = torch.ops.semion.sequence_sums_backward
        return back(gradients[0].contiguous(), cu_seqlens, mask, ctx.num_tokens), None, None
