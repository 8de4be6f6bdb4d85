"""CISPO: a policy gradient whose importance weight is clipped instead of its gradient, so that every token keeps one
(MiniMax-M1, arXiv 2506.13585, equations 4 and 5).

Shape legend: T tokens of the microbatch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from engine.algorithms.base import MISMATCH, Result
from engine.algorithms.off_policy import METRICS as OF_CORRECTION
from engine.algorithms.off_policy import spread, weights
from engine.algorithms.policy_gradient import CLAMPED, KL, RATIO, WITH_SIGNAL, AdvantageOptions, PolicyGradient
from engine.config.load import RunConfig
from engine.config.options import Factor, Weight
from engine.core.types import Batch, Microbatch

if TYPE_CHECKING:
    import torch


class CispoOptions(AdvantageOptions):
    """CISPO's own."""

    weight_low: Weight | None = Field(
        None, description="smallest weight of a token, the paper's 1 - epsilon_low; unset: none, as the paper runs it"
    )
    weight_high: Factor = Field(
        5.0,
        description="largest weight of a token, the paper's 1 + epsilon_high (TRL: epsilon_high, which is the bound itself)",
    )


class Cispo(PolicyGradient):
    """-sum over tokens of weight * A * log-prob, plus kl_weight * KL(policy, reference). The weight is the ratio of the policy
    to the weights that sampled the token, held between weight_low and weight_high, and no gradient goes through it.

    The paper divides by all tokens of a prompt's group and has no KL: reduction = "tokens" divides by all of the step.
    """

    Options = CispoOptions
    sums_over_groups = True
    metrics = (WITH_SIGNAL, KL, RATIO, CLAMPED, *MISMATCH, *OF_CORRECTION)

    @classmethod
    def broken_rules(cls, config: RunConfig) -> list[str]:
        """See Algorithm."""
        a: Any = config.algorithm
        broken = super().broken_rules(config)
        if a.weight_low is not None and a.weight_low >= a.weight_high:
            broken.append(
                f"algorithm.weight_low must be less than algorithm.weight_high; found {a.weight_low} and {a.weight_high}: "
                f"lower it"
            )
        return broken

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """See Loss."""
        o = self.options
        weight, parts = weights(log_probs, microbatch, kind="truncate", level="token", low=o.weight_low, high=o.weight_high)
        terms = -weight * spread(microbatch.advantages, microbatch) * log_probs
        loss, metrics = self.summed(terms, log_probs, microbatch, batch)
        return loss, metrics | parts
