"""The trainer ranks' words of their parts of a checkpoint, a file each in the folder where it is staged: that the part is on
disk, with its files' sizes and digests, or why it is not. Rank 0 waits for them. What the parts are is saving.py's business.

    .staging-step_00000040/parts/rank_0001.json   rank 1's word
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.core.errors import CheckpointError, SemionError, StorageError, WatchdogError
from engine.core.files import atomic_write
from engine.run.checkpoint import rank_file

PARTS = "parts"  # folder of the words in a staging folder
FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.5  # seconds between two looks at the other ranks' words
PAUSE_PER_RANK = 0.001  # seconds; where the longest pause is more than LONGEST_PAUSE, for a look takes longer with more ranks


def tell_part(staging: Path, rank: int, word: Mapping[str, Any]) -> None:
    """Writes a rank's word that its part is on disk, and what it is."""
    with atomic_write(_file(staging, rank), durable=True) as part:
        part.write_text(json.dumps(word), encoding="utf-8")


def tell_failure(staging: Path, rank: int, error: BaseException) -> None:
    """Writes why a rank's part is not on disk, so that rank 0 need not wait for it. The file of the rank's state goes."""
    word = {"error": str(error), "storage": isinstance(error, StorageError)}
    part = _file(staging, rank)
    try:
        (staging / rank_file(rank)).unlink(missing_ok=True)  # so that there is room for a word
        with atomic_write(part) as whole:
            whole.write_text(json.dumps(word), encoding="utf-8")
    except (OSError, SemionError):
        with suppress(OSError):  # nothing can be written: this rank's own error is told
            part.touch()


def await_parts(staging: Path, world_size: int, patience_seconds: float) -> list[dict[str, Any]]:
    """Every rank's word, by rank, once all have said it. WatchdogError where nothing is added to the parts for so long; a
    rank's failure is raised as that rank's own would be.

    It waits beside rank 0's training, so a look is one listing of the words' folder: a word is read once, and again only
    where another file has taken its place. The sizes of all files, which need a look at each, are asked for seldom, and
    once more before the wait is given up."""
    ranks = {_file(staging, rank).name: rank for rank in range(world_size)}
    longest = max(LONGEST_PAUSE, PAUSE_PER_RANK * world_size)
    between_sizes = min(10 * longest, patience_seconds / 4)
    words: dict[int, dict[str, Any]] = {}
    files: dict[int, int] = {}  # by rank, the inode of the word that was read
    pause, seen, sizes_due, patient_until = FIRST_PAUSE, -1, 0.0, 0.0
    while True:
        with os.scandir(staging / PARTS) as entries:
            found = {ranks[entry.name]: entry.inode() for entry in entries if entry.name in ranks}
        for rank in sorted(rank for rank, inode in found.items() if files.get(rank) != inode):
            word = _word(_file(staging, rank))
            if "error" in word:
                raise StorageError(word["error"]) if word["storage"] else CheckpointError(word["error"])
            words[rank], files[rank] = word, found[rank]
        if len(words) == world_size:
            return [words[rank] for rank in range(world_size)]
        now = time.monotonic()
        if now >= min(sizes_due, patient_until):
            size, sizes_due = _size(staging), now + between_sizes
            if size != seen:
                seen, patient_until = size, now + patience_seconds
            elif now > patient_until:
                late = min(set(range(world_size)) - set(words))
                raise WatchdogError(
                    f"trainer rank {late} must write its part of a checkpoint into {staging}; found nothing new for "
                    f"{patience_seconds:g} s: is that folder the same on every node?"
                )
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _file(staging: Path, rank: int) -> Path:
    return staging / PARTS / f"rank_{rank:04d}.json"


def _word(path: Path) -> dict[str, Any]:
    """What a rank said of its part; an empty file is all that a full disk takes."""
    text = path.read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text) if text else {"error": f"{path.stem} cannot be written", "storage": True}
    return found


def _size(folder: Path) -> int:
    """Bytes of all files below a folder; a file that takes its final name meanwhile may be missed."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total
