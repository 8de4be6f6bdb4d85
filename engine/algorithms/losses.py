"""The losses as PAPER.md writes them: from token log-probs of a packed microbatch to one scalar that is already divided
by the whole step's own denominator, so that it adds up over microbatches and data-parallel ranks. No device, no group.

Shape legend: T tokens of the row, B sequences of it, P pairs of it, K metrics.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from engine.config import Algorithm
from engine.ops import policy_gradient_loss, sequence_log_probs
from engine.types import IGNORED, Batch, Microbatch

Result = tuple[torch.Tensor, torch.Tensor]  # (scalar loss, [K] detached sums)


class Objective(Protocol):
    """A loss with the sums it reports."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """K names; each metric is a sum over microbatches and data-parallel ranks."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether the loss looks at reference log-probs."""
        ...

    def coefficients(self, microbatch: Microbatch) -> torch.Tensor | None:
        """What the loss multiplies each log-prob by, up to one factor, [T] float32; None where that depends on them."""
        ...

    def __call__(self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch) -> Result:
        """log_probs [T] float32 with gradient -> (scalar loss, [K] detached sums)."""
        ...


def denominator(batch: Batch, reduction: str) -> int:
    """What the step's loss is divided by: all prompts, surviving pairs, or target tokens; at least 1."""
    counts = {"prompts": batch.num_prompts, "pairs": batch.num_pairs, "tokens": batch.num_target_tokens}
    return max(1, counts[reduction])


def rollout_gap(log_probs: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
    """Sum over target tokens of |policy log-prob - rollout log-prob|: engine mismatch at staleness 0, drift beyond."""
    counted = microbatch.targets != IGNORED
    return ((log_probs.detach() - microbatch.rollout_log_probs).abs() * counted).sum()


class DpoObjective:
    """-log sigmoid(beta * [(l_pi - l_ref)(chosen) - (l_pi - l_ref)(rejected)]), plus nll_weight * NLL(chosen).

    l is the sum of token log-probs over the response, EOS included, not divided by length. Paper, equation 3.
    """

    metric_names = ("pairs", "margin", "preferred", "chosen_log_prob", "rejected_log_prob", "rollout_gap")
    needs_reference = True

    def __init__(self, algorithm: Algorithm) -> None:
        self.beta, self.nll_weight, self.reduction = algorithm.beta, algorithm.nll_weight, algorithm.reduction

    def coefficients(self, microbatch: Microbatch) -> None:
        """Depends on the log-probs."""

    def __call__(self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch) -> Result:
        """See Objective."""
        assert microbatch.reference_log_probs is not None, "the reference must score a microbatch before DPO's loss"
        policy = sequence_log_probs(log_probs, microbatch.cu_seqlens)
        reference = sequence_log_probs(microbatch.reference_log_probs, microbatch.cu_seqlens)
        chosen, rejected = microbatch.pairs.unbind(-1)
        log_ratio = policy - reference
        margin = self.beta * (log_ratio[chosen] - log_ratio[rejected])
        loss = -F.logsigmoid(margin).sum()
        if self.nll_weight:
            loss = loss - self.nll_weight * policy[chosen].sum()
        sums = [
            margin.new_tensor(float(chosen.numel())),
            margin.sum(),
            (margin > 0).float().sum(),
            policy[chosen].sum(),
            policy[rejected].sum(),
            rollout_gap(log_probs, microbatch),
        ]
        return loss / denominator(batch, self.reduction), torch.stack(sums).detach()


class GrpoObjective:
    """-sum over tokens of min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A), plus kl_weight * KL(policy, reference).

    ratio = exp(log-prob - rollout log-prob), A is the sequence's advantage, KL is k3: exp(d) - d - 1 with
    d = reference - policy. No length and no standard-deviation normalisation. Paper, equation 1.
    """

    metric_names = ("with_signal", "kl", "clipped", "ratio", "rollout_gap")

    def __init__(self, algorithm: Algorithm) -> None:
        self.clip, self.kl_weight, self.reduction = algorithm.clip_ratio, algorithm.kl_weight, algorithm.reduction
        self.needs_reference = algorithm.kl_weight > 0

    def coefficients(self, microbatch: Microbatch) -> None:
        """Depends on the log-probs."""

    def __call__(self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch) -> Result:
        """See Objective."""
        reference = microbatch.reference_log_probs if self.needs_reference else None
        assert reference is not None or not self.needs_reference, "the reference must score before GRPO's KL"
        loss, sums = policy_gradient_loss(
            log_probs,
            microbatch.rollout_log_probs,
            reference,
            microbatch.advantages,
            microbatch.cu_seqlens,
            microbatch.targets,
            clip_ratio=self.clip,
            kl_weight=self.kl_weight,
        )
        with_signal = (microbatch.advantages != 0).sum().to(sums).unsqueeze(0)
        return loss / denominator(batch, self.reduction), torch.cat([with_signal, sums])


class NllObjective:
    """Negative log-likelihood of the completion, the mean over target tokens: the loss of `semion sft`."""

    metric_names = ("tokens", "nll")
    needs_reference = False

    def coefficients(self, microbatch: Microbatch) -> torch.Tensor:
        """Every token counts the same; those without a target have a log-prob of 0."""
        return torch.ones_like(microbatch.targets, dtype=torch.float32)

    def __call__(self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch) -> Result:
        """See Objective."""
        nll = -log_probs.sum()
        tokens = (microbatch.targets != IGNORED).sum().float()
        return nll / denominator(batch, "tokens"), torch.stack([tokens, nll]).detach()


def make_objective(algorithm: Algorithm) -> Objective:
    """The objective that `algorithm.loss` names."""
    return DpoObjective(algorithm) if algorithm.loss == "dpo" else GrpoObjective(algorithm)
