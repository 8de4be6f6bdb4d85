"""What every judging process has in common, started by engine/rewards/pool/workers.py as `python -m engine.rewards.*_worker`.

Native code ignores Python's signals, so the only sure deadline is a process that can be killed. A worker imports what
judges once and stays clean: it forks a child that judges under limits of memory, waits with a wall clock, kills a late
child and forks the next. It starts no thread and imports neither torch nor the engine's records; it knows nothing of
prompts, batches, the other workers, or how an answer is judged.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from engine.rewards.pool.frames import read_frame, write_frame

Judge = Callable[..., tuple[float, str]]  # (value, status) of the parts of a request

ANSWERS_PER_CHILD = 1000  # then a fresh child, so that caches of libraries never eat the memory of an honest answer
ANSWERS = 3  # the descriptor on which a worker answers us, and its child the worker
RAISED = 3  # exit code of a child whose judge raised
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class Terms:
    """What one answer may cost, and whether what the judge prints is dropped rather than shown on our stderr."""

    deadline_seconds: float
    memory_bytes: int
    silent: bool


class Child:
    """The forked process that judges, one answer at a time, until it is late, dies, or has judged enough."""

    def __init__(self, judge: Judge, terms: Terms) -> None:
        request_end, self.requests = os.pipe()
        self.answers, answer_end = os.pipe()
        self.num_answers = 0
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self.requests)
                os.close(self.answers)
                _limit_this_process(parent, terms)
                os.dup2(answer_end, ANSWERS, inheritable=False)
                os.close(answer_end)
                while (request := read_frame(request_end)) is not None:
                    write_frame(ANSWERS, judge(*request))
            finally:  # also on an exception: the code of the parent below must never run here
                _leave(sys.exception())
        os.setpgid(self.pid, self.pid)
        os.close(request_end)
        os.close(answer_end)

    def end(self) -> int:
        """Kills and reaps it, and kills the processes it started; its exit code, negative for a signal. Unread answers
        are lost."""
        os.killpg(self.pid, signal.SIGKILL)  # not yet reaped, so the id is still ours; an exit code stays what it is
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.requests)
        os.close(self.answers)
        return code


def _leave(error: BaseException | None) -> None:
    """Ends this process. A lack of memory is the death that the limit meant; every other error is the judge's own, and is
    shown on stderr, if that works."""
    by_itself = error is not None and not isinstance(error, MemoryError)
    try:
        if by_itself:
            traceback.print_exception(error)
    finally:
        os._exit(RAISED if by_itself else 1)


def _limit_this_process(parent: int, terms: Terms) -> None:
    """Bounds memory, forbids core files, ties our life to the parent's, and lets go of the pipe of its requests."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before prctl
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_AS, (terms.memory_bytes, terms.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2) if terms.silent else (0,):
        os.dup2(null, descriptor)


def serve(judge: Judge, requests: int, answers: int, terms: Terms) -> None:
    """Answers a request, the list of the judge's arguments, with [value, status] until `requests` closes; says "ready"
    first. `timeout` past the deadline, `invalid` where the judge raised, `died` where its process ended."""
    child = Child(judge, terms)
    write_frame(answers, "ready")
    while (request := read_frame(requests)) is not None:
        answer = _ask(child, request, requests, terms.deadline_seconds)
        if answer is None:
            break
        if answer[1] in ("timeout", "died") or child.num_answers == ANSWERS_PER_CHILD:
            if child.end() == RAISED:
                answer = 0.0, "invalid"
                terms = replace(terms, silent=True)  # one error was told, the next would repeat it
            child = Child(judge, terms)
        write_frame(answers, answer)
    child.end()


def _ask(child: Child, request: Any, requests: int, deadline_seconds: float) -> Any | None:
    """The child's answer, or what became of the child; None when nobody waits for an answer any more."""
    try:
        write_frame(child.requests, request)
    except BrokenPipeError:
        return 0.0, "died"
    poll = select.poll()
    poll.register(child.answers, select.POLLIN)
    poll.register(requests, 0)  # reports only that the other side is gone
    events = dict(poll.poll(1000 * deadline_seconds))
    if requests in events:
        return None
    child.num_answers += 1
    if not events:
        return 0.0, "timeout"
    return read_frame(child.answers) or (0.0, "died")


def run(load: Callable[[list[str]], Judge | str], *, silent: bool) -> None:
    """A worker's whole life: deadline in seconds, memory in MiB and the judge's own arguments from the command line;
    speaks on standard input and output. `load` makes the judge, or says in a sentence why it cannot: that is sent
    instead of "ready"."""
    terms = Terms(float(sys.argv[1]), int(sys.argv[2]) << 20, silent)
    os.dup2(1, ANSWERS, inheritable=False)  # nothing else is open yet
    os.dup2(2, 1)  # what a library prints must not mix with our frames
    try:
        judge = load(sys.argv[3:])
        if isinstance(judge, str):
            write_frame(ANSWERS, judge)
        else:
            serve(judge, 0, ANSWERS, terms)
    except BrokenPipeError:
        sys.exit(0)  # nobody reads the answer; the child dies with us
