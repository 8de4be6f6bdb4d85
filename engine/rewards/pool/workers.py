"""A pool of judging processes, the ground of every reward that judges in processes of its own (math/, function.py).

This file hands requests to workers (engine/rewards/pool/worker.py) and replaces what is stuck or dead; how a request is judged
and the deadline of one answer are theirs. It starts no thread: one selector waits on all pipes, and for answers that arrive.
"""

from __future__ import annotations

import math
import os
import selectors
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import engine
from engine.config.options import Rewards
from engine.core.errors import ConfigError, SemionError, WatchdogError
from engine.core.types import Score
from engine.rewards.arrivals import Arrivals, Arriving, Item
from engine.rewards.base import Answer, Reward
from engine.rewards.pool.frames import decoded, frame, read_frame
from engine.rewards.pool.slots import SLACK_SECONDS

START_SECONDS = 120.0  # longest start of a worker, on a busy machine
GRACE_SECONDS = 10.0  # beyond an answer's own deadline, before a worker itself counts as stuck
# Where CPU time is what an answer may use, the wall clock only guards against what sleeps or was stopped. It gives each second
# of CPU time so many, so that a machine must have more than so many runnable threads a core before it changes a verdict.
WALL_SECONDS_PER_CPU_SECOND = 20.0
MIN_WALL_SECONDS = 30.0  # for short deadlines: a pause of the machine is as long
CORES_PER_WORKER, MOST_WORKERS = 4, 16  # where rewards.workers is unset
MAX_FAILED_STARTS = 3  # in a row
MAX_TRIES = 2  # of one answer, when workers die under it
INHERITED = {"PATH", "HOME", "TMPDIR", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "HF_HOME", "HF_HUB_OFFLINE"}
INHERITED_PREFIXES = ("LC_", "PYTHON", "OMP_")

Request = tuple[Hashable, ...]  # the arguments of the judge, as JSON can hold them
Outcome = tuple[Any, Any, str]  # what the judge gave, the status, and the error's text or ""
DIED: Outcome = (0.0, "died", "")


def check_environment(wanted: Sequence[str]) -> None:
    """ConfigError when a variable that rewards.environment names is not set."""
    missing = [name for name in wanted if name not in os.environ]
    if missing:
        raise ConfigError(
            f"rewards.environment must name variables that are set where the run starts; found no {', '.join(missing)}: set "
            f"it, or leave it out"
        )


def _environment(wanted: Sequence[str]) -> dict[str, str]:
    """Our variables without what a judge of a model's output has no business with: keys, tokens, passwords. `wanted`: names of
    those it may see all the same."""
    check_environment(wanted)
    root = str(Path(str(engine.__file__)).parents[1])
    return (
        {name: value for name, value in os.environ.items() if name in INHERITED or name.startswith(INHERITED_PREFIXES)}
        | {name: os.environ[name] for name in wanted}
        | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        | {"PYTHONHASHSEED": "0"}  # the order of a set must not decide a verdict
    )


def _start(module: str, arguments: Sequence[str], environment: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is ours to handle
        env=_environment(environment),
    )


def facts_of(module: str, arguments: Sequence[str], environment: Sequence[str]) -> Any:
    """What a worker of `module` says of the judge that it loads, without judging. ConfigError when it refuses, or ends while
    it loads."""
    process = _start(module, ["0", "0", "0", "0", *arguments], environment)
    try:
        said, _ = process.communicate(timeout=START_SECONDS)
    except subprocess.TimeoutExpired:
        said = b""
    finally:
        process.kill()
        process.wait()
    if not said:
        raise ConfigError(
            f"{' = '.join(arguments)} must be loaded within {START_SECONDS:.0f} s; its process ended with exit code "
            f"{process.returncode} and gave no answer: its own error stands above"
        )
    message = decoded(said[4:])
    if isinstance(message, str):
        raise ConfigError(message)
    return message["ready"]


def num_workers(config: Rewards) -> int:
    """Judging processes of a reward: rewards.workers, or what the cores that this process may use leave room for beside the
    engines and ranks of the machine."""
    return config.workers or max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // CORES_PER_WORKER))


class _Worker:
    """One worker process and the requests it is judging."""

    def __init__(self, module: str, arguments: Sequence[str], environment: Sequence[str]) -> None:
        """`arguments`: the limits that engine/rewards/pool/worker.py reads, and the judge's own."""
        self.process = _start(module, arguments, environment)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        os.set_blocking(self.stdin.fileno(), False)  # a request may be larger than the pipe, and the worker stopped
        self.unsent = memoryview(b"")
        self.ready = False
        self.judging: dict[int, float] = {}  # number of the request -> when the worker counts as stuck
        self._must_start_by = time.monotonic() + START_SECONDS

    @property
    def late_at(self) -> float | None:
        """When it is late with what is due from it; None where nothing is."""
        if not self.ready:
            return self._must_start_by
        return min(self.judging.values(), default=None)

    def give(self, number: int, request: Request, seconds: float) -> None:
        """Sends a request to judge, as much of it as the pipe takes now. A dead worker shows when it is read."""
        self.judging[number] = time.monotonic() + seconds
        self.unsent = memoryview(bytes(self.unsent) + frame([number, request]))
        self.push()

    def push(self) -> None:
        """Sends what the pipe takes of the rest."""
        try:
            self.unsent = self.unsent[os.write(self.stdin.fileno(), self.unsent) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.unsent = memoryview(b"")

    def end(self, patience_seconds: float) -> None:
        """Lets it leave by itself for a while, then kills it; reaps it in any case."""
        self.stdin.close()
        try:
            self.process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.stdout.close()


class _Asked:
    """The requests of one judging by number, which of them wait for a worker, and what came of the others."""

    def __init__(self, deterministic: bool) -> None:
        """`deterministic`: equal requests are one."""
        self.waiting: deque[int] = deque()
        self._deterministic = deterministic
        self._requests: list[Request] = []
        self._numbers: dict[Request, int] = {}
        self._places: dict[int, int] = {}  # the number of each place's request
        self._num_tries: list[int] = []
        self._outcomes: dict[int, Outcome] = {}

    def add(self, place: int, request: Request) -> None:
        """What is asked about a place."""
        new = len(self._requests)
        number = self._numbers.setdefault(request, new) if self._deterministic else new
        if number == new:
            self._requests.append(request)
            self._num_tries.append(0)
            self.waiting.append(number)
        self._places[place] = number

    def next(self) -> tuple[int, Request]:
        """The request to judge next, no longer waiting."""
        number = self.waiting.popleft()
        self._num_tries[number] += 1
        return number, self._requests[number]

    def judged(self, number: int, outcome: Outcome | None) -> None:
        """What came of a request; None where its worker was lost, so that it is judged again, unless that is no use."""
        if outcome is None and self._num_tries[number] < MAX_TRIES:
            self.waiting.appendleft(number)
        else:
            self._outcomes[number] = DIED if outcome is None else outcome

    def in_order(self) -> list[Outcome]:
        """The outcomes of all places, in their order."""
        return [self._outcomes[self._places[place]] for place in sorted(self._places)]


class WorkerReward(Reward):
    """A reward behind killable processes. A subclass says which module judges (`MODULE`), with which arguments, what a request
    is, and which clock `rewards.deadline_seconds` is of (`CLOCK`): the CPU time of the judging process, for a judge that
    computes, whose verdict must not depend on what else the machine does; the wall clock, for one that may wait for a network.

    Statuses: `timeout` past `deadline_seconds`, `died` when the judging process crashed (lack of memory among the
    causes), `invalid` when the judge raised, and what the judge itself says; the value of these three is 0.
    """

    begins_early = True
    per_group = True
    deterministic = True  # whether equal requests get equal outcomes, so that they are judged once
    OPTIONS: ClassVar[tuple[str, ...]] = ("workers", "concurrency", "deadline_seconds", "memory_mebibytes")
    MODULE: ClassVar[str]
    CLOCK: ClassVar[Literal["cpu", "wall"]] = "wall"

    def __init__(self, config: Rewards, *arguments: str, environment: Sequence[str] = ()) -> None:
        """`environment`: names of the variables that the processes may see beside what Python needs."""
        self._config, self._arguments, self._environment = config, arguments, tuple(environment)
        self._workers = [self._new_worker() for _ in range(num_workers(config))]
        self._num_failed_starts = 0
        self._arrived = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # readable when answers have arrived while it waits
        self._finalizer = weakref.finalize(self, _end_all, self._workers, self._arrived)  # also when the interpreter leaves

    def close(self) -> None:
        """Ends every process; a second call does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def start(self) -> None:
        """Waits until a worker is ready. Raises ConfigError when it refuses to judge, WatchdogError when it cannot
        start; without this call, `score` does."""
        try:
            while not any(worker.ready for worker in self._workers):
                self._wait()
        except SemionError:
            self.close()
            raise

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        """One score an answer, in order. Raises as `start` does.

        Equal requests are judged once, unless the judge says that it is not deterministic: the samples of a prompt repeat each
        other as entropy falls.
        """
        return self.score_as_they_arrive(Arrivals.of(answers))

    def score_as_they_arrive(self, answers: Arrivals[Answer]) -> list[Score]:
        """The same, judging each as soon as it is there and a worker is free."""
        return [self._score(outcome) for outcome in self._outcomes(answers, self._request)]

    def _request(self, answer: Answer) -> Request:
        """What the judge is asked about a completion."""
        raise NotImplementedError

    def _score(self, outcome: Outcome) -> Score:
        """What the judge's outcome means."""
        value, status, problem = outcome
        return Score(value, status, problem=problem)

    def _outcomes(self, arrivals: Arriving[Item], request_of: Callable[[Item], Request]) -> list[Outcome]:
        """The judge's outcome of what each item asks, in the order of places."""
        assert self._finalizer.alive, "score() after close()"
        for worker in list(self._workers):
            if worker.judging or worker.stdout.closed:  # interrupted, or given up at its start
                self._replace(worker)
        asked = _Asked(self.deterministic)
        with arrivals.telling(lambda: os.eventfd_write(self._arrived, 1)):
            while True:
                with suppress(BlockingIOError):  # it is readable again when something else arrives
                    os.eventfd_read(self._arrived)
                new, are_all = arrivals.take_now()
                for place, item in new.items():
                    asked.add(place, request_of(item))
                self._give(asked)
                if are_all and not asked.waiting and not any(worker.judging for worker in self._workers):
                    return asked.in_order()
                for number, outcome in self._wait(self._arrived):
                    asked.judged(number, outcome)

    def _give(self, asked: _Asked) -> None:
        """Hands out what waits to workers that have room: each one, then each a second one."""
        for _ in range(self._config.concurrency):
            for worker in list(self._workers):
                if not asked.waiting:
                    return
                if worker.ready and not worker.judging and worker.process.poll() is not None:  # it died with nothing to do
                    self._replace(worker)
                elif worker.ready and len(worker.judging) < self._config.concurrency:
                    worker.give(*asked.next(), self._patience_seconds)

    def _new_worker(self) -> _Worker:
        config = self._config
        cpu_seconds = config.deadline_seconds if self.CLOCK == "cpu" else math.inf
        limits = cpu_seconds, self._wall_seconds, config.memory_mebibytes, config.concurrency
        return _Worker(self.MODULE, [*map(str, limits), *self._arguments], self._environment)

    @property
    def _wall_seconds(self) -> float:
        """Longest judging of one answer by the wall clock."""
        seconds = self._config.deadline_seconds
        return seconds if self.CLOCK == "wall" else max(MIN_WALL_SECONDS, WALL_SECONDS_PER_CPU_SECOND * seconds)

    @property
    def _patience_seconds(self) -> float:
        """Longest that a worker may be silent about a request. Of several that are awaited at once, each may have to wait
        until the others have been judged alone, before it is judged among some and at last alone itself (slots.py)."""
        at_once = self._config.concurrency
        turns = 1 if at_once == 1 else 2 * at_once
        return turns * (self._wall_seconds + SLACK_SECONDS) + GRACE_SECONDS

    def _wait(self, arrived: int | None = None) -> list[tuple[int, Outcome | None]]:
        """Waits until a worker speaks, listens, dies or is late, or the descriptor `arrived` is readable; (number, outcome or
        None where the worker was lost)."""
        awaited = [(worker, late_at) for worker in self._workers if (late_at := worker.late_at) is not None]
        with selectors.DefaultSelector() as selector:
            for worker, _ in awaited:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
                if worker.unsent:
                    selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
            if arrived is not None:
                selector.register(arrived, selectors.EVENT_READ)
            first_late_at = min((late_at for _, late_at in awaited), default=None)
            patience = None if first_late_at is None else max(0.0, first_late_at - time.monotonic())
            events = [key for key, _ in selector.select(patience) if key.data is not None]
        speaking = {key.data for key in events if key.fileobj is key.data.stdout}
        for key in events:
            if key.fileobj is key.data.stdin:
                key.data.push()
        outcomes: list[tuple[int, Outcome | None]] = []
        for worker, late_at in awaited:
            message = read_frame(worker.stdout.fileno()) if worker in speaking else None
            if message is not None:
                outcomes += self._heard(worker, message)
            elif worker in speaking or time.monotonic() >= late_at:
                outcomes += [(number, None) for number in worker.judging]
                self._replace(worker)
        return outcomes

    def _heard(self, worker: _Worker, message: Any) -> list[tuple[int, Outcome | None]]:
        if isinstance(message, str):
            raise ConfigError(message)
        self._num_failed_starts = 0
        if not worker.ready:
            worker.ready = True
            return []
        number, *outcome = message
        del worker.judging[number]
        return [(number, (outcome[0], outcome[1], outcome[2]))]

    def _replace(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.end(START_SECONDS)
        if not worker.ready:
            self._num_failed_starts += 1
            if self._num_failed_starts >= MAX_FAILED_STARTS:
                raise WatchdogError(
                    f"a worker of {self.MODULE} must start within {START_SECONDS:.0f} s; found {MAX_FAILED_STARTS} dead or "
                    f"late in a row, the last with exit code {worker.process.returncode}: its own error stands above; "
                    f"is what it imports installed for {sys.executable}?"
                )
        self._workers[self._workers.index(worker)] = self._new_worker()


def _end_all(workers: list[_Worker], arrived: int) -> None:
    os.close(arrived)
    for worker in workers:
        worker.stdin.close()  # all of them begin to leave
    for worker in workers:
        worker.end(2.0)
