"""A pool of judging processes, the ground of every reward that judges in processes of its own (math/, function.py).

This file hands requests to workers (engine/rewards/pool/worker.py), here and on the run's other nodes (nodes.py), and replaces
what is stuck or dead here; how a request is judged and the deadline of one answer are theirs. It starts no thread: one selector
waits on all pipes, for answers that arrive, and for what other nodes have judged.
"""

from __future__ import annotations

import heapq
import math
import os
import selectors
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import RLock
from typing import Any, ClassVar, Literal, Self

import engine
from engine.config.load import RunConfig
from engine.config.options import Rewards
from engine.core.errors import ConfigError, SemionError, WatchdogError
from engine.core.types import Score
from engine.rewards.arrivals import Arrivals, Arriving, Item
from engine.rewards.base import Answer, Reward
from engine.rewards.pool.frames import decoded, frame, read_frame
from engine.rewards.pool.nodes import NodePool, Outcome, Request
from engine.rewards.pool.slots import SLACK_SECONDS

START_SECONDS = 120.0  # longest start of a worker, on a busy machine
GRACE_SECONDS = 10.0  # beyond an answer's own deadline, before a worker itself counts as stuck
# Where CPU time is what an answer may use, the wall clock only guards against what sleeps or was stopped. It gives each second
# of CPU time so many, so that a machine must have more than so many runnable threads a core before it changes a verdict.
WALL_SECONDS_PER_CPU_SECOND = 20.0
MIN_WALL_SECONDS = 30.0  # for short deadlines: a pause of the machine is as long
MOST_WORKERS = 64  # on a node, where rewards.workers is unset: beyond, one process of ours deals slower than they judge
MAX_FAILED_STARTS = 3  # in a row
MAX_TRIES = 2  # of one answer, when workers die under it
INHERITED = {"PATH", "HOME", "TMPDIR", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "HF_HOME", "HF_HUB_OFFLINE"}
INHERITED_PREFIXES = ("LC_", "PYTHON", "OMP_")

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
        | {"OMP_NUM_THREADS": "1"}  # each has one core; where it is started must not decide it
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


def num_workers(config: Rewards, threads: int = 0, num_pools: int = 1) -> int:
    """Judging processes of a reward on this machine: rewards.workers, or its part of the cores that this process may use and
    the `threads` of the machine's ranks and engines leave, of which each of `num_pools` pools gets as many; at least one."""
    free = min(MOST_WORKERS, len(os.sched_getaffinity(0)) - threads)
    return config.workers or max(1, free // max(1, num_pools))


def fitted(config: RunConfig, threads: int, num_pools: int) -> RunConfig:
    """The configuration with rewards.workers as it is on this machine; the others as in `num_workers`."""
    workers = num_workers(config.rewards, threads, num_pools)
    return config.model_copy(update={"rewards": config.rewards.model_copy(update={"workers": workers})})


def stuck_seconds(config: Rewards, clock: Literal["cpu", "wall"] = "cpu") -> float:
    """Longest that a pool which has answers to judge may give no outcome at all. Each try of an answer waits for a worker to
    start, for which there are MAX_FAILED_STARTS attempts, and then lasts as long as that worker may be silent. The value for
    the CPU's clock is the larger one, and so holds for every pool."""
    return MAX_TRIES * (MAX_FAILED_STARTS * START_SECONDS + _patience_seconds(config, clock))


def _wall_seconds(config: Rewards, clock: Literal["cpu", "wall"]) -> float:
    """Longest judging of one answer by the wall clock."""
    seconds = config.deadline_seconds
    return seconds if clock == "wall" else max(MIN_WALL_SECONDS, WALL_SECONDS_PER_CPU_SECOND * seconds)


def _patience_seconds(config: Rewards, clock: Literal["cpu", "wall"]) -> float:
    """Longest that a worker may be silent about a request. Of several that are awaited at once, each may have to wait
    until the others have been judged alone, before it is judged among some and at last alone itself (slots.py)."""
    turns = 1 if config.concurrency == 1 else 2 * config.concurrency
    return turns * (_wall_seconds(config, clock) + SLACK_SECONDS) + GRACE_SECONDS


class Bell:
    """Wakes who waits in a selector, from any thread."""

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # readable once it has been rung
        self._lock = RLock()
        self._is_closed = False

    def ring(self) -> None:
        """Wakes them; nobody, once it is closed."""
        with self._lock:
            if not self._is_closed:
                os.eventfd_write(self.descriptor, 1)

    def hush(self) -> None:
        """It has been heard."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)

    def close(self) -> None:
        """Gives the descriptor back."""
        with self._lock:
            self._is_closed = True
            os.close(self.descriptor)


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
        self._first_places: list[int] = []
        self._outcomes: dict[int, Outcome] = {}

    def add(self, place: int, request: Request) -> None:
        """What is asked about a place."""
        new = len(self._requests)
        number = self._numbers.setdefault(request, new) if self._deterministic else new
        if number == new:
            self._requests.append(request)
            self._num_tries.append(0)
            self._first_places.append(place)
            self.waiting.append(number)
        self._places[place] = number

    def next(self) -> tuple[int, Request]:
        """The request to judge next, no longer waiting."""
        number = self.waiting.popleft()
        self._num_tries[number] += 1
        return number, self._requests[number]

    def again(self, number: int) -> None:
        """The request is judged anew, through no fault of its own."""
        self._num_tries[number] -= 1
        self.waiting.appendleft(number)

    def place(self, number: int) -> int:
        """The place at which a request came first."""
        return self._first_places[number]

    def judged(self, number: int, outcome: Outcome | None) -> Outcome | None:
        """What came of a request; None where its worker was lost, so that it is judged again, unless that is no use."""
        if outcome is None and self._num_tries[number] < MAX_TRIES:
            self.waiting.appendleft(number)
            return None
        self._outcomes[number] = DIED if outcome is None else outcome
        return self._outcomes[number]

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
        self._nodes: tuple[NodePool, ...] = ()
        self._bell = Bell()  # rung when answers have arrived, or another node has judged some, while it waits
        self._finalizer = weakref.finalize(self, _end_all, self._workers, self._bell)  # also when the interpreter leaves

    @property
    def slots(self) -> int:
        """Answers that are judged at once on this machine."""
        return len(self._workers) * self._config.concurrency

    def spread(self, nodes: Sequence[NodePool]) -> None:
        """Has these judge too, from the next judging on."""
        self._nodes = tuple(nodes)

    def judge(self, requests: Arrivals[Request], judged: Callable[[int, Outcome], object]) -> None:
        """Judges requests of another machine's rank 0, as they arrive, and tells what came of each, by its place."""
        self._outcomes(requests, lambda request: request, judged)

    def close(self) -> None:
        """Ends every process of this machine; a second call does nothing."""
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

    def _outcomes(
        self,
        arrivals: Arriving[Item],
        request_of: Callable[[Item], Request],
        told: Callable[[int, Outcome], object] = lambda place, outcome: None,
    ) -> list[Outcome]:
        """The judge's outcome of what each item asks, in the order of places; `told` hears of each when it is there, with the
        place at which it was asked first."""
        assert self._finalizer.alive, "score() after close()"
        for worker in list(self._workers):
            if worker.judging or worker.stdout.closed:  # interrupted, or given up at its start
                self._replace(worker)
        for node in self._nodes:
            node.begin(self._bell.ring, stuck_seconds(self._config, self.CLOCK))
        asked = _Asked(self.deterministic)
        with arrivals.telling(self._bell.ring):
            while True:
                self._bell.hush()  # it is rung again when something else arrives
                for node in self._nodes:
                    found, lost = node.heard()
                    for number, outcome in found.items():
                        asked.judged(number, outcome)
                    for number in lost:
                        asked.again(number)
                new, are_all = arrivals.take_now()
                for place, item in new.items():
                    asked.add(place, request_of(item))
                self._give(asked)
                judging = self._num_judging + sum(len(node.judging) for node in self._nodes)
                if are_all and not asked.waiting and not judging:
                    return asked.in_order()
                for number, heard in self._wait():
                    if (final := asked.judged(number, heard)) is not None:
                        told(asked.place(number), final)

    def _give(self, asked: _Asked) -> None:
        """Hands out what waits, each to where least is under way for what is judged at once there: to a worker of this machine,
        or in one message to a node. Of equally many, this machine comes first."""
        dealt: list[dict[int, Request]] = [{} for _ in self._nodes]
        here, hands, patience = len(dealt), self._hands(), _patience_seconds(self._config, self.CLOCK)
        loads = [(self._num_judging / self.slots, -1, here)]
        loads += [(len(node.judging) / node.slots, number, number) for number, node in enumerate(self._nodes)]
        heapq.heapify(loads)
        while asked.waiting and loads:
            _, order, place = heapq.heappop(loads)
            if place == here:
                worker = next(hands, None)
                if worker is None:
                    continue
                worker.give(*asked.next(), patience)
                load = self._num_judging / self.slots
            else:
                node, requests = self._nodes[place], dealt[place]
                if len(requests) >= node.room:
                    continue
                number, request = asked.next()
                requests[number] = request
                load = (len(node.judging) + len(requests)) / node.slots
            heapq.heappush(loads, (load, order, place))
        for node, requests in zip(self._nodes, dealt, strict=True):
            if requests:
                node.give(requests)

    @property
    def _num_judging(self) -> int:
        return sum(len(worker.judging) for worker in self._workers)

    def _hands(self) -> Iterator[_Worker]:
        """Workers that have room: each one, then each a second time, as often as there is room."""
        for _ in range(self._config.concurrency):
            for worker in list(self._workers):
                if worker.ready and not worker.judging and worker.process.poll() is not None:  # it died with nothing to do
                    self._replace(worker)
                elif worker.ready and len(worker.judging) < self._config.concurrency:
                    yield worker

    def _new_worker(self) -> _Worker:
        config = self._config
        cpu_seconds = config.deadline_seconds if self.CLOCK == "cpu" else math.inf
        limits = cpu_seconds, _wall_seconds(config, self.CLOCK), config.memory_mebibytes, config.concurrency
        return _Worker(self.MODULE, [*map(str, limits), *self._arguments], self._environment)

    def _wait(self) -> list[tuple[int, Outcome | None]]:
        """Waits until a worker speaks, listens, dies or is late, a node is late, or the bell rings; (number, outcome or None
        where the worker was lost)."""
        awaited = [(worker, late_at) for worker in self._workers if (late_at := worker.late_at) is not None]
        with selectors.DefaultSelector() as selector:
            for worker, _ in awaited:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
                if worker.unsent:
                    selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
            selector.register(self._bell.descriptor, selectors.EVENT_READ)
            of_nodes = [late_at for node in self._nodes if (late_at := node.late_at) is not None]
            first_late_at = min((*(late_at for _, late_at in awaited), *of_nodes), default=None)
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


def _end_all(workers: list[_Worker], bell: Bell) -> None:
    bell.close()
    for worker in workers:
        worker.stdin.close()  # all of them begin to leave
    for worker in workers:
        worker.end(2.0)
