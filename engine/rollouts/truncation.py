"""What becomes of responses that were cut off at sampling.max_tokens, and of those that come close: it stands between what was
judged, which the ledger keeps, and what a step trains on. So a ledger can be replayed under other options than it was sampled
with, and the same options give the same. Arithmetic on a group; that a cut-off response is not chosen in a pair is the business
of algorithms/pairs.py.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace

from engine.config.options import Sampling
from engine.core.metrics import Metric
from engine.core.types import Rollout, RolloutGroup, Score
from engine.rollouts.metrics import mean

TRUNCATED_CORRECT = Metric(
    "truncated_correct", "judged right although cut off, of verifiable prompts, whatever becomes of them", unit="rollouts"
)
TRUNCATED_CHANGED = Metric(
    "truncated_changed", "made wrong or left out, with sampling.truncated = 'wrong' or 'leave_out'", unit="rollouts"
)
OVERLONG_PENALTY = Metric(
    "overlong_penalty_mean", "taken from the rewards of long responses, with sampling.overlong_buffer; over the judged rollouts"
)
METRICS = (TRUNCATED_CORRECT, TRUNCATED_CHANGED, OVERLONG_PENALTY)


def treated(groups: Many[RolloutGroup], options: Sampling) -> tuple[list[RolloutGroup], dict[str, float]]:
    """The groups as the options have them trained on, and what that changed. With the defaults they are the same objects.

    `truncated` = "wrong": a judged response that was cut off is wrong whatever it says, and its reward is the lowest of its
    group's judged ones, of a verifiable prompt at most 0. "leave_out": it has the status "truncated", and so no part in any
    pair, mean or advantage. Then, with `overlong_buffer` b and max_tokens m, a response of n > m - b tokens loses
    overlong_penalty * (n - (m - b)) / b of its reward (DAPO, arXiv 2503.14476, equation 13); right stays right.
    """
    cut = [r for group in groups if group.prompt.verifiable for r in group.judged if r.completion.truncated]
    metrics = {TRUNCATED_CORRECT.name: float(sum(rollout.score.correct for rollout in cut))}
    if options.truncated != "judge":
        changed = [_cut_off(group, options.truncated) for group in groups]
        metrics[TRUNCATED_CHANGED.name] = float(sum(_differing(*both) for both in zip(groups, changed, strict=True)))
        groups = changed
    if options.overlong_buffer:
        penalties = [[_penalty(r, options) for r in group.rollouts] for group in groups]
        metrics[OVERLONG_PENALTY.name] = mean([_penalty(r, options) for group in groups for r in group.judged])
        groups = [_lowered(group, own) for group, own in zip(groups, penalties, strict=True)]
    return list(groups), metrics


def _cut_off(group: RolloutGroup, treatment: str) -> RolloutGroup:
    """The group with its judged, cut-off responses made wrong or left out."""
    values = [rollout.score.value for rollout in group.judged]

    def changed(rollout: Rollout) -> Rollout:
        if rollout.score.status != "ok" or not rollout.completion.truncated:
            return rollout
        if treatment == "leave_out":
            return Rollout(rollout.completion, replace(rollout.score, status="truncated"))
        lowest = min(0.0, *values) if group.prompt.verifiable else min(values)
        right = None if rollout.score.right is None else False
        return Rollout(rollout.completion, replace(rollout.score, value=lowest, right=right))

    return replace(group, rollouts=tuple(map(changed, group.rollouts)))


def _penalty(rollout: Rollout, options: Sampling) -> float:
    """What the response loses for its length; 0 up to the buffer, overlong_penalty at max_tokens."""
    over = len(rollout.completion.token_ids) - (options.max_tokens - options.overlong_buffer)
    return options.overlong_penalty * min(1.0, max(0, over) / options.overlong_buffer)


def _lowered(group: RolloutGroup, penalties: list[float]) -> RolloutGroup:
    """The group with these taken from its rewards."""

    def score(rollout: Rollout, penalty: float) -> Score:
        value = rollout.score.value - penalty
        right = rollout.score.correct if group.prompt.verifiable else rollout.score.right
        return replace(rollout.score, value=value, right=right)

    lowered = [
        Rollout(r.completion, score(r, penalty)) if penalty else r for r, penalty in zip(group.rollouts, penalties, strict=True)
    ]
    return replace(group, rollouts=tuple(lowered))


def _differing(before: RolloutGroup, after: RolloutGroup) -> int:
    return sum(one.score != other.score for one, other in zip(before.rollouts, after.rollouts, strict=True))
