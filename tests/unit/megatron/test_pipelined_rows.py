"""How many rows a pipeline has: against every number of rows there could be, and rows in the order in which they cost least."""

from __future__ import annotations

import random

import pytest

from engine.config.options import Trainer
from engine.megatron import dealing
from engine.megatron.outlines import Costs, Outline
from engine.megatron.pipeline import replay_works
from engine.megatron.pipelined_rows import ROW_COST_TOKENS, PipelinedRows, best_number
from tools.scale_balance import ATTENTION, LONG, ROW_TOKENS, SHORT, Case, drawn

COSTS = Costs(True, ATTENTION)


def ranks_of(case: Case, trainer: Trainer, outlines: list[Outline]) -> tuple[list[PipelinedRows], int]:
    """(The ranks as `pack_rows` has them, the fewest rows.)"""
    parts = dealing.split_over_ranks(outlines, case.data_parallel, COSTS)
    few = [dealing._first_fit(part, (), (), trainer, COSTS) for part in parts]
    ranks = [
        PipelinedRows(dealing._dealable(part, (), (), COSTS), rows, (), trainer.microbatch_tokens, trainer, COSTS)
        for part, rows in zip(parts, few, strict=True)
    ]
    together = case.pipeline_parallel if case.virtual_pipeline > 1 else 1
    return ranks, -(-max(map(len, few)) // together) * together


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
    trainer = Trainer(
        data_parallel=case.data_parallel,
        pipeline_parallel=case.pipeline_parallel,
        virtual_pipeline=case.virtual_pipeline,
        microbatch_tokens=ROW_TOKENS[lengths],
    )
    outlines = drawn(case, lengths, random.Random(0))
    ranks, least = ranks_of(case, trainer, outlines)
    number = best_number(ranks, least, trainer)
    step = case.pipeline_parallel if case.virtual_pipeline > 1 else 1
    shortest = min(max(rank.rows(other)[1] for rank in ranks) for other in range(least, 3 * number, step))
    dealt = dealing.deal_rows(outlines, trainer, COSTS)
    assert {len(rows) for rows in dealt.rows} == {number}
    works = [[COSTS.work(row) + ROW_COST_TOKENS for row in rows] for rows in dealt.rows]
    longest = max(replay_works(own, case.pipeline_parallel, case.virtual_pipeline) for own in works)
    assert longest <= 1.02 * shortest


@pytest.mark.parametrize("chunks", [1, 2])
def test_small_rows_stand_where_a_pipeline_fills_and_drains(chunks):
    """Of eight sequences, one ten times as long as the least; in any order drawn the rows take no less."""
    trainer = Trainer(pipeline_parallel=4, virtual_pipeline=chunks, microbatch_tokens=4096)
    draw = random.Random(0)
    outlines = [Outline(i, 10, 200 + 300 * i, -1, i) for i in range(8)]
    rank = PipelinedRows([[[one] for one in outlines]], [], (), 4096, trainer, COSTS)
    rows, seconds = rank.rows(8)
    works = [COSTS.work(row) + ROW_COST_TOKENS for row in rows]
    assert seconds == replay_works(works, 4, chunks)
    others = [replay_works(draw.sample(works, 8), 4, chunks) for _ in range(300)]
    assert seconds <= 1.03 * min(others) < 1.2 * seconds < max(others)


def test_rows_of_spread_groups_stay_the_first():
    """Two sequences of a spread group, which are neither the smallest nor the largest, and six others."""
    trainer = Trainer(pipeline_parallel=4, microbatch_tokens=4096)
    spread = [Outline(i, 10, 1300, 7, i) for i in range(2)]
    others = [Outline(i, 10, 300 * i, -1, i) for i in range(2, 8)]
    rank = PipelinedRows([[[one] for one in spread], [[one] for one in others]], [], {7}, 4096, trainer, COSTS)
    rows, _ = rank.rows(8)
    assert [[one.group for one in row] for row in rows[:2]] == [[7], [7]]
    assert [one.num_completion for row in rows[2:] for one in row] == [600, 1200, 1800, 2100, 1500, 900]
