"""From a group of scored rollouts to one preference pair, or to none, and from marked sequences to all pairs of their
groups. Arithmetic on a group, nothing else.

Of a verifiable prompt correct is a reward above 0; the rewards of any other are degrees, compared within the group. A
rollout that could not be judged is neither correct nor wrong, best nor worst. One that was cut off at sampling.max_tokens is
never chosen, unless algorithm.choose_truncated asks for it: raising the likelihood of a text without an end teaches to write
on; it can be rejected. Wherever several rollouts or pairs would do equally well, a draw decides that is a pure function of
(run seed, step, prompt id, first sample index): no order of samples is preferred.

Shape legend: P pairs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from engine.core.errors import NumericsError
from engine.core.registry import called, load_function
from engine.core.seeds import counted_seed
from engine.core.types import Rollout, RolloutGroup

if TYPE_CHECKING:
    import torch

OPTION = "algorithm.pairing"
Pair = tuple[Rollout, Rollout]
Pairing = Callable[[RolloutGroup, random.Random], Any]  # a user's own; what it returns is checked


def correct_and_wrong(group: RolloutGroup) -> tuple[list[Rollout], list[Rollout]]:
    """The judged rollouts with a reward above 0, and the others. Raises NumericsError for a reward that is not finite."""
    judged = group.judged
    for rollout in judged:
        if not math.isfinite(rollout.score.value):
            raise NumericsError(
                f"the reward of sample {rollout.completion.sample_index} of prompt {group.prompt.id} must be finite; found "
                f"{rollout.score.value}: mend the reward function"
            )
    correct = [rollout for rollout in judged if rollout.score.correct]
    return correct, [rollout for rollout in judged if not rollout.score.correct]


def better_and_worse(group: RolloutGroup, choose_truncated: bool = False) -> tuple[list[Rollout], list[Rollout]]:
    """The two sides of GroupDPO: correct and wrong (paper, equation 4); of a prompt that is not verifiable, the judged
    rollouts with a reward above the group's mean, and the others (ours: for rewards of 0 and 1 it is the same). A better one
    that was cut off is on neither side unless `choose_truncated`."""
    correct, wrong = correct_and_wrong(group)
    if group.prompt.verifiable or not group.judged:
        return _choosable(correct, choose_truncated), wrong
    mean = math.fsum(rollout.score.value for rollout in group.judged) / len(group.judged)
    above = [rollout for rollout in group.judged if rollout.score.value > mean]
    worse = [rollout for rollout in group.judged if rollout.score.value <= mean]
    return _choosable(above, choose_truncated), worse


def _choosable(rollouts: list[Rollout], choose_truncated: bool) -> list[Rollout]:
    """Those that may be the chosen ones of a pair."""
    return [rollout for rollout in rollouts if choose_truncated or not rollout.completion.truncated]


def preference_pair(group: RolloutGroup, pairing: str, run_seed: int, choose_truncated: bool = False) -> Pair | None:
    """(chosen, rejected), or None where the group has no such pair. A prompt that is not verifiable has `best_worst`,
    whichever of ours `pairing` names.

    `random`: one drawn from the correct rollouts, one from the wrong (paper, verifiable task). `best_worst`: the highest
    reward and the lowest, which is also the largest margin of rewards (paper, non-verifiable task); None where all are
    equal. `length_matched`: of all correct and wrong, the two whose numbers of tokens are closest. A user's own is a function
    of the group and a seeded random.Random, and returns two of `group.judged` or None; it is asked for every prompt, and
    decides itself about what was cut off. What else it returns is a NumericsError that names it.
    """
    first = group.rollouts[0].completion.sample_index
    draw = random.Random(counted_seed(run_seed, "pair", group.step, group.prompt.id, first))
    correct, wrong = correct_and_wrong(group)
    own = pairing_function(pairing)
    if own is not None:
        return _checked(pairing, called(pairing, OPTION, own, group, draw), group) if group.judged else None
    if pairing == "best_worst" or not group.prompt.verifiable:
        best, worst = extremes(group, choose_truncated)
        differ = bool(best) and best[0].score.value > worst[0].score.value
        return (draw.choice(best), draw.choice(worst)) if differ else None
    correct = _choosable(correct, choose_truncated)
    if not correct or not wrong:
        return None
    if pairing == "random":
        return draw.choice(correct), draw.choice(wrong)
    distances = {(i, j): abs(_length(c) - _length(w)) for i, c in enumerate(correct) for j, w in enumerate(wrong)}
    least = min(distances.values())
    i, j = draw.choice([places for places, distance in distances.items() if distance == least])
    return correct[i], wrong[j]


def pairing_function(name: str) -> Pairing | None:
    """The user's own behind `name`; None for one of ours."""
    if ":" not in name:
        return None
    function: Pairing = load_function(name, OPTION, "group", "draw")
    return function


def _checked(name: str, pair: Any, group: RolloutGroup) -> Pair | None:
    if pair is None:
        return None
    both = tuple(pair) if isinstance(pair, (tuple, list)) else (pair,)
    places = [i for one in both for i, rollout in enumerate(group.judged) if rollout is one]
    if len(both) != 2 or len(set(places)) != 2:
        raise NumericsError(
            f"{OPTION} = {name!r} must return (chosen, rejected), two different rollouts of group.judged, or None; found "
            f"{len(both)} values for prompt {group.prompt.id}, {len(set(places))} of them of its group: mend the function"
        )
    return group.judged[places[0]], group.judged[places[1]]


def extremes(group: RolloutGroup, choose_truncated: bool = True) -> tuple[list[Rollout], list[Rollout]]:
    """The judged rollouts of the highest reward, and those of the lowest; the same ones where all rewards are equal. Without
    `choose_truncated` the highest is that of the rollouts that ended by themselves."""
    judged = list(group.judged)
    choosable = _choosable(judged, choose_truncated)
    highest = max((rollout.score.value for rollout in choosable), default=0.0)
    lowest = min((rollout.score.value for rollout in judged), default=0.0)
    best = [rollout for rollout in choosable if rollout.score.value == highest]
    return best, [rollout for rollout in judged if rollout.score.value == lowest]


def all_pairs(groups: Sequence[int], chosen: Sequence[bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """(pairs [P, 2] int64, weights [P] float32) of sequences with a group each: places of every chosen one with every
    rejected one of the same group, each weighing 1 / number of pairs of that group. A group of -1 has none.

    Source: paper, equation 4; a group of two is one pair of weight 1.
    """
    import torch

    pairs: list[tuple[int, int]] = []
    weights: list[float] = []
    for group in dict.fromkeys(groups):
        members = [place for place, other in enumerate(groups) if other == group >= 0]
        here = [(c, r) for c in members if chosen[c] for r in members if not chosen[r]]
        pairs += here
        weights += [1 / len(here) for _ in here]
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2), torch.tensor(weights, dtype=torch.float32)


def _length(rollout: Rollout) -> int:
    return len(rollout.completion.token_ids)
