"""The reference implementations: every operator of engine/ops in ordinary PyTorch, in whatever floating-point type it is given.
They are what tests and benchmarks compare the kernels with, written to be read.

Shape legend: T tokens, V_local vocabulary columns of this rank, H hidden, B sequences (or rewards), G groups.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_reduce

from engine.core.types import IGNORED
from engine.ops.advantages import LEAST_DEVIATION
from engine.ops.digest import signed, splitmix64
from engine.ops.policy_gradient import LOG_LIMIT

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
        largest = group.abs().amax() if len(group) else rewards.new_zeros(())
        _, exponent = torch.frexp(largest)
        scaled = torch.ldexp(group, -exponent)  # exact, and within range whatever the rewards
        centred = scaled - scaled.mean()
        if normalize == "mean_std":
            deviation = centred.square().mean().sqrt()
            equal = equal or bool(deviation <= LEAST_DEVIATION * scaled.abs().amax())
            centred = centred / deviation
        else:
            factor = len(group) / max(1, len(group) - 1) if normalize == "leave_one_out" else 1
            centred = torch.ldexp(centred * factor, exponent)
        advantages.append(torch.zeros_like(group) if equal else centred)
        no_signal.append(equal)
    return torch.cat(advantages), torch.tensor(no_signal, dtype=torch.bool, device=rewards.device)


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
    """(loss, sums [5])."""
    counted = targets != IGNORED
    advantage = advantages.repeat_interleave(cu_seqlens.diff().long(), output_size=log_probs.numel())
    gap = torch.where(counted, log_probs - old_log_probs, 0.0)
    ratio = gap.clamp(max=LOG_LIMIT).exp()
    free, clipped = ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    objective = torch.minimum(free, clipped)
    if dual_clip < math.inf:
        objective = torch.where(advantage < 0, torch.maximum(objective, dual_clip * advantage), objective)
    loss = -(objective * counted).sum()
    kl, beyond = log_probs.new_zeros(()), gap > LOG_LIMIT
    if reference_log_probs is not None:
        whole = torch.where(counted, reference_log_probs - log_probs, 0.0)
        d, beyond = whole.clamp(max=LOG_LIMIT), beyond | (whole > LOG_LIMIT)
        kl = (d.exp() - d - 1).sum()
        loss = loss + kl_weight * kl
    held = (objective != free) & counted
    sums = torch.stack([kl, held.sum(), (ratio * counted).sum(), gap.abs().sum(), beyond.sum()])
    return loss, sums.detach()


def lm_head_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_start: int = 0,
    num_valid: int | None = None,
    group: Group = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Log-probs [T] with all logits [T, V_local] in memory."""
    logits = hidden @ weight.t()
    log_probs, _ = token_log_probs(
        logits, targets, vocab_start=vocab_start, num_valid=num_valid, group=group, temperature=temperature
    )
    return log_probs


def block_digest(block: torch.Tensor, *, row: int, col: int, seed: int) -> torch.Tensor:
    """Digest [1]: every weight and every product in int64, which wraps modulo 2**64."""
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[block.element_size()]
    bits = block.view(word).long()
    if block.element_size() < 8:
        bits = bits & (1 << 8 * block.element_size()) - 1
    rows, columns = (
        torch.arange(first, first + size, device=block.device) for first, size in zip((row, col), block.shape, strict=True)
    )
    row_weights = splitmix64(signed(seed) ^ splitmix64(rows)) | 1
    return (row_weights.unsqueeze(1) * (splitmix64(columns + 1) | 1) * bits).sum().view(1)


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: list[int],
    parents: list[int],
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    scale: float,
) -> torch.Tensor:
    """Attention [T, N, D] by a mask over the whole row; `rotary` is widened to q's type."""
    seen = torch.zeros(len(q), len(q), dtype=torch.bool)
    for number, parent in enumerate(parents):
        start, end = bounds[number], bounds[number + 1]
        seen[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
        if parent >= 0:
            seen[start:end, bounds[parent] : bounds[parent + 1]] = True
    if rotary is not None:
        q, k = (_turned(x, *(part.to(x.dtype).unsqueeze(1) for part in rotary)) for x in (q, k))
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
    scores = torch.einsum("lnd,snd->nls", q, k) * scale
    return torch.einsum("nls,snd->lnd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def cached_attention(
    qkv: torch.Tensor, positions: torch.Tensor, angles: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention [T, N D] of one request's tokens [T, (N + 2 M) D] to positions up to their own, of which keys (rotated already)
    and values [.., M, D] are the first."""
    kv_heads, dim = keys.shape[1:]
    q, k, v = qkv.view(len(qkv), -1, dim).split((qkv.size(1) // dim - 2 * kv_heads, kv_heads, kv_heads), 1)
    rotary = [part.unsqueeze(1) for part in angles[positions].chunk(2, -1)]
    q, keys, values = _turned(q, *rotary), torch.cat((keys, _turned(k, *rotary))), torch.cat((values, v))
    keys, values = (x.repeat_interleave(q.size(1) // kv_heads, 1) for x in (keys, values))
    seen = torch.arange(len(keys)) <= positions.unsqueeze(1)
    scores = torch.einsum("lnd,snd->nls", q, keys) * scale
    return torch.einsum("nls,snd->lnd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values).flatten(1)


def _turned(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), -1)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def sample_tokens(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, *, raw_log_probs: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first token whose cumulative probability exceeds a uniform number of the row's seed, its log-prob and its rank."""
    scaled = logits / temperatures.to(logits.dtype).unsqueeze(1)
    heights = scaled.softmax(-1).cumsum(-1)
    tokens = (heights <= (uniforms(seeds).to(logits.dtype) * heights[:, -1]).unsqueeze(1)).sum(-1)
    of_rows = tokens.unsqueeze(1)
    log_probs = (logits if raw_log_probs else scaled).log_softmax(-1).gather(1, of_rows).squeeze(1)
    return tokens, log_probs, (logits >= logits.gather(1, of_rows)).sum(-1)


def uniforms(seeds: torch.Tensor) -> torch.Tensor:
    """float64 in [0, 1): the 53 highest bits of splitmix64 of each seed."""
    return ((splitmix64(seeds) >> 11) & (2**53 - 1)).double() / 2**53


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x * weight over the root of x's mean square."""
    return x * weight / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()
