"""Pipeline schedules, replayed, against the formulas for equal rows and by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.megatron.pipeline import Operation, order, replay, replay_forward, replay_many, replay_works


def equal(stage: int, operation: Operation) -> float:
    return 2.0 if operation.backward else 1.0


@pytest.mark.parametrize(("stages", "rows"), [(1, 3), (2, 2), (4, 4), (4, 16), (8, 9)])
def test_equal_rows_idle_p_minus_1_over_m(stages, rows):
    assert replay(stages, rows, 1, equal) == pytest.approx(3 * rows * (1 + (stages - 1) / rows))
    assert replay_forward(stages, rows, 1, equal) == rows + stages - 1


@pytest.mark.parametrize(("stages", "rows", "chunks"), [(2, 4, 2), (4, 8, 2), (4, 4, 2), (4, 16, 4)])
def test_chunks_divide_what_equal_rows_idle(stages, rows, chunks):
    """A stage's row takes 3 in all, a chunk of it 3 / v; the bubble is (p - 1) / (v m)."""

    def part(stage: int, operation: Operation) -> float:
        return equal(stage, operation) / chunks

    assert replay(stages, rows, chunks, part) == pytest.approx(3 * rows * (1 + (stages - 1) / (chunks * rows)))


def test_one_row_goes_through_every_stage_and_back():
    assert replay(4, 1, 1, equal, hop=0.5) == 4 * 1 + 3 * 0.5 + 4 * 2 + 3 * 0.5


def test_unequal_rows_by_hand():
    """Two stages, rows of 1 and 3 (backward twice as long). Stage 0: F0 0-1, F1 1-4. Stage 1: F0 1-2, B0 2-4, F1 4-7, B1 7-13.
    Stage 0 goes on with B0 4-6 and B1 13-19."""

    def cost(stage: int, operation: Operation) -> float:
        return (1.0, 3.0)[operation.row] * (2 if operation.backward else 1)

    assert replay(2, 2, 1, cost) == 19.0


def test_the_warm_up_is_megatrons():
    """get_pp_rank_microbatches: p - r - 1 forwards, with v chunks 2 (p - r - 1) + (v - 1) p; one more before a backward."""
    for stage in range(4):
        behind = 4 - stage - 1
        for chunks, warm_up in ((1, behind), (2, 2 * behind + 4), (3, 2 * behind + 8)):
            operations = order(stage, 4, 16, chunks)
            assert next(place for place, op in enumerate(operations) if op.backward) == warm_up + 1


def test_a_stage_computes_everything_once():
    for stage in range(4):
        operations = order(stage, 4, 8, 2)
        assert len(operations) == len(set(operations)) == 2 * 8 * 2
        assert all(operations.index(op._replace(backward=False)) < operations.index(op) for op in operations if op.backward)


@pytest.mark.parametrize(("stages", "rows", "chunks"), [(1, 3, 1), (2, 5, 1), (4, 3, 1), (4, 12, 3), (3, 6, 2)])
def test_works_are_rows_whose_parts_are_equal(stages, rows, chunks):
    works = [1.0 + (7 * row) % 5 for row in range(rows)]

    def part(stage: int, operation: Operation) -> float:
        return equal(stage, operation) * works[operation.row] / (stages * chunks)

    assert replay_works(works, stages, chunks) == pytest.approx(replay(stages, rows, chunks, part))
    assert replay_works([], stages, chunks) == 0.0


@given(
    st.integers(1, 6), st.integers(1, 4), st.lists(st.lists(st.integers(0, 9), max_size=26).map(tuple), min_size=1, max_size=4)
)
def test_many_at_once_are_to_the_bit_each_by_itself(stages, chunks, drawn):
    """Of several numbers of rows, fewer than stages and none among them; of virtual stages multiples of the stages."""
    together = stages if chunks > 1 else 1
    candidates = [[work / 7 for work in works[: len(works) // together * together]] for works in drawn]
    assert replay_many(candidates, stages, chunks) == [replay_works(works, stages, chunks) for works in candidates]
