"""Where a run's figures are written: JSON lines that a resumed run can cut back to its checkpoint, TensorBoard scalars,
and whole JSON documents. It decides nothing about what is measured, and shows nothing to a person (progress.py does).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from engine.core.errors import DataError

Row = Mapping[str, Any]


class JsonlLedger:
    """A file of JSON objects, one a line, each with its integer `step`, in the order of the steps.

    A last line without its newline is what a killed process leaves: it is dropped on opening. Rows are handed to the
    operating system at every append; they survive the process, not a power cut.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        drop_torn_line(self.path)
        self._file: TextIO = self.path.open("a", encoding="utf-8")

    def append(self, rows: Iterable[Row]) -> None:
        """Adds `rows`. Raises ValueError for a value that JSON cannot hold (NaN, infinities); then none is added."""
        self._file.write("".join(_line(row) for row in rows))
        self._file.flush()

    def truncate(self, step: int) -> None:
        """Drops every row of `step` and later, all or nothing; raises DataError for a line that is no such row."""
        kept = self.path.with_name(self.path.name + ".part")
        with kept.open("w", encoding="utf-8") as file:
            file.writelines(_line(row) for row in self.rows() if row["step"] < step)
        self._file.close()
        os.replace(kept, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows in file order; raises DataError naming file and line where one is no JSON object with a step."""
        with self.path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield _parsed(line, self.path, number)

    def close(self) -> None:
        """Closes the file; the rows are in it already."""
        self._file.close()


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a ledger that another process may be writing: nothing is changed, and a last line without its newline is
    left out. None where there is no file. DataError as `JsonlLedger.rows`."""
    path = Path(path)
    if path.exists():
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith("\n"):
                    yield _parsed(line, path, number)


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"


def _parsed(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {number} must be a JSON object; found {error}: delete that line") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise DataError(f"{path} line {number} must hold an integer 'step'; found {line[:80]!r}: delete that line")
    return row


def drop_torn_line(path: Path, block_bytes: int = 1 << 16) -> None:
    """Cuts `path` after its last newline, reading backwards only as far as that."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        start = end
        while start > 0:
            start = max(0, start - block_bytes)
            file.seek(start)
            newline = file.read(min(block_bytes, end - start)).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
        file.truncate(0)


class MetricsWriter:
    """One record a step into `directory`: metrics.jsonl, and TensorBoard scalars under tensorboard/.

    A record is {"step": int, name: float, ...}; names carry their units. Close it, or use it as a context manager.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        self._ledger = JsonlLedger(directory / "metrics.jsonl")
        self._events = EventFileWriter(str(directory / "tensorboard"), flush_secs=10)

    def write(self, record: Mapping[str, float]) -> None:
        """Adds one step. A value that is not finite becomes null in metrics.jsonl and stays itself in TensorBoard."""
        step = int(record["step"])
        metrics = {name: float(value) for name, value in record.items() if name != "step"}
        self._ledger.append([{"step": step, **finite(metrics)}])
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def truncate(self, step: int) -> None:
        """Forgets `step` and later, before a resumed run writes them again; TensorBoard is told to hide its own."""
        self._ledger.truncate(step)
        restart = SessionLog(status=SessionLog.START)
        self._events.add_event(Event(wall_time=time.time(), step=step, session_log=restart))

    def close(self) -> None:
        """Writes out what TensorBoard's thread still holds and closes both files."""
        self._events.close()
        self._ledger.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """The metrics as JSON can hold them: null for what is not finite, such as the mean of nothing."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def write_json(path: str | Path, document: Any) -> None:
    """Replaces `path` by `document` as indented JSON, all or nothing; raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Replaces `path` by `text`, all or nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> None:
    """Replaces `path` by `rows`, one JSON object a line, all or nothing; raises ValueError for NaN and infinities."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(_line(row) for row in rows)
    os.replace(part, path)
