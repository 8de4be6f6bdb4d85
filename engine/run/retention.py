"""Which checkpoints of a run stand, and by which names: LATEST, BEST and the `checkpoint.keep` newest. Rank 0 alone names and
removes. How a checkpoint comes to be on disk, and how one is read again, is not decided here.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

from engine.core.errors import CheckpointError
from engine.core.files import atomic_write, sync
from engine.run.checkpoint import BEST, LATEST, MANIFEST, STEPS, best, latest, reference_folder

log = logging.getLogger(__name__)


class Retention:
    """Names and removes the checkpoints in a folder; any thread may call it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._scores: dict[int, float] | None = None  # what BEST is chosen by; None where nobody has said yet
        self._keep = 1

    def add(self, staging: Path, final: Path, keep: int) -> None:
        """Gives the whole checkpoint its name, and LATEST and BEST theirs."""
        with self._lock:
            if final.exists():
                former = final.with_name(f".staging-former-{final.name}")
                final.rename(former)
                shutil.rmtree(former)
            staging.rename(final)
            sync(self._folder)
            self._point(LATEST, final.name)
            self._keep = keep
            self._select(final)

    def select(self, scores: Mapping[int, float], keep: int) -> None:
        """Names by BEST the checkpoint of the highest score, the earliest of equals, among those up to the newest, now and
        whenever one is added; removes BEST where none has a score. `scores` by step."""
        with self._lock:
            self._scores, self._keep = dict(scores), keep
            newest = latest(self._folder)
            if newest is not None:
                self._select(newest)

    def _select(self, newest: Path) -> None:
        if self._scores is None:
            self._prune(newest, best(self._folder))
            return
        scores = self._scores
        there = {int(path.name.removeprefix("step_")): path for path in self._folder.glob(STEPS) if path <= newest}
        known = sorted(step for step in there.keys() & scores.keys() if (there[step] / MANIFEST).exists())
        chosen = there[max(known, key=lambda step: scores[step])] if known else None
        if chosen is not None:
            self._point(BEST, chosen.name)
        else:
            (self._folder / BEST).unlink(missing_ok=True)
        self._prune(newest, chosen)

    def _point(self, pointer: str, name: str) -> None:
        with atomic_write(self._folder / pointer, durable=True) as part:
            part.write_text(name, encoding="utf-8")

    def _prune(self, newest: Path, chosen: Path | None) -> None:
        """Removes all but the best, the `keep` newest, and those that hold their reference. Later steps than the newest are of
        a run that was killed before it named them; they do not count as kept."""
        there = sorted(path for path in self._folder.glob(STEPS) if path.is_dir() and path.name <= newest.name)
        kept = {*there[-self._keep :], *([chosen] if chosen is not None else [])}
        kept |= {path.parent for checkpoint in sorted(kept) if (path := _held(checkpoint)) is not None}
        for old in there:
            if old not in kept:
                shutil.rmtree(old)


def _held(checkpoint: Path) -> Path | None:
    """The folder that a kept checkpoint has its reference in; None where it has none, or cannot be read: it is kept as it is,
    and no reason to end a run that goes on from another one."""
    if not (checkpoint / MANIFEST).exists():
        return None
    try:
        return reference_folder(checkpoint)
    except CheckpointError as error:
        log.warning(str(error))
        return None
