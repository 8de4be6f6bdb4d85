"""What a run came to, from its own records: totals over all steps and every evaluation, also those of before a resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.core.jsonl import read_rows
from engine.observe.journal import WARNINGS, read_warnings
from engine.observe.timeline import FIRST_STEP, STARTUP

TOTALS = (
    *("train_seconds", "wait_seconds", "sync_seconds", "step_seconds", "generation_seconds"),
    *("generation_tokens", "num_tokens", "reward_timeouts", "skipped_prompts"),
)
# What a row of evaluations.jsonl must have, and of that what must be a number or null, as `read_rows` is told
_FIGURES = ("mean", "standard_error", "completion_tokens_mean")
EVALUATION: dict[str, Any] = {"needs": ("set", "measure", *_FIGURES), "numbers": _FIGURES}
RESTARTS = "restarts.jsonl"  # what the command wrote down of losses, in the run's directory; no resume cuts it back
# What a restart's seconds go to, and the phases of its start (startup.jsonl) that are summed for it: those of the command and
# of trainer rank 0, which follow one another. `weights` are within `model`, and engines load beside all that.
STARTED = {
    "start": ("ray", "processes", "ranks"),
    "weights": ("model",),
    "state": ("resume",),
    "engines": ("engines", "connect"),
    "step": (FIRST_STEP,),
}
TOOK = ("notice", "end", *STARTED, "rest", "all")


def read_restarts(directory: Path) -> list[dict[str, Any]]:
    """The rows of restarts.jsonl, each with `took`: seconds by the names in TOOK, where the restart reached a step. `notice` is
    at most what passed between the loss and the moment it was seen; `all` is from that moment to the end of the first step, and
    the sum of the others but `notice`. DataError for a record that cannot be read."""
    starts = {when: row for row in read_rows(directory / STARTUP) if (when := row.get("unix_seconds")) is not None}
    rows = list(read_rows(directory / RESTARTS, needs=("text", "lost_steps")))
    return [row | {"took": _took(row, starts[when])} if (when := row.get("unix_seconds")) in starts else row for row in rows]


def _took(restart: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, float]:
    """What a restart took, of its rows in both records. One of an older version does not say when its loss was seen."""
    of_start = {
        name: sum(phase["seconds"] for phase in start["phases"] if phase["name"] in phases) for name, phases in STARTED.items()
    }
    notice, end = restart.get("silent_seconds", 0.0), restart.get("ending_seconds", 0.0)
    rest = max(0.0, start["seconds"] - sum(of_start.values()))
    return {"notice": notice, "end": end, **of_start, "rest": rest, "all": end + start["seconds"]}


def summarize(directory: Path) -> dict[str, Any]:
    """{"steps", "totals", "evaluations", "restarts", "warnings"} of the run in `directory`; DataError for a record
    that cannot be read."""
    steps, totals = 0, dict.fromkeys(TOTALS, 0.0)
    for row in read_rows(directory / "metrics.jsonl", numbers=True):
        steps += 1
        for name in TOTALS:
            totals[name] += row.get(name) or 0.0
    evaluations = [
        {k: v for k, v in row.items() if k != "records"} for row in read_rows(directory / "evaluations.jsonl", **EVALUATION)
    ]
    told = {"restarts": read_restarts(directory), "warnings": read_warnings(directory / WARNINGS)}
    return {"steps": steps, "totals": totals, "evaluations": evaluations} | told
