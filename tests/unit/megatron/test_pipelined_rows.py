"""How many rows a pipeline has: against every number of rows there could be, and rows in the order in which they cost least."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from engine.config.options import Trainer
from engine.forecast.lengths import LogNormal
from engine.megatron import dealing, pipelined_rows
from engine.megatron.outlines import Costs, Outline
from engine.megatron.pipeline import replay_many, replay_works
from engine.megatron.pipelined_rows import ROW_COST_TOKENS, PipelinedRows, best_number
from engine.megatron.row_filling import Pieces
from tools.scale_balance import ATTENTION, LONG, ROW_TOKENS, SHORT, Case, drawn

COSTS = Costs(True, ATTENTION)


def trainer_of(case: Case, lengths: LogNormal) -> Trainer:
    return Trainer(
        data_parallel=case.data_parallel,
        pipeline_parallel=case.pipeline_parallel,
        virtual_pipeline=case.virtual_pipeline,
        microbatch_tokens=ROW_TOKENS[lengths],
    )


def ranks_of(case: Case, trainer: Trainer, outlines: list[Outline]) -> list[PipelinedRows]:
    """The ranks as `pack_rows` has them."""
    parts = dealing.split_over_ranks(outlines, case.data_parallel, COSTS)
    split = [dealing.too_large(part, trainer, COSTS) for part in parts]
    room = trainer.microbatch_tokens
    return [PipelinedRows([Pieces(part, own, room, COSTS)], (), trainer) for part, own in zip(parts, split, strict=True)]


def shortest(rank: PipelinedRows, num_rows: int, trainer: Trainer) -> float:
    ways = [way.costs for way in rank.ways(num_rows)]
    return min(replay_many(ways, trainer.pipeline_parallel, trainer.virtual_pipeline))


def shortest_rows(rank: PipelinedRows, num_rows: int, trainer: Trainer) -> list[list[Outline]]:
    ways = rank.ways(num_rows)
    times = replay_many([way.costs for way in ways], trainer.pipeline_parallel, trainer.virtual_pipeline)
    return ways[times.index(min(times))].rows()


@pytest.mark.parametrize(
    ("case", "lengths"),
    [
        (Case("DPO", 2, 256, 4, 8, 2), SHORT),  # the 405B file's
        (Case("DPO", 2, 76, 4, 8), SHORT),  # fewer pairs than rows would be good for
        (Case("GRPO", 1, 256, 2, 4), SHORT),  # samples that share prompts
        (Case("GRPO", 1, 256, 4, 8, 2), LONG),  # sequences that are longer than a good row
    ],
)
def test_no_other_number_of_rows_is_shorter_by_two_hundredths(case, lengths):
    trainer = trainer_of(case, lengths)
    outlines = drawn(case, lengths, random.Random(0))
    ranks = ranks_of(case, trainer, outlines)
    number = best_number(ranks, trainer)
    step = case.pipeline_parallel if case.virtual_pipeline > 1 else 1
    least = -(-max(rank.num_few for rank in ranks) // step) * step
    best = min(max(shortest(rank, other, trainer) for rank in ranks) for other in range(least, 3 * number, step))
    dealt = dealing.deal_rows(outlines, trainer, COSTS)
    assert {len(rows) for rows in dealt.rows} == {number}
    works = [[COSTS.work(row) + ROW_COST_TOKENS for row in rows] for rows in dealt.rows]
    longest = max(replay_works(own, case.pipeline_parallel, case.virtual_pipeline) for own in works)
    assert longest == pytest.approx(max(rank.found[number][0] for rank in ranks))
    assert longest <= 1.02 * best


CASES = [
    (Case("DPO", 2, 256, 4, 8, 2), SHORT),
    (Case("GRPO", 1, 256, 4, 4), SHORT),
    (Case("GroupDPO", 16, 256, 4, 4, 2), SHORT),
    (Case("GRPO", 1, 256, 4, 8), LONG),
]


@pytest.mark.parametrize("times", [1, 4, 16])
@pytest.mark.parametrize(("case", "lengths"), CASES)
def test_what_is_tried_grows_with_the_logarithm_of_a_step(case, lengths, times, monkeypatch):
    """The numbers of rows that a rank tries, the limits that are tried for one of them, and the replays, which are together."""
    case = replace(case, num_sequences=times * case.num_sequences, data_parallel=times)
    trainer, fills, batches = trainer_of(case, lengths), [], []

    def filled(self, num_rows, limit):
        fills.append(num_rows)
        return fill(self, num_rows, limit)

    def replayed(candidates, num_stages, num_chunks):
        batches.append(len(candidates))
        return replay_many(candidates, num_stages, num_chunks)

    fill = Pieces._filled
    monkeypatch.setattr(Pieces, "_filled", filled)
    monkeypatch.setattr(pipelined_rows, "replay_many", replayed)
    ranks = ranks_of(case, trainer, drawn(case, lengths, random.Random(0)))
    best_number(ranks, trainer)
    numbers = sorted((len(rank.found) for rank in ranks), reverse=True)
    most = 5 + 2 * math.log2(max(max(rank.found) for rank in ranks))
    assert numbers[0] <= most
    assert sum(numbers) <= 4 * most + 2 * len(ranks)  # of few ranks all numbers, of the others the best one, rarely a second
    assert len(batches) <= 6 and sum(batches) <= 3 * sum(numbers)
    assert len(fills) <= len(ranks) + 10 * sum(numbers)


@pytest.mark.parametrize("chunks", [1, 2])
def test_small_rows_stand_where_a_pipeline_fills_and_drains(chunks):
    """Of eight sequences, one ten times as long as the least; in any order drawn the rows take no less."""
    trainer = Trainer(pipeline_parallel=4, virtual_pipeline=chunks, microbatch_tokens=4096)
    draw = random.Random(0)
    outlines = [Outline(i, 10, 200 + 300 * i, -1, i) for i in range(8)]
    rank = PipelinedRows([Pieces(outlines, (), 4096, COSTS)], (), trainer)
    seconds, rows = shortest(rank, 8, trainer), shortest_rows(rank, 8, trainer)
    works = [COSTS.work(row) + ROW_COST_TOKENS for row in rows]
    assert seconds == pytest.approx(replay_works(works, 4, chunks))
    others = [replay_works(draw.sample(works, 8), 4, chunks) for _ in range(300)]
    assert seconds <= 1.03 * min(others) < 1.2 * seconds < max(others)


def test_rows_of_spread_groups_stay_the_first():
    """Two sequences of a spread group, which are neither the smallest nor the largest, and six others."""
    trainer = Trainer(pipeline_parallel=4, microbatch_tokens=4096)
    spread = [Outline(i, 10, 1300, 7, i) for i in range(2)]
    others = [Outline(i, 10, 300 * i, -1, i) for i in range(2, 8)]
    kinds = [Pieces(spread, {7}, 4096, COSTS), Pieces(others, {7}, 4096, COSTS)]
    rows = shortest_rows(PipelinedRows(kinds, {7}, trainer), 8, trainer)
    assert [[one.group for one in row] for row in rows[:2]] == [[7], [7]]
    assert [one.num_completion for row in rows[2:] for one in row] == [600, 1200, 1800, 2100, 1500, 900]


def test_as_few_rows_as_kinds_need_together_hold_all_of_each_kind():
    """Rows of 1,000 tokens. The split group fills two in order and would take three the largest first; of the others it is the
    reverse, and the largest to the emptiest of two does not fit. So four rows are two filled ones and two full ones."""
    trainer = Trainer(pipeline_parallel=2, microbatch_tokens=1000)
    lengths = {7: (400, 300, 300, 400, 300, 300), -1: (500, 400, 500, 300, 300)}
    every = [(group, length) for group, own in lengths.items() for length in own]
    outlines = [Outline(i, 1, length - 1, group, i) for i, (group, length) in enumerate(every)]
    split, others = (Pieces([one for one in outlines if one.group == group], {7}, 1000, COSTS) for group in lengths)
    assert (split.num_few, split.num_filled, len(split.few().works)) == (2, 2, 3)
    assert (others.num_few, others.num_filled, len(others.few().works), others.dealt(2)) == (2, 3, 2, None)
    rank = PipelinedRows([split, others], (), trainer)
    (way,) = rank.ways(rank.num_few)
    rows = way.rows()
    assert sorted([one.num_tokens for one in row] for row in rows) == [[400, 300, 300]] * 2 + [[400, 300, 300], [500, 500]]
    assert sorted(one.place for row in rows for one in row) == list(range(11))
    assert way.costs == pytest.approx([COSTS.work(row) + ROW_COST_TOKENS for row in rows])
