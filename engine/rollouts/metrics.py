"""What is measured of the rollouts of a step."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence as Many

from engine.core.types import Rollout, RolloutGroup
from engine.inference.pool import Usage


def rollout_metrics(groups: Many[RolloutGroup], usage: Usage | None) -> dict[str, float]:
    """What a person watches of all rollouts sampled for a step; without `usage` nothing of how they were. The entropy is the
    mean of minus the log-prob of every sampled token, an unbiased estimate of the next-token entropy at temperature 1.

    Only of verifiable prompts, where the step has any: accuracy and the lengths of right and wrong answers. Only where there
    are several rewards: the mean of each (`reward_mean_NAME`). Only of rewards with named parts: the mean of each part
    (`reward_PART_mean`).
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = [len(rollout.completion.token_ids) for rollout in rollouts]
    judged = [rollout for group in groups for rollout in group.judged]
    statuses = [rollout.score.status for rollout in rollouts]
    metrics = {
        "reward_mean": mean([rollout.score.value for rollout in judged]),
        **_metrics_by_reward(groups),
        **_metrics_of_parts(judged),
        "rollout_entropy": -math.fsum(p for r in rollouts for p in r.completion.log_probs) / sum(lengths),
        "completion_tokens_mean": sum(lengths) / len(lengths),
        "completion_tokens_p50": percentile(lengths, 50),
        "completion_tokens_p90": percentile(lengths, 90),
        "completion_tokens_p99": percentile(lengths, 99),
        "completion_tokens_max": float(max(lengths)),
        "truncated": sum(r.completion.finish_reason == "length" for r in rollouts) / len(rollouts),
        "reward_timeouts": float(statuses.count("timeout")),
        "reward_failures": float(sum(statuses.count(why) for why in ("died", "unparsable", "invalid"))),
        "reward_too_long": float(statuses.count("too_long")),
    }
    if usage is not None:  # what was sampled while this step was waited for, whichever step's
        metrics |= {"generation_tokens": float(usage.num_tokens), "generation_seconds": usage.busy_seconds}
    return metrics


def _metrics_by_reward(groups: Many[RolloutGroup]) -> dict[str, float]:
    """What only one kind of reward has, and each one's mean where there are several."""
    verified = [rollout for group in groups if group.prompt.verifiable for rollout in group.judged]
    names = sorted({group.prompt.reward for group in groups})
    metrics = {
        f"reward_mean_{shown}": mean([r.score.value for group in groups if group.prompt.reward == name for r in group.judged])
        for name, shown in zip(names, _shown(names), strict=True)
        if len(names) > 1
    }
    if any(group.prompt.verifiable for group in groups):
        correct = [len(rollout.completion.token_ids) for rollout in verified if rollout.score.correct]
        incorrect = [len(rollout.completion.token_ids) for rollout in verified if not rollout.score.correct]
        metrics["accuracy"] = len(correct) / len(verified) if verified else math.nan
        metrics |= {"correct_tokens_mean": mean(correct), "incorrect_tokens_mean": mean(incorrect)}
    return metrics


def _metrics_of_parts(rollouts: Many[Rollout]) -> dict[str, float]:
    """The mean of each named part over the rollouts that have it."""
    values: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, value in rollout.score.parts:
            values.setdefault(f"reward_{_word(name)}_mean", []).append(value)
    return {name: mean(values[name]) for name in sorted(values)}


def _shown(names: Many[str]) -> list[str]:
    """What rewards are called in a metric: a user's own by its last name, unless two of them share that."""
    short = [_word(re.sub(r"[^\s(*,]*:", "", name)) for name in names]
    return short if len(set(short)) == len(short) else [_word(name) for name in names]


def _word(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_")


def percentile(values: Many[float], percent: int) -> float:
    """The smallest of `values` that at least this share of them does not exceed (nearest rank)."""
    return float(sorted(values)[max(0, math.ceil(percent * len(values) / 100) - 1)])


def mean(values: Many[float]) -> float:
    """Of nothing: NaN."""
    return math.fsum(values) / len(values) if values else math.nan
