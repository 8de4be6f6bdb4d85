"""What is measured of the rollouts of a step."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection
from collections.abc import Sequence as Many

from engine.core.arrays import TokenIds, exact_sum
from engine.core.metrics import Metric
from engine.core.types import Rollout, RolloutGroup
from engine.inference.pool import Usage

log = logging.getLogger(__name__)

REWARD = Metric(
    "reward_mean",
    "over the step's judged rollouts",
    title="reward",
    peers={"TRL": "reward", "verl": "critic/rewards/mean"},
)
ENTROPY = Metric(
    "rollout_entropy",
    "next-token entropy: minus the mean log-prob over all tokens sampled for the step",
    title="entropy",
    unit="nats a token",
)
LENGTH = Metric(
    "completion_tokens_mean",
    "length of the rollouts, EOS included",
    title="length",
    unit="tokens",
    peers={"TRL": "completions/mean_length", "verl": "response_length/mean"},
)
PROMPT_LENGTH = Metric("prompt_tokens_mean", "length of the step's prompts", unit="tokens")
LENGTH_P50 = Metric("completion_tokens_p50", "half of the rollouts are no longer (nearest rank)", unit="tokens")
LENGTH_P90 = Metric("completion_tokens_p90", "90 % of the rollouts are no longer", unit="tokens")
LENGTH_P99 = Metric("completion_tokens_p99", "99 % of the rollouts are no longer", unit="tokens")
LENGTH_MAX = Metric(
    "completion_tokens_max",
    "the longest rollout",
    unit="tokens",
    peers={"TRL": "completions/max_length", "verl": "response_length/max"},
)
TRUNCATED = Metric(
    "truncated",
    "rollouts cut off at sampling.max_tokens",
    title="truncated",
    unit="share",
    peers={"TRL": "completions/clipped_ratio", "verl": "response_length/clip_ratio"},
)
END_INSIDE = Metric(
    "end_tokens_inside",
    "rollouts with an end token before their last token, at which sampling should have stopped",
    unit="rollouts",
)
TIMEOUTS = Metric("reward_timeouts", "rollouts not judged in time", title="reward timeouts", unit="rollouts")
FAILURES = Metric("reward_failures", "rollouts not judged for another reason", title="failed rewards", unit="rollouts")
TOO_LONG = Metric("reward_too_long", "rollouts too long for the reward model", unit="rollouts")
GENERATED = Metric("generation_tokens", "sampled while this step was collected, whichever step's", unit="tokens")
GENERATING = Metric("generation_seconds", "for which the engine that worked longest on them was busy", unit="s")
ENGINES_IDLE_SHARE = Metric(
    "engines_idle_share",
    "where prompts are submitted: of the time since they last were, for which engines sampled nothing; over all engines",
    title="engines idle",
    unit="share",
)
ACCURACY = Metric("accuracy", "judged rollouts of verifiable prompts with a reward above 0", title="accuracy", unit="share")
CORRECT_LENGTH = Metric("correct_tokens_mean", "length of the judged rollouts with a reward above 0", unit="tokens")
INCORRECT_LENGTH = Metric("incorrect_tokens_mean", "length of the others", unit="tokens")
WAITED = Metric("wait_seconds", "for the step's rollouts", title="waited", unit="s")
JUDGED = Metric("reward_seconds", "of wait_seconds: for the rewards alone, after the step's last response", unit="s")
UNJUDGED_SHARE = Metric("unjudged_share", "rollouts that could not be judged, for whatever reason", unit="share")
STALENESS = Metric(
    "staleness",
    "between the weights that sampled the rollouts and those that train on them; with sync.in_flight the mean over tokens",
    title="staleness",
    unit="steps",
)
STALENESS_MAX = Metric("staleness_max", "with sync.in_flight: that of the oldest token", title="staleness, most", unit="steps")
UPDATED_SHARE = Metric(
    "updated_in_flight",
    "with sync.in_flight: rollouts whose tokens come from several versions of the weights",
    title="updated in flight",
    unit="share",
)


def reward_of(name: str) -> Metric:
    """The mean of one reward, where a run has several."""
    return Metric(f"reward_mean_{name}", "of one reward by its name, where a run has several")


def part_of(name: str) -> Metric:
    """The mean of one named part of a reward."""
    return Metric(f"reward_{name}_mean", "of one named part of a reward, over the judged rollouts that have it")


METRICS = (
    REWARD,
    reward_of("NAME"),
    part_of("PART"),
    ACCURACY,
    ENTROPY,
    PROMPT_LENGTH,
    LENGTH,
    LENGTH_P50,
    LENGTH_P90,
    LENGTH_P99,
    LENGTH_MAX,
    CORRECT_LENGTH,
    INCORRECT_LENGTH,
    TRUNCATED,
    END_INSIDE,
    TIMEOUTS,
    TOO_LONG,
    FAILURES,
    UNJUDGED_SHARE,
    STALENESS,
    STALENESS_MAX,
    UPDATED_SHARE,
    WAITED,
    JUDGED,
    GENERATED,
    GENERATING,
    ENGINES_IDLE_SHARE,
)


def rollout_metrics(groups: Many[RolloutGroup], usage: Usage | None, end_ids: Collection[int] = ()) -> dict[str, float]:
    """What a person watches of all rollouts sampled for a step; without `usage` nothing of how they were. `end_ids`: the tokens
    that end a response. The entropy is the mean of minus the log-prob of every sampled token, an unbiased estimate of the
    next-token entropy where the log-probs are of what was sampled.

    Only of verifiable prompts, where the step has any: accuracy and the lengths of right and wrong answers. Only where there
    are several rewards: the mean of each (`reward_mean_NAME`). Only of rewards with named parts: the mean of each part
    (`reward_PART_mean`).
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = [len(rollout.completion.token_ids) for rollout in rollouts]
    judged = [rollout for group in groups for rollout in group.judged]
    statuses = [rollout.score.status for rollout in rollouts]
    metrics = {
        REWARD.name: mean([rollout.score.value for rollout in judged]),
        **_metrics_by_reward(groups),
        **_metrics_of_parts(judged),
        ENTROPY.name: -exact_sum(rollout.completion.log_probs for rollout in rollouts) / sum(lengths),
        PROMPT_LENGTH.name: sum(len(group.prompt.token_ids) for group in groups) / len(groups),
        LENGTH.name: sum(lengths) / len(lengths),
        LENGTH_P50.name: percentile(lengths, 50),
        LENGTH_P90.name: percentile(lengths, 90),
        LENGTH_P99.name: percentile(lengths, 99),
        LENGTH_MAX.name: float(max(lengths)),
        TRUNCATED.name: sum(r.completion.truncated for r in rollouts) / len(rollouts),
        END_INSIDE.name: float(num_with_ends_inside([rollout.completion.token_ids for rollout in rollouts], end_ids)),
        TIMEOUTS.name: float(statuses.count("timeout")),
        FAILURES.name: float(sum(statuses.count(why) for why in ("died", "unparsable", "invalid"))),
        TOO_LONG.name: float(statuses.count("too_long")),
        UNJUDGED_SHARE.name: 1.0 - len(judged) / len(rollouts),
    }
    if usage is not None:  # what was sampled while this step was waited for, whichever step's
        metrics |= {GENERATED.name: float(usage.num_tokens), GENERATING.name: usage.busy_seconds}
    return metrics


def num_with_ends_inside(rows: Many[TokenIds], end_ids: Collection[int]) -> int:
    """How many hold one of the tokens before their last."""
    import numpy as np

    token_ids = TokenIds.joined(rows).array
    ends = np.cumsum([len(row) for row in rows])
    places = np.concatenate([(token_ids == end).nonzero()[0] for end in end_ids] or [ends[:0]])
    of_rows = np.searchsorted(ends, places, side="right")
    return int(np.unique(of_rows[places != ends[of_rows] - 1]).size)


def staleness_metrics(groups: Many[RolloutGroup]) -> dict[str, float]:
    """How old the tokens of a step's rollouts are when it trains on them; where versions are known by token also of the oldest
    one, and how many rollouts have several versions."""
    rollouts = [(group.step, rollout.completion) for group in groups for rollout in group.rollouts]
    ages = [(step - version, count) for step, completion in rollouts for version, count in completion.by_version]
    metrics = {STALENESS.name: sum(age * count for age, count in ages) / sum(count for _, count in ages)}
    if any(completion.spans for _, completion in rollouts):
        metrics[STALENESS_MAX.name] = float(max(age for age, _ in ages))
        metrics[UPDATED_SHARE.name] = sum(len(completion.spans) > 1 for _, completion in rollouts) / len(rollouts)
    return metrics


def _metrics_by_reward(groups: Many[RolloutGroup]) -> dict[str, float]:
    """What only one kind of reward has, and each one's mean where there are several."""
    verified = [rollout for group in groups if group.prompt.verifiable for rollout in group.judged]
    names = sorted({group.prompt.reward for group in groups})
    metrics = {
        reward_of(shown).name: mean([r.score.value for group in groups if group.prompt.reward == name for r in group.judged])
        for name, shown in zip(names, _shown(names), strict=True)
        if len(names) > 1
    }
    if any(group.prompt.verifiable for group in groups):
        correct = [len(rollout.completion.token_ids) for rollout in verified if rollout.score.correct]
        incorrect = [len(rollout.completion.token_ids) for rollout in verified if not rollout.score.correct]
        metrics[ACCURACY.name] = len(correct) / len(verified) if verified else math.nan
        metrics |= {CORRECT_LENGTH.name: mean(correct), INCORRECT_LENGTH.name: mean(incorrect)}
    return metrics


def _metrics_of_parts(rollouts: Many[Rollout]) -> dict[str, float]:
    """The mean of each named part over the rollouts that have it."""
    values: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, value in rollout.score.parts:
            values.setdefault(part_of(_word(name)).name, []).append(value)
    return {name: mean(values[name]) for name in sorted(values)}


def _shown(names: Many[str]) -> list[str]:
    """What rewards are called in a metric: a user's own by its last name, unless two of them share that."""
    short = [_word(re.sub(r"[^\s(*,]*:", "", name)) for name in names]
    return short if len(set(short)) == len(short) else [_word(name) for name in names]


def _word(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_")


def warn_of_endings(metrics: dict[str, float], max_tokens: int) -> None:
    """Warns where a step's rollouts do not end as they should; equal warnings are told ever more seldom (journal.py)."""
    if metrics[END_INSIDE.name]:
        log.warning(
            "rollouts hold end tokens before their last one: whatever sampled them did not stop at every end token of "
            "the model in model.path; `semion check` shows who names which"
        )
    if metrics[TRUNCATED.name] == 1.0:
        log.warning(
            "every rollout of a step was cut off at sampling.max_tokens = %d and none ended by itself: raise it, or see "
            "whether the model knows how a response ends (`semion check` shows who names which end token)",
            max_tokens,
        )


def percentile(values: Many[float], percent: int) -> float:
    """The smallest of `values` that at least this share of them does not exceed (nearest rank)."""
    return float(sorted(values)[max(0, math.ceil(percent * len(values) / 100) - 1)])


def mean(values: Many[float]) -> float:
    """Of nothing: NaN."""
    return math.fsum(values) / len(values) if values else math.nan
