"""Sums of token values over the sequences of a packed row; it allocates nothing of row length besides the gradient."""

from __future__ import annotations

import torch


def sequence_log_probs(token_log_probs: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Per-sequence sums [B] of token_log_probs [T] (float32) between the boundaries cu_seqlens [B + 1] (int32).

    Deterministic (no atomics); an empty sequence sums to 0. Differentiable in token_log_probs.
    """
    return torch.segment_reduce(token_log_probs, "sum", offsets=cu_seqlens.long(), axis=0, initial=0)
