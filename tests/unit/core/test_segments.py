"""Segments of rows and columns: what is added comes back as it was, whatever the sizes; a folder is cut where its writer said
it ended, and a writer that goes on from there makes what one would that never stopped, also where it was killed at any
operation on any file.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from engine.core.columns import read_batches, read_columns
from engine.core.errors import DataError
from engine.core.jsonl import line_of, step_of
from engine.core.segment_cut import Cut, adopt, cut_back, find_cut
from engine.core.segment_writer import SegmentWriter
from engine.core.segments import segments_of

COLUMNS = {"token_ids": "int32", "log_probs": "float32"}
FLOATS = arrays.arrays(np.float32, st.integers(0, 5), elements=st.floats(width=32, allow_nan=False))


def step_of_size(step: int, num_rows: int = 3, num_tokens: int = 40) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """A step's rows and columns, other ones for each step and the same every time."""
    draw = np.random.default_rng(step)
    rows = [{"step": step, "version": step // 2 * 2, "text": f"{step} é {place}" * 9} for place in range(num_rows)]
    tokens = [draw.integers(0, 2**31 - 1, num_tokens + place, dtype=np.int32) for place in range(num_rows)]
    return rows, {"token_ids": tokens, "log_probs": [-draw.random(len(part), dtype=np.float32) for part in tokens]}


def write(folder: Path, steps: range, **options: Any) -> dict[str, int] | None:
    """What a run of these steps leaves; where it ends."""
    writer = SegmentWriter(folder, COLUMNS, segment_bytes=options.pop("segment_bytes", 4000), **options)
    for step in steps:
        writer.append(step, *step_of_size(step))
    end = writer.sync()
    writer.close()
    return end


def resume(folder: Path, step: int, known: dict[str, int] | None) -> Cut:
    cut = find_cut(folder, step, known)
    cut_back(folder, cut)
    return cut


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def content(folder: Path) -> dict[int, tuple[list[bytes], dict[str, list[Any]]]]:
    """Rows and columns by step, read back."""
    found: dict[int, tuple[list[bytes], dict[str, list[Any]]]] = {}
    for segment in segments_of(folder):
        assert segment.columns is not None
        for line in segment.lines():
            found.setdefault(step_of(line), ([], {}))[0].append(line.data)
        for batch in read_batches(segment.columns):
            if batch.step in found:
                found[batch.step][1].update(read_columns(segment.columns, batch))
    return found


def test_what_is_added_comes_back_as_it_was_and_full_segments_are_packed(tmp_path):
    write(tmp_path / "r", range(12))
    found = content(tmp_path / "r")
    assert list(found) == list(range(12))
    for step, (lines, columns) in found.items():
        rows, wanted = step_of_size(step)
        assert lines == [line_of(row).encode() for row in rows]
        for name in COLUMNS:
            assert all(np.array_equal(*pair) for pair in zip(columns[name], wanted[name], strict=True))
    there = segments_of(tmp_path / "r")
    assert len(there) > 2 and [segment.is_packed for segment in there] == [True] * (len(there) - 1) + [False]
    assert [one.last_step() + 1 for one in there[:-1]] == [one.first for one in there[1:]]
    with pa.OSFile(str(there[0].columns)) as file:  # what anybody's reader says of it
        assert pa.ipc.open_stream(file).read_next_batch().num_rows == 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(FLOATS, min_size=1, max_size=4), min_size=1, max_size=4), st.sampled_from([1, 300, 1 << 20]))
def test_any_float_survives_bit_for_bit(tmp_path_factory, steps, segment_bytes):
    folder = tmp_path_factory.mktemp("any") / "rollouts"
    writer = SegmentWriter(folder, COLUMNS, segment_bytes=segment_bytes)
    for step, values in enumerate(steps):
        rows = [{"step": step} for _ in values]
        writer.append(step, rows, {"token_ids": [np.arange(len(part), dtype=np.int32) for part in values], "log_probs": values})
    writer.close()
    found = content(folder)
    assert [[part.tobytes() for part in found[step][1]["log_probs"]] for step in range(len(steps))] == [
        [part.tobytes() for part in values] for values in steps
    ]


@pytest.mark.parametrize("beyond", [0, 1, 9])
def test_a_run_that_goes_on_from_any_step_leaves_the_files_of_one_that_never_stopped(tmp_path, beyond):
    """Also where the segment that the checkpoint names is full and packed by then."""
    write(tmp_path / "whole", range(14))
    for saved in range(1, 14):
        known = write(folder := tmp_path / f"{saved}", range(saved))
        write(folder, range(saved, saved + beyond))
        assert resume(folder, saved, known).note is None
        write(folder, range(saved, 14))
        assert files(folder) == files(tmp_path / "whole"), saved


def test_the_cut_is_found_without_being_told_and_told_where_the_folder_was_changed(tmp_path):
    known = write(tmp_path / "r", range(9))
    write(tmp_path / "r", range(9, 14))
    wanted = find_cut(tmp_path / "r", 9, known)
    assert find_cut(tmp_path / "r", 9, None) == wanted
    found = find_cut(tmp_path / "r", 8, known)
    assert "was changed: by the checkpoint, step 8 begins in segment" in str(found.note)
    for path in (tmp_path / "r").iterdir():
        path.unlink()
    assert find_cut(tmp_path / "r", 9, known).first is None
    assert "found nothing before it" in str(find_cut(tmp_path / "r", 9, known).note)


def test_only_so_many_last_steps_stay_in_whole_segments(tmp_path):
    write(tmp_path / "r", range(40), keep_steps=6)
    there = segments_of(tmp_path / "r")
    assert there[0].first <= 34 < there[1].first + 6 and there[0].first > 20
    assert {path.name[:8] for path in (tmp_path / "r").iterdir()} == {f"{segment.first:08d}" for segment in there}


def test_a_file_of_an_older_version_is_the_first_segment_and_what_follows_is_in_the_new_form(tmp_path):
    lines = ['{"step": %d, "token_ids": [1]}\n' % step for step in range(9)]  # noqa: UP031
    (tmp_path / "rollouts.jsonl").write_text("".join(lines))
    adopt(tmp_path / "rollouts.jsonl", tmp_path / "rollouts")
    adopt(tmp_path / "rollouts.jsonl", tmp_path / "rollouts")
    known = {"segment": 0, "rows": sum(map(len, lines[:7]))}
    assert resume(tmp_path / "rollouts", 7, known).note is None
    write(tmp_path / "rollouts", range(7, 9))
    assert [(one.first, one.columns is None) for one in segments_of(tmp_path / "rollouts")] == [(0, True), (7, False)]
    assert (tmp_path / "rollouts" / "00000000.jsonl").read_text() == "".join(lines[:7])
    assert not (tmp_path / "rollouts.jsonl").exists()


def test_columns_that_changed_are_named_and_a_packed_file_that_is_none(tmp_path):
    write(tmp_path / "r", range(9))
    first = segments_of(tmp_path / "r")[0]
    assert first.columns is not None
    (batch, *_) = read_batches(first.columns)
    data = bytearray(first.columns.read_bytes())
    data[batch.begin + 8 : batch.end - 8] = bytes(batch.end - batch.begin - 16)
    first.columns.write_bytes(data)
    with pytest.raises(DataError, match=r"00000000\.arrows, step 0: columns must be as they were written"):
        read_columns(first.columns, batch)
    first.rows.write_bytes(b"no zstd")
    with pytest.raises(DataError, match=r"jsonl\.zst: must be packed rows"):
        list(first.lines())


class KilledError(BaseException):
    """The process is gone: nothing that follows happens."""


def killed_at(number: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the first `number` operations on files happen and none after; a write that is the last one happens by half. The
    names of those that were asked for."""
    asked: list[str] = []

    def counted(name: str, real: Any) -> Any:
        def operation(*arguments: Any, **named: Any) -> Any:
            asked.append(name)
            if len(asked) > number:
                raise KilledError
            return real(*arguments, **named)

        return operation

    class File:
        """A file opened for adding to it, unbuffered, as far as the writer uses one."""

        def __init__(self, path: Path) -> None:
            self._file = path.open("ab", buffering=0)

        def write(self, data: bytes) -> int:
            asked.append("write")
            if len(asked) > number:
                self._file.write(data[: len(data) // 2] if len(asked) == number + 1 else b"")
                raise KilledError
            return self._file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    real_open = Path.open

    def opened(path: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if mode != "ab" or "buffering" in named:
            return real_open(path, mode, *arguments, **named)
        return File(path)

    monkeypatch.setattr(Path, "open", opened)
    for owner, name in (
        (Path, "unlink"),
        (Path, "mkdir"),
        (Path, "write_bytes"),
        (os, "replace"),
        (os, "fsync"),
        (os, "truncate"),
    ):
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    return asked


def test_a_writer_killed_at_any_operation_leaves_what_a_checkpoint_of_before_names(tmp_path):
    """Of a run that packs segments and drops old ones; the resume, too, is killed at each of its operations."""
    known = write(tmp_path / "begun", range(2, 7), keep_steps=3)
    write(tmp_path / "whole", range(2, 7), keep_steps=3)
    write(tmp_path / "whole", range(7, 14), keep_steps=3)
    assert segments_of(tmp_path / "whole")[0].first == 5, "what was written before the checkpoint went, but for its segment"
    begun, number, kinds = files(tmp_path / "begun"), 0, set[str]()
    while True:
        folder = tmp_path / f"{number}"
        folder.mkdir()
        for name, data in begun.items():
            (folder / name).write_bytes(data)
        with pytest.MonkeyPatch.context() as patch:
            asked = killed_at(number, patch)
            try:
                write(folder, range(7, 14), keep_steps=3)
                ended = True
            except KilledError:
                ended = False
        kinds |= set(asked)
        for again in range(number % 7):  # some of those that come after it are killed as well
            with pytest.MonkeyPatch.context() as patch:
                killed_at(again, patch)
                try:
                    resume(folder, 7, known)
                except KilledError:
                    continue
        assert resume(folder, 7, known).note is None
        rows = [path.name[:8] for path in folder.glob("*.jsonl*")]
        assert len(set(rows)) == len(rows) and not list(folder.glob("*.part"))
        write(folder, range(7, 14), keep_steps=3)
        assert files(folder) == files(tmp_path / "whole"), number
        if ended:
            break
        number += 1
    assert number > 30 and kinds >= {"write", "unlink", "write_bytes", "replace", "fsync"}
