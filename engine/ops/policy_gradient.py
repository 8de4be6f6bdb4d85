"""GRPO's loss from token log-probs: ratio, clip, advantage and KL of every token in one pass that also leaves the
gradient, so that the backward is one multiplication.

Shape legend: T tokens of a packed row, B sequences of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch

# What the operator's sums are, in the order of csrc/policy/row.h (num_policy_sums); the first is the loss
SUMS = ("loss", "kl", "clipped", "ratio", "gap", "beyond")
LOG_LIMIT = 20.0  # the largest log-ratio that is exponentiated (csrc/policy/row.h: log_limit; verl clamps at the same)


def policy_gradient_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    reference_log_probs: torch.Tensor | None,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    targets: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_weight: float,
    dual_clip: float = math.inf,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, sums [5]) over the tokens whose target is not IGNORED; the loss is differentiable in log_probs.

    loss = sum of -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_weight * (exp(d) - d - 1), with
    r = exp(log_probs - old_log_probs), A the advantage of the token's sequence, d = reference_log_probs - log_probs
    (paper, equation 1; k3 estimator). Where A is negative the first term is at most -dual_clip * A (Ye et al. 2020,
    arXiv 1912.09729). Without reference log-probs there is no KL. Both exponents are held at LOG_LIMIT: up to and at it the
    gradient is that of the formula, beyond it the term is a constant and passes none. sums (SUMS without the loss): KL,
    tokens that a clip holds, ratios, |log_probs - old_log_probs|, tokens with an exponent beyond LOG_LIMIT.

    log_probs, old and reference log-probs [T] float32, advantages [B] float32, cu_seqlens [B + 1] int32, targets [T]
    int64. Deterministic. Raises ValueError naming argument, rule and value for a wrong shape or type.
    """
    loss, sums = _PolicyGradient.apply(
        log_probs,
        old_log_probs,
        reference_log_probs,
        advantages,
        cu_seqlens,
        targets,
        clip_low,
        clip_high,
        dual_clip,
        kl_weight,
    )
    return loss, sums


def policy_gradient_slopes(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    reference_log_probs: torch.Tensor | None,
    advantages: torch.Tensor,
    targets: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_weight: float,
    dual_clip: float = math.inf,
) -> torch.Tensor:
    """The derivative [T] of policy_gradient_loss by each log-prob, which depends on that token alone; so any tokens of any
    sequences will do. `advantages` [T] are the tokens' own; the rest is as there, and so are the bits. No gradient passes."""
    bounds = torch.arange(log_probs.size(0) + 1, dtype=torch.int32, device=log_probs.device)  # each token a sequence
    slopes: torch.Tensor
    _, slopes = torch.ops.semion.policy_gradient(
        log_probs.detach(),
        old_log_probs,
        reference_log_probs,
        advantages,
        bounds,
        targets,
        clip_low,
        clip_high,
        dual_clip,
        kl_weight,
    )
    return slopes


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
        return gradients[0] * gradient, *[None] * 9
