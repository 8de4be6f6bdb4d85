"""OAPL: a regression of the policy's log-ratio to the weights that sampled, however old they are, on the optimal advantage
(Ritter et al., LLMs Can Learn to Reason Via Off-Policy RL, arXiv 2602.19362, equations 2 and 3). No ratio is exponentiated and
nothing is clipped.

Shape legend: B sequences of a microbatch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING, Any

from pydantic import Field

from engine.algorithms.advantages import LARGEST, advantages_of, bounded
from engine.algorithms.base import MISMATCH, RESPONSES, Algorithm, Result, denominator, mismatch, training_sequence
from engine.algorithms.pairs import correct_and_wrong
from engine.algorithms.policy_gradient import WITH_SIGNAL
from engine.config.load import RunConfig
from engine.config.options import AlgorithmOptions, Factor
from engine.core.metrics import Metric
from engine.core.types import Batch, Microbatch, RolloutGroup, Sequence

if TYPE_CHECKING:
    import torch

LARGEST_REGRESSED = math.sqrt(LARGEST) / 2**10  # of an advantage: float32 holds the sum of the squares of 2**20 of them
SHARE = "share_of_group"  # 1 / judged rollouts of the prompt
RESIDUAL = Metric(
    "residual_square_mean",
    "OAPL: square of what is left of the regression, over the responses trained on",
    reduce="mean",
    per=RESPONSES,
)


class OaplOptions(AlgorithmOptions):
    """OAPL's own."""

    value_beta: Factor = Field(
        1.0, description="how soft the maximum over rewards is that is the prompt's value (the paper's beta 1; NeMo-RL: beta1)"
    )
    ratio_beta: Factor = Field(
        1e-3, description="of the log-ratio that is regressed on the advantage (the paper's beta 2; NeMo-RL: beta2)"
    )


class Oapl(Algorithm):
    """Of a prompt the mean over its rollouts of (ratio_beta * (l - l_rollout) - (r - V))^2, with l the sum of token log-probs
    over the response, and V = value_beta * log of the mean of exp(r / value_beta) over the rollouts, a constant.

    Nothing couples the responses of a prompt but V and the mean, which are known with the rewards. Where all rewards are
    equal r - V is 0, and the loss still draws the policy to what sampled.
    """

    Options = OaplOptions
    sums_over_groups = True
    couples_groups = False
    metrics = (WITH_SIGNAL, RESIDUAL, *MISMATCH)

    def sequences(self, group: RolloutGroup, index: int, run_seed: int) -> tuple[list[Sequence], bool]:
        """Every judged rollout with its optimal advantage r - V. NumericsError names the prompt, for a reward that is not
        finite and for an advantage above LARGEST_REGRESSED."""
        correct_and_wrong(group)
        judged, advantages = group.judged, advantages_of(self._advantages, group)
        made = [
            training_sequence(group, rollout, advantage=advantage, values={SHARE: 1 / len(judged)})
            for rollout, advantage in zip(judged, advantages, strict=True)
        ]
        return made, any(advantages)

    def _advantages(self, rewards: Many[float]) -> list[float]:
        return bounded(optimal_advantages(rewards, self.options.value_beta), LARGEST_REGRESSED)

    @classmethod
    def broken_rules(cls, config: RunConfig) -> list[str]:
        """See Algorithm."""
        broken = super().broken_rules(config)
        if config.algorithm.reduction == "pairs":
            broken.append(
                "algorithm.reduction = 'pairs' needs algorithm.loss with pairs; found 'oapl': use 'prompts' or 'tokens'"
            )
        return broken

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """See Loss."""
        from engine.ops import sequence_log_probs

        bounds, advantages = microbatch.cu_seqlens, microbatch.advantages
        shares = microbatch.values[SHARE] if microbatch.values else advantages.new_zeros(())  # an empty one has none
        gain = sequence_log_probs(log_probs, bounds) - sequence_log_probs(microbatch.rollout_log_probs, bounds)
        squares = (self.options.ratio_beta * gain - advantages).square()
        loss = (shares * squares).sum() / denominator(batch, self.options.reduction)
        metrics: Any = mismatch(log_probs, microbatch) | {
            RESIDUAL.name: squares.detach().sum(),
            WITH_SIGNAL.name: (advantages != 0).sum().to(squares),
        }
        return loss, metrics


def optimal_advantages(rewards: Many[float], beta: float) -> list[float]:
    """r - V of each reward; exactly 0 where all are equal."""
    highest = max(rewards, default=0.0)
    soft = math.fsum(math.exp((reward - highest) / beta) for reward in rewards) / max(1, len(rewards))
    return [reward - highest - beta * math.log(soft) for reward in rewards]
