"""Deals the training sequences of a step to data-parallel ranks and to packed rows, always the same way for the same lengths,
groups and prompts. It sees outlines, no tokens; packing.py then writes the rows.

What is dealt is a unit: the sequences of a group, whose loss couples them, or, where prompts are shared, all that have one
prompt. A unit without a group may be cut where that balances better; its prompt is then computed once in every part.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right, insort
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from itertools import accumulate

from engine.config.options import Trainer
from engine.core.arrays import TokenIds
from engine.core.errors import ConfigError
from engine.core.types import Sequence

ROWS_PER_STAGE = 4  # a pipeline of p stages idles (p - 1) / (rows + p - 1) of its time: a fifth or less with four rows a stage
LEAST_ROW_TOKENS = 1024  # fewer make a row's products inefficient, and cost more than the pipeline gains
WORTH_CUTTING = 0.99  # of the largest share of the work: what a cut must bring it below


@dataclass(frozen=True, slots=True)
class Outline:
    """What of a sequence decides where it is laid."""

    place: int  # in the step
    num_prompt: int
    num_completion: int
    group: int
    prompt: int  # equal where the prompt's tokens are

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and completion together."""
        return self.num_prompt + self.num_completion


@dataclass(frozen=True, slots=True)
class Costs:
    """What a row costs: whether prompts are shared, and what a query's look at a key costs next to the products of a token."""

    shares_prompts: bool
    attention: float = 0.0

    def num_tokens(self, outlines: Many[Outline]) -> int:
        """Tokens of a row with these sequences. A shared prompt counts once, without its last token, which every sample begins
        with; the last token of a sample that shares predicts nothing and is left out."""
        return sum(self.tokens_of(members) for members in self.by_prompt(outlines))

    def tokens_of(self, members: Many[Outline]) -> int:
        """Tokens of sequences that `by_prompt` put together."""
        if len(members) == 1:
            return members[0].num_tokens
        return members[0].num_prompt - 1 + sum(one.num_completion for one in members)

    def by_prompt(self, outlines: Many[Outline]) -> list[list[Outline]]:
        """The sequences of a row that share a prompt together, in the order of their first; one by one where none is shared."""
        if not self.shares_prompts or len(outlines) == 1:
            return [[one] for one in outlines]
        found: dict[int, list[Outline]] = {}
        for one in outlines:
            found.setdefault(one.prompt, []).append(one)
        return list(found.values())

    def work(self, outlines: Many[Outline]) -> float:
        """What a row with these sequences costs, in tokens of short sequences."""
        return self.size(outlines)[0]

    def size(self, outlines: Many[Outline]) -> tuple[float, int]:
        """(work, tokens) of a row with these sequences."""
        work, num_tokens = 0.0, 0
        for members in self.by_prompt(outlines):
            tokens = self.tokens_of(members)
            work += tokens + self.attention * self.looks_of(members)
            num_tokens += tokens
        return work, num_tokens

    def looks_of(self, members: Many[Outline]) -> float:
        """Pairs of a token and one that it attends to, of sequences that `by_prompt` put together."""
        if len(members) == 1:
            return members[0].num_tokens ** 2 / 2
        prompt = members[0].num_prompt - 1
        return prompt**2 / 2 + sum(one.num_completion * (prompt + one.num_completion / 2) for one in members)


def outlines_of(sequences: Many[Sequence]) -> list[Outline]:
    """The outlines of sequences in hand."""
    prompts: dict[TokenIds, int] = {}
    return [
        Outline(i, len(s.prompt_ids), len(s.completion_ids), s.group, prompts.setdefault(s.prompt_ids, len(prompts)))
        for i, s in enumerate(sequences)
    ]


@dataclass(frozen=True, slots=True)
class Share:
    """What one data-parallel rank is dealt of a step, with the counts of the whole step."""

    step: int
    rows: tuple[tuple[Outline, ...], ...]  # packed rows, equally many on every rank; some may be empty
    split: frozenset[int]  # groups of this rank that are split over several rows
    num_prompts: int  # all prompts of the step, skipped ones included
    num_groups: int
    num_target_tokens: int
    num_sequence_tokens: int  # a prompt counted for each of its samples
    num_saved_tokens: int  # of them, what rows do not hold since samples share prompts


def deal_step(outlines: Many[Outline], *, step: int, num_prompts: int, trainer: Trainer, attention: float = 0.0) -> list[Share]:
    """The share of every data-parallel rank, from what decides it alone. `attention`: see Costs. ConfigError when a sequence
    exceeds trainer.microbatch_tokens."""
    costs = Costs(trainer.shares_prompts, attention)
    parts = split_over_ranks(outlines, trainer.data_parallel, costs)
    rows = pack_rows(parts, trainer, costs)
    num_tokens = sum(outline.num_tokens for outline in outlines)
    counts = {
        "num_prompts": num_prompts,
        "num_groups": len({outline.group for outline in outlines} - {-1}),
        "num_target_tokens": sum(outline.num_completion for outline in outlines),
        "num_sequence_tokens": num_tokens,
        "num_saved_tokens": num_tokens - sum(costs.num_tokens(row) for of_rank in rows for row in of_rank),
    }
    return [
        Share(step, tuple(map(tuple, own)), frozenset(split_groups(part, trainer, costs)), **counts)
        for part, own in zip(parts, rows, strict=True)
    ]


def split_over_ranks(outlines: Many[Outline], num_ranks: int, costs: Costs) -> list[list[Outline]]:
    """Deals sequences to ranks, all of a group to one rank, the largest unit to the least loaded rank first, or fitted where
    that is more even.

    Every rank's sequences keep the given order; ties go to the lower rank.
    """
    dealt = _deal(units_of(outlines, costs), num_ranks, costs)
    assert dealt is not None, "a rank has room for everything"
    return dealt


def pack_rows(parts: Many[Many[Outline]], trainer: Trainer, costs: Costs) -> list[list[list[Outline]]]:
    """The packed rows of every data-parallel rank, of at most trainer.microbatch_tokens, equally many on each; a rank with
    fewer sequences has empty ones. A group's sequences stand in one row where they fit. ConfigError for a sequence that is
    larger than a row.

    Without a pipeline rows are as few as first fit makes them. A pipeline idles less with more, of equal work: there are
    ROWS_PER_STAGE a stage where each has LEAST_ROW_TOKENS, unless every row is padded to its largest length.
    """
    rows = [_first_fit(part, trainer, costs) for part in parts]
    together = trainer.pipeline_parallel if trainer.virtual_pipeline > 1 else 1  # virtual stages take rows in groups
    num_rows = max(1, *map(len, rows))
    if trainer.pipeline_parallel > 1 and trainer.row_multiple < trainer.microbatch_tokens:
        largest = max(costs.num_tokens(part) for part in parts)
        num_rows = max(num_rows, min(ROWS_PER_STAGE * trainer.pipeline_parallel, largest // LEAST_ROW_TOKENS))
        num_rows = -(-num_rows // together) * together
        rows = [_equal_rows(part, num_rows, trainer, costs) or few for part, few in zip(parts, rows, strict=True)]
    num_rows = -(-num_rows // together) * together
    return [own + [[] for _ in range(num_rows - len(own))] for own in rows]


def split_groups(outlines: Many[Outline], trainer: Trainer, costs: Costs) -> set[int]:
    """The groups that are larger than a row, and so are split over several."""
    groups: dict[int, list[Outline]] = {}
    for one in outlines:
        if one.group >= 0:
            groups.setdefault(one.group, []).append(one)
    return {group for group, members in groups.items() if costs.num_tokens(members) > room_of(trainer)}


def room_of(trainer: Trainer) -> int:
    """The most tokens of a row, which is a multiple of trainer.row_multiple."""
    return trainer.microbatch_tokens - trainer.microbatch_tokens % trainer.row_multiple


def units_of(outlines: Many[Outline], costs: Costs) -> list[list[Outline]]:
    """What is dealt together, at the place of its first sequence."""
    units: dict[tuple[str, int], list[Outline]] = {}
    of_prompt = {one.prompt: ("group", one.group) for one in reversed(outlines) if one.group >= 0}
    for one in outlines:
        assert one.num_prompt and one.num_completion, "a sequence needs a prompt and a completion"
        if one.group >= 0:
            key = ("group", one.group)
        elif costs.shares_prompts:
            key = of_prompt.get(one.prompt, ("prompt", one.prompt))
        else:
            key = ("place", one.place)
        units.setdefault(key, []).append(one)
    return list(units.values())


Part = tuple[list[Outline], float, int]  # with its work and its tokens
Chosen = list[list[int]]  # of each bin the places of its parts


class _Unit:
    """A unit, and what parts of it cost, by sums over its first sequences: a part's size is a difference of two. All of them
    are multiples of a half and far below 2^53, so it is to the bit what `Costs.size` says."""

    def __init__(self, members: list[Outline], costs: Costs) -> None:
        self._costs, self.members = costs, members
        self._alone = [one for one in members if one.group < 0]
        self.num_alone = len(self._alone)
        self._coupled = [one for one in members if one.group >= 0] if self.num_alone < len(members) else []
        prompt = members[0].num_prompt - 1
        self._shared = costs.shares_prompts and all(one.prompt == members[0].prompt for one in self._alone)
        self._prompt, self._looks = prompt, prompt**2 / 2
        self._tokens_before = list(accumulate((one.num_completion for one in self._alone), initial=0))
        looks = (one.num_completion * (prompt + one.num_completion / 2) for one in self._alone)
        self._looks_before = list(accumulate(looks, initial=0.0))

    def parts(self, most: int) -> list[Part]:
        """The unit cut into at most so many parts, its group never."""
        if most == 1 or not self._alone:
            return [(self.members, *self._costs.size(self.members))]
        size = -(-self.num_alone // most)
        parts = [self._part(start, min(start + size, self.num_alone)) for start in range(0, self.num_alone, size)]
        return [(self._coupled, *self._costs.size(self._coupled)), *parts] if self._coupled else parts

    def _part(self, start: int, end: int) -> Part:
        members = self._alone[start:end]
        if end - start == 1:
            tokens = members[0].num_tokens
            return members, tokens + self._costs.attention * (tokens**2 / 2), tokens
        if not self._shared:
            return members, *self._costs.size(members)
        tokens = self._prompt + self._tokens_before[end] - self._tokens_before[start]
        looks = self._looks + (self._looks_before[end] - self._looks_before[start])
        return members, tokens + self._costs.attention * looks, tokens


def _deal(units: list[list[Outline]], num_bins: int, costs: Costs, room: int | None = None) -> list[list[Outline]] | None:
    """Deals units to bins, with the fewest cuts that balance the work; None where bins of `room` tokens each are too few. Every
    bin keeps the given order."""
    parts, chosen, fullest = _cut([_Unit(unit, costs) for unit in units], num_bins, room)
    if chosen is None:
        return None
    if room is None:
        chosen = _fitted(parts, num_bins, fullest) or chosen
    return [[one for i in sorted(indices) for one in parts[i][0]] for indices in chosen]


def _cut(units: list[_Unit], num_bins: int, room: int | None) -> tuple[list[Part], Chosen | None, float]:
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


def _fitted(parts: list[Part], num_bins: int, fullest: float) -> Chosen | None:
    """Another dealing, whose fullest bin has so much less work than `fullest` that it is WORTH_CUTTING; None where none is
    found. Where bins have two or three parts each, the largest part to the least loaded bin is up to a fifth off.

    MULTIFIT (Coffman, Garey, Johnson 1978): the least limit, by bisection, into which all parts fit, the largest first, each
    where the least is left over it.
    """
    works = [work for _, work, _ in parts]
    least = max(max(works, default=0.0), math.fsum(works) / num_bins)
    found, low, high = None, least, WORTH_CUTTING * fullest
    order = _by_work(parts)
    while high - low > (1 - WORTH_CUTTING) / 2 * least:
        limit = high if found is None else (low + high) / 2
        chosen, fullest = _best_fit(works, order, num_bins, limit)
        if chosen is not None:
            found, high = chosen, fullest
        elif found is None:
            return None
        else:
            low = limit
    return found


def _best_fit(works: list[float], order: list[int], num_bins: int, limit: float) -> tuple[Chosen | None, float]:
    """(What each bin has, the work of the fullest); None where bins of so much work are too few."""
    chosen: Chosen = [[] for _ in range(num_bins)]
    loads = [(0.0, place) for place in range(num_bins)]  # rising
    for i in order:
        at = bisect_right(loads, (limit - works[i], num_bins)) - 1  # the fullest that has room for it
        if at < 0:
            return None, 0.0
        load, place = loads.pop(at)
        insort(loads, (load + works[i], place))
        chosen[place].append(i)
    return chosen, loads[-1][0]


@dataclass
class _Open:
    """A row that takes more."""

    outlines: list[Outline] = field(default_factory=list)
    used: int = 0
    prompts: dict[int, list[Outline]] = field(default_factory=dict)

    def growth(self, unit: list[Outline], size: int, costs: Costs) -> int:
        """Tokens that it grows by; `size`: what the unit takes by itself."""
        if not costs.shares_prompts or self.prompts.keys().isdisjoint([one.prompt for one in unit]):
            return size
        total = 0
        for members in costs.by_prompt(unit):
            there = self.prompts.get(members[0].prompt, [])
            total += costs.tokens_of(there + members) - (costs.tokens_of(there) if there else 0)
        return total

    def take(self, unit: list[Outline], size: int, costs: Costs) -> None:
        """Adds the unit."""
        self.used += self.growth(unit, size, costs)
        self.outlines += unit
        for one in unit:
            self.prompts.setdefault(one.prompt, []).append(one)


def _first_fit(outlines: Many[Outline], trainer: Trainer, costs: Costs) -> list[list[Outline]]:
    """As few rows as first fit in the given order makes. The sequences of a unit that is larger than a row are laid out one by
    one, those of a group that is not together."""
    rows: list[_Open] = []
    room, units = room_of(trainer), units_of(outlines, costs)
    if outlines and costs.num_tokens(outlines) <= room:
        return [[one for unit in units for one in unit]]
    split = split_groups(outlines, trainer, costs)

    def place(unit: list[Outline], size: int) -> None:
        least = sum(one.num_completion - 1 for one in unit)  # where the prompts are there already
        fitting = (row for row in rows if row.used + least <= room and row.used + row.growth(unit, size, costs) <= room)
        chosen = next(fitting, None)
        if chosen is None:
            rows.append(chosen := _Open())
        chosen.take(unit, size, costs)

    for unit in units:
        if (size := costs.num_tokens(unit)) <= room:
            place(unit, size)
            continue
        for part in _whole_groups(unit, split):
            if len(part) == 1 and part[0].num_tokens > room:
                multiple, size = trainer.row_multiple, part[0].num_tokens
                raise ConfigError(
                    f"trainer.microbatch_tokens must hold a sequence; found {room} < {size}: raise it "
                    f"to {-(-size // multiple) * multiple}, or shorten data.max_prompt_tokens or sampling.max_tokens"
                )
            place(part, costs.num_tokens(part))
    return [row.outlines for row in rows]


def _whole_groups(unit: list[Outline], split: set[int]) -> list[list[Outline]]:
    """The sequences of a unit one by one, those of a group that is not split together."""
    together = [one for one in unit if one.group >= 0 and one.group not in split]
    return ([together] if together else []) + [[one] for one in unit if one.group < 0 or one.group in split]


def _equal_rows(outlines: Many[Outline], num_rows: int, trainer: Trainer, costs: Costs) -> list[list[Outline]] | None:
    """So many rows of about equal work; None where they are too few for that."""
    room, split = room_of(trainer), split_groups(outlines, trainer, costs)
    parts = []
    for unit in units_of(outlines, costs):
        parts += [unit] if costs.num_tokens(unit) <= room else _whole_groups(unit, split)
    return _deal(parts, num_rows, costs, room)
