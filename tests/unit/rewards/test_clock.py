"""Whose seconds a deadline is of: a judge that computes is late by its own CPU time, whatever else the machine does; one that
may wait is late by the wall clock. Nothing here depends on how busy the machine is, but for the time that a test takes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import psutil
import pytest

from engine.config.options import Rewards
from engine.core.types import Score
from engine.rewards.base import Answer
from engine.rewards.function import FunctionReward
from engine.rewards.math.reward import MathReward
from engine.rewards.pool import workers
from engine.rewards.pool.workers import Request, WorkerReward
from tests.rollouts import make_prompt

RIGHT, LATE = Score(1.0, "ok"), Score(0.0, "timeout")


class Computing(WorkerReward):
    """Judges by "kind seconds", on the CPU clock."""

    MODULE = "tests.unit.rewards.clock_worker"
    CLOCK: ClassVar[Literal["cpu", "wall"]] = "cpu"

    def _request(self, answer: Answer) -> Request:
        kind, seconds = answer.completion.split()
        return kind, float(seconds)


class Waiting(Computing):
    """The same on the wall clock."""

    CLOCK = "wall"


def answers(*texts: str) -> list[Answer]:
    return [Answer(make_prompt("id", (1,), "", "", "", ""), text) for text in texts]


@contextmanager
def busy(num_processes: int) -> Iterator[None]:
    """While so many processes compute for nothing."""
    code = "import sys; print(flush=True)\nwhile True: pass"
    spinning = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(num_processes)]
    try:
        for process in spinning:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in spinning:
            process.kill()
            process.communicate()


def test_a_judge_that_computes_is_late_by_its_own_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MIN_WALL_SECONDS", 0.0)
    with Computing(Rewards(deadline_seconds=0.1)) as reward:
        slept, burnt, native, after = reward.score(answers("sleep 0.4", "burn 0.4", "native 0", "burn 0.01"))
        assert (slept, burnt, native, after) == (RIGHT, LATE, LATE, RIGHT)
        start = time.monotonic()
        assert reward.score(answers("sleep 60", "burn 0.02")) == [LATE, RIGHT], "what sleeps meets the wall limit"
        assert time.monotonic() - start >= workers.WALL_SECONDS_PER_CPU_SECOND * 0.1


def test_a_judge_that_may_wait_is_late_by_the_wall_clock() -> None:
    with Waiting(Rewards(deadline_seconds=0.3)) as reward:
        assert reward.score(answers("sleep 2", "sleep 0.01")) == [LATE, RIGHT]
    assert FunctionReward.CLOCK == "wall" and MathReward.CLOCK == "cpu"


def test_verdicts_are_the_same_on_a_busy_machine() -> None:
    """An answer that gets a third of a core would be late by the wall clock."""
    cores = len(os.sched_getaffinity(0))
    with busy(3 * cores), Computing(Rewards(deadline_seconds=0.3, workers=1)) as reward:
        reward.start()
        assert reward.score(answers("burn 0.2", "burn 0.201", "burn 0.202", "burn 5")) == [RIGHT, RIGHT, RIGHT, LATE]


def test_an_answer_over_its_cpu_time_is_late_however_late_that_is_seen() -> None:
    """The worker sleeps (as on a busy machine) while its child uses up more than its time, and answers."""
    with Computing(Rewards(workers=1, deadline_seconds=0.5)) as reward:
        reward.start()
        (worker,) = reward._workers
        process = psutil.Process(worker.process.pid)
        give = worker.give

        def give_and_stop(number: int, request: Request, seconds: float) -> None:
            give(number, request, seconds)
            (child,) = process.children()
            used = child.cpu_times().user
            while child.cpu_times().user == used:  # it has been given the request
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGSTOP)
            while child.status() != psutil.STATUS_SLEEPING:  # it has answered
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGCONT)

        worker.give = give_and_stop  # type: ignore[method-assign]
        assert reward.score(answers("burn 1.5")) == [LATE]
        assert reward._workers == [worker]


def test_a_stopped_child_meets_the_wall_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MIN_WALL_SECONDS", 0.3)
    with Computing(Rewards(workers=1, deadline_seconds=0.01)) as reward:
        reward.start()
        (child,) = psutil.Process(reward._workers[0].process.pid).children()
        child.suspend()
        found: list[Any] = reward.score(answers("burn 0", "burn 0.0"))
        assert found == [LATE, LATE], "equal requests are judged once"
        assert reward.score(answers("sleep 0")) == [RIGHT]
