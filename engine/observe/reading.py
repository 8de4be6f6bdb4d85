"""What a run wrote down, as a report needs it: rows of metrics thinned to a bounded number, evaluations with what each problem
came to, what was found, lost and warned of on the way. All of it can be added to while a run goes on. It draws nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from engine.config.schedules.base import Schedule
from engine.core.errors import DataError, brief
from engine.core.jsonl import read_rows
from engine.observe.journal import WARNINGS, read_warnings
from engine.observe.origin import Origin, read_origin
from engine.observe.predicted import Predicted
from engine.observe.problems import Problems
from engine.observe.regime import Proof, prove
from engine.observe.summary import EVALUATION, read_restarts

MOST_ROWS = 800  # of metrics that are kept; of more steps, the means of equally many neighbours
NUM_ANSWERS = 4  # problems of which a run's answers are shown
TOKENS = "tokens_sampled"  # up to and with a step; added to its row
NAMED = ("model.path", "data.train", "algorithm.loss", "sync.sync_interval", "sync.reference", "optimizer.learning_rate")
# What rows of each ledger must have, as `read_rows` is told
LEDGERS: dict[str, dict[str, Any]] = {
    "metrics.jsonl": {"numbers": True},
    "evaluations.jsonl": EVALUATION,
    "samples.jsonl": {"needs": ("set", "problem", "text")},
    "guard.jsonl": {"needs": ("text",)},
}


class MetricRows:
    """Rows of metrics.jsonl as they come, kept as the means of `per` neighbours, at most MOST_ROWS of them: what they cost does
    not grow with the run. A step that comes again, as after a restart, is left out: it has the same values."""

    def __init__(self) -> None:
        self.per, self.num_steps, self.tokens = 1, 0, 0.0
        self.names: set[str] = set()
        self.first_seconds: float | None = None
        self.last_seconds: float | None = None
        self._whole: list[dict[str, float]] = []  # means of `per` steps
        self._part: list[dict[str, float]] = []  # fewer

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes a row, the next step's or one of those before."""
        if row["step"] < self.num_steps:
            return
        self.num_steps = row["step"] + 1
        self.tokens += row.get("generation_tokens") or 0.0
        self.names |= row.keys()
        if seconds := row.get("unix_seconds"):
            self.first_seconds = seconds if self.first_seconds is None else self.first_seconds
            self.last_seconds = seconds
        known = {name: float(value) for name, value in row.items() if value is not None}
        self._part.append(known | {TOKENS: self.tokens})
        if len(self._part) == self.per:
            self._whole.append(_mean(self._part))
            self._part = []
        if len(self._whole) == MOST_ROWS + 2 and not self._part:
            self._whole = [_mean(self._whole[place : place + 2]) for place in range(0, len(self._whole), 2)]
            self.per *= 2

    def rows(self) -> list[dict[str, float]]:
        """What is kept, in order; without what was not finite."""
        return [*self._whole, *([_mean(self._part)] if self._part else [])]


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the rows that have it."""
    if len(rows) == 1:
        return dict(rows[0])
    sums: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            sums.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in sums.items()}


class Answers:
    """Greedy answers: of each problem those at the first and the last evaluation of its set, of NUM_ANSWERS problems a set."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self._of_set: dict[str, int] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Takes a row of samples.jsonl."""
        key = (row["set"], row["problem"])
        if key in self._kept:
            self._kept[key][1:] = [row]
        elif self._of_set.get(row["set"], 0) < NUM_ANSWERS:
            self._of_set[row["set"]] = self._of_set.get(row["set"], 0) + 1
            self._kept[key] = [row]

    def rows(self) -> list[dict[str, Any]]:
        """What is kept, by problem."""
        return [row for kept in self._kept.values() for row in kept]


@dataclass(slots=True)
class RunRecords:
    """What a run wrote down, but for the texts of its rollouts."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)  # of its configuration, by their full names
    proof: Proof | None = None  # None where it was not asked for
    metrics: MetricRows = field(default_factory=MetricRows)
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # without their records
    problems: Problems = field(default_factory=Problems)
    findings: list[dict[str, Any]] = field(default_factory=list)
    restarts: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    answers: Answers = field(default_factory=Answers)
    versions: Mapping[str, str] = field(default_factory=dict)  # of libraries, once the run has ended
    predicted: Predicted | None = None  # a forecast beside it; None where nobody made one
    origin: Origin | None = None  # of a run that was forked off another

    def add_evaluation(self, row: Mapping[str, Any]) -> None:
        """Takes a row of evaluations.jsonl, in the place of one of the same set and step."""
        self.problems.add(row)
        kept = {key: value for key, value in row.items() if key != "records"}
        others = [other for other in self.evaluations if (other["step"], other["set"]) != (row["step"], row["set"])]
        self.evaluations = [*others, kept]

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What it was, for people who have not seen it before."""
        first, last = self.metrics.first_seconds, self.metrics.last_seconds
        began = f"{datetime.fromtimestamp(first, UTC):%Y-%m-%d %H:%M} UTC" if first is not None else "-"
        lasted = str(timedelta(seconds=round(last - first))) if first is not None and last is not None else "-"
        return [
            *(_told_of(self.origin) if self.origin is not None else ()),
            *((name, str(self.options[name])) for name in NAMED if name in self.options),
            ("steps done", f"{self.metrics.num_steps} of {self.options.get('run.steps', '?')}"),
            ("first step done", began),
            ("from the first step to the last", lasted),
            ("tokens sampled", f"{self.metrics.tokens:,.0f}"),
            ("versions", ", ".join(f"{name} {number}" for name, number in self.versions.items()) or "-"),
        ]

    def document(self) -> dict[str, Any]:
        """The same as JSON holds it, the steps' records left out."""
        assert self.proof is not None
        regime = asdict(self.proof) | {"holds": self.proof.holds, "sentence": self.proof.sentence()}
        kept = {"evaluations": self.evaluations, "guard": self.findings, "restarts": self.restarts, "warnings": self.warnings}
        fork = {"fork": self.origin.as_json()} if self.origin is not None else {}
        told = {"predicted": self.predicted.document()} if self.predicted is not None else {}
        return {"run": self.name, "regime": regime, "steps": self.metrics.num_steps} | fork | kept | told


def _told_of(origin: Origin) -> list[tuple[str, str]]:
    return [("forked from", origin.sentence()), ("changed from it", origin.differences())]


def read_run(
    directory: Path,
    name: str,
    schedule: Schedule,
    replayed: str | None = None,
    options: Mapping[str, Any] | None = None,
    rollouts_per_step: int | None = None,
    keep_steps: int | None = None,
) -> RunRecords:
    """The records of a run, which may still be going on, and the `options` of its configuration by their full names; DataError
    for a line that is no row, or of metrics has anything but numbers. Ledgers are read row by row, and of rollouts a segment is
    held at a time, so what it takes does not grow with the steps. `rollouts_per_step` and `keep_steps` as for `prove`."""
    origin = read_origin(directory)
    first_step = origin.step if origin is not None else 0
    proof = prove(directory, schedule, replayed, rollouts_per_step, keep_steps, first_step)
    records = RunRecords(name, options or {}, proof=proof, origin=origin)
    metrics, evaluations, samples, findings = (read_rows(directory / file, **form) for file, form in LEDGERS.items())
    fill(records, metrics=metrics, evaluations=evaluations, samples=samples)
    records.findings, records.restarts = list(findings), read_restarts(directory)
    records.warnings = read_warnings(directory / WARNINGS)
    records.versions = versions_of(directory / "summary.json")
    return records


def fill(
    records: RunRecords,
    *,
    metrics: Iterable[Mapping[str, Any]] = (),
    evaluations: Iterable[Mapping[str, Any]] = (),
    samples: Iterable[dict[str, Any]] = (),
) -> None:
    """Adds rows of three ledgers."""
    for row in metrics:
        records.metrics.add(row)
    for row in evaluations:
        records.add_evaluation(row)
    for sample in samples:
        records.answers.add(sample)


def versions_of(summary: Path) -> dict[str, str]:
    """What summary.json says of libraries; nothing where there is none. DataError where it is no JSON."""
    if not summary.exists():
        return {}
    try:
        said = json.loads(summary.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{summary} must be JSON; found {error}: mend or remove it") from error
    versions = said.get("versions", {}) if isinstance(said, dict) else None
    if not isinstance(versions, dict):
        raise DataError(f"{summary} must be an object with an object of versions; found {brief(said)}: mend or remove it")
    return {name: str(number) for name, number in versions.items()}
