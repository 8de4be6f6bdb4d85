"""Where a run's directory has its rollouts, and their rows for those who look on, newest or oldest first. Tokens and log-probs
are read by whoever trains on them (rollouts/ledger.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from engine.core.jsonl import Line, row_of
from engine.core.segments import is_folder_of_segments, segments_of

ROLLOUTS = "rollouts"  # a folder of segments, in the run's directory
ROLLOUTS_FILE = "rollouts.jsonl"  # which older versions wrote instead
# How a row begins as we write it, of one version; others are parsed whole, and so is one that says any of this once more, which
# JSON then reads instead, or may say it in letters that are escaped
_HEAD = re.compile(rb'\{"step": (\d+), "version": (\d+)[,}]')
_STEP, _VERSION, _SPANS, _ESCAPE = b'"step"', b'"version"', b'"spans"', b"\\u00"


class Head(NamedTuple):
    """Which step and which weights a rollout is of."""

    file: str  # by its name in the run's directory
    line: int  # its number in the file, from 1 on
    step: int
    version: Any  # an integer, unless somebody changed it
    spans: Any = None  # with sync.in_flight: [version, tokens] of each version that sampled some, unless somebody changed it
    num_tokens: Any = None  # beside spans: of the whole rollout, unless somebody changed it

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return f"{self.file} line {self.line}"


def rollouts_of(directory: Path) -> Path | None:
    """The folder of a run's rollouts, or the file of an older run; None where it has neither."""
    folder, file = directory / ROLLOUTS, directory / ROLLOUTS_FILE
    if is_folder_of_segments(folder) or (folder.is_dir() and not file.exists()):
        return folder
    return file if file.exists() else None


def heads(place: Path) -> Iterator[Head]:
    """Of all rollouts, in order, of which a segment is held at a time; DataError for a line that is no row."""
    for segment in segments_of(place):
        name = str(segment.rows.relative_to(place.parent))
        for number, line in enumerate(segment.lines(), start=1):
            found = _HEAD.match(line.data)
            if found and _says_no_more(line.data, found.end()):
                yield Head(name, number, int(found[1]), int(found[2]))
            else:
                row = row_of(line)
                yield Head(name, number, row["step"], row.get("version"), row.get("spans"), row.get("num_tokens"))


def _says_no_more(data: bytes, start: int) -> bool:
    """Whether none of the names comes again in a line, plainly or in letters that are escaped. A long row's time goes here."""
    find = data.find
    return find(_STEP, start) < 0 and find(_VERSION, start) < 0 and find(_SPANS, start) < 0 and find(_ESCAPE, start) < 0


def rows_of_step(place: Path, step: int) -> list[dict[str, Any]]:
    """The rows of a step, in their order, whose cost is that of the segments from its own on."""

    def backwards() -> Iterator[Line]:
        for segment in reversed(segments_of(place)):
            yield from segment.newest_lines()

    found = []
    for line in backwards():
        row = row_of(line)
        if row["step"] < step:
            break
        if row["step"] == step:
            found.append(row)
    return found[::-1]
