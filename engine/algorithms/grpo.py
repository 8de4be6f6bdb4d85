"""GRPO: the clipped policy-gradient loss of the paper (equation 1) with a KL term to the reference.

Shape legend: T tokens of the microbatch, B sequences of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from engine.algorithms.advantages import advantage_function, advantages_of
from engine.algorithms.base import (
    MISMATCH,
    ROLLOUT_GAP,
    Algorithm,
    Result,
    denominator,
    mismatch,
    response_lengths,
    training_sequence,
)
from engine.config.load import RunConfig
from engine.config.options import PURE, AlgorithmOptions, Factor, Normalization, Weight
from engine.core.metrics import Metric, by_name
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
# By the operator's own names
METRIC_OF_SUM = {"kl": KL, "clipped": CLIPPED, "ratio": RATIO, "gap": ROLLOUT_GAP, "beyond": CLAMPED}


class PolicyGradientOptions(AlgorithmOptions):
    """GRPO's own."""

    clip_ratio: Factor = Field(0.2, description="GRPO's epsilon, of both sides (TRL: epsilon; verl: clip_ratio)")
    clip_ratio_low: Factor | None = Field(
        None, description="of ratios below 1; unset: clip_ratio (TRL: epsilon; verl: clip_ratio_low)"
    )
    clip_ratio_high: Factor | None = Field(
        None, description="of ratios above 1; unset: clip_ratio (TRL: epsilon_high; verl: clip_ratio_high)"
    )
    dual_clip: Annotated[float, Field(gt=1), PURE] | None = Field(
        None, description="largest ratio where the advantage is negative; unset: none (TRL: delta; verl: clip_ratio_c)"
    )
    kl_weight: Weight = Field(0.001, description="of GRPO's KL to the reference, k3 (TRL: beta; verl: kl_loss_coef)")
    normalize_advantages: Normalization = Field(
        "mean",
        description="what a reward is compared with in its group: 'mean', 'mean_std', 'leave_one_out', or your own as "
        "path/to/file.py:name (TRL: scale_rewards)",
    )
    normalize_length: bool = Field(False, description="divide GRPO's sum over a response by its number of tokens")

    @property
    def clips(self) -> dict[str, float]:
        """The operator's options that bound the ratio."""
        low, high = (self.clip_ratio if own is None else own for own in (self.clip_ratio_low, self.clip_ratio_high))
        return {"clip_low": low, "clip_high": high, "dual_clip": math.inf if self.dual_clip is None else self.dual_clip}


class Grpo(Algorithm):
    """-sum over tokens of min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), plus kl_weight * KL(policy, reference).

    ratio = exp(log-prob - rollout log-prob), A is the sequence's advantage, KL is k3: exp(d) - d - 1 with
    d = reference - policy; both exponents are held at LOG_LIMIT. Where A is negative the equation bounds the ratio from below
    alone; with dual_clip it counts for no more than that. No length and no standard-deviation normalisation (paper, equation
    1); normalize_length divides a response's sum, KL included, by its number of tokens (DeepSeekMath, equation 3).
    """

    Options = PolicyGradientOptions
    metrics = (WITH_SIGNAL, *by_name((*METRIC_OF_SUM.values(), *MISMATCH)).values())
    without_reference = " and algorithm.kl_weight = 0"

    def __init__(self, options: PolicyGradientOptions, *, sampled: bool = True) -> None:
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
                "algorithm.reduction = 'pairs' needs algorithm.loss with pairs; found 'grpo': use 'prompts' or 'tokens'"
            )
        return broken

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """See Loss."""
        import torch

        from engine.ops import policy_gradient_loss, sequence_log_probs
        from engine.ops.policy_gradient import LOG_LIMIT, SUMS

        options = self.options
        reference = microbatch.reference_log_probs if self.needs_reference else None
        assert reference is not None or not self.needs_reference, "the reference must score before GRPO's KL"
        advantages, fused_reference = microbatch.advantages, reference
        if options.normalize_length:  # the fused KL knows no weight of a sequence
            advantages, fused_reference = advantages / response_lengths(microbatch), None
        fixed = options.clips | {"kl_weight": options.kl_weight}
        loss, sums = policy_gradient_loss(
            log_probs,
            microbatch.rollout_log_probs,
            fused_reference,
            advantages,
            microbatch.cu_seqlens,
            microbatch.targets,
            **fixed,
        )
        metrics = mismatch(log_probs, microbatch)
        metrics |= {METRIC_OF_SUM[name].name: value for name, value in zip(SUMS[1:], sums.unbind(), strict=True)}
        if reference is not None and fused_reference is None:
            counted = microbatch.targets != IGNORED
            whole = torch.where(counted, reference - log_probs, 0.0)
            seen = (log_probs.detach() - microbatch.rollout_log_probs > LOG_LIMIT) & counted  # and counted by the operator
            metrics[CLAMPED.name] = metrics[CLAMPED.name] + ((whole > LOG_LIMIT) & ~seen).sum()
            d = whole.clamp(max=LOG_LIMIT)
            kl = sequence_log_probs(d.exp() - d - 1, microbatch.cu_seqlens)
            loss = loss + options.kl_weight * (kl / response_lengths(microbatch)).sum()
            metrics[KL.name] = kl.detach().sum()
        metrics[WITH_SIGNAL.name] = (microbatch.advantages != 0).sum().to(sums)
        return loss / denominator(batch, options.reduction), metrics
