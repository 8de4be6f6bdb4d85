"""From scored groups to the sequences of one optimizer step: which prompts enter the batch, and what each becomes."""

from __future__ import annotations

from collections.abc import Sequence as Many

from engine.algorithms.advantages import LARGEST
from engine.algorithms.dpo import PAIRS
from engine.algorithms.pairs import correct_and_wrong, extremes
from engine.algorithms.registry import make_algorithm
from engine.config.load import RunConfig
from engine.core.errors import NumericsError
from engine.core.metrics import Metric
from engine.core.types import RolloutGroup, Sequence
from engine.rollouts.base import StepData
from engine.rollouts.metrics import mean
from engine.rollouts.truncation import METRICS as OF_TRUNCATION
from engine.rollouts.truncation import treated

SKIPPED_SHARE = Metric(
    "skipped_share",
    "prompts of the batch without a pair or an advantage",
    title="prompts without signal",
    unit="share",
    peers={"TRL": "frac_reward_zero_std"},
)
SKIPPED = Metric("skipped_prompts", "the same as a count", title="skipped prompts", unit="prompts")
ALL_CORRECT = Metric("all_correct_prompts", "verifiable prompts whose judged rollouts are all right", unit="prompts")
ALL_WRONG = Metric("all_wrong_prompts", "verifiable prompts whose judged rollouts are all wrong", unit="prompts")
UNJUDGED = Metric("unjudged_prompts", "prompts of which no rollout could be judged", unit="prompts")
TIED = Metric("tied_prompts", "prompts with several rollouts of the highest or lowest reward, cut-off ones too", unit="prompts")
SPARE_USED = Metric("spare_prompts_used", "with data.spare_prompts: spare ones that filled a place", unit="prompts")
UNUSED = Metric("unused_prompts", "with data.spare_prompts: with signal, but no place left", unit="prompts")
CHOSEN_TOKENS = Metric("chosen_tokens_mean", "length of the chosen responses that a loss over pairs compares", unit="tokens")
REJECTED_TOKENS = Metric("rejected_tokens_mean", "length of the rejected ones", unit="tokens")
METRICS = (
    SKIPPED_SHARE,
    SKIPPED,
    SPARE_USED,
    UNUSED,
    ALL_CORRECT,
    ALL_WRONG,
    UNJUDGED,
    TIED,
    CHOSEN_TOKENS,
    REJECTED_TOKENS,
    *OF_TRUNCATION,
)


def step_data(
    groups: Many[RolloutGroup], shares: Many[tuple[int, int]], metrics: dict[str, float], config: RunConfig
) -> StepData:
    """What a step trains on of all groups sampled for it; `shares` are those of its Mixture. What was cut off or is too long is
    treated as sampling says; where there are spare prompts, their use is added to `metrics`."""
    groups, of_truncation = treated(groups, config.sampling)
    batch, used, unused = batch_groups(groups, shares, config)
    spare = {SPARE_USED.name: float(used), UNUSED.name: float(unused)} if len(groups) > len(batch) else {}
    sequences, counts = training_sequences(batch, config)
    share = {SKIPPED_SHARE.name: counts[SKIPPED.name] / len(batch)}
    compared = compared_tokens(sequences) if PAIRS in make_algorithm(config.algorithm).metrics else {}
    return StepData(sequences, len(batch), metrics | of_truncation | counts | share | compared | spare)


def wave_data(groups: Many[RolloutGroup], config: RunConfig) -> StepData:
    """What some whole groups of a step add to it, without metrics. Only where none of them depends on the others, and each has
    a place in the batch (waves.py)."""
    sequences, _ = training_sequences(treated(groups, config.sampling)[0], config)
    return StepData(sequences, len(groups), {})


def batch_groups(
    groups: Many[RolloutGroup], shares: Many[tuple[int, int]], config: RunConfig
) -> tuple[list[RolloutGroup], int, int]:
    """(the groups of the batch, spare ones among them, groups with signal for which there was no place).

    Of each source (`shares`: how many were sampled, how many the batch counts) the first ones with signal, in order; where
    those are too few, the first without signal stand in the batch beside them, skipped as they would be without spare ones.
    """
    algorithm, seed = make_algorithm(config.algorithm), config.run.seed
    batch: list[RolloutGroup] = []
    used = unused = start = 0
    for sampled, places in shares:
        own = range(start, start + sampled)
        start += sampled
        with_signal = [i for i in own if sampled == places or algorithm.sequences(groups[i], 0, seed)[1]]
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
    algorithm = make_algorithm(config.algorithm)
    sequences: list[Sequence] = []
    names = (SKIPPED, ALL_CORRECT, ALL_WRONG, UNJUDGED, TIED)
    counts = {metric.name: 0.0 for metric in names}
    num_groups = 0
    for group in groups:
        made, has_signal = algorithm.sequences(group, num_groups, config.run.seed)
        for sequence in made:
            _require_held(sequence, group, config)
        sequences += made
        num_groups += any(sequence.group >= 0 for sequence in made)
        correct, wrong = correct_and_wrong(group)
        best, worst = extremes(group)
        counts[SKIPPED.name] += not has_signal
        counts[ALL_CORRECT.name] += group.prompt.verifiable and bool(correct) and not wrong
        counts[ALL_WRONG.name] += group.prompt.verifiable and bool(wrong) and not correct
        counts[UNJUDGED.name] += not group.judged
        counts[TIED.name] += best != worst and len(best) + len(worst) > 2
    return algorithm.of_step(sequences, groups), counts


def _require_held(sequence: Sequence, group: RolloutGroup, config: RunConfig) -> None:
    """NumericsError, which names the prompt, for an advantage or a value of an algorithm that float32, in which losses are,
    does not hold. Our own algorithms say more before this; a user's may not."""
    for name, number in (("advantage", sequence.advantage), *sequence.values.items()):
        if not abs(number) <= LARGEST:
            raise NumericsError(
                f"step {group.step}, prompt {group.prompt.id}: algorithm.loss = {config.algorithm.loss!r} must give sequences "
                f"whose {name} is a number of at most {LARGEST:.3g}; found {number}: scale the rewards down, or mend the loss"
            )


def compared_tokens(sequences: Many[Sequence]) -> dict[str, float]:
    """Mean lengths of the chosen and the rejected responses that a loss compares; NaN where there are none."""
    compared = [sequence for sequence in sequences if sequence.group >= 0]
    return {
        metric.name: mean([len(s.completion_ids) for s in compared if s.chosen is chosen])
        for metric, chosen in ((CHOSEN_TOKENS, True), (REJECTED_TOKENS, False))
    }
