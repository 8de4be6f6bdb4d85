"""Drops the last steps of a folder of segments, so that a run goes on from a checkpoint: where a step begins, by what the
checkpoint says or by reading one segment, and the folder cut there.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from engine.core.columns import read_batches
from engine.core.errors import DataError, SemionError
from engine.core.files import atomic_write, storing, sync
from engine.core.jsonl import splits_at, step_begins
from engine.core.segments import Listing, Segment, is_folder_of_segments, path_of, unpacked


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
    listing = Listing(folder)
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
    listing = Listing(folder)
    kept = {first for first in listing.firsts if cut.first is not None and first <= cut.first}
    for first, name in sorted(listing.names, reverse=True):
        if first not in kept or listing.is_twice(first, name) or name.endswith(".part"):
            (folder / name).unlink()
    if cut.first is not None:
        for name, num_bytes in (("columns", cut.columns), ("rows", cut.rows)):
            path = path_of(folder, cut.first, name)
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
            os.replace(file, path_of(folder, 0, "rows"))


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
    rows = path_of(segment.rows.parent, segment.first, "rows")
    with atomic_write(rows, durable=True) as part:
        part.write_bytes(unpacked(segment.rows))
    segment.rows.unlink()
    return Segment(segment.first, rows, segment.columns)


def _size(path: Path | None) -> int:
    return path.stat().st_size if path is not None else 0


def _columns_before(segment: Segment, step: int) -> int:
    """Bytes of a segment's columns of the steps before `step`."""
    batches = read_batches(segment.columns) if segment.columns is not None else ()
    return max((batch.end for batch in batches if batch.step < step), default=0)
