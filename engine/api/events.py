"""What a run says while it runs, typed. The processes of a run send small dictionaries ({"kind": "step", ...}); here they
become the records that `engine.train` yields. It adds nothing to them but the time of day, where they have none.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.observe.telling import Activity
from engine.run import signals


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step is done; `metrics` is its row of metrics.jsonl."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The weights after `step` steps were judged on a set of held-out problems; `figures` is the row of evaluations.jsonl
    without its records."""

    step: int
    set: str
    figures: Mapping[str, Any]
    unix_seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Note:
    """Something to know about the run."""

    text: str
    unix_seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Warning:
    """A process of the run, `where`, warned of something."""

    where: str
    text: str
    count: int = 1  # how often so far; equal ones are told again at growing intervals
    unix_seconds: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        """The warning as people read it."""
        often = f" ({self.count} times so far)" if self.count > 1 else ""
        return f"warning, {self.where}: {self.text}{often}"


@dataclass(frozen=True, slots=True)
class Restart:
    """A process was lost; the run goes on after `step` steps with all processes started anew."""

    step: int
    text: str
    unix_seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Done:
    """The run is over, or this is how far it came. `summary`: totals, evaluations and versions, as in summary.json;
    `checkpoint`: the folder that supervised training wrote."""

    summary: Mapping[str, Any]
    checkpoint: str | None = None
    unix_seconds: float = field(default=0.0, compare=False)


Event = Step | Evaluation | Note | Warning | Restart | Activity | Done


def typed(event: signals.Event) -> Event:
    """An event of a run's processes as a record; the last one's summary is for whoever has the run's records to add."""
    kind, now = event["kind"], event.get("unix_seconds", time.time())
    if kind == "activity":
        return Activity.of(event)
    rest = {name: value for name, value in event.items() if name != "kind"}
    if kind == "step":
        return Step(int(rest["step"]), rest)
    if kind == "evaluation":
        figures = {name: value for name, value in rest.items() if name != "unix_seconds"}
        return Evaluation(int(rest["step"]), str(rest["set"]), figures, now)
    if kind == "restart":
        return Restart(int(rest["step"]), rest["text"], now)
    if kind == "warning":
        return Warning(rest["where"], rest["text"], rest["count"], now)
    if kind == "note":
        return Note(rest["text"], now)
    assert kind == "done", event
    return Done({"versions": rest.get("engine_versions", {})}, rest.get("checkpoint"), now)
