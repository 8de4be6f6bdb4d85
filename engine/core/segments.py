"""Rows and columns of steps on disk, in segments of a bounded size, so that to add, cut or read a step costs the same however
many there are. A row is a line of JSON that people can read; numbers that are many (one a token) stand beside it in columns. It
does not know what the rows mean.

    rollouts/00000000-00000039.jsonl.zst   a full segment: the rows of steps 0 to 39, packed (zstdcat, zstdgrep)
    rollouts/00000000.arrows               its columns: an Arrow stream (pyarrow.ipc.open_stream), a batch a step, in it a row
                                           for each line; integers and floats as they are, packed by zstd
    rollouts/00000040.jsonl                the segment that is written: its rows, one a line
    rollouts/00000040.arrows               its columns

A segment is named by its first step. A step's columns are written before its rows, so whoever finds the rows finds both. What a
killed process leaves (a line without its end, a batch that is not whole, columns without rows, a .part) does not count; a plain
file of rows beside a packed one is the one that counts. A segment without columns may have them in its rows, as files of older
versions do.
"""

from __future__ import annotations

import io
import os
import re
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from engine.core.errors import DataError, SemionError
from engine.core.files import atomic_write, storing, sync
from engine.core.jsonl import Line, Row, line_of, lines_in, read_backwards, splits_at, step_begins, step_of

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

SEGMENT_BYTES = 64 << 20  # of rows and columns; a longer one gets no further step
LEVEL = 3  # of zstd: a higher one takes longer and saves little
ADOPTED = b'"token_ids": ['  # what rows have that hold their columns
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # what Arrow ends a stream with, and no reader of one needs
# first step; the last one of packed rows; what a plain file is; .part and whatever else a killed process left
_NAME = re.compile(r"(\d{8,})(?:-(\d{8,})\.jsonl\.zst|\.(jsonl|arrows)|.*\.part)")


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of some steps in a file, and their columns in another."""

    first: int  # step
    rows: Path
    columns: Path | None = None  # None: there are none, or they are in the rows
    last: int | None = None  # step, where the rows are packed

    @property
    def is_packed(self) -> bool:
        """Whether nothing is added to it any more, and its rows are compressed."""
        return self.last is not None

    def lines(self, start: int = 0) -> Iterator[Line]:
        """Its rows from the byte `start` on, where a line begins, counted without packing."""
        with self.open() as file:
            yield from lines_in(file, self.rows, start)

    def newest_lines(self) -> Iterator[Line]:
        """Its rows, the last one first."""
        if self.is_packed:
            yield from reversed(list(self.lines()))
        else:
            yield from read_backwards(self.rows)

    def open(self) -> BinaryIO:
        """Its rows as a file to read; of a segment that has been packed meanwhile those that are packed now."""
        if self.last is not None:
            return io.BytesIO(_unpacked(self.rows))
        try:
            return self.rows.open("rb")
        except FileNotFoundError:
            again = next((found for found in segments_of(self.rows.parent) if found.first == self.first), None)
            if again is None or not again.is_packed:
                raise
            return again.open()

    def last_step(self) -> int:
        """That of its last row; DataError where that has none."""
        return self.last if self.last is not None else step_of(next(read_backwards(self.rows)))


def segments_of(path: Path) -> list[Segment]:
    """The segments of a folder, in order; of a file of rows with their columns in them the one that it is. Those without a row
    are left out. It reads names, and of a file the first line."""
    if not path.is_dir():
        first = next(lines_in_file(path), None)
        return [Segment(step_of(first), path)] if first is not None else []
    listing = _Listing(path)
    return [listing.segment(first) for first in listing.firsts]


class _Listing:
    """The names in a folder, by the segments that they are of."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.names: list[tuple[int, str]] = []  # first step and name of everything that is or was part of a segment
        self._rows: dict[int, tuple[str, int | None]] = {}
        self._columns: set[int] = set()
        for entry in os.scandir(folder):
            match = _NAME.fullmatch(entry.name)
            if match is None:
                continue
            first, name = int(match[1]), entry.name
            self.names.append((first, name))
            if match[2] is not None or match[3] == "jsonl":
                if match[2] is None or first not in self._rows:  # a plain one counts
                    self._rows[first] = name, int(match[2]) if match[2] is not None else None
            elif match[3] == "arrows":
                self._columns.add(first)
        self.firsts = sorted(self._rows)
        while self.firsts and self._is_empty(self.firsts[-1]):
            self.firsts.pop()

    def segment(self, first: int) -> Segment:
        """That of this first step."""
        name, last = self._rows[first]
        columns = self._folder / f"{first:08d}.arrows" if first in self._columns else None
        return Segment(first, self._folder / name, columns, last)

    def is_twice(self, first: int, name: str) -> bool:
        """Whether the file is the packed twin of a plain one."""
        return name.endswith(".zst") and first in self._rows and self._rows[first][0] != name

    def _is_empty(self, first: int) -> bool:
        name, last = self._rows[first]
        return last is None and _is_empty(self._folder / name)


def _is_empty(rows: Path) -> bool:
    """Whether there is no whole row in it; a file that has been packed meanwhile has some."""
    try:
        return next(read_backwards(rows), None) is None
    except FileNotFoundError:
        return False


def lines_in_file(path: Path) -> Iterator[Line]:
    """The whole lines of a file; none where there is no file."""
    if path.exists():
        with path.open("rb") as file:
            yield from lines_in(file, path)


def is_folder_of_segments(path: Path) -> bool:
    """Whether a folder holds rows as this file writes them."""
    return path.is_dir() and bool(_Listing(path).firsts)


# -- columns


class Batch(NamedTuple):
    """Where the columns of a step lie in their file."""

    step: int
    begin: int
    end: int


def read_batches(path: Path) -> Iterator[Batch]:
    """The whole batches of a file of columns, in order; what follows the last is not looked at. DataError where it is none."""
    import pyarrow as pa

    only_steps = pa.ipc.IpcReadOptions(included_fields=[0], use_threads=False)
    with pa.OSFile(str(path)) as file:
        try:
            reader = pa.ipc.open_stream(file, options=only_steps)
        except (pa.ArrowException, OSError):
            return  # killed before its first batch
        begin = file.tell()
        while True:
            try:
                batch = reader.read_next_batch()
            except (StopIteration, pa.ArrowException, OSError):
                return
            end = file.tell()
            yield Batch(batch.column(0)[0].as_py(), begin, end)
            begin = end


def read_columns(path: Path, batch: Batch) -> dict[str, list[np.ndarray]]:
    """The columns of a step by name, an array for each of its rows. DataError where they cannot be read."""
    import pyarrow as pa

    try:
        with pa.OSFile(str(path)) as file:
            schema = pa.ipc.read_schema(file)
            file.seek(batch.begin)
            found = pa.ipc.read_record_batch(pa.ipc.read_message(file), schema)
            found.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}, step {batch.step}: columns must be as they were written; found others ({error}): use another file"
        ) from error
    columns = {}
    for name in schema.names[1:]:
        lists = found.column(name)
        offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy()
        columns[name] = [values[begin:end] for begin, end in pairwise(offsets)]
    return columns


def _schema(columns: Mapping[str, str]) -> pa.Schema:
    import pyarrow as pa

    kinds = {"int32": pa.int32(), "float32": pa.float32()}
    return pa.schema([("step", pa.int32()), *((name, pa.list_(kinds[kind])) for name, kind in columns.items())])


def _message(schema: pa.Schema, step: int, columns: Mapping[str, Sequence[np.ndarray]]) -> bytes:
    """A step's batch as it stands in a stream."""
    import numpy as np
    import pyarrow as pa

    count = len(next(iter(columns.values())))
    arrays = [pa.array(np.full(count, step, np.int32))]
    for name, parts in columns.items():
        assert len(parts) == count, (name, len(parts), count)
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)]).astype(np.int32)
        values = np.concatenate(parts).astype(schema.field(name).type.value_type.to_pandas_dtype(), copy=False)
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)))
    sink = pa.BufferOutputStream()
    packing = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=LEVEL), use_threads=False)
    with pa.ipc.new_stream(sink, schema, options=packing) as stream:
        stream.write_batch(pa.record_batch(arrays, schema=schema))
    whole, head = sink.getvalue().to_pybytes(), schema.serialize().to_pybytes()
    assert whole.startswith(head) and whole.endswith(END_OF_STREAM)
    return whole[len(head) : -len(END_OF_STREAM)]


# -- writing


class SegmentWriter:
    """Adds steps to a folder of segments, from where it ends. Whoever goes on from a checkpoint cuts it first."""

    def __init__(
        self,
        folder: Path,
        columns: Mapping[str, str],
        *,
        keep_steps: int | None = None,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        """`columns`: the type of each, "int32" or "float32". `keep_steps`: segments go, whole, whose steps are all older than
        so many last ones, but none that the last two `sync` named or a later one: whoever goes on from there finds it; None
        keeps all. Nothing is made on disk before the first step."""
        self._folder, self._columns = folder, dict(columns)
        self._keep_steps, self._segment_bytes = keep_steps, segment_bytes
        listing = _Listing(folder) if folder.is_dir() else None
        self._firsts = listing.firsts if listing is not None else []
        newest = listing.segment(self._firsts[-1]) if listing is not None and self._firsts else None
        self._first: int | None = None  # step of the segment that is written
        self._last = newest.last_step() if newest is not None else -1
        self._files: dict[str, BinaryIO] = {}  # "rows", and "columns" where it has any
        self._named = deque[int](self._firsts[-1:], maxlen=2)  # by `sync`: the segments that were written then
        if newest is not None and not newest.is_packed and self._goes_on(newest):
            self._open(newest.first)

    def append(self, step: int, rows: Iterable[Row], columns: Mapping[str, Sequence[np.ndarray]]) -> None:
        """Adds a step, later than all before. ValueError for what JSON cannot hold; StorageError where the disk has no room."""
        assert step > self._last, (step, self._last)
        lines = "".join(line_of(row) for row in rows).encode()
        with storing(self._folder, lambda: len(lines)):
            if self._first is None or self._num_bytes() >= self._segment_bytes:
                self._begin(step)
            if self._columns:
                schema, file = _schema(self._columns), self._files["columns"]
                head = schema.serialize().to_pybytes() if file.tell() == 0 else b""
                file.write(head + _message(schema, step, {name: columns[name] for name in self._columns}))
                file.flush()
            self._files["rows"].write(lines)
            self._files["rows"].flush()
        self._last = step

    def sync(self) -> dict[str, int] | None:
        """Waits until all is on disk; how long the segment is that is written, as `find_cut` is given it. None where no step
        was added yet."""
        if self._first is None:
            return None
        for file in self._files.values():
            os.fsync(file.fileno())
        sync(self._folder)
        sync(self._folder.parent)
        self._named.append(self._first)
        sizes = {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}
        return {"segment": self._first} | sizes

    def close(self) -> None:
        """Closes the files; the rows are in them already."""
        for file in self._files.values():
            file.close()

    def _goes_on(self, segment: Segment) -> bool:
        """Whether what is there has the columns that are written now; a file that `adopt` took is never added to."""
        if segment.columns is None and not self._columns:
            return ADOPTED not in next(segment.lines()).data
        if segment.columns is None or not self._columns:
            return False
        import pyarrow as pa

        with pa.OSFile(str(segment.columns)) as file:
            return bool(pa.ipc.read_schema(file) == _schema(self._columns))

    def _num_bytes(self) -> int:
        return sum(os.fstat(file.fileno()).st_size for file in self._files.values())

    def _open(self, first: int) -> None:
        self._first = first
        names = ["columns", "rows"] if self._columns else ["rows"]
        self._files = {name: _path(self._folder, first, name).open("ab") for name in names}

    def _begin(self, step: int) -> None:
        """A new segment; the one before is packed, and old ones go."""
        self._folder.mkdir(parents=True, exist_ok=True)
        before, self._first = self._first, None
        for file in self._files.values():
            os.fsync(file.fileno())
            file.close()
        self._open(step)
        self._firsts.append(step)
        if before is not None:
            _pack(_path(self._folder, before, "rows"), before, self._last)
        while self._keep_steps is not None and self._firsts[1:] and self._firsts[1] <= step - self._keep_steps:
            if self._firsts[0] in self._named:
                return
            _remove(self._folder, self._firsts.pop(0))


def _path(folder: Path, first: int, name: str) -> Path:
    return folder / f"{first:08d}.{'jsonl' if name == 'rows' else 'arrows'}"


def _pack(rows: Path, first: int, last: int) -> None:
    """Puts a packed file in the place of a segment's rows."""
    import pyarrow as pa

    with atomic_write(rows.with_name(f"{first:08d}-{last:08d}.jsonl.zst"), durable=True) as part:
        data = pa.Codec("zstd", compression_level=LEVEL).compress(rows.read_bytes(), asbytes=True)
        part.write_bytes(data)
    rows.unlink()


def _unpacked(path: Path) -> bytes:
    import pyarrow as pa

    try:
        with pa.CompressedInputStream(str(path), "zstd") as stream:
            data: bytes = stream.read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: must be packed rows; found something else ({error}): remove it") from error
    return data


def _remove(folder: Path, first: int) -> None:
    """A whole segment, its rows first, without which it is none."""
    for rows in (*folder.glob(f"{first:08d}.jsonl"), *folder.glob(f"{first:08d}-*.jsonl.zst")):
        rows.unlink()
    _path(folder, first, "columns").unlink(missing_ok=True)


# -- cutting


class Cut(NamedTuple):
    """Where a folder of segments is to end."""

    first: int | None  # of the last segment that stays; None: nothing stays
    rows: int = 0  # bytes of its rows that stay
    columns: int = 0  # and of its columns
    note: str | None = None  # what somebody should know of how it was found


def find_cut(folder: Path, step: int, known: Mapping[str, int] | None, error: type[SemionError] = DataError) -> Cut:
    """Where the steps from `step` on begin. `known`: where `SegmentWriter.sync` said when those before were all; None where it
    said nothing. It reads one segment at most. Where the folder is not what it said (somebody changed it), the place is found
    by reading that segment, with a note; `error` names a line on the way that has no step."""
    if step == 0 or not folder.is_dir():
        return Cut(None, note=f"{folder} is gone, with the rollouts before step {step}" if known is not None and step else None)
    listing = _Listing(folder)
    place = bisect_left(listing.firsts, step) - 1
    last = _plain(listing.segment(listing.firsts[place])) if place >= 0 else None
    if known is not None and last is not None and last.first == known["segment"]:
        long_enough = _size(last.columns) >= known.get("columns", 0)
        if long_enough and splits_at(last.rows, known["rows"], step, error):
            return Cut(last.first, known["rows"], known.get("columns", 0))
    if last is None:
        return Cut(None, note=_changed(folder, step, known, None) if known is not None else None)
    cut = Cut(last.first, step_begins(last.rows, step, error), _columns_before(last, step))
    return cut._replace(note=_changed(folder, step, known, cut))


def cut_back(folder: Path, cut: Cut) -> None:
    """Drops what comes after `cut`, on disk too, and what killed processes left; later segments first, so that whatever ends
    this in the middle leaves what the same cut mends."""
    if not folder.is_dir():
        return
    listing = _Listing(folder)
    kept = {first for first in listing.firsts if cut.first is not None and first <= cut.first}
    for first, name in sorted(listing.names, reverse=True):
        if first not in kept or listing.is_twice(first, name) or name.endswith(".part"):
            (folder / name).unlink()
    if cut.first is not None:
        for name, num_bytes in (("columns", cut.columns), ("rows", cut.rows)):
            path = _path(folder, cut.first, name)
            if num_bytes:
                os.truncate(path, num_bytes)
                sync(path)
            else:
                path.unlink(missing_ok=True)
    sync(folder)


def adopt(file: Path, folder: Path) -> None:
    """Makes a file of rows with their columns in them, as older versions wrote for a whole run, the first segment of a folder;
    nothing where there is none, or the folder has segments already."""
    if file.exists() and not is_folder_of_segments(folder):
        with storing(folder.parent):
            folder.mkdir(exist_ok=True)
            os.replace(file, _path(folder, 0, "rows"))


def _changed(folder: Path, step: int, known: Mapping[str, int] | None, cut: Cut | None) -> str | None:
    if known is None:
        return None
    found = f"it in segment {cut.first}, byte {cut.rows}" if cut is not None and cut.first is not None else "nothing before it"
    return (
        f"{folder} was changed: by the checkpoint, step {step} begins in segment {known['segment']} at byte {known['rows']}; "
        f"found {found}"
    )


def _plain(segment: Segment) -> Segment:
    """The segment with rows that are not packed."""
    if not segment.is_packed:
        return segment
    rows = _path(segment.rows.parent, segment.first, "rows")
    with atomic_write(rows, durable=True) as part:
        part.write_bytes(_unpacked(segment.rows))
    segment.rows.unlink()
    return Segment(segment.first, rows, segment.columns)


def _size(path: Path | None) -> int:
    return path.stat().st_size if path is not None else 0


def _columns_before(segment: Segment, step: int) -> int:
    """Bytes of a segment's columns of the steps before `step`."""
    batches = read_batches(segment.columns) if segment.columns is not None else ()
    return max((batch.end for batch in batches if batch.step < step), default=0)
