"""Lays what may be cut from each other into so many rows of about equal work: the largest to the emptiest, or one row filled
after another. Which number of rows is best is pipelined_rows.py's question, which asks for many; so what a row costs is told by
sums over the pieces before it, and rows are lists of sequences only once they are chosen.

A piece is a group whose sequences stand in one row, or one sequence. The pieces of a unit that have one prompt share it where
they share a row: all but its last token, which each sequence begins with. What pieces of different units might share is left
out, so a row may have a little less work than is counted.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Collection
from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

from engine.megatron.balancing import WORTH_CUTTING, least_limit
from engine.megatron.outlines import Costs, Outline, units_of, whole_groups

Rows = list[list[Outline]]


@dataclass(frozen=True, slots=True)
class Laid:
    """Rows, none of them empty, and the work of each."""

    works: list[float]
    group: int  # of the first sequence there is
    rows: Callable[[], Rows]  # makes them


@dataclass(frozen=True, slots=True)
class _Part:
    """Pieces from `start` to `end`, all of one unit, with their work and tokens in a row with nothing else of that unit."""

    start: int
    end: int
    work: float
    tokens: int


class Pieces:
    """The pieces of some sequences, one at least, in their order, unit by unit."""

    def __init__(self, outlines: Many[Outline], split: Collection[int], room: int, costs: Costs) -> None:
        """`split`: groups whose sequences may be cut from each other; `room`: tokens of a row, of which no piece has more."""
        self._room, self._members, self._costs = room, list[list[Outline]](), costs
        self._group = outlines[0].group
        self._work_alone, self._tokens_alone = list[float](), list[int]()  # of a piece, with its prompt
        self._work_before, self._tokens_before = [0.0], [0]  # of the pieces before, the prompts of their units counted once
        self._begins, self._ends = list[int](), list[int]()  # of a piece: where the pieces begin and end that share its prompt
        self._work_again, self._tokens_again = list[float](), list[int]()  # of a row that begins with it, for its prompt
        self._prompt_work, self._prompt_tokens = (
            dict[int, float](),
            dict[int, int](),
        )  # of what pieces share, by where they begin
        self._units = list[_Part]()
        self._known: dict[int, tuple[list[int], float]] = {}  # limits, by numbers of rows
        for unit in units_of(outlines, costs):
            self._add(unit, split)
        self.work = self._work_before[-1]

        assert all(tokens <= room for tokens in self._tokens_alone), "a sequence is refused and a group split that fits no row"

    def _add(self, unit: list[Outline], split: Collection[int]) -> None:
        pieces = whole_groups(unit, split)
        first, end, costs = len(self._members), len(self._members) + len(pieces), self._costs
        self._members += pieces
        if len(pieces) > 1 and costs.shares_prompts and all(one.prompt == unit[0].prompt for one in unit):
            self._add_sharing(pieces, first)
        else:
            for piece in pieces:
                work, tokens = costs.size(piece)
                self._work_alone.append(work)
                self._tokens_alone.append(tokens)
                self._work_before.append(self._work_before[-1] + work)
                self._tokens_before.append(self._tokens_before[-1] + tokens)
            self._begins += range(first, end)
            self._ends += range(first + 1, end + 1)
            self._work_again += [0.0] * len(pieces)
            self._tokens_again += [0] * len(pieces)
        work, tokens = self._work_before[end] - self._work_before[first], self._tokens_before[end] - self._tokens_before[first]
        self._units.append(_Part(first, end, work, tokens))

    def _add_sharing(self, pieces: list[list[Outline]], first: int) -> None:
        attention, last = self._costs.attention, first + len(pieces) - 1
        prompt = pieces[0][0].num_prompt - 1
        prompt_work = prompt + attention * (prompt**2 / 2)
        before_work, before_tokens = self._work_before[-1] + prompt_work, self._tokens_before[-1] + prompt
        for piece in pieces:
            tokens = looks = 0
            for one in piece:
                tokens += one.num_completion
                looks += one.num_completion * (2 * prompt + one.num_completion)
            before_work += tokens + attention * (looks / 2)
            before_tokens += tokens
            self._work_before.append(before_work)
            self._tokens_before.append(before_tokens)
            work, tokens = self._costs.size(piece)
            self._work_alone.append(work)
            self._tokens_alone.append(tokens)
        more_work, more_tokens = self._alone_more(last)
        self._work_again += [0.0, *[prompt_work] * (len(pieces) - 2), more_work]
        self._tokens_again += [0, *[prompt] * (len(pieces) - 2), more_tokens]
        self._prompt_work[first], self._prompt_tokens[first] = prompt_work, prompt
        self._begins += [first] * len(pieces)
        self._ends += [last + 1] * len(pieces)

    @property
    def num_pieces(self) -> int:
        """How many there are."""
        return len(self._members)

    @property
    def num_units(self) -> int:
        """How many there would be if none were cut."""
        return len(self._units)

    @cached_property
    def largest(self) -> float:
        """The work of the largest piece."""
        return max(self._work_alone, default=0.0)

    # -- the largest to the emptiest

    @cached_property
    def _ways(self) -> list[list[_Part]]:
        """What is dealt, the largest first: units, but for those larger than a row; and, if that is different, pieces."""
        whole, cut = list[_Part](), list[_Part]()
        for unit in self._units:
            pieces = [_Part(i, i + 1, self._work_alone[i], self._tokens_alone[i]) for i in range(unit.start, unit.end)]
            whole += [unit] if unit.tokens <= self._room else pieces
            cut += pieces
        return [sorted(parts, key=lambda part: -part.work) for parts in ([whole] if len(whole) == len(cut) else [whole, cut])]

    def dealt(self, num_rows: int) -> Laid | None:
        """Units, or where that makes rows more equal pieces, the largest first to the row with the least work that has room;
        None where rows are too few. Every row keeps the given order. Units larger than a row are always cut."""
        found, least = None, math.inf
        for parts in self._ways if num_rows else ():
            rows, fullest = _largest_first(parts, num_rows, self._room)
            if rows is not None and fullest < WORTH_CUTTING * least:
                found, least = rows, fullest
        return None if found is None else self._laid(found)

    def _laid(self, found: list[list[_Part]]) -> Laid:
        rows = [sorted(row, key=lambda part: part.start) for row in found if row]
        return Laid([self._work_of_parts(row) for row in rows], self._group, lambda: [self._outlines(row) for row in rows])

    def _work_of_parts(self, row: list[_Part]) -> float:
        """With the prompts that parts of one unit share."""
        if not self._prompt_work:
            return sum(part.work for part in row)
        total = 0.0
        for begin, parts in groupby(row, lambda part: self._begins[part.start]):
            first, *others = parts
            total += self._work_together(begin, [first, *others]) if others else first.work
        return total

    def _work_together(self, begin: int, parts: list[_Part]) -> float:
        before = self._work_before
        work = sum(before[part.end] - before[part.start] for part in parts)
        return work if parts[0].start == begin else work + self._prompt_work[begin]

    def _outlines(self, parts: list[_Part]) -> list[Outline]:
        return [one for part in parts for piece in self._members[part.start : part.end] for one in piece]

    # -- as few as possible

    @cached_property
    def _few(self) -> list[list[_Part]]:
        """The most tokens first, to a row with others that share the prompt, else to the fullest row that has room (best fit
        decreasing). Units are cut as far as they are larger than a row."""
        rows, used, rising = list[list[_Part]](), list[int](), list[tuple[int, int]]()  # (tokens, row), the fewest first
        holding: dict[int, list[int]] = {}  # rows, by where the pieces begin that share a prompt
        for part in sorted(self._ways[0], key=lambda part: -part.tokens):
            begin = self._begins[part.start]
            beside, more = holding.setdefault(begin, []), part.tokens - self._prompt_tokens.get(begin, 0)
            place = next((place for place in beside if used[place] + more <= self._room), None)
            if place is None:
                more, at = part.tokens, bisect_right(rising, (self._room - part.tokens, len(rows))) - 1
                place = rising[at][1] if at >= 0 else len(rows)
                beside.append(place)
            if place == len(rows):
                rows.append([])
                used.append(0)
            else:
                rising.pop(bisect_left(rising, (used[place], place)))
            rows[place].append(part)
            used[place] += more
            insort(rising, (used[place], place))
        return rows

    @property
    def num_few(self) -> int:
        """How many rows there are at least, as far as is known."""
        least = -(-self._tokens_before[-1] // self._room)
        return least if least == self.num_filled else min(self.num_filled, len(self._few))

    def few(self) -> Laid:
        """Rows that are few and full."""
        return self._laid(self._few)

    # -- one row after another

    @cached_property
    def _whole(self) -> tuple[list[int], float]:
        """Rows filled one after another where nothing but their tokens limits them."""
        filled = self._filled(len(self._members), math.inf)
        assert filled is not None
        return filled

    @property
    def num_filled(self) -> int:
        """How many such rows there are, full ones."""
        return len(self._whole[0])

    def cut(self, num_rows: int) -> Laid | None:
        """Rows filled one after another, in the given order, each up to the least limit of work for which so many are enough;
        None where these are too few. A unit is cut where a row is full, so fewer than `num_rows` prompts are computed again."""
        return None if num_rows < self.num_filled else self._laid_out(self._limited(num_rows)[0])

    def evened(self, num_rows: int) -> Laid | None:
        """The same rows, but that each ends where what is left would be most even, within that limit; None where there are none
        such. Under a limit the last ones are left empty or small."""
        if num_rows < self.num_filled:
            return None
        limit, by_work = self._limited(num_rows)[1] * (1 + 1e-9), self._work_before  # but for how sums are rounded
        ends, start, last = list[int](), 0, len(self._members)
        for left in range(num_rows, 0, -1):
            if start == last:
                break
            free = by_work[start] - self._work_again[start]
            share = free + (self.work - by_work[start]) / left
            end = last if left == 1 else max(start + 1, bisect_right(by_work, share, start + 1) - 1)
            if end < last and by_work[end + 1] - share < share - by_work[end] and by_work[end + 1] - free <= limit:
                end += 1
            if not self._fits(start, end, limit):
                return None
            ends.append(end)
            start = end
        return self._laid_out(ends)

    def _limited(self, num_rows: int) -> tuple[list[int], float]:
        """(Where rows end, the work of the fullest) under the least limit for so many."""
        if num_rows not in self._known:
            least = max(self.largest, self.work / num_rows)
            near = self._filled(num_rows, least + self.largest) or self._whole  # as a rule that is limit enough
            found = least_limit(lambda limit: self._filled(num_rows, limit), least, near[1], 1 - WORTH_CUTTING)
            self._known[num_rows] = found or near
        return self._known[num_rows]

    def _fits(self, start: int, end: int, limit: float) -> bool:
        if end == start + 1 or (self._work(start, end) <= limit <= self._room):  # a row has no more tokens than work
            return True
        tokens = self._tokens_before[end] - self._tokens_before[start] + self._tokens_again[start] + 1
        return self._work(start, end) <= limit and tokens <= self._room

    def _laid_out(self, ends: list[int]) -> Laid:
        rows = list(pairwise((0, *ends)))
        return Laid(
            [self._work(start, end) for start, end in rows],
            self._group,
            lambda: [[one for piece in self._members[start:end] for one in piece] for start, end in rows],
        )

    def _filled(self, num_rows: int, limit: float) -> tuple[list[int], float] | None:
        """(Where rows end, the work of the fullest), none above limit and room but those of one piece; None where so many are
        too few."""
        ends, start, fullest = list[int](), 0, 0.0
        by_work, by_tokens, last = self._work_before, self._tokens_before, len(self._members)
        while start < last:
            if len(ends) == num_rows:
                return None
            free = by_work[start] - self._work_again[start]
            end = bisect_right(by_work, limit + free, start + 1) - 1
            if limit > self._room:  # else a row has room, since it has no more tokens than work
                taken = by_tokens[start] - self._tokens_again[start]
                end = min(end, bisect_right(by_tokens, self._room + taken, start + 1) - 1)
            if end <= start + 1:
                end, work = start + 1, self._work_alone[start]
            else:
                work = by_work[end] - free
                if self._ends[end - 1] > end == self._begins[end - 1] + 1:  # a piece that shares its prompt with none is larger
                    more_work, more_tokens = self._alone_more(end - 1)
                    work += more_work
                    tokens = by_tokens[end] - by_tokens[start] + self._tokens_again[start] + more_tokens
                    if work > limit or tokens > self._room:
                        end -= 1
                        work = self._work(start, end)
            ends.append(end)
            fullest = max(fullest, work)
            start = end
        return ends, fullest

    def _work(self, start: int, end: int) -> float:
        """The work of a row with the pieces from `start` to `end`."""
        if end - start == 1:
            return self._work_alone[start]
        work = self._work_before[end] - self._work_before[start] + self._work_again[start]
        last = end - 1
        return work + self._alone_more(last)[0] if self._begins[last] == last and self._ends[last] > end else work

    def _alone_more(self, place: int) -> tuple[float, int]:
        """What a unit's first piece takes more where it is by itself than where others share its prompt."""
        work = self._work_before[place + 1] - self._work_before[place]
        tokens = self._tokens_before[place + 1] - self._tokens_before[place]
        return self._work_alone[place] - work, self._tokens_alone[place] - tokens


def _largest_first(parts: list[_Part], num_rows: int, room: int) -> tuple[list[list[_Part]] | None, float]:
    """(What each row has, the work of the fullest) of parts, the largest of which comes first."""
    rows: list[list[_Part]] = [[] for _ in range(num_rows)]
    used = [0] * num_rows
    loads = [(0.0, place) for place in range(num_rows)]
    for part in parts:
        load, place = loads[0]
        if used[place] + part.tokens <= room:
            heapq.heapreplace(loads, (load + part.work, place))
        else:
            full = []
            while loads and used[loads[0][1]] + part.tokens > room:
                full.append(heapq.heappop(loads))
            if not loads:
                return None, 0.0
            load, place = heapq.heappop(loads)
            for entry in (*full, (load + part.work, place)):
                heapq.heappush(loads, entry)
        used[place] += part.tokens
        rows[place].append(part)
    return rows, max(load for load, _ in loads)
