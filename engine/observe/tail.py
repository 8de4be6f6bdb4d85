"""The rows of a ledger as they come, for those who look on while a run writes: each is read once, so that a look costs what was
added since the last one and not the run's age; nor does what is kept in memory grow with it. A run that is resumed cuts its
ledgers back; the looker-on is told how many of the rows it was given no longer stand. It writes nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from engine.core.jsonl import read_backwards, read_lines, require_names, require_numbers, row_of, step_of

MOST_MARKS = 4096  # of rows that are remembered; at least 2, the first and the last


class Fresh(NamedTuple):
    """What a look found."""

    withdrawn: int  # of the rows given before, the last so many are gone
    rows: list[dict[str, Any]]


class _Mark(NamedTuple):
    """A row that was given."""

    begin: int  # of its line, in bytes
    end: int
    checksum: int  # of its line
    step: int
    rows: int  # given up to it, itself included


class Tail:
    """Reads a ledger from the byte `start` on, where a line begins. `needs` and `numbers` as for `read_rows`."""

    def __init__(
        self, path: Path, start: int = 0, *, needs: Collection[str] = (), numbers: bool | Collection[str] = False
    ) -> None:
        self.path, self._needs, self._numbers = path, needs, numbers
        self._marks: list[_Mark] = []  # of rows given, in order; see _thin
        self._start = start
        self._withdrawn = 0  # and not told yet
        self._seen = (-1, -1)  # size and time of the file at the last look
        self.bytes_read = 0

    @classmethod
    def of_step(cls, path: Path, step: int) -> Tail:
        """From the first row of `step` or later on, looked for from the end. DataError for a line without a step."""
        start = 0
        for line in read_backwards(path) if path.exists() else ():
            if step_of(line) < step:
                start = line.end
                break
        return cls(path, start)

    def fresh(self, most: int | None = None) -> Fresh:
        """The rows that came since the last look, `most` at most; none where there is no file. DataError for a line that is no
        row."""
        if not self.path.exists():
            self._withdrawn, self._marks = self._withdrawn + self._given, []
            return self._told([])
        status = self.path.stat()
        if (seen := (status.st_size, status.st_mtime_ns)) == self._seen:
            return Fresh(0, [])
        self._withdrawn += self._withdraw(status.st_size)
        rows, marks, given = list[dict[str, Any]](), list[_Mark](), self._given
        for line in read_lines(self.path, self._end):
            if most is not None and len(rows) == most:
                seen = (-1, -1)  # there is more in it
                break
            rows.append(row_of(line))
            require_names(rows[-1], self._needs, line)
            if self._numbers:
                require_numbers(rows[-1], line, names=None if self._numbers is True else self._numbers)
            marks.append(_Mark(line.offset, line.end, crc32(line.data), rows[-1]["step"], given + len(rows)))
            self.bytes_read += len(line.data)
        self._marks += marks  # once all could be read: what was before a broken line comes again with what is after it
        self._thin()
        self._seen = seen
        return self._told(rows)

    def _told(self, rows: list[dict[str, Any]]) -> Fresh:
        withdrawn, self._withdrawn = self._withdrawn, 0
        return Fresh(withdrawn, rows)

    @property
    def _end(self) -> int:
        return self._marks[-1].end if self._marks else self._start

    @property
    def _given(self) -> int:
        return self._marks[-1].rows if self._marks else 0

    def _thin(self) -> None:
        """Keeps MOST_MARKS at most: of the older half where a step ends, of those every second one. Where a ledger was cut
        between two of those kept, the rows behind the first of them are withdrawn too, and come again."""
        while len(self._marks) > MOST_MARKS:
            half = (len(self._marks) + 1) // 2  # 2 at least, so one of them goes
            ends = [mark for mark, later in pairwise(self._marks[: half + 1]) if mark.step != later.step]
            self._marks = [*ends[::2], *self._marks[half:]]

    def _withdraw(self, size: int) -> int:
        """Forgets rows from the last one back to one that is known to stand where it stood; how many."""
        count = self._given
        if size < self._start:
            self._start, self._marks = 0, []
            return count
        with self.path.open("rb") as file:
            while self._marks:
                mark = self._marks[-1]
                if mark.end <= size:
                    file.seek(mark.begin)
                    data = file.read(mark.end - mark.begin)
                    self.bytes_read += len(data)
                    if crc32(data) == mark.checksum:
                        break
                self._marks.pop()
        return count - self._given
