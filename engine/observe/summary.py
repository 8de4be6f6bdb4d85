"""What a run came to, from its own records: totals over all steps and every evaluation, also those of before a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.core.jsonl import read_rows
from engine.observe.journal import WARNINGS, read_warnings

TOTALS = (
    *("train_seconds", "wait_seconds", "sync_seconds", "step_seconds", "generation_seconds"),
    *("generation_tokens", "num_tokens", "reward_timeouts", "skipped_prompts"),
)
RESTARTS = "restarts.jsonl"  # what the command wrote down of losses, in the run's directory; no resume cuts it back


def summarize(directory: Path) -> dict[str, Any]:
    """{"steps", "totals", "evaluations", "restarts", "warnings"} of the run in `directory`; DataError for a record
    that cannot be read."""
    metrics = list(read_rows(directory / "metrics.jsonl"))
    evaluations = [{k: v for k, v in row.items() if k != "records"} for row in read_rows(directory / "evaluations.jsonl")]
    totals = {name: sum(row.get(name) or 0.0 for row in metrics) for name in TOTALS}
    restarts = list(read_rows(directory / RESTARTS))
    told = {"restarts": restarts, "warnings": read_warnings(directory / WARNINGS)}
    return {"steps": len(metrics), "totals": totals, "evaluations": evaluations} | told
