"""Rows and columns of steps on disk, in segments of a bounded size, so that to add, cut or read a step costs the same however
many there are. A row is a line of JSON that people can read; numbers that are many (one a token) stand beside it in columns
(columns.py). Here segments are found and their rows read; segment_writer.py adds steps, segment_cut.py drops the last ones.
None of them knows what the rows mean.

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from engine.core.errors import DataError
from engine.core.jsonl import Line, lines_in, read_backwards, step_of

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
            return io.BytesIO(unpacked(self.rows))
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
    listing = Listing(path)
    return [listing.segment(first) for first in listing.firsts]


class Listing:
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
    return path.is_dir() and bool(Listing(path).firsts)


def path_of(folder: Path, first: int, name: str) -> Path:
    """Where a segment's "rows", not packed, or "columns" stand."""
    return folder / f"{first:08d}.{'jsonl' if name == 'rows' else 'arrows'}"


def unpacked(path: Path) -> bytes:
    """The rows in a packed file; DataError where it holds something else."""
    import pyarrow as pa

    try:
        with pa.CompressedInputStream(str(path), "zstd") as stream:
            data: bytes = stream.read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: must be packed rows; found something else ({error}): remove it") from error
    return data
