"""Figures on disk: a row a step that a resumed run can cut back to its checkpoint, and whole documents. It decides nothing
about what is measured, shows nothing to a person (progress.py does), and tells no other program (sinks/ do).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.core.files import atomic_write
from engine.core.jsonl import JsonlLedger


class MetricsWriter:
    """metrics.jsonl in `directory`, one record a step: {"step": int, name: float, ...}; names carry their units. Close it, or
    use it as a context manager."""

    def __init__(self, directory: str | Path) -> None:
        self.ledger = JsonlLedger(Path(directory) / "metrics.jsonl")

    def write(self, record: Mapping[str, float]) -> None:
        """Adds one step. A value that is not finite becomes null."""
        metrics = {name: float(value) for name, value in record.items() if name != "step"}
        self.ledger.append([{"step": int(record["step"]), **finite(metrics)}])

    def close(self) -> None:
        """Closes the file."""
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
