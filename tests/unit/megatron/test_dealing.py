"""Every sequence of a step stands once in the rows of all ranks, whatever has rows of its own. Draws are fixed, and of sizes at
which kinds of rows compete for the number of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import chain, pairwise
from typing import Any

import pytest

from engine.config.options import Trainer
from engine.megatron import dealing
from engine.megatron.dealing import deal_step, pack_rows
from engine.megatron.outlines import Costs, Outline

NUM_DRAWS = 150


def cut(draw: random.Random, room: int) -> list[int]:
    """A row's tokens in two to five parts."""
    ends = sorted(2 * end for end in draw.sample(range(1, room // 2), draw.randint(1, 4)))
    return [b - a for a, b in pairwise((0, *ends, room))]


def drawn(draw: random.Random, num_groups: int, num_rows: int, room: int) -> list[Outline]:
    """Groups that fill one to three rows each to the last token, in their order, where the largest first often needs more rows;
    then in any order what fills so many rows more, pairs and single sequences, where the order given often needs more."""
    made: list[Outline] = []

    def add(size: int, group: int) -> None:
        prompt = draw.randint(1, min(3, size - 1))
        made.append(Outline(len(made), prompt, size - prompt, group, len(made)))

    for group in range(num_groups):
        for size in chain.from_iterable(cut(draw, room) for _ in range(draw.randint(1, 3))):
            add(size, group)
    others = list(chain.from_iterable(cut(draw, room) for _ in range(num_rows)))
    draw.shuffle(others)
    for group, size in enumerate(others, num_groups):
        pair = size > 8 and draw.random() < 0.5
        for one in (size // 2, size - size // 2) if pair else (size,):
            add(one, group if pair else -1)
    return made


def sampled(draw: random.Random, num_prompts: int, room: int) -> list[Outline]:
    """Samples of so many prompts, which a group couples or not, of a twentieth of a row or up to almost a whole one."""
    made: list[Outline] = []
    for prompt in range(num_prompts):
        length, longest = draw.randint(1, room // 8), draw.choice((room // 20, room // 4, 3 * room // 4))
        group = prompt if draw.random() < 0.9 else -1
        for _ in range(draw.choice((1, 2, 8))):
            made.append(Outline(len(made), length, draw.randint(1, longest), group, prompt))
    return made


def places(rows: list[list[Outline]]) -> list[int]:
    return sorted(one.place for row in rows for one in row)


@pytest.mark.parametrize("num_stages", range(2, 9))
def test_rows_of_spread_split_and_whole_groups_together_hold_every_sequence_once(num_stages: int) -> None:
    """Two ranks; a group is spread, split or whole by chance, but for one larger than a row, which is never whole."""
    draw = random.Random(num_stages)
    for _ in range(NUM_DRAWS):
        num_chunks, attention = draw.choice((1, 1, 2)), draw.choice((0.0, 1 / 61_000))
        trainer = Trainer(pipeline_parallel=num_stages, virtual_pipeline=num_chunks, microbatch_tokens=1024)
        costs = Costs(draw.random() < 0.7, attention)
        outlines = drawn(draw, draw.randint(1, 6), draw.randint(0, 8), 1024)
        if draw.random() < 0.2:
            outlines = sampled(draw, draw.randint(1, 16), 1024)
        groups = sorted({one.group for one in outlines} - {-1})
        spread = {group for group in groups if draw.random() < 0.5}
        parts = [[one for one in outlines if one.group % 2 == rank] for rank in (0, 1)]
        for one in outlines:
            if one.group in spread and draw.random() < 0.1:
                parts[one.group % 2].remove(one)
                parts[1 - one.group % 2].append(one)
        larger = dealing.too_large(outlines, trainer, costs)
        split = spread | larger | {group for group in groups if draw.random() < 0.2}
        dealt = pack_rows(parts, [split, split], spread, trainer, costs)
        for rows, part in zip(dealt, parts, strict=True):
            assert places(rows) == sorted(one.place for one in part)
            assert len(rows) == len(dealt[0]) and len(rows) % (num_stages if num_chunks > 1 else 1) == 0
            assert all(costs.num_tokens(row) <= 1024 for row in rows)
            kinds = [{2 - (one.group in split) - (one.group in spread) for one in row} for row in rows]
            assert all(len(kind) <= 1 for kind in kinds)
            num_first = sum(kind == {0} for kind in kinds)
            assert all(kind == {0} for kind in kinds[:num_first])


@pytest.mark.parametrize("cuts_groups", [False, True])
@pytest.mark.parametrize("room", [512, 1024, 4096])
@pytest.mark.parametrize("data_parallel", [1, 2, 4])
def test_a_step_trains_on_every_sequence_once(data_parallel: int, room: int, cuts_groups: bool) -> None:
    """With and without a pipeline; every rank is told the number of all targets."""
    draw = random.Random(room + data_parallel)
    for _ in range(NUM_DRAWS // 3):
        num_stages = draw.choice((1, 2, 3, 4, 8))
        trainer = Trainer(
            data_parallel=data_parallel,
            pipeline_parallel=num_stages,
            virtual_pipeline=draw.choice((1, 2)) if num_stages > 1 else 1,
            microbatch_tokens=room,
            share_prompts=draw.random() < 0.7,
        )
        outlines = drawn(draw, draw.randint(data_parallel, 3 * data_parallel), draw.randint(0, 4 * data_parallel), room)
        if draw.random() < 0.2:
            outlines = sampled(draw, draw.randint(1, 8 * data_parallel), room)
        attention = draw.choice((0.0, 1 / 61_000))
        shares = deal_step(outlines, step=0, num_prompts=1, trainer=trainer, attention=attention, cuts_groups=cuts_groups)
        rows = [row for share in shares for row in share.rows]
        assert sorted(one.place for row in rows for one in row) == list(range(len(outlines)))
        assert {share.num_target_tokens for share in shares} == {sum(one.num_completion for row in rows for one in row)}


@pytest.mark.parametrize("num_stages", [1, 4])
def test_a_lost_and_a_doubled_sequence_are_refused(num_stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(pipeline_parallel=num_stages, microbatch_tokens=1024)
    outlines = [Outline(i, 10, 300, -1, i) for i in range(8)]

    def deal_with(change: Callable[[list[Outline]], list[Outline]]) -> None:
        def changed(*given: Any) -> list[list[list[Outline]]]:
            return [[change(row) for row in rows] for rows in pack_rows(*given)]

        monkeypatch.setattr(dealing, "pack_rows", changed)
        deal_step(outlines, step=0, num_prompts=8, trainer=trainer)

    deal_with(lambda row: row[::-1])
    with pytest.raises(AssertionError, match=r"rows lack: \[3\]; that they have again: \[\]"):
        deal_with(lambda row: [one for one in row if one.place != 3])
    with pytest.raises(AssertionError, match=r"rows lack: \[\]; that they have again: \[3\]"):
        deal_with(lambda row: row + [one for one in row if one.place == 3])
