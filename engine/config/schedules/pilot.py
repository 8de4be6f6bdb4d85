"""The regime that decides its own intervals (sync.sync_interval = "auto"): each is as long as the drift that was measured lets
it be. At the end of an interval the length of the next one follows from what the metric was at each step of the last few, and
from nothing else, so that a resumed run, every trainer rank and a report that reads metrics.jsonl decide the same.

    steps since the sync   0      1      2      3
    drift of the last      0.010  0.014  0.018          an interval of 3
    growth                 0.004 a step, over 0.010 at a sync
    bound 0.03             0.010 + 0.004 (n - 1) <= 0.03, so n = 6: the longest of 1 to min(auto_most, 2 * 3) that keeps it

Drift is the metric itself, or what the effective sample size lacks to 1. It is extrapolated along a line, so the bound steers:
a step may pass it, and the next interval is then shorter.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from engine.config.schedules.base import Schedule
from engine.config.schedules.paper import Paper

Measure = Literal["log_prob_gap_mean", "ess_share"]
Drifts = Sequence[float | None]  # of the steps of one interval, in order; None where nothing was measured
REMEMBERED = 4  # intervals by which the next one is decided: growth that was measured before them is tried anew


def drift(metric: Measure, value: float | None) -> float | None:
    """How far the policy is from the weights that sampled: 0 or more, the larger the farther. None where the metric has no
    number, as in a step that trained on nothing."""
    if value is None or not math.isfinite(value):
        return None
    return 1.0 - value if metric == "ess_share" else value


def next_length(intervals: Sequence[Drifts], bound: float, most: int) -> int:
    """The steps of the next interval, from the drifts of the last ones, the newest last: the longest up to `most`, and to twice
    the last one, at whose last step the drift expected is no more than `bound`; 1 where none is.

    Expected is the mean just after a sync, and a growth by the step: the line through that mean which fits all other drifts
    best (least squares). Where growth was not measured, or there was none, the length doubles; where nothing at all was
    measured, it stays.
    """
    known = [(age, value) for drifts in intervals for age, value in enumerate(drifts) if value is not None]
    last = len(intervals[-1])
    if not known:
        return min(last, most)
    fresh = [value for age, value in known if age == 0]
    start = math.fsum(fresh) / len(fresh) if fresh else 0.0
    weight = sum(age * age for age, _ in known)
    growth = math.fsum(age * (value - start) for age, value in known) / weight if weight else 0.0
    lengths = range(1, min(most, 2 * last) + 1)
    return max((n for n in lengths if start + max(0.0, growth) * (n - 1) <= bound), default=1)


class Longest(Paper):
    """The pilot as a forecast takes it: every interval as long as it may be."""

    @property
    def regime(self) -> str:
        """That it is the most of what may come."""
        return f"s = auto, taken for its most: {super().regime}"

    @property
    def other(self) -> Schedule:
        """The paper's."""
        return Paper(self.sync_interval, self.reference, self.num_steps, self.offline_chunk)


@dataclass(frozen=True)
class Pilot(Schedule):
    """Syncs where the last interval ends; the first is one step long. `sync_interval` is the most that one may have, and what
    has not been decided yet is taken for intervals of so many steps: what is asked before a run (how old answers may be, how
    much is sampled together) is then the most.

    The one regime that changes: `observe` adds the next sync. `metric` and `bound` as the options sync.auto_metric and
    sync.auto_bound have them.
    """

    metric: Measure = "log_prob_gap_mean"
    bound: float = 0.0
    _decided: list[int] = field(init=False, compare=False, repr=False, default_factory=lambda: [0, 1])  # steps with a sync
    _drifts: list[list[float | None]] = field(init=False, compare=False, repr=False, default_factory=lambda: [[]])

    @property
    def most(self) -> int:
        """sync.auto_most."""
        assert isinstance(self.sync_interval, int), self.sync_interval
        return self.sync_interval

    def sync_due(self, step: int) -> bool:
        """As decided; and after that every `most` steps."""
        last = self._decided[-1]
        if step >= last:
            return (step - last) % self.most == 0
        return self._decided[bisect_left(self._decided, step)] == step

    @property
    def regime(self) -> str:
        """What decides, and where anything has been decided what came of it."""
        side = "at least" if self.metric == "ess_share" else "at most"
        lengths = [after - before for before, after in pairwise(self._decided)]
        begun = lengths if self._drifts[-1] else lengths[:-1]
        found = f"{min(begun)} to {max(begun)} in {len(begun)} intervals, " if begun else ""
        return f"s = auto ({found}{self.metric} {side} {self.bound}, s at most {self.most})"

    @property
    def planned(self) -> Schedule:
        """Every interval as long as it may be."""
        return Longest(self.most, self.reference, self.num_steps, self.offline_chunk)

    @property
    def other(self) -> Schedule:
        """The paper's."""
        return self.planned.other

    @property
    def measures(self) -> str:
        """sync.auto_metric."""
        return self.metric

    def observe(self, step: int, value: float | None) -> int:
        """Where `step` ends an interval, decides the next one."""
        begin, end = self._decided[-2:]
        assert step == begin + len(self._drifts[-1]), f"step {step} observed, in the interval of steps {begin} to {end - 1}"
        self._drifts[-1].append(drift(self.metric, value))
        if step + 1 == end:
            bound = 1.0 - self.bound if self.metric == "ess_share" else self.bound
            self._go_on([*self._decided, end + next_length(self._drifts, bound, self.most)], [*self._drifts, []])
        return end - begin

    def state(self) -> dict[str, Any]:
        """The syncs decided, and the drifts by which the next ones are."""
        return {"syncs": list(self._decided), "drifts": [list(drifts) for drifts in self._drifts]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self._go_on(state["syncs"], state["drifts"])

    def _go_on(self, decided: Sequence[int], drifts: Sequence[Drifts]) -> None:
        self._decided[:] = decided
        self._drifts[:] = [list(known) for known in drifts[-REMEMBERED:]]
        for name in ("_syncs", "_openings"):
            self.__dict__.pop(name, None)  # they follow from the syncs
