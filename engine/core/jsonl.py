"""JSON lines: the one place that reads and writes files of one JSON value a line, and says where each line lies, so that a file
can be cut at a byte without reading what comes before. It does not know what the rows mean.

Two kinds of files. A ledger is appended to by our processes: a last line without its newline is what a killed one leaves, and
never counts. Any other file is somebody's, whole as it is: its last line counts with or without a newline, and blank lines are
skipped.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from engine.core.errors import DataError, SemionError, brief
from engine.core.files import atomic_write, storing

Row = Mapping[str, Any]
Fault = Callable[[DataError], object]  # is told of what cannot be read
BLOCK_BYTES = 1 << 13  # read at a time from the end of a file; doubled for a line that is longer
_STEP = re.compile(rb'\{"step": (\d+)[,}]')  # how a row begins as we write it; others are parsed whole


class Line(NamedTuple):
    """A line of a file."""

    where: str  # for messages: the file, and the line's number or where it begins
    offset: int  # of its first byte
    data: bytes  # with its newline

    @property
    def end(self) -> int:
        """Offset of the byte after it."""
        return self.offset + len(self.data)


def read_lines(path: str | Path, start: int = 0) -> Iterator[Line]:
    """The whole lines of a ledger from the byte `start` on, where a line begins. OSError where there is no file."""
    with Path(path).open("rb") as file:
        yield from lines_in(file, path, start)


def lines_in(file: BinaryIO, path: str | Path, start: int = 0) -> Iterator[Line]:
    """As `read_lines`, of an opened file; `path`: what messages call it."""
    file.seek(start)
    offset, place = start, f"{path}, {'byte' if start else 'line'} "
    for number, data in enumerate(file, start=1):
        if not data.endswith(b"\n"):
            return
        yield Line(f"{place}{offset if start else number}", offset, data)
        offset += len(data)


def read_backwards(path: str | Path, end: int | None = None) -> Iterator[Line]:
    """The whole lines of a ledger (of its first `end` bytes), the last one first; reads no further ahead than asked."""
    path = Path(path)
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = size if end is None else min(end, size)
        held, block = b"", BLOCK_BYTES  # held: from `start` to the end of the last line that was not yielded
        while start > 0:
            num_bytes = min(block, start)
            start, block = start - num_bytes, 2 * block
            file.seek(start)
            held = file.read(num_bytes) + held
            stop = held.rfind(b"\n") + 1
            while stop:
                begin = held.rfind(b"\n", 0, stop - 1) + 1
                if begin == 0 and start > 0:
                    break  # its beginning was not read yet
                yield Line(f"{path}, byte {start + begin}", start + begin, held[begin:stop])
                stop, block = begin, BLOCK_BYTES
            held = held[:stop]


def read_objects(path: str | Path, fault: Fault | None = None) -> Iterator[tuple[str, Any]]:
    """(where, value) of every line of somebody's file, as `objects_in`. DataError names file, line, rule, value and fix."""
    with Path(path).open("rb") as file:
        yield from objects_in(file, path, fault)


def objects_in(lines: Iterable[bytes], path: str | Path, fault: Fault | None = None) -> Iterator[tuple[str, Any]]:
    """(where, value) of every line of an opened file; a UTF-8 byte order mark at its beginning is no part of the first.

    A line that is not JSON is a DataError: told to `fault`, where there is one, and passed over; else raised.
    """
    for number, data in enumerate(lines, start=1):
        data = data.removeprefix(codecs.BOM_UTF8) if number == 1 else data
        if not data.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = parsed(where, data)
        except DataError as error:
            if fault is None:
                raise
            fault(error)
            continue
        yield where, value


def read_rows(
    path: str | Path,
    start: int = 0,
    error: type[SemionError] = DataError,
    needs: Collection[str] = (),
    *,
    numbers: bool | Collection[str] = False,
) -> Iterator[dict[str, Any]]:
    """The rows of a ledger, which another process may be writing, from the byte `start` on; none where there is no file.
    `error` names file and line where one is no JSON object with an integer `step` and all that the reader `needs`; with
    `numbers`, also where it has anything but numbers, or those that are named have (`require_numbers`)."""
    if Path(path).exists():
        for line in read_lines(path, start):
            row = row_of(line, error)
            require_names(row, needs, line, error)
            if numbers:
                require_numbers(row, line, error, names=None if numbers is True else numbers)
            yield row


def require_numbers(
    row: Row, line: Line, error: type[SemionError] = DataError, *, names: Collection[str] | None = None
) -> None:
    """`error` where a line's row has anything but finite numbers and nulls, as rows of metrics do, or where what is at `names`,
    which are there, is anything else: somebody else has written it."""
    for name, value in row.items() if names is None else [(name, row[name]) for name in names]:
        is_number = type(value) in (int, float) and abs(value) <= sys.float_info.max
        if value is not None and not is_number:
            raise error(f"{line.where}: `{name}` must be a number or null; found {brief(value)}: mend or delete that line")


def require_names(row: Any, needs: Collection[str], line: Line, error: type[SemionError] = DataError) -> None:
    """`error` where a line's row is no object with all these names: somebody else has written it."""
    if missing := [name for name in needs if not isinstance(row, dict) or name not in row]:
        raise error(f"{line.where}: `{missing[0]}` must be there; found {brief(line.data)}: delete that line")


def newest_rows(path: str | Path, most: int, *, numbers: bool = False) -> list[dict[str, Any]]:
    """The last rows of a ledger, so many at most, in their order, read from its end; none where there is no file. DataError as
    `read_rows`."""
    rows = []
    for line in islice(read_backwards(path), most) if Path(path).exists() else ():
        rows.append(row_of(line))
        if numbers:
            require_numbers(rows[-1], line)
    return rows[::-1]


def last_row(path: str | Path) -> dict[str, Any] | None:
    """The last row of a ledger; None without one. DataError as `read_rows`."""
    return next(iter(newest_rows(path, 1)), None)


def row_of(line: Line, error: type[SemionError] = DataError) -> dict[str, Any]:
    """The row that a line of a ledger holds; `error` where it is no JSON object with an integer `step`."""
    row: dict[str, Any] = parsed(line.where, line.data, error)
    step = row.get("step") if isinstance(row, dict) else None
    if not isinstance(step, int) or step < 0:
        raise error(f"{line.where}: `step` must be an integer, 0 or more; found {brief(line.data)}: delete that line")
    return row


def step_of(line: Line, error: type[SemionError] = DataError) -> int:
    """The step of a line of a ledger, parsed whole only where we did not write it; `error` as `row_of`."""
    found = _STEP.match(line.data)
    return int(found[1]) if found else int(row_of(line, error)["step"])


def parsed(where: str, data: bytes, error: type[SemionError] = DataError, fix: str = "mend or delete that line") -> Any:
    """What a line of JSON says; `error` where it is none, with what mends it."""
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as fault:
        found = data[fault.start : fault.start + 1]
        raise error(f"{where}: must be UTF-8; found byte {found!r} at {fault.start}: save it as UTF-8, or {fix}") from fault
    except (ValueError, RecursionError) as fault:
        raise error(f"{where}: must be one JSON object; found {brief(data)} ({fault}): {fix}") from fault


def line_of(row: Row) -> str:
    """A row as a line, newline included; ValueError for what JSON cannot hold (NaN, infinities)."""
    return json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> None:
    """Replaces `path` by `rows`, one a line, all or nothing; ValueError as `line_of`."""
    with atomic_write(path) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(line_of(row) for row in rows)


def step_begins(path: Path, step: int, error: type[SemionError] = DataError) -> int:
    """Where the rows of `step` and later begin, read from the end: the cost is that of the rows after. `error` names a line on
    the way that has no step."""
    for line in read_backwards(path):
        if step_of(line, error) < step:
            return line.end
    return 0


def splits_at(path: Path, offset: int, step: int, error: type[SemionError] = DataError) -> bool:
    """Whether a row of an earlier step ends at `offset`, or the file begins there, and none but those of `step` and later
    follow, as far as the two rows beside it tell. `error` as `step_begins`."""
    if offset > path.stat().st_size:
        return False
    before = next(read_backwards(path, offset), None)
    if (before.end if before is not None else 0) != offset:
        return False
    if before is not None and step_of(before, error) >= step:
        return False
    after = next(read_lines(path, offset), None)
    return after is None or step_of(after, error) >= step


class JsonlLedger:
    """A file that rows are appended to, in the order of their `step` where they have one.

    Opening it drops a torn last line. Rows are handed to the operating system at every append: they survive the process, and a
    power cut from the next `sync` on.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with storing(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        last = next(read_backwards(self.path), None)
        whole = last.end if last is not None else 0
        if whole < self.num_bytes:
            self.cut(whole)

    @property
    def num_bytes(self) -> int:
        """The file's length."""
        return os.fstat(self._file.fileno()).st_size

    def append(self, rows: Iterable[Row]) -> None:
        """Adds `rows`. ValueError as `line_of`; then none is added. StorageError where the disk has no room for them."""
        lines = "".join(line_of(row) for row in rows).encode()
        with storing(self.path.parent, lambda: len(lines)):
            self._file.write(lines)
            self._file.flush()

    def sync(self) -> int:
        """Waits until all rows are on disk; the file's length."""
        os.fsync(self._file.fileno())
        return self.num_bytes

    def cut(self, num_bytes: int) -> None:
        """Drops everything after the first `num_bytes`, on disk too; its cost does not depend on how much that is."""
        assert num_bytes <= self.num_bytes, (self.path, num_bytes, self.num_bytes)
        os.ftruncate(self._file.fileno(), num_bytes)
        os.fsync(self._file.fileno())

    def find(self, step: int, error: type[SemionError] = DataError) -> int:
        """As `step_begins`, of this file."""
        return step_begins(self.path, step, error)

    def splits(self, offset: int, step: int, error: type[SemionError] = DataError) -> bool:
        """As `splits_at`, of this file."""
        return splits_at(self.path, offset, step, error)

    def close(self) -> None:
        """Closes the file; the rows are in it already."""
        self._file.close()
