"""Adds steps to a folder of segments: columns before rows, and a new segment where one is full, which is packed then. Where
only the last steps are kept, old segments go.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from engine.core.columns import LEVEL, batch_message, schema_of
from engine.core.files import atomic_write, storing, sync
from engine.core.jsonl import Row, line_of
from engine.core.segments import Listing, Segment, path_of

if TYPE_CHECKING:
    import numpy as np

SEGMENT_BYTES = 64 << 20  # of rows and columns; a longer one gets no further step
ADOPTED = b'"token_ids": ['  # what rows have that hold their columns


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
        listing = Listing(folder) if folder.is_dir() else None
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
                schema, file = schema_of(self._columns), self._files["columns"]
                head = schema.serialize().to_pybytes() if file.tell() == 0 else b""
                file.write(head + batch_message(schema, step, {name: columns[name] for name in self._columns}))
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
            return bool(pa.ipc.read_schema(file) == schema_of(self._columns))

    def _num_bytes(self) -> int:
        return sum(os.fstat(file.fileno()).st_size for file in self._files.values())

    def _open(self, first: int) -> None:
        self._first = first
        names = ["columns", "rows"] if self._columns else ["rows"]
        self._files = {name: path_of(self._folder, first, name).open("ab") for name in names}

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
            _pack(path_of(self._folder, before, "rows"), before, self._last)
        while self._keep_steps is not None and self._firsts[1:] and self._firsts[1] <= step - self._keep_steps:
            if self._firsts[0] in self._named:
                return
            _remove(self._folder, self._firsts.pop(0))


def _pack(rows: Path, first: int, last: int) -> None:
    """Puts a packed file in the place of a segment's rows."""
    import pyarrow as pa

    with atomic_write(rows.with_name(f"{first:08d}-{last:08d}.jsonl.zst"), durable=True) as part:
        data = pa.Codec("zstd", compression_level=LEVEL).compress(rows.read_bytes(), asbytes=True)
        part.write_bytes(data)
    rows.unlink()


def _remove(folder: Path, first: int) -> None:
    """A whole segment, its rows first, without which it is none."""
    for rows in (*folder.glob(f"{first:08d}.jsonl"), *folder.glob(f"{first:08d}-*.jsonl.zst")):
        rows.unlink()
    path_of(folder, first, "columns").unlink(missing_ok=True)
