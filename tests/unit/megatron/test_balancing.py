"""The dealing of a step to data-parallel ranks: what is balanced, what is cut, what it costs."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.forecast.lengths import LogNormal
from engine.megatron import balancing
from engine.megatron.dealing import split_over_ranks
from engine.megatron.outlines import Costs, Outline, outlines_of, units_of
from tests.rollouts import make_sequence
from tests.unit.megatron.outlines import COSTS, outline_lists
from tools.scale_balance import ATTENTION, LONG, SHORT, Case, drawn


def test_a_prompt_is_computed_on_few_ranks_and_cut_where_that_balances() -> None:
    """Eight prompts of eight samples: two ranks get four prompts each, whole; sixteen ranks half of one each."""
    sequences = [make_sequence((p,) * 5, (100 + 8 * p + i,) * 10, ()) for p in range(8) for i in range(8)]
    for num_ranks, copies in ((2, 8), (16, 16)):
        dealt = split_over_ranks(outlines_of(sequences), num_ranks, Costs(True))
        assert {len(part) for part in dealt} == {64 // num_ranks}
        assert sum(len({one.prompt for one in part}) for part in dealt) == copies
    dealt = split_over_ranks(outlines_of(sequences), 16, Costs(False))
    assert {len(part) for part in dealt} == {4}


def test_work_counts_what_a_token_attends_to() -> None:
    """One sequence of 100 tokens and four of 30: by tokens the long one goes alone, by work with `attention` too, and it weighs
    as much as they together where a look costs a hundredth of a token."""
    lengths = (100, 30, 30, 30, 30)
    outlines = outlines_of([make_sequence((i,), (1,) * (length - 1), ()) for i, length in enumerate(lengths)])
    assert [len(part) for part in split_over_ranks(outlines, 2, Costs(True))] == [1, 4]
    assert [len(part) for part in split_over_ranks([*outlines, *outlines[1:3]], 2, Costs(True))] == [2, 5]
    assert [len(part) for part in split_over_ranks([*outlines, *outlines[1:3]], 2, Costs(True, 0.02))] == [1, 6]


@given(outline_lists(), COSTS, st.integers(1, 12))
def test_what_a_part_of_a_unit_costs_is_what_a_row_of_it_would(outlines: list[Outline], costs: Costs, most: int) -> None:
    """To the bit, though it is told from sums over the unit's first sequences."""
    for unit in units_of(outlines, costs):
        parts = balancing.Unit(unit, costs).parts(most)
        assert sorted(one.place for part, _, _ in parts for one in part) == sorted(one.place for one in unit)
        assert all((work, tokens) == costs.size(part) for part, work, tokens in parts)


@given(outline_lists(), COSTS, st.integers(1, 40))
def test_no_further_cut_balances_better_than_the_one_at_which_dealing_stops(
    outlines: list[Outline], costs: Costs, num_ranks: int
) -> None:
    """The plain form deals with every cut and takes the first of those that gain a hundredth."""
    units = [balancing.Unit(unit, costs) for unit in units_of(outlines, costs)]
    best, least, cut = None, float("inf"), 1
    while cut < 2 * max(1, *(unit.num_alone for unit in units)):
        chosen, fullest = balancing._largest_first([part for unit in units for part in unit.parts(cut)], num_ranks)
        if fullest < 0.99 * least:
            best, least = chosen, fullest
        cut *= 2
    assert balancing._cut(units, num_ranks)[1:] == (best, least)


def works_of(dealt: list[list[Outline]], costs: Costs) -> list[float]:
    return [costs.work(part) for part in dealt]


def test_what_fits_better_than_the_largest_to_the_least_loaded_is_found() -> None:
    """Graham's example, groups of 3, 3, 2, 2 and 2 tokens on two ranks: the largest first to the least loaded make 7 and 5, and
    6 and 6 can be had. A group of 9 beside them leaves nothing to gain."""
    costs = Costs(True)
    groups = [Outline(i, 1, size - 1, i, i) for i, size in enumerate((3, 3, 2, 2, 2))]
    assert sorted(works_of(split_over_ranks(groups, 2, costs), costs)) == [6, 6]
    assert [[one.place for one in part] for part in split_over_ranks(groups, 2, costs)] == [[2, 3, 4], [0, 1]]
    assert max(works_of(split_over_ranks([*groups, Outline(5, 1, 11, 5, 5)], 2, costs), costs)) == 12


@given(outline_lists(), COSTS, st.integers(1, 12))
def test_fitting_never_makes_the_fullest_rank_fuller_and_keeps_groups_whole(
    outlines: list[Outline], costs: Costs, num_ranks: int
) -> None:
    units = [balancing.Unit(unit, costs) for unit in units_of(outlines, costs)]
    fullest = balancing._cut(units, num_ranks)[2]
    dealt = split_over_ranks(outlines, num_ranks, costs)
    assert sorted(one.place for part in dealt for one in part) == list(range(len(outlines)))
    assert max(works_of(dealt, costs)) <= fullest * (1 + 1e-12)
    for group in {one.group for one in outlines} - {-1}:
        assert sum(any(one.group == group for one in part) for part in dealt) == 1


def test_long_groups_are_within_a_tenth_of_even_where_a_rank_has_two() -> None:
    """64 groups of 16 responses of 4,000 tokens on 32 ranks, the case of docs/results.md; a largest group is fuller than a rank
    should be in one of six draws. The largest first to the least loaded alone are 1.17 on the mean."""
    costs, case = Costs(True, ATTENTION), Case("GroupDPO", 16, 1024, 32)
    over = []
    for number in range(6):
        outlines = drawn(case, LONG, random.Random(number))
        works = works_of(split_over_ranks(outlines, 32, costs), costs)
        over.append(max(works) / (sum(works) / 32))
    assert sum(over) / 6 < 1.09 and sorted(over)[-2] < 1.1


def test_ranks_are_balanced_and_ties_go_to_the_lower() -> None:
    """Largest first: 5, 4, 3, 2 tokens deal as 5 + 2 and 4 + 3, each rank in the given order."""
    sizes = (2, 4, 3, 5)
    sequences = [make_sequence((size,), tuple(range(size - 1)), ()) for size in sizes]
    dealt = [[sequence.num_tokens for sequence in part] for part in split_over_ranks(outlines_of(sequences), 2, Costs(True))]
    assert dealt == [[2, 5], [4, 3]]
    assert split_over_ranks([], 2, Costs(True)) == [[], []]


def work_with(dealt: list[list[Outline]], costs: Costs) -> list[float]:
    """The work of every rank, with what is scored first: a third of the sequences of groups that several ranks have."""
    held = [{one.group for one in part} - {-1} for part in dealt]
    spread = {group for groups in held for group in groups if sum(group in others for others in held) > 1}
    apart = [[one for one in part if one.group in spread] for part in dealt]
    rest = [[one for one in part if one.group not in spread] for part in dealt]
    return [costs.work(first) * 4 / 3 + costs.work(second) for first, second in zip(apart, rest, strict=True)]


@given(outline_lists(), COSTS, st.integers(1, 12))
def test_cutting_groups_makes_the_fullest_rank_less_full_by_a_hundredth_or_cuts_none(
    outlines: list[Outline], costs: Costs, num_ranks: int
) -> None:
    """A token a cut group on a rank may be off: the prompt's last, which every sample that shares it begins with."""
    whole = split_over_ranks(outlines, num_ranks, costs)
    dealt = split_over_ranks(outlines, num_ranks, costs, cuts_groups=True)
    assert dealt == split_over_ranks(outlines, num_ranks, costs, cuts_groups=True)
    assert sorted(one.place for part in dealt for one in part) == list(range(len(outlines)))
    if dealt != whole:
        assert max(work_with(dealt, costs)) <= 0.99 * max(works_of(whole, costs)) + 4 / 3 * len(outlines)


def test_two_groups_on_three_ranks_are_cut_where_that_pays() -> None:
    """Two groups of 12 responses of 100 tokens: 1,200 on a rank whole, and 8 on each cut, scored first, 1,067. Of two pairs on
    two ranks a cut gains nothing; on four ranks it makes 200 a rank 133."""
    groups = [Outline(i, 1, 99, i // 12, i // 12) for i in range(24)]
    costs = Costs(False)
    assert max(works_of(split_over_ranks(groups, 3, costs), costs)) == 1200
    dealt = split_over_ranks(groups, 3, costs, cuts_groups=True)
    assert [len(part) for part in dealt] == [8, 8, 8]
    assert max(work_with(dealt, costs)) == pytest.approx(800 * 4 / 3)
    pairs = [Outline(i, 1, 99, i // 2, i // 2) for i in range(4)]
    assert split_over_ranks(pairs, 2, costs, cuts_groups=True) == split_over_ranks(pairs, 2, costs) == [pairs[:2], pairs[2:]]
    assert sorted(map(len, split_over_ranks(pairs, 4, costs, cuts_groups=True))) == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("sequences", "ranks", "lengths", "whole", "cut"),
    [
        (1024, 64, SHORT, 1.51, 1.13),
        (1024, 64, LONG, 1.91, 1.14),
        (256, 16, SHORT, 1.39, 1.13),
        (256, 16, LONG, 1.64, 1.13),
        (1024, 32, SHORT, 1.08, 1.03),
        (1024, 32, LONG, 1.08, 1.03),
    ],
)
def test_groups_of_sixteen_are_nearly_even_where_they_are_cut(
    sequences: int, ranks: int, lengths: LogNormal, whole: float, cut: float
) -> None:
    """The cases of docs/results.md: the fullest rank over the mean of whole groups, what is scored first counted."""
    costs, case, over = Costs(True, ATTENTION), Case("GroupDPO", 16, sequences, ranks), []
    for number in range(6):
        outlines = drawn(case, lengths, random.Random(number))
        before, after = (split_over_ranks(outlines, ranks, costs, cuts_groups=cuts) for cuts in (False, True))
        mean = sum(works_of(before, costs)) / ranks
        over.append((max(works_of(before, costs)) / mean, max(work_with(after, costs)) / mean))
    first, second = (sum(values) / 6 for values in zip(*over, strict=True))
    assert first == pytest.approx(whole, abs=0.01)
    assert second < cut
