"""Balances units of a step over bins, ranks or rows, by their work: with whole units where that is even, else with units cut.

A unit without a group may be cut; its prompt is then computed once in every part. A group may be cut over ranks where its loss
can be differentiated by log-probs that several ranks have: the policy then scores its sequences first, which is a forward more
for each of them.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from functools import cached_property
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
        work, tokens = costs.size(self._coupled)
        self._scored_first = SCORED_FIRST * work if row is not None and tokens > row else 0.0
        self._group: Part = (self._coupled, work + self._scored_first, tokens)
        prompt = members[0].num_prompt - 1
        self._shared = costs.shares_prompts and all(one.prompt == members[0].prompt for one in self._alone)
        self._prompt, self._looks = prompt, prompt**2 / 2
        self._tokens_before = list(accumulate((one.num_completion for one in self._alone), initial=0))
        looks = (one.num_completion * (prompt + one.num_completion / 2) for one in self._alone)
        self._looks_before = list(accumulate(looks, initial=0.0))
        before = zip(self._tokens_before, self._looks_before, strict=True)
        self._work_before = [tokens + costs.attention * looks for tokens, looks in before]
        self._prompt_work = prompt + costs.attention * self._looks

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

    @cached_property
    def largest_piece(self) -> float:
        """The work of the largest of what may be cut from each other."""
        return max(work for _, work, _ in self.parts(len(self.members)))

    @property
    def num_pieces(self) -> int:
        """What may be cut from each other: its group, and every other sequence."""
        return bool(self._coupled) + self.num_alone

    def longest(self, start: int, work: float, tokens: int, least: int) -> tuple[int, Part]:
        """(Where it ends, the longest run of pieces from one on that has no more work and tokens), of at least so many."""
        before = int(bool(self._coupled))
        if start < before:
            fits = self._group[1] <= work and self._group[2] <= tokens
            return (1, self._group) if fits or least else (0, ([], 0.0, 0))
        first = start - before
        end = self._furthest(first, work, tokens)
        if end - first <= 1:  # one by itself costs a little more than a part of one
            end = first + (least > 0 or self._within(first, first + 1, work, tokens))
        return end + before, ((self._alone[first:end], *self.size(first, end)) if end > first else ([], 0.0, 0))

    def _furthest(self, first: int, work: float, tokens: int) -> int:
        """Where a run from `first` on ends that has no more work and tokens."""
        if not self._shared:
            fits = (end for end in range(self.num_alone, first, -1) if self._within(first, end, work, tokens))
            return next(fits, first)
        by_work = bisect_right(self._work_before, work - self._prompt_work + self._work_before[first])
        by_tokens = bisect_right(self._tokens_before, tokens - self._prompt + self._tokens_before[first])
        return max(first, min(by_work, by_tokens) - 1)

    def _within(self, first: int, end: int, work: float, tokens: int) -> bool:
        found = self.size(first, end)
        return found[0] <= work and found[1] <= tokens

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


def deal_to_rows(units: list[Unit], num_rows: int, room: int) -> list[list[Outline]] | None:
    """Deals units, or where that makes rows more equal their sequences, to rows of at most `room` tokens, the largest first to
    the row with the least work that has room; None where rows are too few. Every row keeps the given order. Units that are
    larger than a row are always cut."""
    found, least = None, math.inf
    for whole in (True, False):
        parts = [part for unit in units for part in unit.parts(1 if whole and unit.tokens <= room else len(unit.members))]
        chosen, fullest = _largest_first(parts, num_rows, room) if num_rows else (None, 0.0)
        if chosen is not None and fullest < WORTH_CUTTING * least:
            found, least = _bins_of(parts, chosen), fullest
    return found


def cut_to_rows(units: list[Unit], num_rows: int, room: int) -> list[list[Outline]] | None:
    """Fills rows of at most `room` tokens one after another, in the given order, each up to the least limit of work for which
    so many are enough; None where these are too few. A unit is cut where a row is full, so fewer than `num_rows` prompts are
    computed again."""
    if not num_rows:
        return None
    largest = max((unit.largest_piece for unit in units), default=0.0)
    least = max(largest, math.fsum(unit.work for unit in units) / num_rows)

    def attempt(limit: float) -> tuple[list[list[Outline]], float] | None:
        rows = _filled(units, limit, room)
        if len(rows) > num_rows or any(tokens > room for _, _, tokens in rows):
            return None
        return [members for members, _, _ in rows], max((work for _, work, _ in rows), default=0.0)

    whole = attempt(math.inf)
    return None if whole is None else (_least_limit(attempt, least, whole[1]) or whole)[0]


def _filled(units: list[Unit], limit: float, room: int) -> list[Part]:
    """Rows one after another, none above limit and room but those of one sequence or group that is."""
    rows: list[Part] = []
    own, load, used = list[Outline](), 0.0, 0
    for unit in units:
        start = 0
        while start < unit.num_pieces:
            start, (members, work, tokens) = unit.longest(start, limit - load, room - used, 0 if own else 1)
            own, load, used = own + members, load + work, used + tokens
            if start < unit.num_pieces:
                rows.append((own, load, used))
                own, load, used = [], 0.0, 0
    return [*rows, (own, load, used)] if own else rows


def deal_to_ranks(
    units: list[list[Outline]], num_ranks: int, costs: Costs, *, row: int | None = None, cuts_groups: bool = False
) -> list[list[Outline]]:
    """Deals units to ranks, with the fewest cuts that balance the work. Every rank keeps the given order. `row`: the tokens of
    a row; larger groups are scored first, wherever they are. `cuts_groups`: groups may be cut too, and are scored first then.
    """
    parts, chosen, fullest = _cut([Unit(unit, costs, row) for unit in units], num_ranks, None)
    assert chosen is not None, "a rank has room for everything"
    chosen, fullest = _fitted(parts, num_ranks, fullest) or (chosen, fullest)
    return (_with_groups_cut(parts, num_ranks, costs, fullest) if cuts_groups else None) or _bins_of(parts, chosen)


def _bins_of(parts: list[Part], chosen: Chosen) -> list[list[Outline]]:
    return [[one for i in sorted(indices) for one in parts[i][0]] for indices in chosen]


def _cut(units: list[Unit], num_bins: int, room: int | None) -> tuple[list[Part], Chosen | None, float]:
    """(The parts of the units, what of them each bin has, the work of the fullest), the largest part to the least loaded bin
    first."""
    found: tuple[list[Part], Chosen | None, float] = [], None, float("inf")
    most, cut = max((unit.num_alone for unit in units), default=1), 1
    while True:
        parts = [part for unit in units for part in unit.parts(cut)]
        chosen, fullest = _largest_first(parts, num_bins, room)
        if chosen is not None and fullest < WORTH_CUTTING * found[2]:
            found = parts, chosen, fullest
        # A cut takes no work away, so no bin gets below today's mean by another one.
        mean = math.fsum(work for _, work, _ in parts) / num_bins
        if cut >= most or num_bins == 1 or WORTH_CUTTING * found[2] < mean:
            return found
        cut *= 2


def _largest_first(parts: list[Part], num_bins: int, room: int | None) -> tuple[Chosen | None, float]:
    """(What each bin has, the work of the fullest.)"""
    chosen: Chosen = [[] for _ in range(num_bins)]
    used = [0] * num_bins
    loads = [(0.0, place) for place in range(num_bins)]
    for i in _by_work(parts):
        _, work, tokens = parts[i]
        if room is None:
            load, place = loads[0]
            heapq.heapreplace(loads, (load + work, place))
        else:
            full = []
            while loads and used[loads[0][1]] + tokens > room:
                full.append(heapq.heappop(loads))
            if not loads:
                return None, 0.0
            load, place = heapq.heappop(loads)
            used[place] += tokens
            for entry in (*full, (load + work, place)):
                heapq.heappush(loads, entry)
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
    return _least_limit(lambda limit: _best_fit(works, order, num_bins, limit), least, fullest)


def _least_limit(
    attempt: Callable[[float], tuple[Dealing, float] | None], least: float, fullest: float
) -> tuple[Dealing, float] | None:
    """What `attempt` gives, a dealing and its fullest bin's work, for about the least limit between `least` and `fullest` for
    which it gives one; None where none is WORTH_CUTTING."""
    found, low, high = None, least, WORTH_CUTTING * fullest
    while high - low > (1 - WORTH_CUTTING) / 2 * least:
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

    found = _least_limit(attempt, mean, fullest)
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
