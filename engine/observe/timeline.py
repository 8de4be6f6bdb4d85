"""When what happened to a run: events.jsonl has every note and every activity that is done, with the time of day, and
startup.jsonl a row a start, with the seconds that each of its phases took up to the first finished step. The command writes
both in the run's directory, and no resume cuts them back. They decide nothing, and nothing of a run is made from them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.core.jsonl import JsonlLedger

FIRST_STEP = "first step"  # the phase of a start from the end of the last other one to the end of the first step
RANK_0 = "trainer rank 0"
EVENTS, STARTUP = "events.jsonl", "startup.jsonl"  # in the run's directory


class Timeline:
    """What a command writes down of a run's events, as the processes send them."""

    def __init__(self, began_unix: float) -> None:
        """`began_unix`: when the command began. Nothing is written before `open`."""
        self._began = began_unix
        self._directory: Path | None = None
        self._held: list[dict[str, Any]] = []
        self._phases: list[dict[str, Any]] | None = []  # of a start; None once a step is done

    def open(self, directory: Path) -> None:
        """The run's directory is ours from now on; what was held is written."""
        self._directory = directory
        self._write(self._held)

    def add(self, event: dict[str, Any]) -> dict[str, Any]:
        """Writes down what is to be kept of an event; the event."""
        kind = event["kind"]
        if kind == "note" or (kind == "activity" and event["state"] == "done"):
            row = {name: value for name, value in event.items() if name != "state"}
            if self._directory is None:
                self._held.append(row)
            else:
                self._write([row])
        if kind == "activity" and event["state"] == "done" and self._phases is not None:
            self._phases.append(event)
        elif kind == "restart":
            self._began, self._phases = event["unix_seconds"], []
        elif kind == "step" and self._phases is not None:
            self._append(STARTUP, [self._start(event)])
            self._phases = None
        return event

    def _start(self, step: dict[str, Any]) -> dict[str, Any]:
        """The row of a start that ends with this step."""
        phases = [
            {
                "process": phase["where"],
                "name": phase["what"],
                "about": phase["about"],
                "after_seconds": phase["unix_seconds"] - phase["seconds"] - self._began,
                "seconds": phase["seconds"],
            }
            for phase in self._phases or ()
        ]
        until = step.get("unix_seconds", self._began)
        after = max((phase["after_seconds"] + phase["seconds"] for phase in phases), default=0.0)
        seconds = until - self._began
        first = {
            "process": RANK_0,
            "name": FIRST_STEP,
            "about": "",
            "after_seconds": after,
            "seconds": max(0.0, seconds - after),
        }
        return {"step": step["step"], "unix_seconds": self._began, "seconds": seconds, "phases": [*phases, first]}

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self._append(EVENTS, rows)

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        assert self._directory is not None, "opened"
        ledger = JsonlLedger(self._directory / name)
        ledger.append(rows)
        ledger.close()
