"""A pool of judging processes, the ground of every reward that judges in processes of its own (math.py, function.py).

This file hands requests to workers (engine/rewards/pool/worker.py) and replaces what is stuck or dead; how a request is judged
and the deadline of one answer are theirs. It starts no thread: one selector waits on all pipes.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Self

import engine
from engine.config.options import Rewards
from engine.core.errors import ConfigError, SemionError, WatchdogError
from engine.core.types import Prompt, Score
from engine.rewards.pool.frames import frame, read_frame

START_SECONDS = 120.0  # longest start of a worker, on a busy machine
GRACE_SECONDS = 10.0  # beyond an answer's own deadline, before a worker itself counts as stuck
MAX_FAILED_STARTS = 3  # in a row
MAX_TRIES = 2  # of one answer, when workers die under it
INHERITED = {"PATH", "HOME", "TMPDIR", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "HF_HOME", "HF_HUB_OFFLINE"}
INHERITED_PREFIXES = ("LC_", "PYTHON", "OMP_")

Request = tuple[Hashable, ...]  # the arguments of the judge, as JSON can hold them


def _environment() -> dict[str, str]:
    """Our variables without what a judge of a model's output has no business with: keys, tokens, passwords."""
    return {name: value for name, value in os.environ.items() if name in INHERITED or name.startswith(INHERITED_PREFIXES)}


class _Worker:
    """One worker process and the index of the request it is judging."""

    def __init__(self, module: str, arguments: Sequence[str], config: Rewards) -> None:
        root = str(Path(str(engine.__file__)).parents[1])
        limits = [str(config.deadline_seconds), str(config.memory_mebibytes)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *limits, *arguments],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is ours to handle
            env=_environment()
            | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
            | {"PYTHONHASHSEED": "0"},  # the order of a set must not decide a verdict
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        os.set_blocking(self.stdin.fileno(), False)  # a request may be larger than the pipe, and the worker stopped
        self.unsent = memoryview(b"")
        self.ready = False
        self.index: int | None = None
        self.late_at = time.monotonic() + START_SECONDS

    @property
    def awaited(self) -> bool:
        """Whether a message is due from it."""
        return not self.ready or self.index is not None

    def give(self, index: int, request: Request, seconds: float) -> None:
        """Sends a request to judge, as much of it as the pipe takes now. A dead worker shows when it is read."""
        self.index, self.late_at = index, time.monotonic() + seconds
        self.unsent = memoryview(frame(request))
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


class WorkerReward:
    """A `Reward` behind killable processes. A subclass says which module judges (`MODULE`), with which arguments, and
    what a request is.

    Statuses: `timeout` past `deadline_seconds`, `died` when the judging process crashed (lack of memory among the
    causes), `invalid` when the judge raised, and what the judge itself says; the value of these three is 0.
    """

    MODULE: str

    def __init__(self, config: Rewards, *arguments: str) -> None:
        self._config, self._arguments = config, arguments
        self._workers = [self._new_worker() for _ in range(config.workers)]
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

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """One score for each (prompt, completion text), in order. Raises as `start` does.

        Equal requests are judged once: the samples of a prompt repeat each other as entropy falls.
        """
        assert self._finalizer.alive, "score() after close()"
        requests = [self._request(prompt, text) for prompt, text in items]
        distinct = list(dict.fromkeys(requests))
        judged = dict(zip(distinct, self._judge(distinct), strict=True))
        return [judged[request] for request in requests]

    def _request(self, prompt: Prompt, text: str) -> Request:
        """What the judge is asked about a completion."""
        raise NotImplementedError

    def _new_worker(self) -> _Worker:
        return _Worker(self.MODULE, self._arguments, self._config)

    def _judge(self, requests: list[Request]) -> list[Score]:
        """One score for each request."""
        scores: list[Score | None] = [None] * len(requests)
        num_tries = [0] * len(requests)
        waiting = deque(range(len(requests)))
        for worker in list(self._workers):
            if worker.index is not None or worker.process.poll() is not None:  # interrupted, or dead by now
                self._replace(worker)
        while waiting or any(worker.index is not None for worker in self._workers):
            for worker in self._workers:
                if waiting and worker.ready and worker.index is None:
                    index = waiting.popleft()
                    num_tries[index] += 1
                    worker.give(index, requests[index], self._config.deadline_seconds + GRACE_SECONDS)
            for index, score in self._wait():
                if score is not None:
                    scores[index] = score
                elif num_tries[index] < MAX_TRIES:
                    waiting.appendleft(index)
                else:
                    scores[index] = Score(0.0, "died")
        return [score for score in scores if score is not None]

    def _wait(self) -> list[tuple[int, Score | None]]:
        """Waits until a worker speaks, listens, dies or is late; (index, score or None where the worker was lost)."""
        awaited = [worker for worker in self._workers if worker.awaited]
        with selectors.DefaultSelector() as selector:
            for worker in awaited:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
                if worker.unsent:
                    selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
            first_late_at = min(worker.late_at for worker in awaited)
            events = [key for key, _ in selector.select(max(0.0, first_late_at - time.monotonic()))]
        speaking = {key.data for key in events if key.fileobj is key.data.stdout}
        for key in events:
            if key.fileobj is key.data.stdin:
                key.data.push()
        outcomes: list[tuple[int, Score | None]] = []
        for worker in awaited:
            message = read_frame(worker.stdout.fileno()) if worker in speaking else None
            index = worker.index
            if message is not None:
                self._heard(worker, message)
            elif worker in speaking or time.monotonic() >= worker.late_at:
                self._replace(worker)
            else:
                continue
            if index is not None:
                outcomes.append((index, Score(*message) if message is not None else None))
        return outcomes

    def _heard(self, worker: _Worker, message: object) -> None:
        if not worker.ready and message != "ready":
            raise ConfigError(str(message))
        self._num_failed_starts = 0
        worker.ready, worker.index = True, None

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
