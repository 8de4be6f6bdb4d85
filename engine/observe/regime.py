"""The regime of a run, proven from what it wrote down: every rollout's weight version (with sync.in_flight every token's) and
every step's staleness against the schedule of its configuration. It reads records row by row, of rollouts a segment at a time,
and trusts none of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from operator import attrgetter
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
    """Checks the rollouts and metrics.jsonl of a run, which may still be going on; DataError for a line that is no row, or of
    metrics has anything but numbers. `rollouts_per_step`: so many every step must have that is in metrics.jsonl, for its
    rollouts are written before that. `keep_steps`: of so many last steps they must be there; None: of all. `first_step`: the
    first on record, of a run that was forked off another. A `schedule` that decides as a run goes on decides anew, by
    metrics.jsonl alone. A run without rollouts, as a supervised one, has nothing to prove, nor has one that replayed a file."""
    place = rollouts_of(directory)
    if replayed is not None or place is None:
        return Proof(schedule.regime, sum(1 for _ in _metrics(directory)), 0, None, None, replayed)
    decision = of_metrics = of_rollouts = gap = lacking = of_tokens = ""  # what contradicts first, of each kind
    num_steps = None  # on record when they are first read, before rollouts: a run goes on meanwhile
    if schedule.measures is not None:
        schedule, num_steps = replace(schedule), 0  # which has decided nothing yet
        for at, row in enumerate(_metrics(directory)):
            fault, num_steps = _of_decision(row, at, schedule), at + 1
            decision = decision or fault  # after one the schedule says nothing of versions that could be relied on
    at = -1
    for at, row in enumerate(_metrics(directory, num_steps)):
        of_metrics = of_metrics or _of_step(row, at, schedule, first_step)
    num_steps = at + 1
    first, end = first_step, first_step + num_steps  # of the rollouts that must be there, and of all steps on record
    known = schedule.num_steps if schedule.measures is None else num_steps  # these rows decide nothing of later steps
    rows = enumerate(_metrics(directory, num_steps), start=first_step)  # once more, beside the rollouts of their steps
    num_rollouts, ages, odd = 0, set[int](), (0, 0)
    steps = counted = 0  # of which there are rollouts, and how many rollouts those have that are on record in metrics.jsonl
    for found in _by_step(place, schedule, first_step, known):
        num_rollouts += found.num_rollouts
        ages |= found.ages.keys()
        if of_rollouts := found.contradiction:
            break
        if not steps and keep_steps is not None:
            first = min(found.step, max(first_step, end - keep_steps))
        if found.step != first + steps:
            gap = gap or f"out of its place step {found.step}"
        if first + steps < end:
            counted += found.num_rollouts
            odd = odd if odd[1] or found.num_rollouts == rollouts_per_step else (found.step, found.num_rollouts)
        if schedule.updates_in_flight and not of_tokens:
            of_tokens = next((_of_tokens(row, at - first_step, found) for at, row in rows if at == found.step), "")
        steps += 1
    if first + steps < end:
        gap = gap or f"them end before step {first + steps}"
    if gap:
        gap = f"{place.name} must hold the rollouts of steps {first}..{end - 1}, one step after another; found {gap}"
    if rollouts_per_step is not None and odd[1]:
        told, due = min(steps, end - first), rollouts_per_step
        lacking = (
            f"{place.name} must hold {due} rollouts of each of {told} steps, {due * told} in all; found {odd[1]} of step "
            f"{odd[0]}, {counted} in all"
        )
    contradiction = decision or of_rollouts or of_metrics or gap or of_tokens or lacking or None
    staleness = (min(ages), max(ages)) if ages else None
    dropped, by_token = first - first_step, schedule.updates_in_flight
    return Proof(schedule.regime, num_steps, num_rollouts, staleness, contradiction, None, dropped, by_token)


def _metrics(directory: Path, most: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl, so many at most."""
    return islice(read_rows(directory / "metrics.jsonl", numbers=True), most)


@dataclass(slots=True)
class _OfStep:
    """What the rollouts of a step come to."""

    step: int
    num_rollouts: int = 0
    ages: Counter[int] = field(default_factory=Counter)  # how many tokens are so old, or rollouts where all of a step are
    num_updated: int = 0  # rollouts of several versions
    contradiction: str = ""  # of the first that the schedule does not allow; nothing is read behind it


def _by_step(place: Path, schedule: Schedule, first_step: int, known: int) -> Iterator[_OfStep]:
    """The steps of the rollouts in `place`, in their order, up to step `known`."""
    for step, of_step in groupby(heads(place), key=attrgetter("step")):
        if step > known:
            return
        found = _OfStep(step)
        is_step = first_step <= step < schedule.num_steps
        allowed = schedule.versions(step) if is_step else ()
        for head in of_step:
            found.num_rollouts += 1
            if not is_step:
                steps = f"{first_step}..{schedule.num_steps - 1}"
                found.contradiction = f"{head.where} must be of steps {steps}; found step {step}"
            elif schedule.updates_in_flight:
                found.contradiction = _of_spans(head, allowed)
            elif head.version != allowed[0] or head.spans is not None:
                told = f"{head.version}" if head.spans is None else f"spans {head.spans}"
                found.contradiction = f"{head.where} must have version {allowed[0]} at step {step}; found {told}"
            if found.contradiction:
                break
            if schedule.updates_in_flight:
                for version, num_tokens in head.spans:
                    found.ages[step - version] += num_tokens
                found.num_updated += len(head.spans) > 1
        if not schedule.updates_in_flight and not found.contradiction:
            found.ages[step - allowed[0]] = found.num_rollouts
        yield found
        if found.contradiction:
            return


def _of_decision(row: Mapping[str, Any], number: int, schedule: Schedule) -> str:
    """Whether the interval of a step is as long as `schedule` decides by the rows before it; the row is what it hears next."""
    length = schedule.observe(number, row.get(schedule.measures or ""))
    if row.get("interval_steps") == length:
        return ""
    return (
        f"metrics.jsonl line {number + 1} must have interval_steps {length} at step {number}, as {schedule.measures} of the "
        f"steps before decides; found {row.get('interval_steps')}"
    )


def _of_spans(head: Head, allowed: Sequence[int]) -> str:
    """Whether each token of a rollout may be of the version that its spans say."""
    found = _versions(head.spans)
    if not found or found[0] != head.version or found != sorted(set(found)) or not set(found) <= set(allowed):
        wanted = ", ".join(map(str, allowed))
        return (
            f"{head.where} must have spans of versions {wanted}, rising from its `version`, at step {head.step}; found "
            f"{head.spans}"
        )
    if (total := sum(count for _, count in head.spans)) != head.num_tokens:
        return (
            f"{head.where} must have spans of as many tokens as `num_tokens` says, {head.num_tokens}; found {total} in "
            f"{head.spans}"
        )
    return ""


def _versions(spans: Any) -> list[int]:
    """Those of the spans of a row; empty where they have not the form of spans."""
    rows = spans if isinstance(spans, list) else []
    whole = all(isinstance(row, list) and len(row) == 2 and all(type(n) is int for n in row) and row[1] > 0 for row in rows)
    return [version for version, _ in rows] if whole else []


def _of_tokens(row: Mapping[str, Any], number: int, found: _OfStep) -> str:
    """Whether what a step's metrics say of versions is what its rollouts say."""
    num_tokens = found.ages.total()
    told = {
        "staleness": (sum(age * count for age, count in found.ages.items()) / num_tokens, "the mean of its tokens"),
        "staleness_max": (max(found.ages), "that of its oldest token"),
        "updated_in_flight": (found.num_updated / found.num_rollouts, "the share of its rollouts with several versions"),
    }
    for name, (value, meaning) in told.items():
        if row.get(name) != value:
            return (
                f"metrics.jsonl line {number + 1} must have {name} {value} at step {row['step']}, {meaning}; found "
                f"{row.get(name)}"
            )
    return ""


def _of_step(row: Mapping[str, Any], number: int, schedule: Schedule, first_step: int) -> str:
    """Whether a row of metrics.jsonl is of the step, the staleness and the sync that the schedule says."""
    step, where = first_step + number, f"metrics.jsonl line {number + 1}"
    if row["step"] != step:
        return f"{where} must be of step {step}; found step {row['step']}"
    if row.get("staleness") != schedule.staleness(step) and not schedule.updates_in_flight:
        return f"{where} must have staleness {schedule.staleness(step)} at step {step}; found {row.get('staleness')}"
    if not schedule.updates_in_flight and (told := [name for name in OF_UPDATES if row.get(name) is not None]):
        return f"{where} must have no {told[0]}, for no weights were updated in flight; found {row[told[0]]}"
    if ("sync_seconds" in row) != schedule.sync_due(step):
        found, wanted = ("a", "no") if "sync_seconds" in row else ("no", "a")
        return f"{where} must tell of {wanted} weight sync at step {step}; found {found} sync_seconds"
    return ""
