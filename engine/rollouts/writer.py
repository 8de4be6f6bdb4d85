"""Writes rollouts down while their step is trained: whoever has a step's groups hands them over and goes on, and a thread makes
JSON and columns of them. What fails there is raised where the next step is handed over, or by whoever waits. It measures and
judges nothing; ledger.py reads what is written here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from engine.config.options import RolloutRecords
from engine.core.jsonl import JsonlLedger
from engine.core.segment_writer import SegmentWriter
from engine.core.types import RolloutGroup
from engine.rollouts.ledger import COLUMNS, columns_of, ledger_rows, rollout_rows

QUEUED = 2  # steps that may wait to be written; who hands over a further one waits


class Store(Protocol):
    """Where rollouts go."""

    def append(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Adds a step, later than all before."""
        ...

    def sync(self) -> dict[str, int] | None:
        """Waits until all is on disk; where it ends, as its form says."""
        ...

    def close(self) -> None:
        """Closes the files."""
        ...


class RolloutFile:
    """One file of JSON lines with the tokens and log-probs in each."""

    def __init__(self, path: Path) -> None:
        self._ledger = JsonlLedger(path)

    def append(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Adds a step."""
        self._ledger.append(row for group in groups for row in ledger_rows(group))

    def sync(self) -> dict[str, int] | None:
        """Waits until all is on disk; the file's length."""
        return {"rows": self._ledger.sync()}

    def close(self) -> None:
        """Closes the file."""
        self._ledger.close()


class RolloutFolder:
    """A folder of segments, with what the run's `records` say."""

    def __init__(self, folder: Path, options: RolloutRecords) -> None:
        self._options = options
        kept = {"token_ids": options.tokens, "log_probs": options.log_probs}
        columns = {name: kind for name, kind in COLUMNS.items() if kept[name]}
        self._segments = SegmentWriter(folder, columns, keep_steps=options.keep_steps)

    def append(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Adds a step."""
        rows = [row for group in groups for row in rollout_rows(group, text=self._options.text)]
        self._segments.append(step, rows, columns_of(rollout.completion for group in groups for rollout in group.rollouts))

    def sync(self) -> dict[str, int] | None:
        """Waits until all is on disk; where it ends, as `find_cut` is given it."""
        return self._segments.sync()

    def close(self) -> None:
        """Closes the files."""
        self._segments.close()


class RolloutWriter:
    """Hands steps to a store by a thread of its own, in their order. For one thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout records")
        self._written: deque[Future[None]] = deque()
        self._has_failed = False

    def append(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Takes a step, which nobody changes any more; waits only where QUEUED steps are not written yet. Raises what has
        failed of those before: StorageError where the disk is full or not to be written."""
        while self._written and (self._written[0].done() or len(self._written) >= QUEUED):
            self._written.popleft().result()
        self._written.append(self._thread.submit(self._write, step, groups))

    def settle(self) -> None:
        """Returns when all that was taken is written, so that it survives this process. Raises what has failed."""
        while self._written:
            self._written.popleft().result()

    def sync(self) -> dict[str, int] | None:
        """The same on disk; where it ends, as the store says."""
        self.settle()
        return self._store.sync()

    def close(self) -> None:
        """Ends the thread, once it has written what it was given, and closes the files. Raises what has failed."""
        self._thread.shutdown()
        self._store.close()
        self.settle()

    def _write(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """What the thread does; nothing follows a step that could not be written."""
        if self._has_failed:
            return
        self._has_failed = True
        self._store.append(step, groups)
        self._has_failed = False
