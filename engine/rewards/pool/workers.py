"""A pool of judging processes, the ground of every reward that judges in processes of its own (math/, function.py).

This file hands requests to workers (engine/rewards/pool/worker.py) and replaces what is stuck or dead; how a request is judged
and the deadline of one answer are theirs. It starts no thread: one selector waits on all pipes.
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
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import engine
from engine.config.options import Rewards
from engine.core.errors import ConfigError, SemionError, WatchdogError
from engine.core.types import Score
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


class WorkerReward(Reward):
    """A reward behind killable processes. A subclass says which module judges (`MODULE`), with which arguments, what a request
    is, and which clock `rewards.deadline_seconds` is of (`CLOCK`): the CPU time of the judging process, for a judge that
    computes, whose verdict must not depend on what else the machine does; the wall clock, for one that may wait for a network.

    Statuses: `timeout` past `deadline_seconds`, `died` when the judging process crashed (lack of memory among the
    causes), `invalid` when the judge raised, and what the judge itself says; the value of these three is 0.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("workers", "concurrency", "deadline_seconds", "memory_mebibytes")
    MODULE: ClassVar[str]
    CLOCK: ClassVar[Literal["cpu", "wall"]] = "wall"

    def __init__(self, config: Rewards, *arguments: str, environment: Sequence[str] = ()) -> None:
        """`environment`: names of the variables that the processes may see beside what Python needs."""
        self._config, self._arguments, self._environment = config, arguments, tuple(environment)
        self._workers = [self._new_worker() for _ in range(num_workers(config))]
        self._num_failed_starts = 0
        self._finalizer = weakref.finalize(self, _end_all, self._workers)  # runs also when the interpreter leaves

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
        assert self._finalizer.alive, "score() after close()"
        requests = [self._request(answer) for answer in answers]
        return [self._score(outcome) for outcome in self._outcomes(requests)]

    def _request(self, answer: Answer) -> Request:
        """What the judge is asked about a completion."""
        raise NotImplementedError

    def _score(self, outcome: Outcome) -> Score:
        """What the judge's outcome means."""
        value, status, problem = outcome
        return Score(value, status, problem=problem)

    def _outcomes(self, requests: Sequence[Request], *, deterministic: bool = True) -> list[Outcome]:
        """The judge's outcome of each request, in order; where it is `deterministic`, equal ones are judged once."""
        if not deterministic:
            return self._judge(list(requests))
        distinct = list(dict.fromkeys(requests))
        judged = dict(zip(distinct, self._judge(distinct), strict=True))
        return [judged[request] for request in requests]

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

    def _judge(self, requests: list[Request]) -> list[Outcome]:
        """One outcome for each request."""
        outcomes: dict[int, Outcome] = {}
        num_tries = [0] * len(requests)
        waiting = deque(range(len(requests)))
        for worker in list(self._workers):
            if worker.judging or worker.process.poll() is not None:  # interrupted, or dead by now
                self._replace(worker)
        while waiting or any(worker.judging for worker in self._workers):
            for _ in range(self._config.concurrency):  # each worker one, then each a second one
                for worker in self._workers:
                    if waiting and worker.ready and len(worker.judging) < self._config.concurrency:
                        number = waiting.popleft()
                        num_tries[number] += 1
                        worker.give(number, requests[number], self._patience_seconds)
            for number, outcome in self._wait():
                if outcome is not None:
                    outcomes[number] = outcome
                elif num_tries[number] < MAX_TRIES:
                    waiting.appendleft(number)
                else:
                    outcomes[number] = DIED
        return [outcomes[number] for number in range(len(requests))]

    def _wait(self) -> list[tuple[int, Outcome | None]]:
        """Waits until a worker speaks, listens, dies or is late; (number, outcome or None where the worker was lost)."""
        awaited = [(worker, late_at) for worker in self._workers if (late_at := worker.late_at) is not None]
        with selectors.DefaultSelector() as selector:
            for worker, _ in awaited:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
                if worker.unsent:
                    selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
            first_late_at = min(late_at for _, late_at in awaited)
            events = [key for key, _ in selector.select(max(0.0, first_late_at - time.monotonic()))]
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
            if self._num_failed_starts == MAX_FAILED_STARTS:
                raise WatchdogError(
                    f"a worker of {self.MODULE} must start within {START_SECONDS:.0f} s; found {MAX_FAILED_STARTS} dead or "
                    f"late in a row, the last with exit code {worker.process.returncode}: its own error stands above; "
                    f"is what it imports installed for {sys.executable}?"
                )
        self._workers[self._workers.index(worker)] = self._new_worker()


def _end_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.stdin.close()  # all of them begin to leave
    for worker in workers:
        worker.end(2.0)
