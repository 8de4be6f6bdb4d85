"""GRPO: the clipped policy-gradient loss of the paper (equation 1) with a KL term to the reference.

Shape legend: T tokens of the microbatch, B sequences of it.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from engine.algorithms.advantages import advantage_function
from engine.algorithms.base import ROLLOUT_GAP, Algorithm, Result, denominator, response_lengths, training_sequence
from engine.config.load import RunConfig
from engine.config.options import AlgorithmOptions, NonNegativeFloat, Normalization, PositiveFloat
from engine.core.metrics import Metric
from engine.core.types import IGNORED, Batch, Microbatch, RolloutGroup, Sequence
from engine.ops import policy_gradient_loss, sequence_log_probs
from engine.ops.policy_gradient import SUMS

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
METRIC_OF_SUM = {"kl": KL, "clipped": CLIPPED, "ratio": RATIO, "gap": ROLLOUT_GAP}  # by the operator's own names


class PolicyGradientOptions(AlgorithmOptions):
    """GRPO's own."""

    clip_ratio: PositiveFloat = Field(0.2, description="GRPO's epsilon (TRL: epsilon; verl: clip_ratio)")
    kl_weight: NonNegativeFloat = Field(0.001, description="of GRPO's KL to the reference, k3 (TRL: beta; verl: kl_loss_coef)")
    normalize_advantages: Normalization = Field(
        "mean", description="mean, mean_std, leave_one_out, or your own as path/to/file.py:name (TRL: scale_rewards)"
    )
    normalize_length: bool = Field(False, description="divide GRPO's sum over a response by its number of tokens")


class Grpo(Algorithm):
    """-sum over tokens of min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A), plus kl_weight * KL(policy, reference).

    ratio = exp(log-prob - rollout log-prob), A is the sequence's advantage, KL is k3: exp(d) - d - 1 with
    d = reference - policy. No length and no standard-deviation normalisation (paper, equation 1); normalize_length
    divides a response's sum, KL included, by its number of tokens (DeepSeekMath, equation 3).
    """

    Options = PolicyGradientOptions
    metrics = (WITH_SIGNAL, *METRIC_OF_SUM.values())
    without_reference = " and algorithm.kl_weight = 0"

    def __init__(self, options: PolicyGradientOptions, *, sampled: bool = True) -> None:
        super().__init__(options, sampled=sampled)
        self.needs_reference = options.kl_weight > 0
        self.advantages = advantage_function(options.normalize_advantages)

    def sequences(self, group: RolloutGroup, index: int, run_seed: int) -> tuple[list[Sequence], bool]:
        """Every judged rollout with its advantage. Where all are 0 the prompt is kept for the KL term, which still sees it,
        and dropped where there is none."""
        advantages = self.advantages([rollout.score.value for rollout in group.judged])
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
                "algorithm.reduction = 'pairs' needs algorithm.loss with pairs; found 'grpo': use 'prompts' or 'tokens'"
            )
        return broken

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """See Loss."""
        options = self.options
        reference = microbatch.reference_log_probs if self.needs_reference else None
        assert reference is not None or not self.needs_reference, "the reference must score before GRPO's KL"
        advantages, fused_reference = microbatch.advantages, reference
        if options.normalize_length:  # the fused KL knows no weight of a sequence
            advantages, fused_reference = advantages / response_lengths(microbatch), None
        fixed: dict[str, Any] = {"clip_ratio": options.clip_ratio, "kl_weight": options.kl_weight}
        loss, sums = policy_gradient_loss(
            log_probs,
            microbatch.rollout_log_probs,
            fused_reference,
            advantages,
            microbatch.cu_seqlens,
            microbatch.targets,
            **fixed,
        )
        metrics = {METRIC_OF_SUM[name].name: value for name, value in zip(SUMS[1:], sums.unbind(), strict=True)}
        if reference is not None and fused_reference is None:
            d = torch.where(microbatch.targets != IGNORED, reference - log_probs, 0.0)
            kl = sequence_log_probs(d.exp() - d - 1, microbatch.cu_seqlens)
            loss = loss + options.kl_weight * (kl / response_lengths(microbatch)).sum()
            metrics[KL.name] = kl.detach().sum()
        metrics[WITH_SIGNAL.name] = (microbatch.advantages != 0).sum().to(sums)
        return loss / denominator(batch, options.reduction), metrics
