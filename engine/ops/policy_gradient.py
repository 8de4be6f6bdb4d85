"""GRPO's loss from token log-probs: ratio, clip, advantage and KL of every token in one pass that also leaves the
gradient, so that the backward is one multiplication.

Shape legend: T tokens of a packed row, B sequences of it.
"""

from __future__ import annotations

from typing import Any

import torch

# What the operator's sums are, in the order of csrc/policy/row.h (num_policy_sums); the first is the loss
SUMS = ("loss", "kl", "clipped", "ratio", "gap")


def policy_gradient_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    reference_log_probs: torch.Tensor | None,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    targets: torch.Tensor,
    *,
    clip_ratio: float,
    kl_weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, sums [4]) over the tokens whose target is not IGNORED; the loss is differentiable in log_probs.

    loss = sum of -min(r A, clip(r, 1 - clip_ratio, 1 + clip_ratio) A) + kl_weight * (exp(d) - d - 1), with
    r = exp(log_probs - old_log_probs), A the advantage of the token's sequence, d = reference_log_probs - log_probs
    (paper, equation 1; k3 estimator). Without reference log-probs there is no KL. sums (SUMS without the
    loss): KL, number of tokens that the clip holds, sum of ratios, sum of |log_probs - old_log_probs|.

    log_probs, old and reference log-probs [T] float32, advantages [B] float32, cu_seqlens [B + 1] int32, targets [T]
    int64. Deterministic. Raises ValueError naming argument, rule and value for a wrong shape or type.
    """
    loss, sums = _PolicyGradient.apply(
        log_probs, old_log_probs, reference_log_probs, advantages, cu_seqlens, targets, clip_ratio, kl_weight
    )
    return loss, sums


class _PolicyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        sums, gradient = torch.ops.semion.policy_gradient(*arguments)
        ctx.save_for_backward(gradient)
        loss, others = sums[0], sums[1:]
        ctx.mark_non_differentiable(others)
        ctx.set_materialize_grads(False)
        return loss, others

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradients[0] * gradient, *[None] * 7
