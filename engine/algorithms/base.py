"""What every loss is: from token log-probs of a packed microbatch to one scalar that is already divided by the whole
step's own denominator, so that it adds up over microbatches and data-parallel ranks. No device, no process group.

Sequences of one group whose loss couples them share a microbatch. Where they do not fit, `Objective.weigh` precomputes the
derivative of the group's loss by each sequence's log-prob, so that every microbatch can backpropagate alone.

Shape legend: T tokens of the microbatch, B sequences of it, P pairs of it, K metrics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.core.types import IGNORED, Batch, Microbatch
from engine.ops import sequence_log_probs

Result = tuple[torch.Tensor, torch.Tensor]  # (scalar loss, [K] detached sums)


class Objective:
    """A loss with the sums it reports."""

    metric_names: tuple[str, ...] = ()  # K names; each metric is a sum over microbatches and data-parallel ranks
    needs_reference = False  # whether the loss looks at reference log-probs
    needs_entropy = False  # whether it looks at the entropy of the next token

    def coefficients(self, microbatch: Microbatch) -> torch.Tensor | None:
        """What the loss multiplies each log-prob by, up to one factor, [T] float32; None where that depends on them."""
        return None

    def weigh(self, microbatches: list[Microbatch], log_probs: Sequence[torch.Tensor]) -> list[Microbatch]:
        """The rows of a rank with `slopes` and `spread_sums` for the groups spread over several of them. `log_probs` [T]
        are the policy's own of each row as its weights now stand, without gradient."""
        return microbatches

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """log_probs [T] float32 with gradient, entropy [T] likewise where needed -> (scalar loss, [K] detached sums)."""
        raise NotImplementedError


def denominator(batch: Batch, reduction: str) -> int:
    """What the step's loss is divided by: all prompts, prompts that have a pair, or target tokens; at least 1."""
    counts = {"prompts": batch.num_prompts, "pairs": batch.num_groups, "tokens": batch.num_target_tokens}
    return max(1, counts[reduction])


def rollout_gap(log_probs: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
    """Sum over target tokens of |policy log-prob - rollout log-prob|: engine mismatch at staleness 0, drift beyond."""
    counted = microbatch.targets != IGNORED
    return ((log_probs.detach() - microbatch.rollout_log_probs).abs() * counted).sum()


class SumObjective(Objective):
    """A weighted sum of objectives over the same rows."""

    def __init__(self, parts: Sequence[tuple[float, Objective]]) -> None:
        self.parts = tuple(parts)
        self.metric_names = tuple(dict.fromkeys(name for _, part in parts for name in part.metric_names))
        self.needs_reference = any(part.needs_reference for _, part in parts)
        self.needs_entropy = any(part.needs_entropy for _, part in parts)

    def weigh(self, microbatches: list[Microbatch], log_probs: Sequence[torch.Tensor]) -> list[Microbatch]:
        """See Objective."""
        for _, part in self.parts:
            microbatches = part.weigh(microbatches, log_probs)
        return microbatches

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """See Objective. A metric that several parts know is the same in each."""
        total, metrics = log_probs.new_zeros(()), dict[str, torch.Tensor]()
        for weight, part in self.parts:
            loss, sums = part(log_probs, microbatch, batch, entropy)
            total = total + weight * loss
            metrics |= dict(zip(part.metric_names, sums.unbind(), strict=True))
        return total, torch.stack([metrics[name] for name in self.metric_names])


def response_lengths(microbatch: Microbatch) -> torch.Tensor:
    """Target tokens of each sequence, [B] float32; 1 for the padding segment, which has none."""
    counted = (microbatch.targets != IGNORED).float()
    return sequence_log_probs(counted, microbatch.cu_seqlens).clamp(min=1)
