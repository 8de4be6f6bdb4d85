"""From scored groups to the sequences of one optimizer step: which prompts enter the batch, and what each becomes."""

from __future__ import annotations

from collections.abc import Sequence as Many

from engine.algorithms.advantages import grouped_advantages
from engine.algorithms.pairs import better_and_worse, correct_and_wrong, extremes, preference_pair
from engine.config.load import RunConfig
from engine.core.types import Rollout, RolloutGroup, Sequence
from engine.rollouts.base import StepData
from engine.rollouts.metrics import mean


def step_data(
    groups: Many[RolloutGroup], shares: Many[tuple[int, int]], metrics: dict[str, float], config: RunConfig
) -> StepData:
    """What a step trains on of all groups sampled for it; `shares` are those of its Mixture. Where there are spare prompts,
    their use is added to `metrics`."""
    batch, used, unused = batch_groups(groups, shares, config)
    spare = {"spare_prompts_used": float(used), "unused_prompts": float(unused)} if len(groups) > len(batch) else {}
    sequences, counts = training_sequences(batch, config)
    share = {"skipped_share": counts["skipped_prompts"] / len(batch)}
    compared = compared_tokens(sequences) if config.algorithm.loss != "grpo" else {}
    return StepData(sequences, len(batch), metrics | counts | share | compared | spare)


def batch_groups(
    groups: Many[RolloutGroup], shares: Many[tuple[int, int]], config: RunConfig
) -> tuple[list[RolloutGroup], int, int]:
    """(the groups of the batch, spare ones among them, groups with signal for which there was no place).

    Of each source (`shares`: how many were sampled, how many the batch counts) the first ones with signal, in order; where
    those are too few, the first without signal stand in the batch beside them, skipped as they would be without spare ones.
    """
    batch: list[RolloutGroup] = []
    used = unused = start = 0
    for sampled, places in shares:
        own = range(start, start + sampled)
        start += sampled
        with_signal = [i for i in own if sampled == places or _sequences_of(groups[i], config, 0)[1]]
        without = [i for i in own if i not in with_signal]
        kept = sorted(with_signal[:places] + without[: max(0, places - len(with_signal))])
        batch += [groups[i] for i in kept]
        used += sum(i >= own[places] for i in kept) if sampled > places else 0
        unused += len(with_signal[places:])
    assert start == len(groups), (start, len(groups))
    return batch, used, unused


def training_sequences(groups: Many[RolloutGroup], config: RunConfig) -> tuple[list[Sequence], dict[str, float]]:
    """The sequences in prompt order, and how many prompts gave no signal and why.

    skipped_prompts: no pair and no advantage but 0. Of verifiable prompts: all_correct_prompts, all_wrong_prompts. Of all:
    unjudged_prompts (none of the rollouts could be judged); tied_prompts: of those with two different rewards, how many
    have several rollouts of the highest or of the lowest, so that a seeded draw chose among them.
    """
    sequences: list[Sequence] = []
    names = ("skipped_prompts", "all_correct_prompts", "all_wrong_prompts", "unjudged_prompts", "tied_prompts")
    counts = dict.fromkeys(names, 0.0)
    num_groups = 0
    for group in groups:
        made, has_signal = _sequences_of(group, config, num_groups)
        sequences += made
        num_groups += any(sequence.group >= 0 for sequence in made)
        correct, wrong = correct_and_wrong(group)
        best, worst = extremes(group)
        counts["skipped_prompts"] += not has_signal
        counts["all_correct_prompts"] += group.prompt.verifiable and bool(correct) and not wrong
        counts["all_wrong_prompts"] += group.prompt.verifiable and bool(wrong) and not correct
        counts["unjudged_prompts"] += not group.judged
        counts["tied_prompts"] += best != worst and len(best) + len(worst) > 2
    return sequences, counts


def compared_tokens(sequences: Many[Sequence]) -> dict[str, float]:
    """Mean lengths of the chosen and the rejected responses that a loss compares; NaN where there are none."""
    compared = [sequence for sequence in sequences if sequence.group >= 0]
    return {
        f"{name}_tokens_mean": mean([len(s.completion_ids) for s in compared if s.chosen is chosen])
        for name, chosen in (("chosen", True), ("rejected", False))
    }


def _sequences_of(group: RolloutGroup, config: RunConfig, index: int) -> tuple[list[Sequence], bool]:
    """(what the loss trains on of this prompt, whether there is a pair or an advantage).

    DPO and GroupDPO drop a prompt without a pair. GRPO keeps it at advantage 0, since its KL term still sees it, and drops
    it where there is none. Rollouts that could not be judged are left out of all (`reward_timeouts` and `reward_failures`
    count them).
    """
    algorithm = config.algorithm
    if algorithm.loss == "dpo":
        pair = preference_pair(group, algorithm.pairing, config.run.seed)
        return [_sequence(group, r, 0.0, index, r is pair[0]) for r in pair] if pair else [], pair is not None
    advantages = grouped_advantages([r.score.value for r in group.judged], algorithm.normalize_advantages)
    better, worse = better_and_worse(group)
    has_pairs = algorithm.loss == "group_dpo" and bool(better) and bool(worse)
    has_signal = has_pairs or (algorithm.uses_advantages and any(advantages))
    if not has_signal and not (algorithm.uses_advantages and algorithm.kl_weight):
        return [], False
    made = [
        _sequence(group, r, advantage, index if has_pairs else -1, has_pairs and r in better)
        for r, advantage in zip(group.judged, advantages, strict=True)
    ]
    return made, has_signal


def _sequence(group: RolloutGroup, rollout: Rollout, advantage: float, index: int, chosen: bool) -> Sequence:
    completion = rollout.completion
    return Sequence(
        group.prompt.token_ids, completion.token_ids, completion.log_probs, advantage=advantage, group=index, chosen=chosen
    )
