"""How long engines sample: a replay of continuous batching, from completion to completion, with the requests dealt as the pool
deals them. Requests wait first come, first served for one of an engine's slots and for room in its KV cache; where growing
answers fill the cache, the newest one gives its room back and is computed again later, as vLLM has it.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

from engine.capacity.kv_cache import item_bytes, kv_bytes_per_token
from engine.config.load import RunConfig
from engine.forecast.constants import Constants
from engine.forecast.lengths import StepWork
from engine.inference.pool import deal_prompts, open_after
from engine.models.base import ModelShape
from engine.models.headers import num_elements
from engine.models.sharding import EngineLayout, layer_matrices
from engine.rollouts.waves import COMPLETE_SHARES, Waves, least_groups

ROUNDED_BYTES = 130  # read and written of each element that a weight sync rounds to FP8 and proves, most of them float32
_ANSWER: Any = None  # of which a wave only counts that it is there
LEAST_DEALT = 4  # engines whose requests are kept where some are dealt: few are told of first, more of them later


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of an engine's work. One iteration decodes one token of each running request."""

    fixed: float  # an iteration, whatever it decodes
    request: float  # an iteration for each request, beside its products
    weights: float  # an iteration reads the weights ...
    products: float  # ... while it multiplies them for each request; the longer of both counts
    context: float  # an iteration for each token that the requests attend to
    prompt: float  # a token of a prompt

    def iterations(self, count: int, batch: int, context: int) -> float:
        """So many iterations of a batch that holds `context` tokens at first, and grows by one each an iteration."""
        each = self.fixed + self.request * batch + max(self.weights, self.products * batch)
        return count * each + self.context * (count * context + batch * count * (count - 1) / 2)


def speed_of(shape: ModelShape, config: RunConfig, constants: Constants) -> Speed:
    """An engine's speed by the model's sizes, its tensor parallelism and the constants."""
    c, tp = constants, config.inference.tensor_parallel
    matrices = num_elements(shape) - (0 if shape.tied else shape.vocab_size * shape.hidden)  # the embedding is only looked up
    head = shape.vocab_size * shape.hidden
    item = item_bytes(config.model.dtype)
    stored, faster = (1, c.fp8_factor) if config.inference.quantization == "fp8" else (item, 1.0)  # of the layers' matrices
    products = 2 * ((matrices - head) / faster + head) / tp
    bandwidth = c.memory_gigabytes_per_second * 1e9 * c.decode_memory_share
    peak = c.peak_teraflops * 1e12
    together = 2 * shape.num_layers * c.collective_seconds if tp > 1 else 0.0
    return Speed(
        fixed=c.iteration_seconds + together,
        request=c.request_iteration_seconds,
        weights=((matrices - head) * stored + head * item) / tp / bandwidth,
        products=products / (peak * c.decode_peak_share),
        context=kv_bytes_per_token(shape, tp, config.inference.stored_dtype or config.model.dtype) / bandwidth,
        prompt=products / (peak * c.prefill_peak_share),
    )


def quantizing_seconds(shape: ModelShape, config: RunConfig, constants: Constants) -> float:
    """What a weight sync takes to round an engine's matrices to FP8, by the passes over them that engine/ops/fp8.py makes."""
    if config.inference.quantization == "none":
        return 0.0
    elements = shape.num_layers * sum(map(math.prod, layer_matrices(shape, EngineLayout(config.inference.tensor_parallel))))
    return ROUNDED_BYTES * elements / (constants.memory_gigabytes_per_second * 1e9)


@dataclass(slots=True)
class _Request:
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
    _waiting: deque[_Request] = field(default_factory=deque)
    _heap: list[tuple[int, int, _Request]] = field(default_factory=list)  # by the iteration at which each is done
    _newest: list[_Request] = field(default_factory=list)
    _count: int = 0  # that run
    _number: int = 0
    _iteration: int = 0
    _context: int = 0
    _known: set[tuple[int, int]] = field(default_factory=set)

    def submit(self, now: float, requests: Many[_Request]) -> None:
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

    def _first(self) -> tuple[int, int, _Request]:
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

    def _finish(self, request: _Request, now: float) -> None:
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


class Deals:
    """What the first engines are asked of steps, dealt once for each number of engines and each step from which on it is dealt:
    a search has many layouts with equally many engines, and what is dealt first does not hang on how much follows."""

    def __init__(self, works: Many[StepWork]) -> None:
        """`works`: the steps' requests, repeated from the first where a run has more."""
        self._works = works
        self._found: dict[tuple[int, int], tuple[int, list[list[list[int]]]]] = {}  # with the number of engines told of

    def shares(self, steps: range, num_engines: int, first: int) -> list[list[list[int]]]:
        """Of each step and each of the first engines, which of the step's requests it is asked, where all these steps are
        dealt together."""
        key = (num_engines, steps.start % len(self._works))
        told, found = self._found.get(key, (0, []))
        if told < first or len(found) < len(steps):
            told = max(told, first, LEAST_DEALT)
            found = deal_prompts((self._works[step % len(self._works)].requests for step in steps), num_engines, told)
            self._found[key] = (told, found)
        return found[: len(steps)]


class Engines:
    """All engines of a run: what is asked of them, and when the steps' answers are in."""

    def __init__(
        self,
        config: RunConfig,
        speed: Speed,
        room: int,
        works: Many[StepWork],
        only: int | None = None,
        deals: Deals | None = None,
    ) -> None:
        """`works`: the steps' requests, repeated from the first where a run has more. `room`: tokens that the KV cache of an
        engine holds. `only`: that so many engines are replayed, the first ones, for an estimate. `deals`: of the same works."""
        self._count = config.inference.engines
        self._works = works
        self.engines = [
            Engine(speed, config.inference.max_concurrent, room) for _ in range(min(self._count, only or self._count))
        ]
        self._deals = deals or Deals(works)
        self._submitted: dict[int, float] = {}
        self._asked: dict[int, Counter[int]] = {}  # with sync.streaming, of each step: how many responses to which prompt
        self._least = least_groups(config)
        self._waves: dict[tuple[int, ...], list[tuple[float, float]]] = {}  # by the step and each engine's calls
        if config.sync.streaming:
            for engine in self.engines:
                engine.ends = {}

    def open(self, now: float, steps: range) -> None:
        """Submits the prompts of these steps."""
        shares = self._deals.shares(steps, self._count, len(self.engines))
        for step in steps:
            self._submitted[step] = now
        for place, engine in enumerate(self.engines):
            asked: list[_Request] = []
            for step, share in zip(steps, shares, strict=True):
                work = self._works[step % len(self._works)]
                samples = len(work.completions[0])
                for i in share[place]:
                    prompt, sample = divmod(i, samples)
                    if engine.ends is not None:
                        self._asked.setdefault(step, Counter())[prompt] += 1
                    asked.append(_Request(step, (step, prompt), work.prompts[prompt], work.completions[prompt][sample]))
            engine.submit(now, asked)

    def sampled(self, step: int) -> float:
        """When the last response of an opened step is in."""
        return max(engine.done(step, self._submitted[step]) for engine in self.engines)

    def handed_over(self, step: int) -> list[tuple[float, float]]:
        """When which shares of a step's responses were handed over so far, in this order."""
        found = sorted(part for engine in self.engines for part in engine.handed_over.get(step, ()))
        count = sum(engine.num_asked.get(step, 0) for engine in self.engines)
        return [(when, number / count) for when, number in found]

    def waves(self, step: int) -> list[tuple[float, float]]:
        """When which shares of a step's tokens are cut off as a wave (sync.streaming), as far as the engines have come; the
        last one once no response is missing. As the run's own `Waves` cuts the groups that these engines have to themselves."""
        told = [engine for engine in self.engines if engine.num_asked.get(step)]
        calls = [engine.handed_over.get(step, []) for engine in told]
        key = (step, *map(len, calls))
        if key not in self._waves:
            self._waves[key] = self._cut(step, told, calls)
        return self._waves[key]

    def _cut(self, step: int, told: Many[Engine], calls: Many[Many[tuple[float, int]]]) -> list[tuple[float, float]]:
        work = self._works[step % len(self._works)]
        size, due = len(work.completions[0]), [len(open_after(engine.num_asked[step])) for engine in told]
        groups = {prompt: place for place, prompt in enumerate(p for p, n in self._asked[step].items() if n == size)}
        turns: list[float] = []  # when all engines have answered so many calls
        while len(turns) < max(due):
            last = [min(len(turns), most - 1) for most in due]
            answered = [own[number][0] for own, number in zip(calls, last, strict=True) if len(own) > number]
            if len(answered) < len(told):
                break
            turns.append(max(answered))
        least = -(-self._least * len(groups) // len(work.prompts))
        waves, found = Waves(len(groups), size, COMPLETE_SHARES, least), list[tuple[float, float]]()
        ends, counts = [deque((engine.ends or {}).get(step, ())) for engine in told], Counter[int]()
        for turn, moment in enumerate(turns if groups else ()):
            for own, ended, most in zip(calls, ends, due, strict=True):
                while ended and ended[0][0] <= own[min(turn, most - 1)][0]:
                    _, prompt = ended.popleft()
                    if prompt in groups:
                        waves.put({groups[prompt] * size + counts[prompt]: _ANSWER})
                        counts[prompt] += 1
            waves.turn()
            early = [wave for wave in waves.made if not wave.is_last]
            found += [(moment, self._share(work, list(groups), wave.groups)) for wave in early[len(found) :]]
        if len(turns) == max(due):
            found.append((turns[-1], 1.0 - sum(share for _, share in found)))
        return found

    def _share(self, work: StepWork, prompts: Many[int], groups: Many[int]) -> float:
        """Of the tokens of a step's groups those of some."""
        tokens = [len(work.completions[p]) * work.prompts[p] + sum(work.completions[p]) for p in prompts]
        return sum(tokens[group] for group in groups) / sum(tokens)

    def catch_up(self, now: float, slow: float = 1.0) -> None:
        """Works up to a time; everything takes `slow` times as long."""
        for engine in self.engines:
            engine.slow = slow
            engine.submit(now, ())

    def pause(self, now: float, until: float) -> None:
        """What is not done at a time goes on at another, with its tokens kept and computed anew. All engines have worked until
        the last of them had completed the steps that they aimed at."""
        for engine in self.engines:
            engine.slow = 1.0
        aimed = [(engine, step) for engine in self.engines for step in engine.aim or ()]
        last = max((engine.done(step, 0.0) for engine, step in aimed), default=now)
        for engine in self.engines:
            engine.aim = None
            engine.submit(min(now, last), ())
            engine.pause(until)

    def aim(self, steps: range) -> None:
        """The engines work until each has completed these steps, however much they have begun beside them, and then rest until
        `pause`."""
        for engine in self.engines:
            engine.aim = steps

    @property
    def num_working(self) -> int:
        """Engines that have something to do where they stand."""
        return sum(engine.works for engine in self.engines)

    def lacks(self, step: int) -> bool:
        """Whether a response of an opened step is not in yet, where the engines stand."""
        return any(engine.lacks(step) for engine in self.engines)

    @property
    def busy_seconds(self) -> float:
        """Of the engines that are replayed, in the mean."""
        return sum(engine.busy for engine in self.engines) / len(self.engines)

    @property
    def longest_wait(self) -> float:
        """Seconds that an engine needed for a step's answers at most, after it had those of the steps before."""
        waits = [0.0]
        for engine in self.engines:
            before = 0.0
            for step, moment in sorted(engine.finished.items(), key=lambda one: one[1]):
                begin = max(before, self._submitted[step])  # what it rests after that nobody waits for
                waits.append(sum(max(0.0, min(until, moment) - max(since, begin)) for since, until in engine.stretches))
                before = moment
        return max(waits)

    @property
    def preempted(self) -> int:
        """Requests whose room in a cache was given back."""
        return sum(engine.preempted for engine in self.engines)

    @property
    def most(self) -> int:
        """Requests that any engine decoded together."""
        return max(engine.most for engine in self.engines)

    @property
    def most_open(self) -> int:
        """The most requests that an engine had together, those that waited for a slot or room included."""
        return max(engine.most_open for engine in self.engines)
