"""JSON lines: what survives a kill, where a ledger may be cut and what that costs, and what is said of a line that is none."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core import jsonl
from engine.core.errors import CheckpointError, DataError
from engine.core.jsonl import JsonlLedger, last_row, read_backwards, read_lines, read_objects, read_rows, write_jsonl


def filled(path, *steps, text=""):
    ledger = JsonlLedger(path)
    ledger.append({"step": step, "text": text} for step in steps)
    return ledger


def test_rows_survive_without_closing(tmp_path):
    ledger = JsonlLedger(tmp_path / "deep" / "rollouts.jsonl")
    rows = [{"step": 0, "text": "½\n"}, {"step": 0, "text": "b"}]
    ledger.append(rows)
    assert list(read_rows(ledger.path)) == rows
    assert ledger.num_bytes == ledger.sync() == ledger.path.stat().st_size


# nothing but the torn line; a torn line shorter and longer than the block that is searched at a time
@pytest.mark.parametrize("whole", ["", '{"step": 0}\n'])
@pytest.mark.parametrize("torn", ['{"step": 1, "te', '{"step": 1, "text": "' + "x" * 200_000])
def test_a_torn_last_line_never_counts_and_is_dropped_on_opening(tmp_path, whole, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text(whole + torn, encoding="utf-8")
    assert list(read_rows(path)) == [{"step": 0}] * bool(whole), "a reader leaves it out, and alone"
    assert last_row(path) == ({"step": 0} if whole else None)
    assert path.read_text(encoding="utf-8") == whole + torn
    JsonlLedger(path).append([{"step": 7}])
    assert path.read_text(encoding="utf-8") == whole + '{"step": 7}\n'


def test_the_last_line_of_somebodys_file_counts_without_its_newline_and_blank_ones_do_not(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1}\n\n  \n[2]')
    assert list(read_objects(path)) == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 4", [2])]


CONTENT = st.binary(max_size=40).map(lambda line: line.replace(b"\n", b""))


@given(st.lists(CONTENT), CONTENT, st.integers(1, 16), st.data())
def test_lines_read_backwards_are_the_lines_read_forwards(tmp_path_factory, lines, torn, block, data):
    path = tmp_path_factory.mktemp("lines") / "l.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines) + torn)
    forwards = [(line.offset, line.data) for line in read_lines(path)]
    assert [content for _, content in forwards] == [line + b"\n" for line in lines]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "BLOCK_BYTES", block)
        assert [(line.offset, line.data) for line in read_backwards(path)] == forwards[::-1]
        end = data.draw(st.integers(0, path.stat().st_size))
        wanted = [(offset, content) for offset, content in forwards if offset + len(content) <= end]
        assert [(line.offset, line.data) for line in read_backwards(path, end)] == wanted[::-1]


def test_a_ledger_is_cut_at_a_byte_and_goes_on(tmp_path):
    ledger = filled(tmp_path / "rollouts.jsonl", 0, 0, 1, 1, 2, 2, 3)
    offset = ledger.find(2)
    assert [ledger.find(step) for step in (0, 4)] == [0, ledger.num_bytes]
    ledger.cut(offset)
    ledger.append([{"step": 2, "text": "again"}])
    assert [row["step"] for row in read_rows(ledger.path)] == [0, 0, 1, 1, 2]
    assert [row["text"] for row in read_rows(ledger.path, offset)] == ["again"]
    assert [path.name for path in tmp_path.iterdir()] == ["rollouts.jsonl"]


def test_only_the_boundary_before_a_step_splits_there(tmp_path):
    ledger = filled(tmp_path / "rollouts.jsonl", 0, 0, 2, 2, 4)
    places = {step: ledger.find(step) for step in range(6)}
    splitting = {step: [at for at in range(ledger.num_bytes + 2) if ledger.splits(at, step)] for step in range(6)}
    assert splitting == {step: [place] for step, place in places.items()}
    assert JsonlLedger(tmp_path / "empty.jsonl").splits(0, 3)


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"loss": 1}', '{"step": "1"}', '{"step": -1}', "\udcff"])
def test_a_spoilt_line_is_named_by_every_reader_that_comes_to_it(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(f'{{"step": 0}}\n{line}\n'.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: .*must .*; found .*: (mend|delete|save)"):
        list(read_rows(path))
    before, ledger = path.read_bytes(), JsonlLedger(path)
    for look in (lambda: ledger.find(1, CheckpointError), lambda: ledger.splits(12, 1, CheckpointError)):
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl, byte 12: "):
            look()
    assert path.read_bytes() == before


def test_not_a_number_is_refused_and_nothing_of_the_call_is_written(tmp_path):
    ledger = JsonlLedger(tmp_path / "rollouts.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        ledger.append([{"step": 0}, {"step": 0, "log_probs": [math.nan]}])
    ledger.close()
    assert ledger.path.read_text(encoding="utf-8") == ""


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "records.jsonl"
    write_jsonl(path, [{"a": "½"}])
    with pytest.raises(ValueError, match="JSON"):
        write_jsonl(path, [{"a": 1}, {"a": math.inf}])
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [{"a": "½"}]
