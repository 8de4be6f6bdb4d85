"""When the answers of a run's steps are in: the steps' requests dealt to the engines as the pool deals them, each engine
replayed (batching.py), and what all of them have together: hand-overs, waves, pauses.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence as Many
from typing import Any

from engine.config.load import RunConfig
from engine.forecast.batching import Engine, Request
from engine.forecast.lengths import StepWork
from engine.forecast.speed import Speed
from engine.inference.pool import deal_prompts, open_after
from engine.rollouts.waves import COMPLETE_SHARES, Waves, least_groups

_ANSWER: Any = None  # of which a wave only counts that it is there
LEAST_DEALT = 4  # engines whose requests are kept where some are dealt: few are told of first, more of them later


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
            asked: list[Request] = []
            for step, share in zip(steps, shares, strict=True):
                work = self._works[step % len(self._works)]
                samples = len(work.completions[0])
                for i in share[place]:
                    prompt, sample = divmod(i, samples)
                    if engine.ends is not None:
                        self._asked.setdefault(step, Counter())[prompt] += 1
                    asked.append(Request(step, (step, prompt), work.prompts[prompt], work.completions[prompt][sample]))
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
