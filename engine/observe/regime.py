"""The regime of a run, proven from what it wrote down: every rollout's weight version (with sync.in_flight every token's) and
every step's staleness against the schedule of its configuration. It reads records and trusts none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config.schedules.base import Schedule
from engine.core.jsonl import read_rows
from engine.observe.rollouts import Head, heads, rollouts_of

OF_UPDATES = ("staleness_max", "updated_in_flight")  # metrics that only a run with sync.in_flight has


@dataclass(frozen=True, slots=True)
class Proof:
    """What the records of a run say of its regime."""

    regime: str  # in the words of the schedule
    num_steps: int  # on record, of those the run was to have
    num_rollouts: int
    staleness: tuple[int, int] | None  # least and largest of all rollouts, or tokens; None without any
    contradiction: str | None  # the first row that the schedule does not allow
    replayed: str | None = None  # what the run trained on instead of rollouts of its own
    num_dropped: int = 0  # steps whose rollouts are no longer on record, where records.keep_steps says so
    by_token: bool = False  # whether rollouts may be of several versions, so that each token was looked at

    @property
    def holds(self) -> bool:
        """Whether there are rollouts and no row contradicts the schedule."""
        return self.staleness is not None and self.contradiction is None

    def sentence(self) -> str:
        """The verdict in a line."""
        if self.replayed is not None:
            return f"replayed {self.replayed}: nothing was sampled, so there is no regime to prove"
        if self.contradiction is not None:
            return f"{self.regime} is contradicted: {self.contradiction}"
        if self.staleness is None:
            return f"{self.regime}: no rollouts on record"
        low, high = self.staleness
        steps = f"{self.num_steps} steps"
        if self.num_dropped:
            steps = f"{self.num_steps - self.num_dropped} steps; those of the first {self.num_dropped} are not kept"
        rollouts = f"{self.num_rollouts} rollouts{', token by token,' * self.by_token} of {steps}"
        return f"{self.regime}: staleness {low}..{high}, proven from {rollouts}"


def prove(
    directory: Path,
    schedule: Schedule,
    replayed: str | None = None,
    rollouts_per_step: int | None = None,
    keep_steps: int | None = None,
    first_step: int = 0,
) -> Proof:
    """Checks the rollouts and metrics.jsonl of a run, which may still be going on; DataError for a line that is no row.
    `rollouts_per_step`: so many every step must have that is in metrics.jsonl, for its rollouts are written before that.
    `keep_steps`: of so many last steps they must be there; None: of all. `first_step`: the first on record, of a run that was
    forked off another. A `schedule` that decides as a run goes on decides anew, by metrics.jsonl alone. A run without rollouts,
    such as a supervised one, has nothing to prove, nor one that replayed a file."""
    metrics = list(read_rows(directory / "metrics.jsonl"))  # first: a run goes on while its rollouts are read
    place = rollouts_of(directory)
    if replayed is not None or place is None:
        return Proof(schedule.regime, len(metrics), 0, None, None, replayed)
    wrong_lengths = list[str]()  # after one of which the schedule says nothing of versions that could be relied on
    if schedule.measures is not None:
        schedule = replace(schedule)  # which has decided nothing yet
        wrong_lengths = [fault for at, row in enumerate(metrics) for fault in _of_decision(row, at, schedule)]
    contradictions = [fault for at, row in enumerate(metrics) for fault in _of_step(row, at, schedule, first_step)][:1]
    num_rollouts, steps, counts, ages = 0, list[int](), list[int](), set[int]()
    tokens: dict[int, list[list[tuple[int, int]]]] = {}  # with updates in flight, by step: (age, tokens) of each rollout
    known = schedule.num_steps if schedule.measures is None else len(metrics)  # these rows decide nothing of later steps
    for head in heads(place):
        if head.step > known:
            break
        num_rollouts += 1
        if fault := _of_rollout(head, schedule, first_step):
            contradictions.insert(0, fault)
            break
        spans = head.spans or [(head.version, 0)]
        ages.update(head.step - version for version, _ in spans)
        if schedule.updates_in_flight:
            tokens.setdefault(head.step, []).append([(head.step - version, count) for version, count in spans])
        if not steps or steps[-1] != head.step:
            steps.append(head.step)
            counts.append(0)
        counts[-1] += 1
    first, end = first_step, first_step + len(metrics)  # of the rollouts that must be there, and of all steps on record
    if keep_steps is not None and steps:
        first = min(steps[0], max(first_step, end - keep_steps))
    if not contradictions and (steps != list(range(first, first + len(steps))) or first + len(steps) < end):
        odd = next((step for place, step in enumerate(steps, start=first) if step != place), first + len(steps))
        contradictions.append(
            f"{place.name} must hold the rollouts of steps {first}..{end - 1}, one step after another; found "
            f"{'them end before' if odd == first + len(steps) else 'out of its place'} step {odd}"
        )
    if not contradictions and schedule.updates_in_flight:
        contradictions = [fault for number, row in enumerate(metrics) for fault in _of_tokens(row, number, tokens)][:1]
    if not contradictions and rollouts_per_step is not None:
        contradictions += _of_counts(place.name, counts[: end - first], first, rollouts_per_step)
    staleness = (min(ages), max(ages)) if ages else None
    contradiction = next(iter([*wrong_lengths, *contradictions]), None)
    dropped, by_token = first - first_step, schedule.updates_in_flight
    return Proof(schedule.regime, len(metrics), num_rollouts, staleness, contradiction, None, dropped, by_token)


def _of_decision(row: Mapping[str, Any], number: int, schedule: Schedule) -> Iterator[str]:
    """Whether the interval of a step is as long as `schedule` decides by the rows before it; the row is what it hears next."""
    length = schedule.observe(number, row.get(schedule.measures or ""))
    if row.get("interval_steps") != length:
        yield (
            f"metrics.jsonl line {number + 1} must have interval_steps {length} at step {number}, as {schedule.measures} of "
            f"the steps before decides; found {row.get('interval_steps')}"
        )


def _of_counts(name: str, counts: Sequence[int], first: int, due: int) -> list[str]:
    """Whether every step that was trained on has all its rollouts; a ledger that lost rows has not."""
    return [
        f"{name} must hold {due} rollouts of each of {len(counts)} steps, {due * len(counts)} in all; found {count} of "
        f"step {step}, {sum(counts)} in all"
        for step, count in enumerate(counts, start=first)
        if count != due
    ][:1]


def _of_rollout(head: Head, schedule: Schedule, first_step: int) -> str:
    where, step, version, spans, num_tokens = head
    if not first_step <= step < schedule.num_steps:
        return f"{where} must be of steps {first_step}..{schedule.num_steps - 1}; found step {step}"
    if schedule.updates_in_flight:
        allowed = schedule.versions(step)
        found = _versions(spans)
        if not found or found[0] != version or found != sorted(set(found)) or not set(found) <= set(allowed):
            wanted = ", ".join(map(str, allowed))
            return f"{where} must have spans of versions {wanted}, rising from its `version`, at step {step}; found {spans}"
        if (total := sum(count for _, count in spans)) != num_tokens:
            return f"{where} must have spans of as many tokens as `num_tokens` says, {num_tokens}; found {total} in {spans}"
    elif version != schedule.version(step) or spans is not None:
        told = f"{version}" if spans is None else f"spans {spans}"
        return f"{where} must have version {schedule.version(step)} at step {step}; found {told}"
    return ""


def _versions(spans: Any) -> list[int]:
    """Those of the spans of a row; empty where they have not the form of spans."""
    rows = spans if isinstance(spans, list) else []
    whole = all(isinstance(row, list) and len(row) == 2 and all(type(n) is int for n in row) and row[1] > 0 for row in rows)
    return [version for version, _ in rows] if whole else []


def _of_tokens(row: dict[str, Any], number: int, tokens: dict[int, list[list[tuple[int, int]]]]) -> Iterator[str]:
    """Whether what a step's metrics say of versions is what its rollouts say, where those are on record."""
    rollouts = tokens.get(row["step"], [])
    if not rollouts:
        return
    ages = [age for rollout in rollouts for age in rollout]
    told = {
        "staleness": (sum(age * count for age, count in ages) / sum(count for _, count in ages), "the mean of its tokens"),
        "staleness_max": (max(age for age, _ in ages), "that of its oldest token"),
        "updated_in_flight": (
            sum(len(rollout) > 1 for rollout in rollouts) / len(rollouts),
            "the share of its rollouts with several versions",
        ),
    }
    for name, (value, meaning) in told.items():
        if row.get(name) != value:
            yield (
                f"metrics.jsonl line {number + 1} must have {name} {value} at step {row['step']}, {meaning}; found "
                f"{row.get(name)}"
            )


def _of_step(row: dict[str, Any], number: int, schedule: Schedule, first_step: int) -> Iterator[str]:
    step, where = first_step + number, f"metrics.jsonl line {number + 1}"
    if row["step"] != step:
        yield f"{where} must be of step {step}; found step {row['step']}"
    elif row.get("staleness") != schedule.staleness(step) and not schedule.updates_in_flight:
        yield f"{where} must have staleness {schedule.staleness(step)} at step {step}; found {row.get('staleness')}"
    elif not schedule.updates_in_flight and (told := [name for name in OF_UPDATES if row.get(name) is not None]):
        yield f"{where} must have no {told[0]}, for no weights were updated in flight; found {row[told[0]]}"
    elif ("sync_seconds" in row) != schedule.sync_due(step):
        found, wanted = ("a", "no") if "sync_seconds" in row else ("no", "a")
        yield f"{where} must tell of {wanted} weight sync at step {step}; found {found} sync_seconds"
