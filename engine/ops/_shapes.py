"""What the operators of torch.ops.semion give, as shapes and types without values: with it torch.compile traces them without a
break and FakeTensorMode runs them. Arguments are checked by the kernels alone.

Shape legend: T tokens of a packed row, B sequences (or rewards), G groups, N blocks (or heads).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

NUM_POLICY_SUMS = 6  # csrc/policy/row.h: num_policy_sums


def register() -> None:
    """Registers them, once the operators' library is loaded."""
    for name, function in _FAKES.items():
        torch.library.register_fake(f"semion::{name}", function)


def _log_prob_parts(
    logits: torch.Tensor,
    targets: torch.Tensor,
    vocab_start: int,
    num_valid: int,
    lowest_id: int,
    end_id: int,
    temperature: float,
    every_row: bool,
) -> torch.Tensor:
    return logits.new_empty(4, logits.size(0), dtype=torch.float32)


def _log_prob_join(
    parts: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows = targets.size(0)
    return parts.new_empty(num_rows), parts.new_empty(num_rows), parts.new_empty(3, num_rows)


def _log_prob_backward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    totals: torch.Tensor,
    grad_log_prob: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    vocab_start: int,
    num_valid: int,
    temperature: float,
    out: torch.Tensor,
) -> None:
    return None


def _sequence_sums(values: torch.Tensor, cu_seqlens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return values.new_empty(cu_seqlens.size(0) - 1)


def _sequence_sums_backward(
    grad_sums: torch.Tensor, cu_seqlens: torch.Tensor, mask: torch.Tensor | None, num_tokens: int
) -> torch.Tensor:
    return grad_sums.new_empty(num_tokens)


def _grouped_advantages(
    rewards: torch.Tensor, cu_groups: torch.Tensor, normalize: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    no_signal = rewards.new_empty(cu_groups.size(0) - 1, dtype=torch.bool)
    return torch.empty_like(rewards), no_signal, rewards.new_empty(1, dtype=torch.int64)


def _policy_gradient(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    reference_log_probs: torch.Tensor | None,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    targets: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return log_probs.new_empty(NUM_POLICY_SUMS), torch.empty_like(log_probs)


def _block_digests(
    blocks: list[torch.Tensor], columns: torch.Tensor, rows: list[int], cols: list[int], seeds: list[int]
) -> torch.Tensor:
    return columns.new_empty(len(blocks), dtype=torch.int64)


def _packed_attention(q: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.size(1), q.size(0), dtype=torch.float32)


def _packed_attention_backward(
    gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _cached_attention(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    table: torch.Tensor,
    angles: torch.Tensor,
    cache: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    return qkv.new_empty(qkv.size(0), qkv.size(1) - cache.size(1) * cache.size(3))


def _swiglu(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.size(0), x.size(1) // 2)


def _swiglu_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.size(0), dtype=torch.float32)


def _rms_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _few_rows_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.size(0), weight.size(0))


def _sample_tokens(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, raw: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(seeds), torch.empty_like(temperatures), torch.empty_like(seeds)


_FAKES: dict[str, Callable[..., object]] = {
    "log_prob_parts": _log_prob_parts,
    "log_prob_join": _log_prob_join,
    "log_prob_backward": _log_prob_backward,
    "sequence_sums": _sequence_sums,
    "sequence_sums_backward": _sequence_sums_backward,
    "grouped_advantages": _grouped_advantages,
    "policy_gradient": _policy_gradient,
    "packed_attention": _packed_attention,
    "packed_attention_backward": _packed_attention_backward,
    "cached_attention": _cached_attention,
    "swiglu": _swiglu,
    "swiglu_backward": _swiglu_backward,
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "few_rows_product": _few_rows_product,
    "sample_tokens": _sample_tokens,
    "block_digests": _block_digests,
}
