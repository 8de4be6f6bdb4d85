"""A looker-on of a ledger: every row once, a look that costs what was added, and rows withdrawn where a resumed run cut."""

from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.errors import DataError
from engine.core.jsonl import JsonlLedger, read_rows
from engine.observe import tail as tail_module
from engine.observe.tail import MOST_MARKS, Tail


def row(step, version=0):
    return {"step": step, "text": "x" * (step % 7), "version": version}


def test_every_row_comes_once_and_a_half_written_one_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.fresh() == (0, [])
    ledger = JsonlLedger(path)
    ledger.append([row(0), row(1)])
    assert tail.fresh(1) == (0, [row(0)])
    assert tail.fresh(1) == (0, [row(1)])
    with path.open("ab") as file:
        file.write(b'{"step": 2')
        file.flush()
        assert tail.fresh() == (0, [])
        file.write(b"}\n")
    assert tail.fresh() == (0, [{"step": 2}])
    ledger.cut(ledger.find(1))
    with path.open("ab") as file:
        file.write(b"broken\n")
    with pytest.raises(DataError, match="must be one JSON object"):
        tail.fresh()
    ledger.cut(0)
    ledger.append([row(0, 1)])
    assert tail.fresh() == (3, [row(0, 1)]), "what was withdrawn before the broken line is told now"


def test_a_look_reads_what_was_added_and_one_row_to_be_sure(tmp_path):
    ledger = JsonlLedger(tmp_path / "metrics.jsonl")
    ledger.append(row(step) for step in range(5000))
    tail = Tail(ledger.path)
    assert len(tail.fresh().rows) == 5000
    before = tail.bytes_read
    ledger.append([row(5000)])
    assert tail.fresh().rows == [row(5000)]
    assert tail.bytes_read - before < 200
    assert tail.fresh().rows == [] and tail.bytes_read - before < 200, "nothing new: nothing read"


@settings(max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6), st.booleans()), max_size=8), st.sampled_from((2, 3, 5, 4096)))
def test_what_was_given_less_what_was_withdrawn_is_what_stands(tmp_path_factory, changes, most_marks):
    """Whatever is cut and written again between looks, also within the bytes that were read before, however few rows are
    remembered."""
    with patch.object(tail_module, "MOST_MARKS", most_marks):
        check_what_stands(tmp_path_factory, changes)


def check_what_stands(tmp_path_factory, changes):
    ledger = JsonlLedger(tmp_path_factory.mktemp("run") / "metrics.jsonl")
    tail = Tail(ledger.path)
    held: list[dict[str, Any]] = []
    ledger.append([])
    for version, (step, more, looks) in enumerate(changes):
        ledger.cut(ledger.find(step))
        first = sum(1 for _ in read_rows(ledger.path))
        ledger.append(row(n, version) for n in range(first, first + more))
        if looks:
            withdrawn, rows = tail.fresh()
            held = held[: len(held) - withdrawn] + rows
            assert held == list(read_rows(ledger.path))
    withdrawn, rows = tail.fresh()
    assert held[: len(held) - withdrawn] + rows == list(read_rows(ledger.path))


def test_beginning_at_a_step_reads_back_from_the_end_alone(tmp_path):
    ledger = JsonlLedger(tmp_path / "metrics.jsonl")
    ledger.append(row(step) for step in range(3000))
    tail = Tail.of_step(ledger.path, 2998)
    assert [found["step"] for found in tail.fresh().rows] == [2998, 2999]
    assert tail.bytes_read < 200
    ledger.cut(ledger.find(2000))
    assert tail.fresh() == (2, [row(step) for step in range(2000)]), "cut before where it began: all that stands"


def test_what_is_remembered_does_not_grow_with_the_run(tmp_path):
    """Two rows a step; a run that goes back far is given again from where a step that is remembered ends."""
    ledger = JsonlLedger(tmp_path / "samples.jsonl")
    tail, held = Tail(ledger.path), []
    for begin in range(0, 12_000, 500):
        ledger.append(row(step, 1) for step in range(begin, begin + 500) for _ in range(2))
        held += tail.fresh().rows
        assert len(tail._marks) <= MOST_MARKS
    ledger.cut(ledger.find(700))
    withdrawn, rows = tail.fresh()
    held = held[: len(held) - withdrawn]
    assert held[-1]["step"] < rows[0]["step"], "no step is cut in two"
    assert held + rows == list(read_rows(ledger.path))
