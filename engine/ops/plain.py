"""The plain twins: every operator of this folder in ordinary PyTorch, in whatever floating-point type it is given. They
are what tests and benchmarks compare the kernels with, written to be read; no code of the engine calls them.

Shape legend: T tokens, V_local vocabulary columns of this rank, H hidden, B sequences (or rewards), G groups.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_reduce

from engine.core.types import IGNORED
from engine.ops.digest import signed, splitmix64

Group = dist.ProcessGroup | None


def token_log_probs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_start: int = 0,
    num_valid: int | None = None,
    group: Group = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs [T], entropy [T]) with autograd's own backward; across ranks by differentiable all-reduces."""
    valid = logits.size(-1) if num_valid is None else max(0, min(logits.size(-1), num_valid - vocab_start))
    x = logits[:, :valid] / temperature
    largest = x.detach().amax(-1) if valid else x.new_full((x.size(0),), -torch.inf)
    if group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    weight = (x - largest.unsqueeze(-1)).exp()
    column = targets - vocab_start
    mine = (column >= 0) & (column < valid)
    picked = x.gather(-1, torch.where(mine, column, 0).unsqueeze(-1)).squeeze(-1) if valid else x.sum(-1)
    sums = torch.stack([weight.sum(-1), torch.where(weight > 0, weight * x, 0.0).sum(-1), torch.where(mine, picked, 0.0)])
    if group is not None:
        sums = all_reduce(sums, group=group)
    total, weighted, target_x = sums.unbind()
    log_total = largest + total.log()
    return torch.where(targets != IGNORED, target_x - log_total, 0.0), log_total - weighted / total


def sequence_log_probs(
    token_log_probs: torch.Tensor, cu_seqlens: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Per-sequence sums [B]."""
    values = token_log_probs if mask is None else torch.where(mask, token_log_probs, 0.0)
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.long(), axis=0, initial=0)


def grouped_advantages(
    rewards: torch.Tensor, cu_groups: torch.Tensor, *, normalize: str = "mean"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages [B], no_signal [G])."""
    advantages, no_signal = [rewards.new_empty(0)], []
    for group in rewards.split(cu_groups.diff().tolist()):
        equal = bool((group == group[:1]).all())
        centred = group - group.mean()
        if normalize == "mean_std":
            centred = centred / centred.square().mean().sqrt()
        elif normalize == "leave_one_out":
            centred = centred * (len(group) / max(1, len(group) - 1))
        advantages.append(torch.zeros_like(group) if equal else centred)
        no_signal.append(equal)
    return torch.cat(advantages), torch.tensor(no_signal, dtype=torch.bool)


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
    """(loss, sums [4])."""
    counted = targets != IGNORED
    advantage = advantages.repeat_interleave(cu_seqlens.diff().long(), output_size=log_probs.numel())
    gap = torch.where(counted, log_probs - old_log_probs, 0.0)
    ratio = gap.exp()
    low, high = 1 - clip_ratio, 1 + clip_ratio
    free, clipped = ratio * advantage, ratio.clamp(low, high) * advantage
    loss = -(torch.minimum(free, clipped) * counted).sum()
    kl = log_probs.new_zeros(())
    if reference_log_probs is not None:
        d = torch.where(counted, reference_log_probs - log_probs, 0.0)
        kl = (d.exp() - d - 1).sum()
        loss = loss + kl_weight * kl
    held = (clipped < free) & counted
    sums = torch.stack([kl, held.to(ratio.dtype).sum(), (ratio * counted).sum(), gap.abs().sum()])
    return loss, sums.detach()


def lm_head_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_start: int = 0,
    num_valid: int | None = None,
    group: Group = None,
) -> torch.Tensor:
    """Log-probs [T] with all logits [T, V_local] in memory."""
    logits = hidden @ weight.t()
    return token_log_probs(logits, targets, vocab_start=vocab_start, num_valid=num_valid, group=group)[0]


def block_digest(block: torch.Tensor, *, row: int, col: int, seed: int) -> torch.Tensor:
    """Digest [1]: every weight and every product in int64, which wraps modulo 2**64."""
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[block.element_size()]
    bits = block.view(word).long()
    if block.element_size() < 8:
        bits = bits & (1 << 8 * block.element_size()) - 1
    rows, columns = (torch.arange(first, first + size) for first, size in zip((row, col), block.shape, strict=True))
    row_weights = splitmix64(signed(seed) ^ splitmix64(rows)) | 1
    return (row_weights.unsqueeze(1) * (splitmix64(columns + 1) | 1) * bits).sum().view(1)
