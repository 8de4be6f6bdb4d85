"""The trainer's time in a replay, and what engines and rewards do beside it: each on devices of its own, or all on the same
cores. Which steps are waited for in which order is decided in replay.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from engine.forecast.played import Span


class Sampling(Protocol):
    """Engines, as decoding.Engines replays them."""

    def open(self, now: float, steps: range) -> None:
        """Submits the prompts of these steps."""
        ...

    def sampled(self, step: int) -> float:
        """When the last response of an opened step is in."""
        ...

    def handed_over(self, step: int) -> list[tuple[float, float]]:
        """When which shares of a step's responses were handed over, as far as the engines have come, in this order."""
        ...

    def waves(self, step: int) -> list[tuple[float, float]]:
        """When which shares of a step's tokens are cut off as a wave (sync.streaming), as far as the engines have come; the
        last one once no response is missing."""
        ...

    def catch_up(self, now: float, slow: float = 1.0) -> None:
        """Works up to a time; everything takes `slow` times as long."""
        ...

    def pause(self, now: float, until: float) -> None:
        """What is not done at a time goes on at another, with its tokens kept and computed anew."""
        ...

    def aim(self, steps: range) -> None:
        """Each engine works until it has completed these steps, however much it has begun beside them, and then rests."""
        ...

    @property
    def num_working(self) -> int:
        """Engines that have something to do where they stand."""
        ...

    def lacks(self, step: int) -> bool:
        """Whether a response of an opened step is not in yet, where the engines stand."""
        ...

    @property
    def busy_seconds(self) -> float:
        """So far, in the mean over engines."""
        ...


@dataclass(frozen=True, slots=True)
class Cores:
    """The CPU cores of one machine on which trainer, engines and rewards compute together, and how many each keeps busy."""

    count: float
    trainer: float  # while it trains
    engine: float  # each, while it samples
    rewards: float  # while they judge

    def slow(self, threads: float) -> float:
        """By which all take longer when so many threads compute."""
        return max(1.0, threads / self.count)


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a step's parts, by its number, of whoever has the machine to himself."""

    train: Callable[[int], float]
    judge: Callable[[int], float]
    host: Callable[[int], float]  # between the rollouts and the batch: ledger, metrics, packing
    sync: float
    turn: float = 0.0  # colocated: for the engines to sleep and, at the next sync, to wake
    colocated: bool = False
    cores: Cores | None = None  # None: everybody has devices of his own
    streams: bool = False  # sync.streaming: the trainer takes a step's groups in waves, while others are sampled
    together: int = 0  # responses that are judged together, when the last of them is handed over; 0: all of a step


class Wave(NamedTuple):
    """A wave of a step that was waited for; where it is not an early one, only the step's last one is left."""

    is_early: bool
    share: float  # of the step's tokens, that are in it
    waited: float  # seconds


class Clock:
    """The trainer's time, and what goes on beside it; by itself, of a run whose batches come from disk."""

    def __init__(self, spans: list[Span], costs: Costs) -> None:
        self.now = 0.0
        self._spans, self._costs = spans, costs
        self._num_waves: dict[int, int] = {}  # of each step, that the trainer has taken

    def open(self, steps: range) -> None:
        """Submits the prompts of these steps."""

    def wait_sampled(self, steps: range) -> float:
        """Until the last response of these steps is in; how long that was."""
        return 0.0

    def wait_scored(self, step: int, together: range) -> tuple[float, float]:
        """Until a step's answers are judged, and those of the steps `together`; how long that was, and of that how long after
        the step's last response."""
        return 0.0, 0.0

    def wait_wave(self, step: int) -> Wave:
        """Until the next wave of a step is judged, or it is known that only the last one is left."""
        return Wave(False, 0.0, 0.0)

    def train(self, step: int, share: float) -> float:
        """The trainer trains on so much of a step; how long it was."""
        began, cores = self.now, self._costs.cores
        seconds = self.work(share * self._costs.train(step), cores.trainer if cores else 0.0)
        self._spans.append(Span("trainer", f"step {step}", began, self.now))
        return seconds

    def work(self, seconds: float, threads: float) -> float:
        """The trainer computes what takes so long where nobody else does; how long it was."""
        self.now += seconds
        return seconds


def complete(parts: list[tuple[float, float]], together: int) -> list[tuple[float, float]]:
    """When which shares of a step's responses can be judged, of which such shares are handed over at such times: as many as are
    judged `together` are there with the last of them. They are taken to be as long as any others are, so that of n all are
    there with the n-th power of the chance that one is."""
    found, here, before = [], 0.0, 0.0
    for when, share in parts:
        here = min(1.0, here + share)
        found.append((when, here**together - before))
        before = here**together
    return found


def judged_at(parts: list[tuple[float, float]], seconds: float, free: float) -> float:
    """When a step's answers are judged, of which such shares are there at such times, by rewards that take so many seconds for
    all of them and are free from a time on."""
    for when, share in parts:
        free = max(free, when) + share * seconds
    return free


class Apart(Clock):
    """Trainer, engines and rewards have devices of their own: nobody waits but for what he needs."""

    def __init__(self, spans: list[Span], engines: Sampling, costs: Costs) -> None:
        super().__init__(spans, costs)
        self._engines = engines
        self._scored: dict[int, float] = {}
        self._judged_until = 0.0  # one thread judges the steps in order

    def open(self, steps: range) -> None:
        """Submits the prompts of these steps."""
        self._engines.open(self.now, steps)

    def wait_sampled(self, steps: range) -> float:
        """Until the engines have them."""
        asked = self.now
        self.now = max(asked, *map(self._engines.sampled, steps)) if steps else asked
        return self.now - asked

    def wait_scored(self, step: int, together: range) -> tuple[float, float]:
        """Until the one thread that judges has done them."""
        asked = self.now
        self.now = max(asked, *(self._until_scored(each) for each in (*together, step)))
        waited = self.now - asked
        sampled = max(map(self._engines.sampled, (*together, step)))  # nobody trains before the last of them
        judged = max(0.0, self.now - max(asked, sampled))
        return waited, min(judged, waited)

    def wait_wave(self, step: int) -> Wave:
        """The trainer hurries no engine, so all waves are known beforehand."""
        self._engines.sampled(step)
        waves, number = self._engines.waves(step), self._num_waves.get(step, 0)
        if number == len(waves) - 1:
            return Wave(False, 0.0, 0.0)
        judged = judged_at(waves[: number + 1], self._costs.judge(step), self._judged_until)
        self._num_waves[step] = number + 1
        asked, self.now = self.now, max(self.now, judged)
        return Wave(True, waves[number][1], self.now - asked)

    def _until_scored(self, step: int) -> float:
        if step not in self._scored:
            sampled = self._engines.sampled(step)
            parts = complete(self._engines.handed_over(step), self._costs.together) if self._costs.together else []
            if self._costs.streams:  # they judge wave after wave, and the last one as it arrives
                *early, (_, rest) = self._engines.waves(step)
                late = [part for part in parts if not early or part[0] > early[-1][0]] or [(sampled, 1.0)]
                whole = sum(share for _, share in late)
                parts = early + [(when, rest * share / whole) for when, share in late]
            parts = parts or [(sampled, 1.0)]  # where none of the engines that are replayed has a part of it
            begin = max(parts[0][0], self._judged_until)
            self._judged_until = self._scored[step] = judged_at(parts, self._costs.judge(step), self._judged_until)
            self._spans.append(Span("rewards", f"step {step}", begin, self._judged_until))
        return self._scored[step]


class Together(Clock):
    """Trainer, engines and rewards compute on the same cores: while their threads are more than there are cores, all of them
    take longer. Time goes on in slices, in each of which nothing but what is left of the work changes."""

    SLICES = 64  # of a step's training, or of a wait

    def __init__(self, spans: list[Span], engines: Sampling, costs: Costs, cores: Cores) -> None:
        super().__init__(spans, costs)
        self._engines, self._cores = engines, cores
        self._slice = max(costs.train(0), 1e-3) / self.SLICES
        self._judging: deque[tuple[int, float, float]] = deque()  # (step, seconds left, when it began), in the order of steps
        self._sampled: dict[int, float] = {}
        self._scored: dict[int, float] = {}

    def open(self, steps: range) -> None:
        """Submits the prompts of these steps, to be judged in their order."""
        self._engines.open(self.now, steps)
        self._judging.extend((step, self._costs.judge(step), -1.0) for step in steps)

    def wait_sampled(self, steps: range) -> float:
        """Slice by slice, until no engine lacks any."""
        asked = self.now
        while any(map(self._engines.lacks, steps)):
            self._go_on(self._slice, 0.0)
        return self.now - asked

    def wait_scored(self, step: int, together: range) -> tuple[float, float]:
        """Slice by slice, until they are judged."""
        asked = self.now
        while step not in self._scored or any(each not in self._scored for each in together):
            self._go_on(self._slice, 0.0)
        sampled = max(self._sampled[each] for each in (*together, step))
        return self.now - asked, min(self.now - asked, max(0.0, self.now - max(asked, sampled)))

    def wait_wave(self, step: int) -> Wave:
        """Slice by slice, until it is cut and as much of the step is judged as there is in it and those before."""
        asked, number = self.now, self._num_waves.get(step, 0)
        while len(waves := self._engines.waves(step)) <= number:
            self._go_on(self._slice, 0.0)
        if not self._engines.lacks(step) and number == len(waves) - 1:
            return Wave(False, 0.0, self.now - asked)
        judge, there = self._costs.judge(step), sum(share for _, share in waves[: number + 1])
        while step not in self._scored and self._judging[0][1] > (1.0 - there) * judge + 1e-9:
            self._go_on(self._slice, 0.0)
        self._num_waves[step] = number + 1
        return Wave(True, waves[number][1], self.now - asked)

    def work(self, seconds: float, threads: float) -> float:
        """Slice by slice, beside whoever else computes."""
        began, left = self.now, seconds
        while left > 0:
            left -= self._go_on(min(left, self._slice), threads)
        return self.now - began

    def _to_judge(self) -> float:
        """Seconds of judging that there is now, of the step whose turn it is."""
        if not self._judging:
            return 0.0
        step, left, _ = self._judging[0]
        if step in self._sampled:
            return left
        if self._costs.together:
            parts = complete(self._engines.handed_over(step), self._costs.together)
        else:
            parts = self._engines.waves(step) if self._costs.streams else []
        here = sum(share for _, share in parts)
        return left - (1.0 - here) * self._costs.judge(step)

    def _go_on(self, seconds: float, threads: float) -> float:
        """All go on for what the trainer, or whoever else works, does in so many seconds alone; those seconds."""
        for each, *_ in self._judging:
            if self._engines.lacks(each):
                break
            self._sampled.setdefault(each, self.now)
        here = self._to_judge()
        is_last = bool(self._judging) and self._judging[0][0] in self._sampled  # nothing comes behind what is here
        judges = is_last or here > 1e-9
        busy = threads + self._cores.engine * self._engines.num_working + (self._cores.rewards if judges else 0.0)
        slow = self._cores.slow(busy)
        if judges:
            step, left, began = self._judging[0]
            began = self.now if began < 0 else began
            if not threads:  # a wait ends where the judging does
                seconds = max(min(seconds, here), 1e-9)
            left -= min(seconds, here)
            self._judging[0] = (step, left, began)
        self.now += seconds * slow
        self._engines.catch_up(self.now, slow)
        if is_last and left <= 1e-9:
            self._judging.popleft()
            self._scored[step] = self.now
            self._spans.append(Span("rewards", f"step {step}", began, self.now))
        return seconds
