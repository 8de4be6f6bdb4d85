"""A replay of the training loop (run/loop.py) for any schedule: what the trainer, the engines and the rewards do when, step by
step, from the seconds that each part takes. Nothing is started; a clock goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from engine.config.schedules.base import Schedule

MOST_REQUESTS = 150_000  # of the intervals that are replayed, where one alone has no more
LEAST_STEPS = 20  # that count, where that is not too many requests
MOST_INTERVALS = 100


class Sampling(Protocol):
    """Engines, as decoding.Engines replays them."""

    def open(self, now: float, steps: range) -> None:
        """Submits the prompts of these steps."""
        ...

    def sampled(self, step: int) -> float:
        """When the last response of an opened step is in."""
        ...

    def catch_up(self, now: float) -> None:
        """Works up to a time."""
        ...

    @property
    def busy_seconds(self) -> float:
        """So far, in the mean over engines."""
        ...


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a step's parts, by its number."""

    train: Callable[[int], float]
    judge: Callable[[int], float]  # after the step's last response is in
    host: Callable[[int], float]  # between the rollouts and the batch: ledger, metrics, packing
    sync: float
    turn: float = 0.0  # colocated: for the engines to sleep and, at the next sync, to wake
    colocated: bool = False


@dataclass(frozen=True, slots=True)
class StepTimes:
    """When a step began and ended, and where its time went."""

    start: float
    sync: float  # of a weight sync, colocated with its turns
    finish: float  # before it, for engines to complete what they sample ahead
    waited: float  # for rollouts to be sampled and judged
    judged: float  # of that, for the rewards after the last response
    host: float
    train: float

    @property
    def seconds(self) -> float:
        """The step."""
        return self.sync + self.finish + self.waited + self.host + self.train

    @property
    def end(self) -> float:
        """When it was done."""
        return self.start + self.seconds


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time, for a picture."""

    lane: str
    name: str
    start: float
    end: float


@dataclass(slots=True)
class Played:
    """The steps that were replayed, and those of them that count."""

    steps: list[StepTimes] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    first: int = 0  # of those that count
    engine_seconds: float = 0.0  # for which engines were busy meanwhile, in the mean over them

    @property
    def counted(self) -> list[StepTimes]:
        """The steps that count."""
        return self.steps[self.first :]

    @property
    def duration(self) -> float:
        """Of those."""
        return self.steps[-1].end - self.steps[self.first].start

    def mean(self, name: str) -> float:
        """Seconds a step of one of its parts."""
        return sum(getattr(step, name) for step in self.counted) / len(self.counted)

    @property
    def step_seconds(self) -> float:
        """Of a step, in the mean."""
        return self.duration / len(self.counted)


def window(schedule: Schedule, requests_per_step: int) -> tuple[int, int]:
    """(how many steps are replayed, the first that counts): whole intervals. Where a schedule opens intervals ahead, the first
    ones are not counted, since engines have a head start in them."""
    opened = schedule.opens(0)
    openings = [0]
    for step in range(1, schedule.num_steps):
        if schedule.opens(step) or (opened.stop > step and schedule.sync_due(step)):
            openings.append(step)
        if len(openings) > MOST_INTERVALS:
            break
    ahead = sum(0 < step < opened.stop for step in openings)
    skipped = min(2 * ahead, len(openings) - 1)
    ends = [*openings[1:], schedule.num_steps]
    last = skipped
    while (
        last + 1 < len(openings)
        and ends[last] - openings[skipped] < LEAST_STEPS
        and ends[last] * requests_per_step < MOST_REQUESTS
    ):
        last += 1
    return ends[last], openings[skipped]


def play(schedule: Schedule, num_steps: int, first: int, engines: Sampling | None, costs: Costs) -> Played:
    """Steps 0 to num_steps - 1 of a run, of which those from `first` on count. Without engines batches come from disk."""
    played = Played(first=first)
    clock = busy_before = 0.0
    scored: dict[int, float] = {}
    judged_until = 0.0  # one thread judges the steps in order

    def until_scored(step: int) -> float:
        nonlocal judged_until
        if step not in scored:
            assert engines is not None
            sampled = engines.sampled(step)
            begin = max(sampled, judged_until)
            judged_until = scored[step] = begin + costs.judge(step)
            played.spans.append(Span("rewards", f"step {step}", begin, judged_until))
        return scored[step]

    for step in range(num_steps):
        start = clock
        if step == first and engines is not None:
            engines.catch_up(clock)
            busy_before = engines.busy_seconds
        finish = sync = waited = judged = 0.0
        if engines is not None and schedule.sync_due(step):
            ahead = schedule.in_flight(step)
            if ahead:
                finish = max(0.0, max(map(engines.sampled, ahead)) - clock)
                clock += finish
            sync = costs.sync
            played.spans.append(Span("sync", f"version {step}", clock, clock + sync))
            clock += sync
        opened = schedule.opens(step) if engines is not None else range(0)
        if engines is not None and opened:
            engines.open(clock, opened)
        if engines is not None:
            asked = clock
            if costs.colocated and opened:
                for each in opened:
                    clock = max(clock, until_scored(each))
            ready = max(clock, until_scored(step))
            waited = ready - asked
            judged = max(0.0, ready - max(asked, engines.sampled(step))) if waited else 0.0
            clock = ready
            if costs.colocated and opened:
                sync += costs.turn
                clock += costs.turn
        host, train = costs.host(step), costs.train(step)
        played.spans.append(Span("trainer", f"step {step}", clock + host, clock + host + train))
        clock += host + train
        played.steps.append(StepTimes(start, sync, finish, waited, min(judged, waited), host, train))
    if engines is not None:
        engines.catch_up(clock)
        played.engine_seconds = engines.busy_seconds - busy_before
    return played
