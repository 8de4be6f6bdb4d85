"""How many packed rows a pipeline takes, what is in each, and in which order: what the schedule, replayed (pipeline.py), is
shortest with. A pipeline idles less with more rows, of equal work, but each row costs something beside its tokens, and a prompt
whose samples stand in several rows is computed in each. It sees outlines, no tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from collections.abc import Sequence as Many

from engine.config.options import Trainer
from engine.megatron.balancing import Unit, cut_to_rows, deal_to_rows
from engine.megatron.outlines import Costs, Outline
from engine.megatron.pipeline import replay_works

# What a row costs beside its own tokens, in tokens of short sequences: the sum of two, unverified on a GPU. Products are
# computed in tiles of 128 tokens, of which a row's last is half empty on the mean. The launches of a layer's kernels, 100
# microseconds by the forecast's guess (layer_row_seconds), take as long as 50 tokens of a 405B model over eight tensor-parallel
# GPUs, and 110 of an 8B model on one.
ROW_COST_TOKENS = 128
RATIO = math.sqrt(2)  # between numbers of rows that are tried, and its root next to the best: the time is flat there
MANY = 4  # sequences of a row, of which one more or less no longer makes it unequal

Rows = list[list[Outline]]


class PipelinedRows:
    """The sequences of a data-parallel rank, to be laid into rows of its pipeline."""

    def __init__(
        self,
        kinds: Many[list[list[Outline]]],
        few: Rows,
        spread: Collection[int],
        room: int,
        trainer: Trainer,
        costs: Costs,
    ) -> None:
        """`kinds`: units by what has rows of its own; `few`: as few rows as first fit makes of them; `spread`: groups whose
        rows stay the first ones; `room`: tokens of a row at most."""
        self._units = [[Unit(unit, costs) for unit in units] for units in kinds]
        self._works = [math.fsum(unit.work for unit in units) for units in self._units]
        self._few, self._spread, self._costs = few, spread, costs
        self._room = room
        self._num_stages, self._num_chunks = trainer.pipeline_parallel, trainer.virtual_pipeline
        self.work = sum(self._works)
        every = [unit for units in self._units for unit in units]
        self.num_pieces = sum(unit.num_pieces for unit in every)
        self.largest_piece = max((unit.largest_piece for unit in every), default=0.0)
        self._cuttable = self.num_pieces > len(every)

    def rows(self, num_rows: int) -> tuple[Rows, float]:
        """(So many rows of about equal work, some perhaps empty, in the order in which a pipeline takes least; that time, in
        the unit of works). The largest unit first to the row with the least work makes rows most equal; rows that are filled
        one after another compute fewer prompts again. Where so many are too few for both, those of first fit."""
        counts = _shared_out(num_rows, self._works)
        deals = [cut_to_rows] if self._cuttable and self.num_pieces > MANY * num_rows else [deal_to_rows, cut_to_rows]
        found = [
            self._ordered([row for rows in laid for row in rows or ()], num_rows)
            for deal in deals
            if None not in (laid := [deal(units, count, self._room) for units, count in zip(self._units, counts, strict=True)])
        ]
        return min(found or [self._ordered(self._few, num_rows)], key=lambda one: one[1])

    def _ordered(self, rows: Rows, num_rows: int) -> tuple[Rows, float]:
        """While a pipeline fills and drains every stage waits for the largest row on its way, so small rows are at both ends;
        with model chunks, which rows go through in groups of as many as there are stages, the smallest group is the first one
        and all others fall."""
        rows = rows + [[] for _ in range(num_rows - len(rows))]
        works = [self._costs.work(row) + ROW_COST_TOKENS for row in rows]
        first = [i for i, row in enumerate(rows) if row and row[0].group in self._spread]
        rising = sorted(set(range(len(rows))) - set(first), key=lambda i: (works[i], i))
        if self._num_chunks == 1:
            order = first + rising[::2] + rising[1::2][::-1]
        else:
            order = first + rising[: self._num_stages] + rising[self._num_stages :][::-1]
        return [rows[i] for i in order], replay_works([works[i] for i in order], self._num_stages, self._num_chunks)


def best_number(ranks: Many[PipelinedRows], least: int, trainer: Trainer) -> int:
    """How many rows, at least so many, make the longest of the ranks' pipelines shortest. Rows that could be cut anywhere, with
    so much work W, take about (m + (p - 1) / v) (W / m + ROW_COST_TOKENS) on p stages of v chunks, which is least for
    m^2 = W (p - 1) / (v ROW_COST_TOKENS). What is tried goes from the fewest rows, which share most prompts, to beyond that, on
    the rank with most work and on the one that is slowest where rows are as small as can be."""
    waits = (trainer.pipeline_parallel - 1) / trainer.virtual_pipeline  # for the largest row, in times
    together = trainer.pipeline_parallel if trainer.virtual_pipeline > 1 else 1  # virtual stages take rows in groups
    by_work = max(ranks, key=lambda rank: rank.work)
    slowest = max(ranks, key=lambda rank: rank.work + waits * rank.largest_piece)
    looked_at = [by_work] if by_work is slowest else [by_work, slowest]
    smooth = math.ceil(RATIO * math.sqrt(by_work.work * waits / ROW_COST_TOKENS))
    most = max(least, min(smooth, max(rank.num_pieces for rank in looked_at)))
    found: dict[int, float] = {}

    def attempt(number: float) -> None:
        rows = -(-round(number) // together) * together
        if rows not in found:
            found[rows] = max(rank.rows(rows)[1] for rank in looked_at)

    def best() -> int:
        return min(found, key=lambda number: (found[number], number))

    number = float(least)
    while number < most:
        attempt(number)
        number *= RATIO
    attempt(most)
    for number in (max(least, best() / math.sqrt(RATIO)), min(most, best() * math.sqrt(RATIO))):
        attempt(number)
    return best()


def _shared_out(count: int, works: list[float]) -> list[int]:
    """So many rows among kinds with so much work, one at least to each as long as there are any."""
    found, left = list[int](), sum(works)
    for place, work in enumerate(works):
        free, others = count - sum(found), len(works) - place - 1
        own = max(1, round(free * work / left)) if others else free
        found.append(max(0, min(own, free - others)))
        left -= work
    return found
