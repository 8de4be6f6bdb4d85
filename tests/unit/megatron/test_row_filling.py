"""Rows of what may be cut from each other: against every way to cut, and what a row is said to cost against what it costs."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from engine.megatron.balancing import WORTH_CUTTING
from engine.megatron.outlines import Costs, Outline
from engine.megatron.row_filling import Laid, Pieces
from tests.unit.megatron.outlines import COSTS, outline_lists

ROOM = 10_000
GROUP = 1 / 2  # of a row: what a group has at most that stays whole


def pieces_of(outlines: list[Outline], costs: Costs, room: int) -> Pieces:
    """Groups of more than a part of a row are split."""
    groups = {one.group: [other for other in outlines if other.group == one.group] for one in outlines if one.group >= 0}
    split = {group for group, members in groups.items() if costs.num_tokens(members) > GROUP * room}
    return Pieces(outlines, split, room, costs)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(1, 5), st.integers(0, 8))
def test_rows_filled_one_after_another_are_within_a_hundredth_of_the_best_cuts(
    lengths: list[int], num_rows: int, same: int
) -> None:
    """The plain form tries every place to cut at. The first `same` sequences are samples of one prompt of 20 tokens."""
    costs = Costs(True)
    outlines = [Outline(i, 20, length, -1, 0 if i < same else i) for i, length in enumerate(lengths)]
    places = range(1, len(lengths))
    ways = (cuts for count in range(min(num_rows, len(lengths))) for cuts in combinations(places, count))
    laid = ([outlines[a:b] for a, b in pairwise((0, *cuts, len(lengths)))] for cuts in ways)
    least = min(max(map(costs.work, rows)) for rows in laid)
    pieces = Pieces(outlines, (), ROOM, costs)
    found = pieces.cut(num_rows)
    assert found is not None and len(found.works) <= num_rows
    assert [one for row in found.rows() for one in row] == outlines
    assert least <= max(found.works) <= least / WORTH_CUTTING
    if (evened := pieces.evened(num_rows)) is not None:
        assert [one for row in evened.rows() for one in row] == outlines
        assert len(evened.works) <= num_rows and max(evened.works) <= max(found.works) * (1 + 1e-9)
    if max(one.num_tokens for one in outlines) < least:
        assert Pieces(outlines, (), int(least) - 1, costs).cut(num_rows) is None


@given(outline_lists(), COSTS, st.integers(1, 30), st.sampled_from((5_000, ROOM, 10 * ROOM)))
def test_every_way_has_every_sequence_once_in_rows_with_room_and_knows_what_they_cost(
    outlines: list[Outline], costs: Costs, num_rows: int, room: int
) -> None:
    pieces = pieces_of(outlines, costs, room)
    assert pieces.few().works and len(pieces.few().works) >= pieces.num_few
    for num in (num_rows, pieces.num_few, pieces.num_filled):
        ways: list[Laid | None] = [pieces.few(), pieces.dealt(num), pieces.cut(num), pieces.evened(num)]
        assert num < pieces.num_filled or ways[2] is not None
        for way in ways:
            if way is None:
                continue
            rows = way.rows()
            assert all(rows) and (way is ways[0] or len(rows) <= num)
            assert sorted(one.place for row in rows for one in row) == list(range(len(outlines)))
            assert all(costs.num_tokens(row) <= room for row in rows)
            for work, row in zip(way.works, rows, strict=True):
                assert abs(work - costs.work(row)) <= 1e-9 * work


@given(outline_lists(), COSTS, st.integers(1, 60), st.sampled_from((5_000, ROOM)))
def test_a_row_that_is_filled_ends_only_where_what_comes_next_has_no_place(
    outlines: list[Outline], costs: Costs, tenths: int, room: int
) -> None:
    """Whatever comes next, a sequence of the same prompt behind a group in the row among it."""
    pieces = pieces_of(outlines, costs, room)
    limit = max(pieces.largest, pieces.work * tenths / 60)
    found = pieces._filled(len(outlines), limit)
    assert found is not None
    bounds = [0, *found[0]]
    members = [[one for piece in pieces._members[start:end] for one in piece] for start, end in pairwise(bounds)]
    for row, end in zip(members, bounds[1:-1], strict=False):
        work, tokens = costs.size([*row, *pieces._members[end]])
        assert work > limit * (1 - 1e-9) or tokens > room
    assert found[1] <= limit * (1 + 1e-9)


def test_a_group_and_other_sequences_of_its_prompt_share_a_row() -> None:
    """A pair of 40 tokens and four samples of its prompt, of 24 more each, in two rows of about 84."""
    outlines = [Outline(0, 11, 15, 0, 0), Outline(1, 11, 15, 0, 0), *(Outline(i, 11, 24, -1, 0) for i in range(2, 6))]
    found = Pieces(outlines, (), 100, Costs(True)).cut(2)
    assert found is not None
    assert [[one.place for one in row] for row in found.rows()] == [[0, 1, 2], [3, 4, 5]]
    assert found.works == [64, 82]
