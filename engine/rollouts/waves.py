"""Waves: a step's groups in the parts, at most three, in which the trainer takes them with sync.streaming, in the order in
which they are complete. It samples, judges and trains nothing.

**What for.** At s = 1 without staleness the trainer waits while engines sample. Most responses of a step are there long before
the last one. With streaming the trainer computes the gradient of the groups that are complete while engines decode the others,
and takes the optimizer's step when all are in. Every rollout is of the version before the step, as without.

**Which groups.** Engines hand completions over at counted decoding steps: when half of a step's requests are done, half of the
rest, and so on (`open_after` in engine/inference/pool.py). When every engine has answered its n-th such call, a *turn* is over.
A wave is cut at the first turn after which COMPLETE_SHARES of the step's groups are complete: wave 1 is all groups that are
complete at the first such turn, wave 2 what is complete at the second and not in wave 1, and the last wave is the rest. A group
is never cut. Where a wave, or what it leaves, would have fewer groups than give every data-parallel rank something to do
(`least_groups`), it is not cut: it waits for the next turn, or stays part of the last wave. What an engine has decoded by its
n-th call depends on tokens alone, so waves do, whatever is delayed, and a run repeats and resumes bit for bit. A turn that
completes the whole step cuts nothing: such a step has one wave.

**Why the step is the same.** A group's rewards, advantages and pairs depend on the group alone. Its loss depends on the rest of
the step by one factor, 1 / the step's denominator (prompts, pairs or target tokens), which is not known before the last wave.
So the policy adds up the gradients of undivided losses on each rank, reduces them over ranks once, with the last wave, and
multiplies them with that factor (`Policy.add_gradient`, `Policy.train_step`). All that is different is how sums are rounded.
Each wave is dealt to data-parallel ranks and packed into rows as a step is. Metrics are computed of the whole step.

**What it cannot do** is refused before the start: advantages over the batch, spare prompts, rewards that judge a step's answers
together, a loss that does not say that it is such a sum, gradients that are reduced while they are computed, FP8, colocated
engines, and any staleness (`broken_streaming_rules` of engine/config, `Algorithm.broken_rules`, `check_streaming`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Sequence as Many
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Lock

from engine.config.options import LOSSES, Options
from engine.core.metrics import Metric
from engine.core.types import RolloutGroup
from engine.rewards.arrivals import Arrivals
from engine.rewards.base import Answer
from engine.rollouts.base import HEARTBEAT_SECONDS, StepData, Waiting

COMPLETE_SHARES = (1 / 4, 3 / 4)  # of a step's groups: so many are complete where a wave is cut
UNITS_A_RANK = 2  # of what is dealt to data-parallel ranks, in each wave

NUM_WAVES = Metric(
    "num_waves",
    "with sync.streaming: parts in which the step's groups were trained on",
    title="waves",
    unit="waves",
)
STREAMED_SHARE = Metric(
    "streamed_share",
    "with sync.streaming: of the tokens trained on, prompts counted for each sample, those of waves before the last",
    title="streamed",
    unit="share",
)
STREAMED_SECONDS = Metric(
    "streamed_seconds",
    "with sync.streaming: seconds of dealing and training on a part of the step before its last response was there",
    title="trained while sampling",
    unit="s",
)
METRICS = (NUM_WAVES, STREAMED_SHARE, STREAMED_SECONDS)


def least_groups(config: Options) -> int:
    """Groups that a wave has at least: UNITS_A_RANK for each data-parallel rank, where a group whose loss couples its responses
    is one, and else each response. With fewer, ranks would wait for one that has a group more than they; one never does."""
    if config.trainer.data_parallel == 1:
        return 1
    units = 1 if LOSSES.load(config.algorithm.loss).couples_groups else config.algorithm.samples_per_prompt
    return -(-UNITS_A_RANK * config.trainer.data_parallel // units)


@dataclass(frozen=True, slots=True)
class Wave:
    """Some groups of a step, whose answers are there or still arrive."""

    number: int
    groups: tuple[int, ...]  # their numbers in the step, rising
    answers: Arrivals[Answer]
    is_last: bool


class Waves:
    """The waves of a step. One thread puts answers as they arrive, says when a turn is over and leaves it as a context; another
    iterates over the waves, each as soon as it is cut, the last one as soon as no other can follow. Answers have places; the
    groups are of consecutive places, equally many each."""

    def __init__(self, num_groups: int, size: int, shares: Collection[float] = (), least: int = 1) -> None:
        """`size`: answers of a group. `shares`: see COMPLETE_SHARES, rising; without any the step is one wave. `least`: groups
        of each wave, where there are several."""
        self._num_groups, self._size, self._least = num_groups, size, least
        self._shares = list(shares)
        self._held: dict[int, Answer] = {}  # of no wave so far
        self._left = set(range(num_groups))  # groups of no wave so far
        self._cut: SimpleQueue[Wave] = SimpleQueue()
        self._made: list[Wave] = []
        self._last: Arrivals[Answer] | None = None  # where answers go once no wave is to be cut
        self._abandoned = False
        self._lock = Lock()
        if not self._shares:
            self._open_last()

    @property
    def made(self) -> tuple[Wave, ...]:
        """The waves so far."""
        return tuple(self._made)

    def put(self, answers: Mapping[int, Answer]) -> None:
        """Answers that have arrived, by their places."""
        with self._lock:
            if self._last is not None:
                self._last.put(answers)
            else:
                self._held |= answers

    def turn(self) -> None:
        """Every engine has answered its next call: a wave is cut where that is due."""
        with self._lock:
            if self._last is not None or len(self._held) == len(self._left) * self._size:  # all is there: nothing to wait for
                return
            counts = Counter(place // self._size for place in self._held)
            complete = sorted(group for group, count in counts.items() if count == self._size)
            share = 1 - (len(self._left) - len(complete)) / self._num_groups
            due = [wanted for wanted in self._shares if share >= wanted]
            if not due:
                return
            if len(self._left) - len(complete) < self._least:  # nor will any later turn leave enough
                self._shares = []
            elif len(complete) < self._least:
                return
            else:
                self._shares = self._shares[len(due) :]
                places = [group * self._size + i for group in complete for i in range(self._size)]
                arrived = Arrivals[Answer](is_part=True)
                with arrived:
                    arrived.put({place: self._held.pop(place) for place in places})
                self._add(complete, arrived, is_last=False)
            if not self._shares:
                self._open_last()

    def abandon(self) -> None:
        """Nobody wants what is judged any more, or not all will come: who iterates, or judges a wave, gets a CancelledError."""
        with self._lock:
            if self._last is None:
                self._open_last()
            self._abandoned = True
            for wave in self._made:
                wave.answers.abandon()

    def __enter__(self) -> Waves:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.abandon()
            return
        with self._lock:
            if self._last is None:
                self._open_last()
            assert self._last is not None
            with self._last:  # ends it
                pass

    def __iter__(self) -> Iterator[Wave]:
        """The waves, each when it is cut; the last one may still arrive."""
        is_last = False
        while not is_last:
            wave = self._cut.get()
            if self._abandoned:
                raise CancelledError
            is_last = wave.is_last
            yield wave

    def _open_last(self) -> None:
        self._last = Arrivals[Answer]()
        if self._held:
            self._last.put(self._held)
        self._held = {}
        self._add(sorted(self._left), self._last, is_last=True)

    def _add(self, groups: list[int], answers: Arrivals[Answer], *, is_last: bool) -> None:
        self._left -= set(groups)
        wave = Wave(len(self._made), tuple(groups), answers, is_last)
        self._made.append(wave)
        self._cut.put(wave)


@dataclass
class Streamed:
    """What has become of a step's waves: judged ones, which one thread puts and another takes, and what the latter took."""

    judged: SimpleQueue[list[RolloutGroup] | None] = field(default_factory=SimpleQueue)  # None: only the last one is left
    waited_seconds: float = 0.0
    judged_seconds: float = 0.0  # of waited_seconds, after the step's last response: for rewards
    sampled_at: float | None = None  # when the step's last response was there (time.monotonic)
    _taken: set[int | None] = field(default_factory=set)  # numbers of waves
    _num_tokens: int = 0
    _seconds: float = 0.0
    _taken_at: float | None = None

    def next(self, waiting: Waiting) -> list[RolloutGroup] | None:
        """The next judged wave; waits for it. None where only the last one is left."""
        started = time.monotonic()
        self.trained()
        while True:
            try:
                groups = self.judged.get(timeout=HEARTBEAT_SECONDS)
                break
            except Empty:
                waiting()
        now = time.monotonic()
        self.waited_seconds += now - started
        self.judged_seconds += max(0.0, now - max(started, self.sampled_at if self.sampled_at is not None else now))
        return groups

    def take(self, groups: Many[RolloutGroup], data: StepData) -> None:
        """The trainer takes this wave, which has something to train on."""
        self._taken.add(groups[0].wave)
        self._num_tokens += sum(sequence.num_tokens for sequence in data.sequences)
        self._taken_at = time.monotonic()

    def trained(self) -> None:
        """The trainer is done with what it took last."""
        if self._taken_at is not None:
            until = min(time.monotonic(), self.sampled_at or float("inf"))
            self._seconds += max(0.0, until - self._taken_at)
        self._taken_at = None

    def rest(self, groups: Many[RolloutGroup]) -> list[RolloutGroup]:
        """Those of a step's groups that were not taken."""
        return [group for group in groups if group.wave not in self._taken]

    def metrics(self, rest: StepData) -> dict[str, float]:
        """Those of a step, of which the trainer takes `rest` now."""
        num_tokens = self._num_tokens + sum(sequence.num_tokens for sequence in rest.sequences)
        return {
            NUM_WAVES.name: float(len(self._taken) + 1),
            STREAMED_SHARE.name: self._num_tokens / max(1, num_tokens),
            STREAMED_SECONDS.name: self._seconds,
        }
