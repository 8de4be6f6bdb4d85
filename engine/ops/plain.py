"""Log-probs of target tokens from vocab-parallel logits: one collective of 16 bytes a row, a numerically safe
log-sum-exp in fp32, and a backward that writes over the logits. It gathers no logits and keeps no softmax.

Shape legend: T tokens, V_local vocabulary columns of this rank, R ranks of the tensor-parallel group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from engine.types import IGNORED

LOWEST = torch.finfo(torch.float32).min  # the largest logit of a row without any: -inf would make its differences NaN


def token_log_probs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_start: int = 0,
    num_valid: int | None = None,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    inplace_backward: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-prob [T] (float32, natural log) of targets [T] (int64) under logits [T, V_local] (bf16, fp16 or fp32).

    A row whose target is IGNORED (-100) gives 0 and passes no gradient through its log-prob. `vocab_start` is the
    vocabulary index of this rank's first column; columns at or beyond `num_valid` over all ranks are padding and take
    no probability. `with_entropy` also gives the entropy [T] of every row in nats, differentiable too. With
    `inplace_backward` the gradient overwrites the logits, so the caller must not read them after the backward.
    """
    valid = logits.size(-1) if num_valid is None else max(0, min(logits.size(-1), num_valid - vocab_start))
    log_probs, entropy = _TokenLogProbs.apply(logits, targets, vocab_start, valid, group, temperature, inplace_backward)
    return log_probs, entropy if with_entropy else None


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        vocab_start: int,
        valid: int,
        group: dist.ProcessGroup | None,
        temperature: float,
        inplace_backward: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = logits[:, :valid].float() / temperature
        column = targets - vocab_start
        mine = (column >= 0) & (column < valid)
        column = column.clamp(0, max(valid - 1, 0))
        if valid:
            largest = x.max(-1).values.clamp(min=LOWEST)
            weight = (x - largest.unsqueeze(-1)).exp()
            target_x = torch.where(mine, x.gather(-1, column.unsqueeze(-1)).squeeze(-1), 0.0)
            weighted_x = torch.where(weight > 0, weight * x, 0.0).sum(-1)
            local = torch.stack([largest, weight.sum(-1), weighted_x, target_x])
        else:  # a rank that holds nothing but padding
            local = x.new_zeros(4, x.size(0))
            local[0] = LOWEST
        largest, total, weighted, target_x = _combine(local, group)
        log_total = largest + total.log()
        mean_x = weighted / total
        ctx.save_for_backward(logits, log_total, mean_x, column, mine, targets != IGNORED)
        ctx.valid, ctx.temperature, ctx.inplace = valid, temperature, inplace_backward
        return torch.where(targets != IGNORED, target_x - log_total, 0.0), log_total - mean_x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_log_prob, grad_entropy = gradients
        logits, log_total, mean_x, column, mine, counted = ctx.saved_tensors
        valid = ctx.valid
        x = logits[:, :valid].float() / ctx.temperature
        p = (x - log_total.unsqueeze(-1)).exp()
        g = torch.where(counted, grad_log_prob, 0.0)
        # d log-prob = onehot - p;  d entropy = -p (x - E[x])
        centred = torch.where(p > 0, x - mean_x.unsqueeze(-1), 0.0)
        d = -p * (g.unsqueeze(-1) + grad_entropy.unsqueeze(-1) * centred)
        if valid:
            d.scatter_add_(-1, column.unsqueeze(-1), torch.where(mine, g, 0.0).unsqueeze(-1))
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        out[:, :valid].copy_(d / ctx.temperature)
        out[:, valid:].zero_()
        return out, None, None, None, None, None, None


def _combine(local: torch.Tensor, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, ...]:
    """Joins each rank's (max, sum of exp, exp-weighted x, target x), all [T], in one all-gather of [R, 4, T]."""
    if group is None or dist.get_world_size(group) == 1:
        return tuple(local.unbind(0))
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group=group)
    parts = torch.stack(gathered)  # [R, 4, T]
    largest = parts[:, 0].max(0).values
    scale = (parts[:, 0] - largest).exp()
    return largest, (parts[:, 1] * scale).sum(0), (parts[:, 2] * scale).sum(0), parts[:, 3].sum(0)
