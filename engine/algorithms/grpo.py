"""GRPO: the clipped policy-gradient loss of the paper (equation 1) with a KL term to the reference. With algorithm.ratio_level
its ratio is a response's (GSPO), with algorithm.correction its weight is that of off_policy.py.

Shape legend: T tokens of the microbatch, B sequences of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from engine.algorithms.base import MISMATCH, ROLLOUT_GAP, Parts, Result, Slopes, denominator, mismatch, response_lengths
from engine.algorithms.off_policy import METRICS as OF_CORRECTION
from engine.algorithms.off_policy import CorrectionOptions, broken_correction_rules, log_ratios, spread, weights
from engine.algorithms.policy_gradient import CLAMPED, CLIPPED, KL, RATIO, WITH_SIGNAL, AdvantageOptions, PolicyGradient
from engine.config.load import RunConfig
from engine.config.options import PURE, Factor
from engine.core.metrics import by_name
from engine.core.types import IGNORED, Batch, Microbatch

if TYPE_CHECKING:
    import torch

# By the operator's own names
METRIC_OF_SUM = {"kl": KL, "clipped": CLIPPED, "ratio": RATIO, "gap": ROLLOUT_GAP, "beyond": CLAMPED}


class PolicyGradientOptions(CorrectionOptions, AdvantageOptions):
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
    ratio_level: Literal["token", "geometric"] = Field(
        "token",
        description="of the clipped ratio: of each token, or the geometric mean over the response (GSPO; TRL: "
        "importance_sampling_level = 'sequence')",
    )

    @property
    def clips(self) -> dict[str, float]:
        """The operator's options that bound the ratio."""
        low, high = (self.clip_ratio if own is None else own for own in (self.clip_ratio_low, self.clip_ratio_high))
        return {"clip_low": low, "clip_high": high, "dual_clip": math.inf if self.dual_clip is None else self.dual_clip}

    @property
    def is_plain(self) -> bool:
        """Whether it is the paper's equation 1, which has a kernel."""
        return self.correction == "none" and self.ratio_level == "token"


def broken_clip_rules(options: PolicyGradientOptions) -> list[str]:
    """Sentences for clips and levels that a correction, or others of them, leave nothing to do."""
    if options.correction == "none":
        both = None not in (options.clip_ratio_low, options.clip_ratio_high)
        if not both or options.clip_ratio == PolicyGradientOptions.model_fields["clip_ratio"].default:
            return []
        return [
            f"algorithm.clip_ratio is of the sides that clip_ratio_low and clip_ratio_high do not say, and they say both; "
            f"found {options.clip_ratio} beside {options.clip_ratio_low} and {options.clip_ratio_high}: remove it, or one of "
            f"them"
        ]
    names = ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "dual_clip", "ratio_level")
    clips = [getattr(options, name) for name in names]
    if clips == [PolicyGradientOptions.model_fields[name].default for name in names]:
        return []
    return [
        f"algorithm.correction = {options.correction!r} bounds the ratio itself, so that the clip, against the policy before "
        f"the step, never acts; found clip_ratio = {clips[0]}, clip_ratio_low = {clips[1]}, clip_ratio_high = {clips[2]}, "
        f"dual_clip = {clips[3]} and ratio_level = {clips[4]!r}: remove them, or set correction = 'none'"
    ]


class Grpo(PolicyGradient):
    """-sum over tokens of min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), plus kl_weight * KL(policy, reference).

    ratio = exp(log-prob - rollout log-prob), A is the sequence's advantage, KL is k3: exp(d) - d - 1 with
    d = reference - policy; both exponents are held at LOG_LIMIT. Where A is negative the equation bounds the ratio from below
    alone; with dual_clip it counts for no more than that. No length and no standard-deviation normalisation (paper, equation
    1); normalize_length divides a response's sum, KL included, by its number of tokens (DeepSeekMath, equation 3).
    """

    Options = PolicyGradientOptions
    sums_over_groups = True
    metrics = (WITH_SIGNAL, *by_name((*METRIC_OF_SUM.values(), *MISMATCH)).values())

    def __init__(self, options: Any, *, sampled: bool = True) -> None:
        super().__init__(options, sampled=sampled)
        if options.correction != "none":  # nothing is clipped
            self.metrics = (*(metric for metric in type(self).metrics if metric is not CLIPPED), *OF_CORRECTION)

    @classmethod
    def broken_rules(cls, config: RunConfig) -> list[str]:
        """See Algorithm."""
        options: Any = config.algorithm
        return super().broken_rules(config) + broken_correction_rules(options) + broken_clip_rules(options)

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """See Loss."""
        import torch

        from engine.ops import policy_gradient_loss, sequence_log_probs
        from engine.ops.policy_gradient import LOG_LIMIT, SUMS

        options, reference = self.options, self.reference(microbatch)
        if not options.is_plain:
            terms, parts = (self._geometric if options.correction == "none" else self._corrected)(log_probs, microbatch)
            loss, metrics = self.summed(terms, log_probs, microbatch, batch)
            return loss, metrics | parts
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

    def coefficients(self, microbatch: Microbatch) -> Slopes | None:
        """See Loss: a function where the loss is the kernel's alone, of one weight for all tokens."""
        options = self.options
        if not options.is_plain or options.normalize_length or type(self).__call__ is not Grpo.__call__:
            return None
        advantages, given = spread(microbatch.advantages, microbatch), microbatch.reference_log_probs

        def slopes(positions: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
            from engine.ops import policy_gradient_slopes

            reference = log_probs if given is None else given[positions]
            return policy_gradient_slopes(
                log_probs,
                microbatch.rollout_log_probs[positions],
                reference if self.needs_reference else None,
                advantages[positions],
                microbatch.targets[positions],
                kl_weight=options.kl_weight,
                **options.clips,
            )

        return slopes

    def _corrected(self, log_probs: torch.Tensor, microbatch: Microbatch) -> tuple[torch.Tensor, Parts]:
        """-weight * A * ratio of each token [T], where the ratio is to the policy before the step: a step takes one update, so
        it is 1, and its gradient is the log-prob's."""
        o = self.options
        bounds = {"low": o.correction_low, "high": o.correction_high}
        weight, parts = weights(log_probs, microbatch, kind=o.correction, level=o.correction_level, **bounds)
        return -weight * spread(microbatch.advantages, microbatch) * (log_probs - log_probs.detach()).exp(), parts

    def _geometric(self, log_probs: torch.Tensor, microbatch: Microbatch) -> tuple[torch.Tensor, Parts]:
        """-min(s A, clip(s) A) of each token [T], with s the geometric mean of the response's ratios. Its gradient by a
        response's log-probs is that of the response's one term, times its length (GSPO, section 4.3), which normalize_length
        divides by."""
        import torch

        from engine.ops.policy_gradient import LOG_LIMIT

        clips, counted = self.options.clips, microbatch.targets != IGNORED
        held = log_ratios(log_probs, microbatch, "geometric")
        own = torch.where(held > LOG_LIMIT, 0.0, log_probs - log_probs.detach())  # beyond it there is no gradient
        ratio = held.clamp(max=LOG_LIMIT).exp() * own.exp()
        advantage = spread(microbatch.advantages, microbatch)
        clipped = ratio.clamp(1 - clips["clip_low"], 1 + clips["clip_high"])
        objective = torch.min(ratio * advantage, clipped * advantage)
        least = torch.where(advantage < 0, clips["dual_clip"] * advantage, -math.inf)
        open_ = torch.where(advantage >= 0, ratio <= 1 + clips["clip_high"], ratio >= 1 - clips["clip_low"])
        open_ &= (advantage >= 0) | (ratio <= clips["dual_clip"])
        parts = {CLIPPED.name: (counted & ~open_ & (advantage != 0)).sum().to(ratio)}
        return -torch.maximum(least, objective), parts
