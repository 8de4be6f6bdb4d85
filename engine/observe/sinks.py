"""Where a run's figures are written: a row a step that a resumed run can cut back to its checkpoint, TensorBoard scalars, and
whole documents. It decides nothing about what is measured, and shows nothing to a person (progress.py does).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from engine.core.files import atomic_write
from engine.core.jsonl import JsonlLedger


class MetricsWriter:
    """One record a step into `directory`: metrics.jsonl, and TensorBoard scalars under tensorboard/.

    A record is {"step": int, name: float, ...}; names carry their units. Close it, or use it as a context manager.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        self.ledger = JsonlLedger(directory / "metrics.jsonl")
        self._events = EventFileWriter(str(directory / "tensorboard"), flush_secs=10)

    def write(self, record: Mapping[str, float]) -> None:
        """Adds one step. A value that is not finite becomes null in metrics.jsonl and stays itself in TensorBoard."""
        step = int(record["step"])
        metrics = {name: float(value) for name, value in record.items() if name != "step"}
        self.ledger.append([{"step": step, **finite(metrics)}])
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def cut(self, num_bytes: int, step: int) -> None:
        """Forgets `step` and later, which begin at this byte of the ledger, before a resumed run writes them again.
        TensorBoard's files are left alone: it is told to hide its own."""
        self.ledger.cut(num_bytes)
        restart = SessionLog(status=SessionLog.START)
        self._events.add_event(Event(wall_time=time.time(), step=step, session_log=restart))

    def close(self) -> None:
        """Writes out what TensorBoard's thread still holds and closes both files."""
        self._events.close()
        self.ledger.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """The metrics as JSON can hold them: null for what is not finite, such as the mean of nothing."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def write_json(path: str | Path, document: Any) -> None:
    """Replaces `path` by `document` as indented JSON, all or nothing; raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Replaces `path` by `text`, all or nothing."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
