"""Rows of token ids and log-probs: values, equality, immutability, what they weigh, and sums that are rounded once."""

import functools
import math
import operator
import pickle
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core import arrays
from engine.core.arrays import NO_LOG_PROBS, NO_TOKENS, LogProbs, TokenIds, exact_sum

TOKENS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20)
FLOATS = st.lists(st.floats(-(2.0**99), 2.0**99, width=32), max_size=20)


@given(TOKENS, FLOATS)
def test_a_row_holds_its_numbers(tokens, floats):
    for row, numbers in ((TokenIds.of(tokens), tokens), (LogProbs.of(floats), floats)):
        assert list(row) == numbers == row.array.tolist()
        assert len(row) == len(numbers) and bool(row) is bool(numbers)
        assert list(row[1:3]) == numbers[1:3] and type(row[1:3]) is type(row)
        assert not numbers or row[-1] == numbers[-1]
        assert pickle.loads(pickle.dumps(row)) == row == type(row).copied(row.array)
        assert eval(repr(row), {"TokenIds": TokenIds, "LogProbs": LogProbs}) == row


def test_rows_are_equal_and_hashed_by_their_bits():
    one, same = TokenIds.of([1, 2]), TokenIds.of(iter((1, 2)))
    assert one == same and hash(one) == hash(same) and len({one, same}) == 1
    assert one != TokenIds.of([2, 1]) and one != TokenIds.of([1])
    assert one != LogProbs(one.data), "of another kind"
    assert LogProbs.of([math.nan]) == LogProbs.of([math.nan]) and LogProbs.of([0.0]) != LogProbs.of([-0.0])


def test_nobody_changes_a_row():
    row = TokenIds.of([1, 2])
    with pytest.raises(FrozenInstanceError):
        row.data = b""  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        row.array[0] = 3


def test_what_does_not_fit_is_refused():
    with pytest.raises(OverflowError):
        TokenIds.of([2**31])
    with pytest.raises(AssertionError, match="float64"):
        LogProbs.copied(LogProbs.of([0.5]).array.astype("float64"))


def test_a_pickled_row_is_its_bytes():
    """Four a token and a few hundred beside them, whatever the numbers; a tuple of integers took three times that."""
    row = TokenIds.of(range(100_000, 200_000))
    assert len(pickle.dumps(row)) <= 400_000 + 300


@given(st.lists(TOKENS, max_size=5))
def test_rows_are_joined_and_parted(rows):
    made = [TokenIds.of(row) for row in rows]
    assert TokenIds.joined(made).parted(map(len, made)) == made
    with pytest.raises(AssertionError):
        TokenIds.joined([*made, TokenIds.of([1])]).parted(map(len, made))


@given(st.lists(FLOATS, max_size=5))
def test_a_sum_is_rounded_once(rows):
    assert exact_sum(map(LogProbs.of, rows)) == math.fsum(number for row in rows for number in row)


def test_a_long_sum_is_rounded_once_in_any_order(monkeypatch):
    """More numbers than are added at once, from 2^-149 to 2^100; the plain sum of float64 is another."""
    numbers = [math.ldexp(1 + i % 97 / 97, i * 7919 % 240 - 140) * (-1) ** i for i in range(arrays.AT_ONCE + 1000)]
    row = LogProbs.of([*numbers, 2.0**-149])
    wanted = math.fsum(row)
    assert exact_sum([row]) == exact_sum([row[5000:], row[:5000]]) == wanted
    assert functools.reduce(operator.add, row) != wanted, "so the order would count; `sum` compensates from Python 3.12 on"


def test_nothing_sums_to_zero():
    assert exact_sum([]) == exact_sum([NO_LOG_PROBS]) == 0.0 and not NO_TOKENS
