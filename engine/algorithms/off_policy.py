"""Off-policy corrections of a policy-gradient loss: what a token trained on weighs, by the ratio of its probability under the
policy to that under the weights that sampled it. One table of options for every loss that has them; docs/algorithms.md says
what each is, where it comes from and what others call it.

With g = log-prob of the policy as it is before the step - rollout log-prob, of a token with a target, both at
sampling.temperature, the ratio is e^G, and G by `correction_level`

    token        g of the token
    sequence     the sum of g over the response
    geometric    the mean of g over the response

(G held at LOG_LIMIT). The weight is the ratio held at the bounds ("truncate"), or the ratio inside them and 0 outside ("mask").
It is a constant: no gradient goes through it. Weights are not normalised, and what the step's loss is divided by (reduction,
normalize_length) counts every token, those of weight 0 too.

Shape legend: T tokens of the microbatch, B sequences of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from engine.config.options import AlgorithmOptions, Factor, Weight
from engine.core.metrics import Metric
from engine.core.types import IGNORED, Microbatch

if TYPE_CHECKING:
    import torch

Level = Literal["token", "sequence", "geometric"]
WEIGHT = Metric(
    "weight_mean",
    "what a token trained on weighs in an off-policy loss: its ratio after the bounds",
    reduce="mean",
    per="target_tokens",
    peers={"verl": "rollout_corr/rollout_is_mean"},
)
OUTSIDE = Metric(
    "outside_share",
    "tokens trained on whose ratio is outside the bounds of that weight, so that it is held there, or 0",
    unit="share",
    reduce="mean",
    per="target_tokens",
    peers={"verl": "rollout_corr/rollout_rs_masked_fraction"},
)
METRICS = (WEIGHT, OUTSIDE)


class CorrectionOptions(AlgorithmOptions):
    """The table of corrections."""

    correction: Literal["none", "truncate", "mask"] = Field(
        "none",
        description="what weighs the policy gradient off policy: 'none', the clipped ratio alone; 'truncate', the ratio held "
        "at the bounds (TIS); 'mask', the ratio inside them, 0 outside (TRL: vllm_importance_sampling_mode)",
    )
    correction_level: Level = Field(
        "token",
        description="of that ratio: of each token, the product over the response ('sequence'), or its geometric mean",
    )
    correction_low: Weight | None = Field(
        None, description="lower bound of that ratio; unset: none (TRL: vllm_importance_sampling_clip_min)"
    )
    correction_high: Factor | None = Field(
        None, description="upper bound of that ratio (TRL: vllm_importance_sampling_clip_max; verl: rollout_is_threshold)"
    )


def broken_correction_rules(options: CorrectionOptions) -> list[str]:
    """Sentences for a table that says nothing, or contradicts itself."""
    kind, low, high = options.correction, options.correction_low, options.correction_high
    if kind == "none":
        if (low, high, options.correction_level) == (None, None, "token"):
            return []
        return [
            f"algorithm.correction_low, correction_high and correction_level need algorithm.correction; found {low}, {high} "
            f"and {options.correction_level!r} with 'none': set correction to 'truncate' or 'mask', or remove them"
        ]
    if high is None and (kind == "truncate" or low is None):
        return [
            f"algorithm.correction = {kind!r} needs algorithm.correction_high, the largest weight"
            f"{'' if kind == 'truncate' else ', or correction_low'}; found none: set it, as 2.0 for tokens"
        ]
    if low is not None and high is not None and low >= high:
        return [
            f"algorithm.correction_low must be less than algorithm.correction_high; found {low} and {high}: lower it, or raise "
            f"correction_high"
        ]
    return []


def spread(values: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
    """A value of each sequence [B] at each of its tokens [T]; not differentiated."""
    import torch

    lengths = microbatch.cu_seqlens.to(values.device).diff()
    return torch.repeat_interleave(values.detach(), lengths, output_size=microbatch.targets.numel())


def log_ratios(log_probs: torch.Tensor, microbatch: Microbatch, level: Level) -> torch.Tensor:
    """G of every token [T], without gradient; 0 where there is no target at level `token`."""
    import torch

    from engine.algorithms.base import response_lengths
    from engine.ops import sequence_log_probs

    counted = microbatch.targets != IGNORED
    gap = torch.where(counted, log_probs.detach() - microbatch.rollout_log_probs, 0.0)
    if level == "token":
        return gap
    sums = sequence_log_probs(gap, microbatch.cu_seqlens)
    return spread(sums / response_lengths(microbatch) if level == "geometric" else sums, microbatch)


def weights(
    log_probs: torch.Tensor,
    microbatch: Microbatch,
    *,
    kind: Literal["truncate", "mask"],
    level: Level,
    low: float | None,
    high: float | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(weight of every token [T], 0 where there is no target, without gradient; parts of METRICS)."""
    import torch

    from engine.ops.policy_gradient import LOG_LIMIT

    counted = microbatch.targets != IGNORED
    ratio = log_ratios(log_probs, microbatch, level).clamp(max=LOG_LIMIT).exp()
    least, most = 0.0 if low is None else low, math.inf if high is None else high
    outside = (ratio < least) | (ratio > most)
    held = ratio.clamp(least, most) if kind == "truncate" else torch.where(outside, 0.0, ratio)
    found = torch.where(counted, held, 0.0)
    return found, {WEIGHT.name: found.sum(), OUTSIDE.name: (outside & counted).sum().to(found)}
