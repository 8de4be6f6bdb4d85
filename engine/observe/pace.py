"""How long a run still takes, from the steps it has finished. Arithmetic alone: it reads no clock and shows nothing.

Rollouts of a whole sync interval are sampled together, so the first step of an interval waits for most of them and the others
for few: the two kinds have a mean each. What comes before the first step (processes, weights, the first evaluation) is no part
of the pace.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import fmean

WINDOW = 64  # steps of a kind that its mean is of


class Pace:
    """The pace of one run, or of what follows a restart."""

    def __init__(self, total_steps: int, interval: int = 1, evaluations_left: Callable[[int], int] = lambda done: 0) -> None:
        """`interval`: steps of which the rollouts are sampled together; `evaluations_left(done)`: how many evaluations come
        after `done` steps."""
        assert total_steps > 0 and interval > 0, (total_steps, interval)
        self._total_steps = total_steps
        self._interval = interval
        self._evaluations_left = evaluations_left
        self._first: deque[float] = deque(maxlen=WINDOW)
        self._later: deque[float] = deque(maxlen=WINDOW)
        self._warming_up = True
        self._evaluations: list[float] = []
        self._done = 0

    def finished(self, step: int, seconds: float, evaluation_seconds: float = 0.0) -> None:
        """`step` took `seconds` since the one before it ended, evaluations left out, and those `evaluation_seconds`."""
        kind = self._later if step % self._interval else self._first
        if self._warming_up and len(kind) == 1 and kind is self._first:
            kind.clear()  # the first step of all compiles and warms up: it counts until there is another
            self._warming_up = False
        kind.append(seconds)
        if evaluation_seconds > 0:
            self._evaluations.append(evaluation_seconds)
        self._done = step + 1

    def restart(self) -> None:
        """Processes start anew: their first step is slow again."""
        self._first.clear()
        self._later.clear()
        self._warming_up = True

    def seconds_left(self) -> float | None:
        """Until the run's end, or None before a step is finished."""
        known = self._first or self._later
        if not known:
            return None
        steps = range(self._done, self._total_steps)
        waits = len(range(-(-self._done // self._interval) * self._interval, self._total_steps, self._interval))
        first, later = fmean(known), fmean(self._later or known)
        evaluations = self._evaluations_left(self._done) * (fmean(self._evaluations) if self._evaluations else 0.0)
        return first * waits + later * (len(steps) - waits) + evaluations
