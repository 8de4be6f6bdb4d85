"""Log-probs of target tokens from vocab-parallel logits: kernels read each logit once, one collective of 16 bytes a row
joins the ranks, and the backward writes over the logits. Nothing else of size T × V_local ever exists.

Shape legend: T tokens, V_local vocabulary columns of this rank, R ranks of the tensor-parallel group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

Group = dist.ProcessGroup | None
SQUARE_ROWS = 64  # rows of logits that are widened to float32 at a time


def token_log_probs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_start: int = 0,
    num_valid: int | None = None,
    group: Group = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    inplace_backward: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-prob [T] (float32, natural log) of targets [T] (int64) under logits [T, V_local] (bf16, fp16 or fp32).

    Rows of the logits may have any stride, columns are adjacent. A row whose target is IGNORED (-100) gives 0 and passes
    no gradient through its log-prob. `vocab_start` is the vocabulary index of this rank's first column; columns at or
    beyond `num_valid` over all ranks are padding and take no probability. `with_entropy` also gives the entropy [T] of
    every row in nats, differentiable too. Both are of the distribution softmax(logits / temperature). With
    `inplace_backward` the gradient overwrites the logits and raises their version, as an in-place operation of torch does:
    a second backward, or that of another use of the logits that comes later, is torch's error about modified variables. A
    leaf, or a view of one, would get its gradient for its value and is refused. Repeats bit for bit, whatever the number of
    threads.

    Raises ValueError naming argument, rule and value for a wrong shape, type or device, for a leaf, and (on the CPU) for a
    target that is no column of any rank.
    """
    if inplace_backward and torch.is_grad_enabled() and _writes_a_leaf(logits):
        raise ValueError(
            "logits must be no leaf that requires a gradient, nor a view of one, with inplace_backward = True, which "
            "overwrites them; found one: pass inplace_backward=False, or what a layer computed"
        )
    columns = local_columns(logits, vocab_start, num_valid, group)
    log_probs, entropy = _TokenLogProbs.apply(
        logits, targets, vocab_start, columns, group, temperature, with_entropy, inplace_backward
    )
    return log_probs, entropy if with_entropy else None


@torch.no_grad()
def log_square_probs(
    logits: torch.Tensor,
    *,
    vocab_start: int = 0,
    num_valid: int | None = None,
    group: Group = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """The log of the sum of squared probabilities of every row [T] (float32), the probability that two draws agree, under
    softmax(logits / temperature); logits and the rest as of `token_log_probs`. No gradient; plain torch, SQUARE_ROWS rows at a
    time, and two collectives of 4 and 8 bytes a row."""
    columns, _, _ = local_columns(logits, vocab_start, num_valid, group)
    own = logits.detach()[:, :columns]
    highest = torch.full((logits.size(0),), -torch.inf, device=logits.device)
    if columns:
        highest = own.amax(-1).float() / temperature
    if group_size(group) > 1:
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    sums = torch.zeros(2, logits.size(0), device=logits.device)
    for first in range(0, logits.size(0), SQUARE_ROWS):
        rows = slice(first, first + SQUARE_ROWS)
        shifted = (own[rows].float() / temperature - highest[rows, None]).exp()
        sums[0, rows], sums[1, rows] = shifted.sum(-1), shifted.square().sum(-1)
    if group_size(group) > 1:
        dist.all_reduce(sums, group=group)
    return sums[1].log() - 2 * sums[0].log()


def local_columns(logits: torch.Tensor, vocab_start: int, num_valid: int | None, group: Group) -> tuple[int, int, int]:
    """(columns of this rank that are no padding, lowest and end of the vocabulary indices that a target may have)."""
    width = logits.size(-1) if logits.dim() else 0
    num_ranks = group_size(group)
    lowest, end = (vocab_start, vocab_start + width) if num_ranks == 1 else (0, num_ranks * width)
    end = end if num_valid is None else min(end, num_valid)
    return max(0, min(width, end - vocab_start)), lowest, end


def _writes_a_leaf(logits: torch.Tensor) -> bool:
    """Whether an in-place operation on the logits would change a leaf that requires a gradient."""
    owners = (logits, *(() if logits._base is None else (logits._base,)))
    return any(owner.requires_grad and owner.is_leaf for owner in owners)


def group_size(group: Group) -> int:
    """Ranks of the group; 1 for none."""
    return 1 if group is None else dist.get_world_size(group)


def joined_parts(
    logits: torch.Tensor,
    targets: torch.Tensor,
    vocab_start: int,
    columns: tuple[int, int, int],
    group: Group,
    temperature: float,
    with_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-probs [T], entropy [T], totals [3, T]) from this rank's logits and one all-gather of [4, T] float32.

    The entropy means something only if it was asked for, or the row's target is not IGNORED.
    """
    kernels = torch.ops.semion
    parts = kernels.log_prob_parts(logits, targets, vocab_start, *columns, temperature, with_entropy).unsqueeze(0)
    if group_size(group) > 1:
        parts, own = parts.new_empty(group_size(group), *parts.shape[1:]), parts
        dist.all_gather_into_tensor(parts, own, group=group)  # one tensor: a list would be copied twice
    log_probs, entropy, totals = kernels.log_prob_join(parts, targets, temperature)
    return log_probs, entropy, totals


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        vocab_start: int,
        columns: tuple[int, int, int],
        group: Group,
        temperature: float,
        with_entropy: bool,
        inplace_backward: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs, entropy, totals = joined_parts(logits, targets, vocab_start, columns, group, temperature, with_entropy)
        ctx.save_for_backward(logits, targets, totals)
        ctx.options = vocab_start, columns[0], temperature
        ctx.with_entropy, ctx.inplace = with_entropy, inplace_backward
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_log_prob, grad_entropy = gradients
        logits, targets, totals = ctx.saved_tensors
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        entropy_part = grad_entropy.contiguous() if ctx.with_entropy else None
        grad_log_prob = grad_log_prob.contiguous()
        torch.ops.semion.log_prob_backward(logits, targets, totals, grad_log_prob, entropy_part, *ctx.options, out)
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        return out, *[None] * 7
