"""What every loss and every algorithm is. A loss goes from token log-probs of a packed microbatch to one scalar that is
already divided by the whole step's own denominator, so that it adds up over microbatches and data-parallel ranks; an
algorithm is a loss that also says what a group of rollouts becomes, which options it has and what they may not be combined
with. No device, no process group.

Sequences of one group whose loss couples them share a microbatch. Where they do not fit, the policy scores them first without
gradient, `precompute_split_groups` differentiates the groups' loss by every token log-prob, and each microbatch then
backpropagates alone: exact while the weights stand still, which they do until the optimizer steps.

Shape legend: T tokens of the microbatch, B sequences of it.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace
from typing import Any, ClassVar

import torch

from engine.config.load import RunConfig
from engine.config.options import AlgorithmOptions
from engine.core.metrics import Metric, by_name
from engine.core.types import IGNORED, Batch, Microbatch, Rollout, RolloutGroup, Sequence
from engine.ops import sequence_log_probs

Parts = dict[str, torch.Tensor]  # what a microbatch contributes to each metric: a detached scalar by name
Result = tuple[torch.Tensor, Parts]  # (scalar loss, parts)

ROLLOUT_GAP = Metric(
    "log_prob_gap_mean",
    "absolute difference of policy and rollout log-probs, over the tokens trained on: mismatch when fresh, drift when stale",
    title="log-prob gap",
    unit="nats a token",
    reduce="mean",
    per="target_tokens",
    peers={"TRL": "sampling/sampling_logp_difference/mean"},
)


class Loss:
    """A loss with the metrics it reports."""

    metrics: tuple[Metric, ...] = ()
    needs_reference = False  # whether the loss looks at reference log-probs
    needs_entropy = False  # whether it looks at the entropy of the next token

    def coefficients(self, microbatch: Microbatch) -> torch.Tensor | None:
        """What the loss multiplies each log-prob by, up to one factor, [T] float32; None where that depends on them."""
        return None

    def precompute_split_groups(self, microbatches: list[Microbatch], log_probs: Many[torch.Tensor]) -> list[Microbatch]:
        """The rows of a rank with gradients, loss and metrics of the groups split over several of them. `log_probs` [T]
        are the policy's own of each row as its weights now stand, without gradient."""
        return microbatches

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """log_probs [T] float32 with gradient, entropy [T] likewise where needed -> (scalar loss, parts of the metrics)."""
        raise NotImplementedError


class Algorithm(Loss):
    """A loss that a configuration can name. One file holds it with its options, rules and metrics."""

    Options: ClassVar[type[AlgorithmOptions]] = AlgorithmOptions
    needs_rollouts = True  # whether it needs rewards and rollout log-probs, which pairs that others wrote have not

    def __init__(self, options: Any, *, sampled: bool = True) -> None:
        """`options` are of the class's own Options. `sampled`: whether there are rollout log-probs to compare with;
        responses that others wrote have none."""
        self.options = options
        self.sampled = sampled

    def sequences(self, group: RolloutGroup, index: int, run_seed: int) -> tuple[list[Sequence], bool]:
        """(what the loss trains on of this prompt, whether it gives a signal: a pair, an advantage). `index` is the group's
        number in the step. Rollouts that could not be judged are left out."""
        raise NotImplementedError

    @classmethod
    def broken_rules(cls, config: RunConfig) -> list[str]:
        """Sentences for options that this loss cannot be combined with: keys, rule, values found, fix. ConfigError where a part
        that an option names is not there."""
        a, broken = config.algorithm, list[str]()
        made = cls(a)
        if config.sync.reference != "never" and not made.needs_reference:
            broken.append(
                f"sync.reference needs a loss that looks at the reference; found {config.sync.reference!r} with algorithm.loss "
                f"= {a.loss!r}{cls.without_reference}: set sync.reference = 'never'"
            )
        if a.entropy_weight and config.trainer.fused_lm_head:
            broken.append(
                f"algorithm.entropy_weight needs the logits, which trainer.fused_lm_head never makes; found {a.entropy_weight} "
                f"and true: set trainer.fused_lm_head to false"
            )
        return broken

    without_reference: ClassVar[str] = ""  # for the message above: which option makes it so


class SumLoss(Loss):
    """A weighted sum of losses over the same rows. At most one of them couples the sequences of a group."""

    def __init__(self, parts: Many[tuple[float, Loss]]) -> None:
        self.parts = tuple(parts)
        self.metrics = tuple(by_name(metric for _, part in parts for metric in part.metrics).values())
        self.needs_reference = any(part.needs_reference for _, part in parts)
        self.needs_entropy = any(part.needs_entropy for _, part in parts)

    def precompute_split_groups(self, microbatches: list[Microbatch], log_probs: Many[torch.Tensor]) -> list[Microbatch]:
        """See Loss."""
        for _, part in self.parts:
            microbatches = part.precompute_split_groups(microbatches, log_probs)
        return microbatches

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """See Loss. A metric that several parts know is the same in each."""
        total, metrics = log_probs.new_zeros(()), Parts()
        for weight, part in self.parts:
            loss, more = part(log_probs, microbatch, batch, entropy)
            total = total + weight * loss
            metrics |= more
        return total, metrics


def denominator(batch: Batch, reduction: str) -> int:
    """What the step's loss is divided by: all prompts, prompts that are compared, or target tokens; at least 1."""
    counts = {"prompts": batch.num_prompts, "pairs": batch.num_groups, "tokens": batch.num_target_tokens}
    return max(1, counts[reduction])


def rollout_gap(log_probs: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
    """Sum over target tokens of |policy log-prob - rollout log-prob|: engine mismatch at staleness 0, drift beyond."""
    counted = microbatch.targets != IGNORED
    return ((log_probs.detach() - microbatch.rollout_log_probs).abs() * counted).sum()


def response_lengths(microbatch: Microbatch) -> torch.Tensor:
    """Target tokens of each sequence, [B] float32; 1 for the padding segment, which has none."""
    counted = (microbatch.targets != IGNORED).float()
    return sequence_log_probs(counted, microbatch.cu_seqlens).clamp(min=1)


def training_sequence(group: RolloutGroup, rollout: Rollout, /, **more: Any) -> Sequence:
    """The training sequence of a rollout; `more` are fields of Sequence."""
    completion = rollout.completion
    return Sequence(group.prompt.token_ids, completion.token_ids, completion.log_probs, reward=rollout.score.value, **more)


def store_split_groups(
    microbatches: list[Microbatch], leaves: list[torch.Tensor], loss: torch.Tensor, metrics: Parts
) -> list[Microbatch]:
    """The rows with the derivative of the split groups' `loss` by the token log-probs of each (`leaves`, [T] each); the first
    row carries loss and metrics."""
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    rows = []
    for index, (microbatch, leaf, gradient) in enumerate(zip(microbatches, leaves, gradients, strict=True)):
        known = torch.zeros_like(leaf) if gradient is None else gradient
        first: dict[str, Any] = {"split_loss": loss.detach(), "split_metrics": metrics} if index == 0 else {}
        rows.append(replace(microbatch, split_gradients=known, **first))
    return rows


def split_groups_loss(log_probs: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
    """What the split groups add to a row's loss: their value on one row, their gradient by the tokens of every row."""
    gradients = microbatch.split_gradients
    assert gradients is not None, "groups that are split over several rows must be precomputed"
    loss = (gradients * (log_probs - log_probs.detach())).sum()
    return loss if microbatch.split_loss is None else microbatch.split_loss + loss
