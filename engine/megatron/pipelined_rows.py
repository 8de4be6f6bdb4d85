"""How many packed rows a pipeline takes, what is in each, and in which order: what the schedule, replayed (pipeline.py), is
shortest with. A pipeline idles less with more rows, of equal work, but each row costs something beside its tokens, and a prompt
whose samples stand in several rows is computed in each. It sees outlines, no tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from collections.abc import Sequence as Many
from dataclasses import dataclass

from engine.config.options import Trainer
from engine.megatron.outlines import Outline
from engine.megatron.pipeline import replay_many
from engine.megatron.row_filling import Laid, Pieces

# What a row costs beside its own tokens, in tokens of short sequences: the sum of two, unverified on a GPU. Products are
# computed in tiles of 128 tokens, of which a row's last is half empty on the mean. The launches of a layer's kernels, 100
# microseconds by the forecast's guess (layer_row_seconds), take as long as 50 tokens of a 405B model over eight tensor-parallel
# GPUs, and 110 of an 8B model on one.
ROW_COST_TOKENS = 128
RATIO = math.sqrt(2)  # between numbers of rows that are tried, and its root beside the best two
CLOSE = 1.01  # a rank that is so much slower than those that were looked at makes no difference
MANY = 4  # sequences of a row, of which one more or less no longer makes it unequal

Rows = list[list[Outline]]


def pipelined_rows(ranks: Many[Many[Pieces]], spread: Collection[int], trainer: Trainer) -> list[Rows]:
    """The rows of every data-parallel rank, equally many on each, in their order; some may be empty. `ranks`: of each its
    pieces by what has rows of its own; `spread`: groups whose rows stay the first ones."""
    own = [PipelinedRows(kinds, spread, trainer) for kinds in ranks]
    num_rows = best_number(own, trainer)
    return [rank.found[num_rows][1].rows() for rank in own]


@dataclass(frozen=True, slots=True)
class Ordered:
    """Rows kind by kind, the order in which a pipeline is to have them, and what each costs then; some may be empty."""

    kinds: list[Laid]
    order: list[int]
    costs: list[float]

    def rows(self) -> Rows:
        """The rows in that order."""
        made = [row for laid in self.kinds for row in laid.rows()]
        assert len(made) == sum(len(laid.works) for laid in self.kinds) <= len(self.order), (len(made), len(self.order))
        made += [[] for _ in range(len(self.order) - len(made))]
        return [made[i] for i in self.order]


class PipelinedRows:
    """The sequences of a data-parallel rank, to be laid into rows of its pipeline."""

    def __init__(self, kinds: Many[Pieces], spread: Collection[int], trainer: Trainer) -> None:
        """`kinds` and `spread`: see pipelined_rows."""
        self._kinds, self._spread = kinds, spread
        self._num_stages, self._num_chunks = trainer.pipeline_parallel, trainer.virtual_pipeline
        self.found: dict[int, tuple[float, Ordered]] = {}  # by numbers of rows that were tried: (the time, the rows)
        self.work = sum(kind.work for kind in kinds)
        self.num_pieces = sum(kind.num_pieces for kind in kinds)
        self.largest_piece = max((kind.largest for kind in kinds), default=0.0)
        self._cuttable = self.num_pieces > sum(kind.num_units for kind in kinds)

    @property
    def num_filled(self) -> int:
        """How many rows there are where one is filled after another."""
        return sum(kind.num_filled for kind in self._kinds)

    @property
    def num_few(self) -> int:
        """How many there are at least."""
        return sum(kind.num_few for kind in self._kinds)

    def ways(self, num_rows: int) -> list[Ordered]:
        """So many rows of about equal work, `num_few` or more, in the order in which a pipeline takes least: one or two ways.
        The largest unit first to the row with the least work makes rows most equal; rows that are filled one after another
        compute fewer prompts again."""
        deals = [Pieces.cut, Pieces.evened]
        if not self._cuttable or self.num_pieces <= MANY * num_rows:
            deals.append(Pieces.dealt)
        counts = self._shared_out(num_rows)
        shares = list(zip(self._kinds, counts, strict=True))
        found = [[deal(kind, count) for kind, count in shares] for deal in deals]
        return [self._ordered([laid for laid in kinds if laid], num_rows) for kinds in found if None not in kinds] or [
            self._ordered([kind.cut(count) or kind.few() for kind, count in shares], num_rows)  # one of which is few enough
        ]

    def _shared_out(self, count: int) -> list[int]:
        """So many rows among the kinds by their work, to each what it needs."""
        needed = [kind.num_filled for kind in self._kinds]
        if sum(needed) > count:
            needed = [kind.num_few for kind in self._kinds]
        assert count >= sum(needed), (count, needed)
        found, work, least = list[int](), self.work, sum(needed)
        for kind, own in zip(self._kinds, needed, strict=True):
            free, least = count - sum(found), least - own
            found.append(max(own, min(round(free * kind.work / work) if least else free, free - least)))
            work -= kind.work
        return found

    def _ordered(self, kinds: list[Laid], num_rows: int) -> Ordered:
        """While a pipeline fills and drains every stage waits for the largest row on its way, so small rows are at both ends;
        with model chunks, which rows go through in groups of as many as there are stages, the smallest group is the first one
        and all others fall."""
        costs = [work + ROW_COST_TOKENS for laid in kinds for work in laid.works]
        assert len(costs) <= num_rows, (len(costs), num_rows)
        costs += [float(ROW_COST_TOKENS)] * (num_rows - len(costs))
        num_first = sum(len(laid.works) for laid in kinds if laid.group in self._spread)
        rising = sorted(range(num_first, num_rows), key=costs.__getitem__)
        if self._num_chunks == 1:
            order = [*range(num_first), *rising[::2], *rising[1::2][::-1]]
        else:
            order = [*range(num_first), *rising[: self._num_stages], *rising[self._num_stages :][::-1]]
        return Ordered(kinds, order, [costs[i] for i in order])


def best_number(ranks: Many[PipelinedRows], trainer: Trainer) -> int:
    """How many rows make the longest of the ranks' pipelines shortest; every rank has tried it. Rows that could be cut
    anywhere, with so much work W, take about (m + (p - 1) / v) (W / m + ROW_COST_TOKENS) on p stages of v chunks, which
    is least for m^2 = W (p - 1) / (v ROW_COST_TOKENS). What is tried goes from the fewest rows, which share most prompts,
    to beyond that, and then beside the best two, on the rank with most work and on the one that is slowest where rows are
    as small as can be. A rank that then turns out to be slower than these tries the numbers too, as far as they are
    shorter."""
    waits = (trainer.pipeline_parallel - 1) / trainer.virtual_pipeline  # for the largest row, in times
    by_work = max(ranks, key=lambda rank: rank.work)
    slowest = max(ranks, key=lambda rank: rank.work + waits * rank.largest_piece)
    looked_at = [by_work] if by_work is slowest else [by_work, slowest]
    smooth = RATIO * math.sqrt(by_work.work * waits / ROW_COST_TOKENS)
    together = trainer.pipeline_parallel if trainer.virtual_pipeline > 1 else 1  # virtual stages take rows in groups
    least = together
    for rank in sorted(ranks, key=lambda rank: -rank.num_filled):
        if rank.num_filled > least:
            least = max(least, -(-rank.num_few // together) * together)
    most = max(least, min(math.ceil(smooth), max(rank.num_pieces for rank in looked_at)))
    found: dict[int, float] = {}

    def attempt(wanted: list[float]) -> int:
        numbers = [-(-round(number) // together) * together for number in wanted]
        _try([(rank, number) for number in numbers for rank in looked_at], trainer)
        found.update({number: max(rank.found[number][0] for rank in looked_at) for number in numbers})
        return min(found, key=lambda number: (found[number], number))

    numbers = [float(least)]
    while numbers[-1] * RATIO < most:
        numbers.append(numbers[-1] * RATIO)
    attempt([*numbers, most])
    shortest = sorted(found, key=lambda number: (found[number], number))[:2]  # there may be a dip beside either
    best = attempt([min(most, max(least, number * near)) for number in shortest for near in (RATIO**-0.5, RATIO**0.5)])
    while True:
        _try([(rank, best) for rank in ranks], trainer)
        last = max(ranks, key=lambda rank: rank.found[best][0])
        time = last.found[best][0]
        if time <= CLOSE * found[best]:
            return best
        looked_at.append(last)
        found[best] = time
        best = attempt([number for number, others in found.items() if others <= time])


def _try(wanted: Many[tuple[PipelinedRows, int]], trainer: Trainer) -> None:
    """Ranks try numbers of rows, as far as they have not yet."""
    new = [(rank, number) for rank, number in dict.fromkeys(wanted) if number not in rank.found]
    ways = [(rank, number, way) for rank, number in new for way in rank.ways(number)]
    times = replay_many([way.costs for _, _, way in ways], trainer.pipeline_parallel, trainer.virtual_pipeline)
    for (rank, number, way), time in zip(ways, times, strict=True):
        if number not in rank.found or time < rank.found[number][0]:
            rank.found[number] = time, way
