"""The forked process that judges: a plain function one answer after another, a coroutine function several at once. It dies of
what its judge raises, so that the next answer meets a clean process. Who is late and what follows is slots.py's.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from engine.core.lifetimes import die_with_parent
from engine.rewards.pool.frames import LENGTH, decoded, frame, read_frame, write_frame

Judge = Callable[..., tuple[Any, str] | Awaitable[tuple[Any, str]]]  # (what it gives, status) of the parts of a request

ANSWERS = 3  # the descriptor on which a worker answers us, and its child the worker
OURS = Path(__file__).parents[2]  # engine/, whose calls are no news to whoever wrote a function
MAX_TOLD = 4000  # characters of an error's traceback that are kept, its end


@dataclass(frozen=True, slots=True)
class Terms:
    """What one answer may cost, how many a worker judges at once, and whether what the judge prints is dropped rather than
    shown on our stderr."""

    cpu_seconds: float  # on the clock of the child's own CPU time; infinite where the wall clock alone decides
    wall_seconds: float
    memory_bytes: int
    concurrency: int
    silent: bool


def is_concurrent(judge: Judge) -> bool:
    """Whether one child awaits several answers at once."""
    return inspect.iscoroutinefunction(judge)


class Child:
    """The parent's side of a child: its pipes, the numbers of the answers that it judges with the wall-clock time of each
    deadline, and its CPU clock.

    It is sent [number, request] and answers [number, what the judge gives, status, error or ""]; one element more says that
    it ends itself with this answer."""

    def __init__(self, judge: Judge, terms: Terms, others: Collection[Child]) -> None:
        """`others`: children that live already, whose pipes are not for this one."""
        request_end, self.requests = os.pipe()
        self.answers, answer_end = os.pipe()
        self.num_answers = 0
        self.late_at: dict[int, float] = {}
        self._unsent = memoryview(b"")
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            judging: list[int] = []  # numbers of the answers under way
            try:
                for descriptor in (self.requests, self.answers, *(d for o in others for d in (o.requests, o.answers))):
                    os.close(descriptor)
                _limit_this_process(parent, terms)
                os.dup2(answer_end, ANSWERS, inheritable=False)
                os.close(answer_end)
                if is_concurrent(judge):
                    asyncio.run(_judge_at_once(judge, request_end, terms.wall_seconds, judging))
                else:
                    _judge_in_turn(judge, request_end, judging)
            finally:  # also on an exception: the code of the parent below must never run here
                _leave(sys.exception(), judging)
        os.setpgid(self.pid, self.pid)
        self._clock = _cpu_clock(self.pid)
        self._began = 0.0
        os.close(request_end)
        os.close(answer_end)
        os.set_blocking(self.requests, False)

    @property
    def sends(self) -> bool:
        """Whether a part of a request is still to be sent."""
        return bool(self._unsent)

    def give(self, number: int, request: Any, late_at: float) -> None:
        """Sends a request, as much of it as the pipe takes now. A dead child shows when it is read."""
        self._began = time.clock_gettime(self._clock)
        self.late_at[number] = late_at
        self._unsent = memoryview(bytes(self._unsent) + frame([number, request]))
        self.push()

    @property
    def cpu_seconds(self) -> float:
        """CPU time that it used since it was last given something, in user and kernel mode; it stands still while the child
        waits for its turn on a busy machine."""
        return time.clock_gettime(self._clock) - self._began

    def push(self) -> None:
        """Sends what the pipe takes of the rest."""
        try:
            self._unsent = self._unsent[os.write(self.requests, self._unsent) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._unsent = memoryview(b"")

    def end(self) -> None:
        """Kills and reaps it, and kills the processes it started. Unread answers are lost."""
        os.killpg(self.pid, signal.SIGKILL)  # not yet reaped, so the id is still ours
        os.waitpid(self.pid, 0)
        os.close(self.requests)
        os.close(self.answers)


def _cpu_clock(pid: int) -> int:
    """The id of the clock of a process's CPU time (clock_getcpuclockid(3)), readable until the process is reaped."""
    clock = ctypes.c_int()
    code = ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock))
    if code:
        raise OSError(code, f"no CPU clock of process {pid}: {os.strerror(code)}")
    return clock.value


def told(error: BaseException) -> str:
    """The traceback of an error that a judge raised, as people read it: from their own code on, without the calls of ours that
    led there. What we refuse of a result has no traceback."""
    trace = error.__traceback__
    while trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(OURS):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))[-MAX_TOLD:]


def _judge_in_turn(judge: Judge, requests: int, judging: list[int]) -> None:
    while (message := read_frame(requests)) is not None:
        number, request = message
        judging[:] = [number]
        given, status = cast("tuple[Any, str]", judge(*request))
        write_frame(ANSWERS, [number, given, status, ""])


async def _judge_at_once(judge: Judge, requests: int, wall_seconds: float, judging: list[int]) -> None:
    """Starts to judge whatever comes. A late answer is cancelled and answered for, whether it stops or not."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(requests, "rb", buffering=0))
    under_way: set[asyncio.Task[None]] = set()  # the loop itself keeps only weak references
    while True:
        try:
            (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
            number, request = decoded(await reader.readexactly(length))
        except asyncio.IncompleteReadError:
            return
        judging.append(number)
        task = loop.create_task(_answer(judge, number, request, wall_seconds, judging))
        under_way.add(task)
        task.add_done_callback(under_way.discard)


async def _answer(judge: Judge, number: int, request: Any, wall_seconds: float, judging: list[int]) -> None:
    task = asyncio.ensure_future(cast("Awaitable[tuple[Any, str]]", judge(*request)))
    await asyncio.wait({task}, timeout=wall_seconds)
    if not task.done():
        task.cancel()
        outcome: tuple[Any, str, str] = 0.0, "timeout", ""
    elif task.cancelled():
        outcome = 0.0, "invalid", "asyncio.CancelledError: it cancelled itself"
    elif (error := task.exception()) is not None:
        outcome = (0.0, "died", "") if isinstance(error, MemoryError) else (0.0, "invalid", told(error))
    else:
        outcome = *task.result(), ""
    judging.remove(number)
    write_frame(ANSWERS, [number, *outcome])


def _leave(error: BaseException | None, judging: list[int]) -> None:
    """Ends this process. A lack of memory is the death that the limit meant; every other error is the judge's own, and is told
    where it is clear which answer it is about."""
    try:
        if error is not None and not isinstance(error, MemoryError) and len(judging) == 1:
            write_frame(ANSWERS, [judging[0], 0.0, "invalid", told(error), "the last answer"])
    finally:
        os._exit(1)


def _limit_this_process(parent: int, terms: Terms) -> None:
    """Bounds memory, forbids core files, ties our life to the parent's, and lets go of the pipe of its requests."""
    die_with_parent(parent)
    resource.setrlimit(resource.RLIMIT_AS, (terms.memory_bytes, terms.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2) if terms.silent else (0,):
        os.dup2(null, descriptor)
