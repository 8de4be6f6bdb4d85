"""GroupDPO: DPO's loss over every correct with every incorrect response of a group (paper, equation 4), and alpha times GRPO
over the same group (paper, section 5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from engine.algorithms.advantages import advantages_of
from engine.algorithms.base import Result, training_sequence
from engine.algorithms.dpo import Dpo, PreferenceOptions
from engine.algorithms.grpo import Grpo, PolicyGradientOptions, broken_clip_rules
from engine.algorithms.off_policy import broken_correction_rules
from engine.algorithms.pairs import better_and_worse
from engine.config.load import RunConfig
from engine.config.options import Weight
from engine.core.metrics import by_name
from engine.core.types import Batch, Microbatch, RolloutGroup, Sequence

if TYPE_CHECKING:
    import torch


class GroupDpoOptions(PreferenceOptions, PolicyGradientOptions):
    """GroupDPO's own, and those of the GRPO beside it."""

    alpha: Weight = Field(0.0, description="GRPO's weight beside GroupDPO, over the same group; the paper tries 0.01 and 0.001")

    @property
    def uses_ratios(self) -> bool:
        """With GRPO beside it, both losses are of the distribution that was sampled: a step has one set of log-probs."""
        return self.alpha > 0


class GroupDpo(Dpo):
    """DPO's loss, the mean over all pairs of a group, plus alpha * GRPO."""

    Options = GroupDpoOptions
    sums_over_groups = True

    def __init__(self, options: GroupDpoOptions, *, sampled: bool = True) -> None:
        super().__init__(options, sampled=sampled)
        self.grpo = Grpo(options)
        self.alpha = options.alpha
        self.needs_rollouts = options.alpha > 0
        if self.alpha:
            self.metrics = tuple(by_name((*self.metrics, *self.grpo.metrics)).values())

    def sequences(self, group: RolloutGroup, index: int, run_seed: int) -> tuple[list[Sequence], bool]:
        """Every judged rollout, in the group's number where it has both sides and it is on one of them. What is in no pair is
        dropped unless GRPO has an advantage or a KL term for it."""
        better, worse = better_and_worse(group, self.options.choose_truncated)
        advantages = advantages_of(self.grpo.advantages, group)
        has_pairs = bool(better) and bool(worse)
        has_signal = has_pairs or bool(self.alpha and any(advantages))
        if not has_signal and not (self.alpha and self.options.kl_weight):
            return [], False
        made = []
        for rollout, advantage in zip(group.judged, advantages, strict=True):
            chosen = has_pairs and rollout in better
            paired = chosen or (has_pairs and rollout in worse)
            if paired or self.alpha:
                number = index if paired else -1
                made.append(training_sequence(group, rollout, advantage=advantage, group=number, chosen=chosen))
        return made, has_signal

    @classmethod
    def broken_rules(cls, config: RunConfig) -> list[str]:
        """See Algorithm."""
        a: Any = config.algorithm  # of GroupDpoOptions, which Options of a class that extends this one extend
        broken = super().broken_rules(config)
        if not a.alpha and (a.normalize_length or a.normalize_advantages != "mean"):
            broken.append(
                f"algorithm.normalize_advantages and algorithm.normalize_length are GRPO's; found {a.normalize_advantages!r} "
                f"and {a.normalize_length} with {a.loss!r} and algorithm.alpha = 0: leave them at 'mean' and false"
            )
        if not a.alpha and not a.is_plain:
            broken.append(
                f"algorithm.correction and algorithm.ratio_level are GRPO's; found {a.correction!r} and {a.ratio_level!r} with "
                f"{a.loss!r} and algorithm.alpha = 0: leave them at 'none' and 'token'"
            )
        names = ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "dual_clip", "kl_weight")
        changed = [name for name in names if getattr(a, name) != type(a).model_fields[name].default]
        if not a.alpha and changed:
            values = ", ".join(f"{name} = {getattr(a, name)}" for name in changed)
            broken.append(
                f"algorithm.{' and algorithm.'.join(changed)} {'are' if len(changed) > 1 else 'is'} of the GRPO that "
                f"algorithm.alpha adds; found {values} with {a.loss!r} and algorithm.alpha = 0: set alpha, or remove "
                f"{'them' if len(changed) > 1 else 'it'}"
            )
        return broken + broken_correction_rules(a) + broken_clip_rules(a)

    def __call__(
        self, log_probs: torch.Tensor, microbatch: Microbatch, batch: Batch, entropy: torch.Tensor | None = None
    ) -> Result:
        """See Loss."""
        loss, metrics = super().__call__(log_probs, microbatch, batch, entropy)
        if not self.alpha:
            return loss, metrics
        more, others = self.grpo(log_probs, microbatch, batch, entropy)
        return loss + self.alpha * more, metrics | others
