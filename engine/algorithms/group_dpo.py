"""GroupDPO: DPO's loss over every correct with every incorrect response of a group (paper, equation 4), and alpha times GRPO
over the same group (paper, section 5).
"""

from __future__ import annotations

import torch
from pydantic import Field

from engine.algorithms.base import Result, training_sequence
from engine.algorithms.dpo import Dpo, PreferenceOptions
from engine.algorithms.grpo import Grpo, PolicyGradientOptions
from engine.algorithms.pairs import better_and_worse
from engine.config.load import RunConfig
from engine.config.options import NonNegativeFloat
from engine.core.metrics import by_name
from engine.core.types import Batch, Microbatch, RolloutGroup, Sequence


class GroupDpoOptions(PreferenceOptions, PolicyGradientOptions):
    """GroupDPO's own, and those of the GRPO beside it."""

    alpha: NonNegativeFloat = Field(0.0, description="GRPO's weight beside GroupDPO, over the same group")


class GroupDpo(Dpo):
    """DPO's loss, the mean over all pairs of a group, plus alpha * GRPO."""

    Options = GroupDpoOptions

    def __init__(self, options: GroupDpoOptions, *, sampled: bool = True) -> None:
        super().__init__(options, sampled=sampled)
        self.grpo = Grpo(options)
        self.alpha = options.alpha
        self.needs_rollouts = options.alpha > 0
        if self.alpha:
            self.metrics = tuple(by_name((*self.metrics, *self.grpo.metrics)).values())

    def sequences(self, group: RolloutGroup, index: int, run_seed: int) -> tuple[list[Sequence], bool]:
        """Every judged rollout, in the group's number where it has both sides. A prompt without pairs is dropped unless GRPO
        has an advantage or a KL term for it."""
        better, worse = better_and_worse(group)
        advantages = self.grpo.advantages([rollout.score.value for rollout in group.judged])
        has_pairs = bool(better) and bool(worse)
        has_signal = has_pairs or bool(self.alpha and any(advantages))
        if not has_signal and not (self.alpha and self.options.kl_weight):
            return [], False
        made = [
            training_sequence(group, r, advantage=advantage, group=index if has_pairs else -1, chosen=has_pairs and r in better)
            for r, advantage in zip(group.judged, advantages, strict=True)
        ]
        return made, has_signal

    @classmethod
    def broken_rules(cls, config: RunConfig) -> list[str]:
        """See Algorithm."""
        a, broken = config.algorithm, super().broken_rules(config)
        assert isinstance(a, GroupDpoOptions), a
        if not a.alpha and (a.normalize_length or a.normalize_advantages != "mean"):
            broken.append(
                f"algorithm.normalize_advantages and algorithm.normalize_length are GRPO's; found {a.normalize_advantages!r} "
                f"and {a.normalize_length} with {a.loss!r} and algorithm.alpha = 0: leave them at 'mean' and false"
            )
        return broken

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """See Loss."""
        loss, metrics = super().__call__(log_probs, microbatch, batch, entropy)
        if not self.alpha:
            return loss, metrics
        more, others = self.grpo(log_probs, microbatch, batch, entropy)
        return loss + self.alpha * more, metrics | others
