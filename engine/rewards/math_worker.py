"""The process that runs Math-Verify, started by engine/rewards/math.py as `python -m engine.rewards.math_worker`.

Math-Verify's own timeout is a signal, which native code ignores, so the only sure deadline is a process that can be
killed. This one imports Math-Verify once and stays clean: it forks a child that judges under limits of memory, waits
with a wall clock, kills a late child and forks the next. It starts no thread and imports neither torch nor the
engine's records; it knows nothing of prompts, batches or the other workers.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import resource
import select
import signal
import sys
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from engine.rewards.frames import read_frame, write_frame

ANSWERS_PER_CHILD = 1000  # then a fresh child, so that caches of sympy never eat the memory of an honest answer
CHILD_REQUESTS, CHILD_ANSWERS = 0, 3  # descriptors in the child
PR_SET_PDEATHSIG = 1  # linux/prctl.h
WARM_UP = (r"\frac{1}{2}", r"x^2 + \sqrt{3} \le 5", r"(1, \pi)", r"\{1, 2\}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}")
LATEX = re.compile(r"(?<!\\)\$.+\$|\\\(.+\\\)|\\\[.+\\\]|\\boxed\s*\{", re.DOTALL)


class Child:
    """The forked process that judges, one answer at a time, until it is late, dies, or has judged enough."""

    def __init__(self, memory_bytes: int) -> None:
        request_end, self.requests = os.pipe()
        self.answers, answer_end = os.pipe()
        self.num_answers = 0
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _limit_this_process(parent, memory_bytes)
                _keep_only(request_end, answer_end)
                while (request := read_frame(CHILD_REQUESTS)) is not None:
                    write_frame(CHILD_ANSWERS, judge(*request))
            finally:
                os._exit(1)  # also on an exception: the code of the parent below must never run here
        os.close(request_end)
        os.close(answer_end)

    def end(self) -> None:
        """Kills and reaps; unread answers are lost."""
        os.kill(self.pid, signal.SIGKILL)  # not yet reaped, so the id is still ours
        os.waitpid(self.pid, 0)
        os.close(self.requests)
        os.close(self.answers)


def _limit_this_process(parent: int, memory_bytes: int) -> None:
    """Bounds memory, forbids core files, and ties our life to the parent's."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before prctl
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _keep_only(request_end: int, answer_end: int) -> None:
    """Moves the two pipes to fixed numbers and closes the rest, above all the pipe on which our parent answers: an
    orphan that holds it would hide the parent's death."""
    os.dup2(request_end, CHILD_REQUESTS)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.dup2(answer_end, CHILD_ANSWERS)
    os.closerange(CHILD_ANSWERS + 1, 64)  # descriptors of a worker never come near 64


def judge(gold: str, text: str) -> tuple[float, str]:
    """(1.0 or 0.0, status) of one completion against the gold answer. May run for ever: only for a killable process.

    The completion is read with Math-Verify's default extraction, LaTeX and plain expressions.
    """
    expected = _parse_gold(gold)
    if not expected:
        return 0.0, "unparsable"
    right = verify(expected, parse(text, parsing_timeout=None), timeout_seconds=None)
    return float(right), "ok"


@lru_cache(maxsize=64)  # the rollouts of one prompt come together
def _parse_gold(gold: str) -> list[Any]:
    expected: list[Any] = parse(gold if LATEX.search(gold) else rf"\boxed{{{gold}}}", parsing_timeout=None)
    return expected


def serve(requests: int, answers: int, deadline_seconds: float, memory_bytes: int) -> None:
    """Answers [gold, text] with [value, status] until `requests` closes; says "ready" first."""
    child = Child(memory_bytes)
    write_frame(answers, "ready")
    while (request := read_frame(requests)) is not None:
        answer = _ask(child, request, requests, deadline_seconds)
        if answer is None:
            break
        if answer[1] in ("timeout", "died") or child.num_answers == ANSWERS_PER_CHILD:
            child.end()
            child = Child(memory_bytes)
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


def main() -> None:
    """Reads deadline in seconds and memory in MiB from the command line; speaks on standard input and output."""
    logging.disable(logging.CRITICAL)
    deadline_seconds, memory_mebibytes = float(sys.argv[1]), int(sys.argv[2])
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not mix with our frames
    for expression in WARM_UP:
        judge(expression, rf"\boxed{{{expression}}} or ${expression}$ or 2/3")
    try:
        serve(0, answers, deadline_seconds, memory_mebibytes << 20)
    except BrokenPipeError:
        sys.exit(0)  # nobody reads the answer; the child dies with us


if __name__ == "__main__":
    main()
