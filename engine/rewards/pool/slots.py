"""The children of one worker: as many as it may judge answers at once, or one where that one awaits several. It gives each what
waits, listens to all, and replaces who is late, dead, or has judged enough.

A child is late by its own CPU clock where the terms have one, so that the verdict is the same on a busy machine, and by the
wall clock in any case. An answer that is alone in its child when the child is late or dies has itself to blame. Several answers
that a child awaits together are under suspicion then: each is judged again, alone, so that what becomes of one never depends on
its neighbours.
"""

from __future__ import annotations

import math
import os
import select
import time
from collections import deque
from typing import Any

from engine.rewards.pool.child import Child, Judge, Terms, is_concurrent
from engine.rewards.pool.frames import read_frame, write_frame

ANSWERS_PER_CHILD = 1000  # then a fresh child, so that caches of libraries never eat the memory of an honest answer
SLACK_SECONDS = 1.0  # beyond the deadline that a child which awaits keeps itself, before it counts as stuck


class Slots:
    """Judges the requests that come on one descriptor, [number, request], and answers on another, [number, what the judge
    gives, status, error or ""]: `timeout` past the deadline, `invalid` where the judge raised, `died` where its process
    ended."""

    def __init__(self, judge: Judge, requests: int, answers: int, terms: Terms) -> None:
        self._judge, self._requests, self._answers, self._terms = judge, requests, answers, terms
        self._awaits = is_concurrent(judge)
        assert not self._awaits or math.isinf(terms.cpu_seconds), "what is awaited shares one CPU clock"
        self._room = terms.concurrency if self._awaits else 1  # answers at once in a child
        self._patience = terms.wall_seconds + (SLACK_SECONDS if self._awaits else 0.0)
        self._texts: dict[int, Any] = {}  # the requests under way, by number
        self._waiting: deque[int] = deque()
        self._suspects: deque[int] = deque()
        self._alone: set[int] = set()  # suspects that are being judged again
        self._told = terms.silent  # one error is told on stderr, the next would repeat it
        self._children: list[Child] = []
        for _ in range(1 if self._awaits else terms.concurrency):
            self._children.append(Child(judge, terms, self._children))

    def serve(self) -> None:
        """Until the requests' other side is gone."""
        while self._listen():
            for child in self._children:
                self._fill(child)
        for child in self._children:
            child.end()

    def _fill(self, child: Child) -> None:
        """Gives a child what waits and it has room for; a suspect only where it is alone."""
        if self._alone & child.late_at.keys():
            return
        queue, room = (self._suspects, 1) if self._suspects else (self._waiting, self._room)
        while queue and len(child.late_at) < room and child.num_answers + len(child.late_at) < ANSWERS_PER_CHILD:
            number = queue.popleft()
            if queue is self._suspects:
                self._alone.add(number)
            child.give(number, self._texts[number], time.monotonic() + self._patience)

    def _listen(self) -> bool:
        """Waits until somebody speaks, listens or is late; False when nobody waits for answers any more."""
        poll = select.poll()
        poll.register(self._requests, select.POLLIN)
        for child in self._children:
            if child.late_at:  # one that dies of nothing shows when it is asked, or it would be replaced for ever
                poll.register(child.answers, select.POLLIN)
            if child.sends:
                poll.register(child.requests, select.POLLOUT)
        patience = max(0.0, min(left)) if (left := [self._left(c) for c in self._children if c.late_at]) else None
        ready = {descriptor for descriptor, _ in poll.poll(None if patience is None else 1000 * patience)}
        if self._requests in ready:
            message = read_frame(self._requests)
            if message is None:
                return False
            number, self._texts[number] = message
            self._waiting.append(number)
        for child in list(self._children):
            if child.sends and child.requests in ready:
                child.push()
            if child.answers in ready:
                self._hear(child)
            elif child.late_at and self._left(child) <= 0:
                self._lose(child, "timeout")
        for child in list(self._children):  # at once: what waits would else not be given, and nobody would wake
            if not child.late_at and child.num_answers >= ANSWERS_PER_CHILD:
                self._replace(child)
        return True

    def _left(self, child: Child) -> float:
        """Seconds until a child that judges can be late: until its wall-clock limit, or until its CPU time would be used up if
        it ran without a break, which a busy machine puts off each time that it is looked at."""
        return min(min(child.late_at.values()) - time.monotonic(), self._terms.cpu_seconds - child.cpu_seconds)

    def _hear(self, child: Child) -> None:
        message = read_frame(child.answers)
        late = child.cpu_seconds >= self._terms.cpu_seconds  # we were late to see it, which must not change a verdict
        if message is None:
            self._lose(child, "timeout" if late else "died")
            return
        number, given, status, error, *last = message
        if late:
            given, status, error = 0.0, "timeout", ""
        del child.late_at[number]
        child.num_answers += 1
        self._reply(number, given, status, error)
        if last:
            self._suspects.extend(child.late_at)
            self._replace(child)

    def _lose(self, child: Child, status: str) -> None:
        """The end of a child that is late or dead."""
        numbers = list(child.late_at)
        self._replace(child)
        if len(numbers) == 1:
            self._reply(numbers[0], 0.0, status, "")
        else:
            self._suspects.extend(numbers)

    def _replace(self, child: Child) -> None:
        child.end()
        place = self._children.index(child)
        others = self._children[:place] + self._children[place + 1 :]
        self._children[place] = Child(self._judge, self._terms, others)

    def _reply(self, number: int, given: Any, status: str, error: str) -> None:
        del self._texts[number]
        self._alone.discard(number)
        if error and not self._told:
            self._told = True
            os.write(2, error.encode("utf-8", "backslashreplace"))
        write_frame(self._answers, [number, given, status, error])
