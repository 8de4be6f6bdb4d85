"""How long one engine samples: a replay of continuous batching, from completion to completion. Requests wait first come, first
served for one of the engine's slots and for room in its KV cache; where growing answers fill the cache, the newest one gives
its room back and is computed again later, as vLLM has it. Which requests an engine is asked is decided in decoding.py.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from engine.forecast.speed import Speed
from engine.inference.pool import open_after


@dataclass(slots=True)
class Request:
    """A response to sample, and how far it has come."""

    step: int
    prompt: tuple[int, int]  # (step, place), whose tokens are computed once where they are still there
    num_prompt: int
    left: int  # tokens to sample
    made: int = 0
    admitted: int = 0  # the iteration at which it began to run
    running: bool = False
    again: bool = False  # its room was given back: prompt and answer so far are computed anew


@dataclass(slots=True)
class Engine:
    """One engine. `slots`: requests that run together at most; `room`: tokens that its KV cache holds."""

    speed: Speed
    slots: int
    room: int
    clock: float = 0.0
    slow: float = 1.0  # by which everything takes longer now, where others compute on the same cores
    aim: range | None = None  # it works until it lacks none of these steps, and then rests; None: until it lacks nothing
    busy: float = 0.0
    preempted: int = 0
    most: int = 0  # requests that ran together
    most_open: int = 0  # and that ran or waited
    finished: dict[int, float] = field(default_factory=dict)  # of each step, when its last request was done so far
    handed_over: dict[int, list[tuple[float, int]]] = field(default_factory=dict)  # of each step, when so many requests were
    ends: dict[int, list[tuple[float, int]]] | None = None  # where kept: of each step, when a response to which prompt was done
    stretches: list[tuple[float, float]] = field(default_factory=list)  # in which it was busy, from and until
    _left: dict[int, int] = field(default_factory=dict)
    num_asked: dict[int, int] = field(default_factory=dict)  # of each step
    _open_after: dict[int, list[int]] = field(default_factory=dict)  # of each step, what the last and further calls leave open
    _waiting: deque[Request] = field(default_factory=deque)
    _heap: list[tuple[int, int, Request]] = field(default_factory=list)  # by the iteration at which each is done
    _newest: list[Request] = field(default_factory=list)
    _count: int = 0  # that run
    _number: int = 0
    _iteration: int = 0
    _context: int = 0
    _known: set[tuple[int, int]] = field(default_factory=set)

    def submit(self, now: float, requests: Many[Request]) -> None:
        """Queues requests at a time that is not before any of earlier calls."""
        self._rush(now)
        while self._go_on(now):
            self._rush(now)
        if not self._count and not self._waiting:
            self.clock = max(self.clock, now)
            self._known.clear()
        self._waiting.extend(requests)
        self.most_open = max(self.most_open, self._count + len(self._waiting))
        for request in requests:
            self._left[request.step] = self._left.get(request.step, 0) + 1
        for step in {request.step for request in requests}:
            self.num_asked[step] = self._left[step]
            self._open_after[step] = [self._left[step], *open_after(self._left[step])]

    def pause(self, until: float) -> None:
        """Nothing runs before a time that is not before any of earlier calls. What was running goes on then, first come, first
        served; the prompt and the answer so far are computed anew, for the weights are others."""
        running = [request for request in self._newest if request.running]
        while self._count:
            self._give_back()
        self.preempted -= len(running)
        self._known.clear()
        self.clock = max(self.clock, until)

    @property
    def works(self) -> bool:
        """Whether it has anything to do now."""
        if not self._count and not self._waiting:
            return False
        return self.aim is None or any(map(self.lacks, self.aim))

    def lacks(self, step: int) -> bool:
        """Whether a request of a step is not done yet."""
        return bool(self._left.get(step))

    def done(self, step: int, submitted: float) -> float:
        """When the last request of a step is done; `submitted` where it has none here."""
        while self.lacks(step):
            assert self.works, f"step {step} is waited for, and engines aim at {self.aim}"
            self._rush(float("inf"), step)
            if self.lacks(step):
                self._go_on(float("inf"))
        return self.finished.get(step, submitted)

    def _go_on(self, until: float) -> bool:
        """Works up to the next completion, or as far as `until`; False where there is nothing more to do by then."""
        if self.clock >= until or not self.works:
            return False
        began = self.clock
        if self._waiting and self._count < self.slots:
            self._admit()
        running, context, slow = self._count, self._context, self.slow
        if not running:
            return False
        count = self._first()[0] - self._iteration
        left = (self.room - context) // running
        if left < count:
            if left <= 0 and running > 1:
                self._give_back()
                return True
            count = max(1, left)
        seconds = slow * self.speed.iterations(count, running, context)
        if self.clock + seconds > until:
            count = self._fitting(count, (until - self.clock) / slow)
            if not count:
                return False
            seconds = slow * self.speed.iterations(count, running, context)
        self.clock += seconds
        self.busy += seconds
        self._iteration += count
        self._context += count * running
        self._worked(began)
        self._complete()
        return True

    def _rush(self, until: float, step: int | None = None) -> None:
        """The same as `_go_on` over and over in one loop, which is several times faster: up to `until`, or until no request of
        `step` is left, or as far as no request has to give its room back."""
        if self.aim is not None:
            return
        speed, slots, room, slow = self.speed, self.slots, self.room, self.slow
        fixed, each_request, weights, products = speed.fixed, speed.request, speed.weights, speed.products
        heap, waiting, newest, known, left_of = self._heap, self._waiting, self._newest, self._known, self._left
        began = clock = self.clock
        busy, iteration, context, count, number, most = (
            self.busy,
            self._iteration,
            self._context,
            self._count,
            self._number,
            self.most,
        )
        while clock < until and (step is None or left_of.get(step)):
            while waiting and count < slots:  # as `_admit`
                request = waiting[0]
                held = request.num_prompt + request.made
                if count and context + held + count + 1 > room:
                    break
                waiting.popleft()
                seconds = slow * (held if request.again or request.prompt not in known else 1) * speed.prompt
                known.add(request.prompt)
                clock += seconds
                busy += seconds
                request.running, request.admitted = True, iteration
                number += 1
                heapq.heappush(heap, (iteration + request.left, number, request))
                newest.append(request)
                count += 1
                context += held
            most = max(most, count)
            if not count:
                break
            while not heap[0][2].running or heap[0][2].admitted + heap[0][2].left != heap[0][0]:  # as `_first`
                heapq.heappop(heap)
            ahead, left = heap[0][0] - iteration, (room - context) // count
            if left < ahead:
                if left <= 0 and count > 1:
                    break
                ahead = max(1, left)
            each = fixed + each_request * count + max(weights, products * count)
            seconds = slow * (ahead * each + speed.context * (ahead * context + count * ahead * (ahead - 1) / 2))
            if clock + seconds > until:
                break
            clock += seconds
            busy += seconds
            iteration += ahead
            context += ahead * count
            while count and heap[0][0] <= iteration:  # as `_complete`
                due, _, request = heapq.heappop(heap)
                if request.running and request.admitted + request.left == due:
                    count -= 1
                    context -= request.num_prompt + request.made + request.left
                    self._finish(request, clock)
        self.clock, self.busy, self._iteration, self._context = clock, busy, iteration, context
        self._count, self._number, self.most = count, number, most
        if clock > began:
            self._worked(began)

    def _worked(self, began: float) -> None:
        """It was busy since then; what follows at once, but for the rest of an iteration, is one stretch."""
        if self.stretches and began <= self.stretches[-1][1] + self.slow * (self.speed.fixed + self.speed.weights):
            began = self.stretches.pop()[0]
        self.stretches.append((began, self.clock))

    def _fitting(self, most: int, seconds: float) -> int:
        """How many iterations fit into a time."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.speed.iterations(middle, self._count, self._context) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low

    def _first(self) -> tuple[int, int, Request]:
        """The request that is done first."""
        while not self._heap[0][2].running or self._heap[0][2].admitted + self._heap[0][2].left != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0]

    def _admit(self) -> None:
        """Lets requests run, first come, first served, as far as there are slots and room."""
        while self._waiting and self._count < self.slots:
            request = self._waiting[0]
            held = request.num_prompt + request.made
            if self._count and self._context + held + self._count + 1 > self.room:  # none to spare for an iteration
                break
            self._waiting.popleft()
            tokens = held if request.again or request.prompt not in self._known else 1
            self._known.add(request.prompt)
            self.clock += self.slow * tokens * self.speed.prompt
            self.busy += self.slow * tokens * self.speed.prompt
            request.running, request.admitted = True, self._iteration
            self._number += 1
            heapq.heappush(self._heap, (self._iteration + request.left, self._number, request))
            self._newest.append(request)
            self._count += 1
            self._context += held
        self.most = max(self.most, self._count)

    def _give_back(self) -> None:
        """The newest request waits again, before all others."""
        while not self._newest[-1].running:
            self._newest.pop()
        request = self._newest.pop()
        ran = self._iteration - request.admitted
        self._context -= request.num_prompt + request.made + ran
        request.made, request.left = request.made + ran, request.left - ran
        request.running, request.again = False, True
        self._count -= 1
        self.preempted += 1
        self._waiting.appendleft(request)

    def _complete(self) -> None:
        while self._count and self._first()[0] == self._iteration:
            request = heapq.heappop(self._heap)[2]
            self._context -= request.num_prompt + request.made + request.left
            self._count -= 1
            self._finish(request, self.clock)

    def _finish(self, request: Request, now: float) -> None:
        """A request is done; those of its step that are to be handed over together are, with the last of them."""
        step = request.step
        request.running = False
        self._left[step] = left = self._left[step] - 1
        self.finished[step] = now
        if self.ends is not None:
            self.ends.setdefault(step, []).append((now, request.prompt[1]))
        open_after = self._open_after[step]
        if left == open_after[1]:
            self.handed_over.setdefault(step, []).append((now, open_after[0] - left))
            del open_after[0]
