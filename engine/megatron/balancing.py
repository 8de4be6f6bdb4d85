"""Balances units of a step over ranks by their work: with whole units where that is even, else with units cut.

A unit without a group may be cut; its prompt is then computed once in every part. A group may be cut over ranks where its loss
can be differentiated by log-probs that several ranks have: the policy then scores its sequences first, which is a forward more
for each of them.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from itertools import accumulate
from typing import TypeVar

from engine.megatron.outlines import Costs, Outline

WORTH_CUTTING = 0.99  # of the largest share of the work: what a cut must bring it below
SCORED_FIRST = 1 / 3  # what a forward more adds to a sequence's forward and backward


Part = tuple[list[Outline], float, int]  # with its work and its tokens
Chosen = list[list[int]]  # of each bin the places of its parts
Dealing = TypeVar("Dealing")


class Unit:
    """What is dealt together as far as possible, and what parts of it cost, by sums over its first sequences: a part's size is
    a difference of two. All of them are multiples of a half and far below 2^53, so it is to the bit what `Costs.size` says."""

    def __init__(self, members: list[Outline], costs: Costs, row: int | None = None) -> None:
        """`row`: the tokens of a row; a larger group is scored first wherever it is, whole or cut."""
        self._costs, self.members = costs, members
        self._alone = [one for one in members if one.group < 0]
        self.num_alone = len(self._alone)
        self._coupled = [one for one in members if one.group >= 0] if self.num_alone < len(members) else []
        self.work, self.tokens = costs.size(members)
        work, tokens = costs.size(self._coupled) if self._alone else (self.work, self.tokens)
        self._scored_first = SCORED_FIRST * work if self._coupled and row is not None and tokens > row else 0.0
        self._group: Part = (self._coupled, work + self._scored_first, tokens)
        if self._alone:
            self._sum_up()

    def _sum_up(self) -> None:
        prompt = self.members[0].num_prompt - 1
        self._shared = self._costs.shares_prompts and all(one.prompt == self.members[0].prompt for one in self._alone)
        self._prompt, self._looks = prompt, prompt**2 / 2
        self._tokens_before = list(accumulate((one.num_completion for one in self._alone), initial=0))
        looks = (one.num_completion * (prompt + one.num_completion / 2) for one in self._alone)
        self._looks_before = list(accumulate(looks, initial=0.0))

    def parts(self, most: int) -> list[Part]:
        """The unit cut into at most so many parts, its group never."""
        if not self._alone:
            return [self._group]
        if most == 1:
            return [(self.members, self.work + self._scored_first, self.tokens)]
        size = -(-self.num_alone // most)
        parts = [self._part(start, min(start + size, self.num_alone)) for start in range(0, self.num_alone, size)]
        return [self._group, *parts] if self._coupled else parts

    def _part(self, start: int, end: int) -> Part:
        return self._alone[start:end], *self.size(start, end)

    def size(self, start: int, end: int) -> tuple[float, int]:
        """(work, tokens) of so many of its sequences that may be cut from each other."""
        if end - start == 1:
            tokens = self._alone[start].num_tokens
            return tokens + self._costs.attention * (tokens**2 / 2), tokens
        if not self._shared:
            return self._costs.size(self._alone[start:end])
        tokens = self._prompt + self._tokens_before[end] - self._tokens_before[start]
        looks = self._looks + (self._looks_before[end] - self._looks_before[start])
        return tokens + self._costs.attention * looks, tokens


def deal_to_ranks(
    units: list[list[Outline]], num_ranks: int, costs: Costs, *, row: int | None = None, cuts_groups: bool = False
) -> list[list[Outline]]:
    """Deals units to ranks, with the fewest cuts that balance the work. Every rank keeps the given order. `row`: the tokens of
    a row; larger groups are scored first, wherever they are. `cuts_groups`: groups may be cut too, and are scored first then.
    """
    parts, chosen, fullest = _cut([Unit(unit, costs, row) for unit in units], num_ranks)
    chosen, fullest = _fitted(parts, num_ranks, fullest) or (chosen, fullest)
    return (_with_groups_cut(parts, num_ranks, costs, fullest) if cuts_groups else None) or _bins_of(parts, chosen)


def _bins_of(parts: list[Part], chosen: Chosen) -> list[list[Outline]]:
    return [[one for i in sorted(indices) for one in parts[i][0]] for indices in chosen]


def _cut(units: list[Unit], num_bins: int) -> tuple[list[Part], Chosen, float]:
    """(The parts of the units, what of them each bin has, the work of the fullest), the largest part to the least loaded bin
    first."""
    found: tuple[list[Part], Chosen, float] = [], [], math.inf
    most, cut = max((unit.num_alone for unit in units), default=1), 1
    while True:
        parts = [part for unit in units for part in unit.parts(cut)]
        chosen, fullest = _largest_first(parts, num_bins)
        if fullest < WORTH_CUTTING * found[2]:
            found = parts, chosen, fullest
        # A cut takes no work away, so no bin gets below today's mean by another one.
        mean = math.fsum(work for _, work, _ in parts) / num_bins
        if cut >= most or num_bins == 1 or WORTH_CUTTING * found[2] < mean:
            return found
        cut *= 2


def _largest_first(parts: list[Part], num_bins: int) -> tuple[Chosen, float]:
    """(What each bin has, the work of the fullest), the largest part to the least loaded bin first."""
    chosen: Chosen = [[] for _ in range(num_bins)]
    loads = [(0.0, place) for place in range(num_bins)]
    for i in _by_work(parts):
        load, place = loads[0]
        heapq.heapreplace(loads, (load + parts[i][1], place))
        chosen[place].append(i)
    return chosen, max(load for load, _ in loads)


def _by_work(parts: list[Part]) -> list[int]:
    """Places of parts, the largest first; of equal ones the first."""
    return sorted(range(len(parts)), key=lambda i: -parts[i][1])


def _fitted(parts: list[Part], num_bins: int, fullest: float) -> tuple[Chosen, float] | None:
    """Another dealing and its fullest bin's work, which is so much less than `fullest` that it is WORTH_CUTTING; None where
    none is found. Where bins have two or three parts each, the largest part to the least loaded bin is up to a fifth off.

    MULTIFIT (Coffman, Garey, Johnson 1978): the least limit, by bisection, into which all parts fit, the largest first, each
    where the least is left over it.
    """
    works, order = [work for _, work, _ in parts], _by_work(parts)
    least = max(max(works, default=0.0), math.fsum(works) / num_bins)
    return least_limit(lambda limit: _best_fit(works, order, num_bins, limit), least, fullest)


def least_limit(
    attempt: Callable[[float], tuple[Dealing, float] | None],
    least: float,
    fullest: float,
    close: float = (1 - WORTH_CUTTING) / 2,
) -> tuple[Dealing, float] | None:
    """What `attempt` gives, a dealing and its fullest bin's work, for about the least limit between `least` and `fullest` for
    which it gives one, to `close` times the least; None where none is WORTH_CUTTING."""
    found, low, high = None, least, WORTH_CUTTING * fullest
    while high - low > close * least:
        limit = high if found is None else (low + high) / 2
        if (tried := attempt(limit)) is not None:
            found, high = tried, tried[1]
        elif found is None:
            return None
        else:
            low = limit
    return found


class _Bins:
    """Work that bins have been given, kept in order of it."""

    def __init__(self, num_bins: int, limit: float) -> None:
        self._limit, self._num_bins = limit, num_bins
        self.loads = [0.0] * num_bins
        self._rising = [(0.0, place) for place in range(num_bins)]

    def best(self, work: float) -> int | None:
        """The fullest that has room for so much more."""
        at = bisect_right(self._rising, (self._limit - work, self._num_bins)) - 1
        return None if at < 0 else self._rising[at][1]

    def add(self, place: int, work: float) -> None:
        """Gives it to a bin."""
        self._rising.pop(bisect_left(self._rising, (self.loads[place], place)))
        self.loads[place] += work
        insort(self._rising, (self.loads[place], place))


def _best_fit(works: list[float], order: list[int], num_bins: int, limit: float) -> tuple[Chosen, float] | None:
    """What each bin has, and the work of the fullest; None where bins of so much work are too few."""
    chosen: Chosen = [[] for _ in range(num_bins)]
    bins = _Bins(num_bins, limit)
    for i in order:
        place = bins.best(works[i])
        if place is None:
            return None
        bins.add(place, works[i])
        chosen[place].append(i)
    return chosen, max(bins.loads)


def _with_groups_cut(parts: list[Part], num_bins: int, costs: Costs, fullest: float) -> list[list[Outline]] | None:
    """Another dealing, in which groups are cut, and whose fullest bin has so much less work than `fullest`, with what is scored
    first, that it is WORTH_CUTTING; None where none is found. Under a limit whole parts are put first, as `_fitted` does, and
    then the sequences of the groups that no bin has room for, one by one, where possible beside others of their group."""
    mean = math.fsum(work for _, work, _ in parts) / num_bins
    if WORTH_CUTTING * fullest < mean:
        return None
    order = _by_work(parts)
    pieces = {i: _pieces(members, costs) for i in order if _is_group(members := parts[i][0])}
    works = [work for _, work, _ in parts]

    def attempt(limit: float) -> tuple[list[list[tuple[int, Outline]]], float] | None:
        bins, chosen, left = _Bins(num_bins, limit), [list[tuple[int, Outline]]() for _ in range(num_bins)], list[int]()
        for i in order:
            place = bins.best(works[i])
            if place is not None:
                bins.add(place, works[i])
                chosen[place] += [(i, one) for one in parts[i][0]]
            elif i in pieces:
                left.append(i)
            else:
                return None
        for i in left:
            beside: list[int] = []
            for one, alone, more in pieces[i]:
                place, work = next((place for place in beside if bins.loads[place] + more <= limit), None), more
                if place is None:
                    place, work = bins.best(alone), alone
                    if place is None:
                        return None
                    beside.append(place)
                bins.add(place, work)
                chosen[place].append((i, one))
        return chosen, max(bins.loads)

    found = least_limit(attempt, mean, fullest)
    if found is None:
        return None
    return [[one for _, one in sorted(own, key=lambda part: (part[0], part[1].place))] for own in found[0]]


def _is_group(members: list[Outline]) -> bool:
    return len(members) > 1 and all(one.group == members[0].group >= 0 for one in members)


def _pieces(members: list[Outline], costs: Costs) -> list[tuple[Outline, float, float]]:
    """Each sequence of a cut group, the largest first, with its work where none of its group is and where another one is."""
    factor, pieces = 1 + SCORED_FIRST, []
    for one in sorted(members, key=lambda one: (-one.num_tokens, one.place)):
        alone = costs.work([one])
        looks = one.num_completion * (one.num_prompt - 1 + one.num_completion / 2)
        more = one.num_completion + costs.attention * looks if costs.shares_prompts else alone
        pieces.append((one, factor * alone, factor * more))
    return pieces
