"""What every sink is: a program outside that is told of a run while it goes on, such as TensorBoard or Weights & Biases. A sink
gets rows that are on disk already, in a process of its own (follow.py), so it may be slow or fail: the run does not wait for it
and does not end with it. It measures nothing and keeps no state but what the program itself keeps.

Promises to a sink: every row comes once and in the order of steps, also where the run lost steps and did them again; `open`
comes first and `close` last; a call that raises one of `failures` is repeated with the same rows, at growing intervals.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal

State = Literal["finished", "stopped", "failed", "lost"]


@dataclass(frozen=True, slots=True)
class Followed:
    """The run that a sink is told of."""

    directory: Path
    name: str
    options: Mapping[str, Any]  # of its configuration, by their full names
    metrics: Mapping[str, Mapping[str, str]]  # declared ones by name: "unit", "help", "title"
    known: str | None  # what `open` returned when this run was followed before


@dataclass(frozen=True, slots=True)
class End:
    """How a run ended. "stopped": it was asked to and can go on; "lost": the command vanished without a word."""

    state: State
    text: str = ""  # what ended it, in words


class Sink(ABC):
    """One program that is told of one run."""

    packages: ClassVar[tuple[str, ...]] = ()  # distributions of which one must be installed
    failures: tuple[type[Exception], ...] = (OSError,)  # that a later attempt may be spared; `open` may add to them

    @classmethod
    def missing(cls) -> str | None:
        """What is not there that the sink needs, and what to do; None where it can work. Asked before a run starts, in another
        process: it imports no large library and asks no network."""
        return missing_package(cls.packages)

    @abstractmethod
    def open(self, run: Followed) -> str:
        """Begins to tell of a run, or goes on where `run.known` was returned before; what it is known by there."""

    @abstractmethod
    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Some rows of metrics.jsonl: {"step": int, name: float or None, ...}."""

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """A row of evaluations.jsonl without its records: "step", "set", "measure", "mean", "standard_error", ..."""
        return

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Greedy answers of one evaluation: "set", "problem", "answer" (the right one), "text"."""
        return

    def finding(self, row: Mapping[str, Any]) -> None:
        """Something a person should see: "kind" ("guard" or "restart"), "step", "text"."""
        return

    def flush(self) -> None:
        """All of a turn's rows were told: what is still held in memory must leave it."""
        return

    def close(self, end: End) -> None:
        """The run has ended."""
        return


def missing_package(packages: Sequence[str]) -> str | None:
    """What to install where none of these distributions is there."""
    for name in packages:
        try:
            version(name)
        except PackageNotFoundError:
            continue
        return None
    return (
        f"package {' or '.join(packages)} is not installed: pip install --no-deps -r requirements/tracking.txt"
        if packages
        else None
    )


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation by the names that all sinks give them."""
    prefix = f"evaluation/{row['set']}"
    named = {row["measure"]: row["mean"], **{name: value for name, value in row.items() if name not in ("step", "mean")}}
    return {f"{prefix}/{name}": float(value) for name, value in named.items() if isinstance(value, (int, float))}
