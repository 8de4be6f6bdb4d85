"""Which steps of a run are profiled, in which processes: opens and closes the window of this trainer rank, and from rank 0
that of the engines. It measures nothing itself.

Engines answer their calls in order and decode an interval's steps together, so that their window is the intervals which hold
the profiled steps: it opens before the first one's weight sync, and closes behind the last one's rollouts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from engine.config.options import Profile
from engine.config.schedules.base import Schedule
from engine.observe.profiling.recorder import Recorder, profiled_process


class Engines(Protocol):
    """The pool, as far as a profile needs it."""

    def profile(self, engines: tuple[int, ...], on: bool) -> None:
        """See Pool.profile."""
        ...


class Window:
    """The profiled steps as one trainer rank meets them, each `step` before all else of it."""

    def __init__(
        self, options: Profile, directory: Path, rank: int, engines: Engines | None = None, schedule: Schedule | None = None
    ) -> None:
        """`engines` is rank 0's, and needs the schedule; None elsewhere and where the run samples nothing."""
        self._steps = range(options.first_step, options.first_step + options.num_steps)
        self._recorder: Recorder | None = None
        if options.tool != "off" and rank in options.ranks:
            self._recorder = Recorder(options.tool, directory, profiled_process("rank", rank))
        self._engines = engines if options.tool != "off" and options.engines else None
        self._chosen, self._schedule = options.engines, schedule
        self._engines_record = False

    def step(self, step: int) -> None:
        """`step` begins, or with the number of steps in all, the end of the run."""
        if self._recorder is not None and self._recorder.recording != (step in self._steps):
            if self._recorder.recording:
                self._recorder.stop()
            else:
                self._recorder.start()
        if self._engines is not None and self._schedule is not None and not self._engines_record:
            interval = self._schedule.samples(step)
            if interval and self._overlaps(interval):
                self._engines.profile(self._chosen, True)
                self._engines_record = True

    def submitted(self, steps: range) -> None:
        """The rollouts of `steps` have been asked for, to be completed; what is asked of the engines now comes behind them."""
        if self._engines is not None and self._engines_record and self._steps.stop <= steps.stop:
            self._engines.profile(self._chosen, False)
            self._engines_record = False

    def _overlaps(self, steps: range) -> bool:
        return max(steps.start, self._steps.start) < min(steps.stop, self._steps.stop)
