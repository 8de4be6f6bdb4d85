"""What losses over advantages have in common, GRPO's and CISPO's: options, metrics, what a group becomes, the KL to the
reference, and how terms of single tokens become the step's loss.

Shape legend: T tokens of the microbatch, B sequences of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from engine.algorithms.advantages import advantage_function, advantages_of
from engine.algorithms.base import Algorithm, Parts, Result, denominator, mismatch, response_lengths, training_sequence
from engine.config.load import RunConfig
from engine.config.options import AlgorithmOptions, Normalization, Weight
from engine.core.metrics import Metric
from engine.core.types import IGNORED, Batch, Microbatch, RolloutGroup, Sequence

if TYPE_CHECKING:
    import torch

WITH_SIGNAL = Metric("with_signal", "sequences with an advantage other than 0", unit="sequences", reduce="sum")
KL = Metric(
    "kl_mean",
    "KL to the reference (k3), over the tokens trained on",
    unit="nats a token",
    reduce="mean",
    per="target_tokens",
    peers={"TRL": "kl", "verl": "actor/kl_loss"},
)
CLIPPED = Metric(
    "clipped_share",
    "tokens trained on where the clip acts",
    unit="share",
    reduce="mean",
    per="target_tokens",
    peers={"TRL": "clip_ratio/region_mean", "verl": "actor/pg_clipfrac"},
)
RATIO = Metric(
    "ratio_mean",
    "probability of a token under the policy over that under the weights that sampled it, over the tokens trained on",
    reduce="mean",
    per="target_tokens",
    peers={"TRL": "sampling/importance_sampling_ratio/mean"},
)
CLAMPED = Metric(
    "clamped_tokens",
    "tokens trained on whose log-ratio to the rollout or the reference is above 20: taken for 20, without gradient",
    unit="tokens",
    reduce="sum",
)


class AdvantageOptions(AlgorithmOptions):
    """What losses over advantages have."""

    kl_weight: Weight = Field(0.001, description="of the KL to the reference, k3 (TRL: beta; verl: kl_loss_coef)")
    normalize_advantages: Normalization = Field(
        "mean",
        description="what a reward is compared with in its group: 'mean', 'mean_std', 'leave_one_out', 'batch_std', or your "
        "own as path/to/file.py:name (TRL: scale_rewards)",
    )
    normalize_length: bool = Field(False, description="divide the sum over a response by its number of tokens")


class PolicyGradient(Algorithm):
    """A loss that is a sum over tokens, each with its sequence's advantage, plus kl_weight * KL(policy, reference).

    KL is k3: exp(d) - d - 1 with d = reference - policy, held at LOG_LIMIT. normalize_length divides a response's sum, KL
    included, by its number of tokens.
    """

    Options: ClassVar[type[AdvantageOptions]] = AdvantageOptions
    without_reference = " and algorithm.kl_weight = 0"
    couples_groups = False

    def __init__(self, options: Any, *, sampled: bool = True) -> None:
        super().__init__(options, sampled=sampled)
        self.needs_reference = options.kl_weight > 0
        self.advantages = advantage_function(options.normalize_advantages)

    def sequences(self, group: RolloutGroup, index: int, run_seed: int) -> tuple[list[Sequence], bool]:
        """Every judged rollout with its advantage. Where all are 0 the prompt is kept for the KL term, which still sees it,
        and dropped where there is none."""
        advantages = advantages_of(self.advantages, group)
        has_signal = any(advantages)
        if not has_signal and not self.options.kl_weight:
            return [], False
        pairs = zip(group.judged, advantages, strict=True)
        return [training_sequence(group, rollout, advantage=advantage) for rollout, advantage in pairs], has_signal

    @classmethod
    def broken_rules(cls, config: RunConfig) -> list[str]:
        """See Algorithm."""
        broken = super().broken_rules(config)
        if config.algorithm.reduction == "pairs":
            broken.append(
                f"algorithm.reduction = 'pairs' needs algorithm.loss with pairs; found {config.algorithm.loss!r}: use "
                f"'prompts' or 'tokens'"
            )
        return broken

    def reference(self, microbatch: Microbatch) -> torch.Tensor | None:
        """The reference's log-probs [T], where the KL needs them."""
        found = microbatch.reference_log_probs if self.needs_reference else None
        assert found is not None or not self.needs_reference, "the reference must score before the KL"
        return found

    def summed(self, terms: torch.Tensor, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch) -> Result:
        """The loss of these terms of single tokens [T] with the KL, and the metrics that every such loss has: WITH_SIGNAL, KL,
        RATIO, CLAMPED, those of the mismatch."""
        import torch

        from engine.ops import sequence_log_probs
        from engine.ops.policy_gradient import LOG_LIMIT

        counted, reference = microbatch.targets != IGNORED, self.reference(microbatch)
        gap = torch.where(counted, log_probs.detach() - microbatch.rollout_log_probs, 0.0)
        clamped, terms = gap > LOG_LIMIT, torch.where(counted, terms, 0.0)
        kl = torch.zeros_like(gap)
        if reference is not None:
            whole = torch.where(counted, reference - log_probs, 0.0)
            d = whole.clamp(max=LOG_LIMIT)
            kl, clamped = d.exp() - d - 1, clamped | (whole > LOG_LIMIT)
            terms = terms + self.options.kl_weight * kl
        sums = sequence_log_probs(terms, microbatch.cu_seqlens)
        loss = (sums / response_lengths(microbatch) if self.options.normalize_length else sums).sum()
        parts: Parts = mismatch(log_probs, microbatch) | {
            WITH_SIGNAL.name: (microbatch.advantages != 0).sum().to(gap),
            KL.name: kl.detach().sum(),
            RATIO.name: torch.where(counted, gap.clamp(max=LOG_LIMIT).exp(), 0.0).sum(),
            CLAMPED.name: clamped.sum().to(gap),
        }
        return loss / denominator(batch, self.options.reduction), parts
