"""A reward class of the user's own. Its `score` runs in a thread of its own with a deadline, and what it returns is checked, so
that one that hangs or forgets an answer ends the run by its name. Functions of the user's are function.py's, in processes that
can be killed.

A class is asked for a step whole, here alone. One that says `per_group = True` is asked for one group in each call, as soon as
its last answer is there, here and on every other node of the run (engine/rewards/serving.py has one there), each one call at a
time. So a score follows from its group and not from who judged it, when, or what else was judged.

Waiting: for answers, without a deadline; for a call here rewards.timeout_seconds; for other nodes as in pool/nodes.py.
"""

from __future__ import annotations

import math
import queue
import reprlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from engine.core.errors import ConfigError, NumericsError, SemionError, WatchdogError
from engine.core.registry import called
from engine.core.types import Score, Status
from engine.rewards.arrivals import Arrivals, Arriving, Groups, Item
from engine.rewards.base import Answer, Reward
from engine.rewards.pool.nodes import NodePool, Outcome, Request

OPTION = "data.reward"
UNUSABLE = (TypeError, ValueError, ArithmeticError, RuntimeError)  # what numbers of Python, numpy and torch raise
PARTS = "whose parts must be a tuple of (name, finite number)"
SHORT = reprlib.Repr()
SHORT.maxother = SHORT.maxstring = 80


def require_class(kind: type[Reward], name: str) -> None:
    """ConfigError for a user's class that cannot judge."""
    if kind.score is Reward.score:
        raise ConfigError(f"{OPTION} = {name!r} must have a method score(self, answers); found none: write it")
    if not isinstance(kind.per_group, bool):
        raise ConfigError(f"{OPTION} = {name!r} must say per_group = True or False; found {kind.per_group!r}: set it")


def says_per_group(kind: type[Reward]) -> bool:
    """Whether a user's class itself says that a score depends on its own group alone. What it inherits does not count: that was
    said of another `score`."""
    return vars(kind).get("per_group") is True


def spreads(kind: type[Reward]) -> bool:
    """Whether a user's class judges group by group, on every node: it says so, and needs nothing that one node alone has."""
    return says_per_group(kind) and not kind.uses_engine


@dataclass(slots=True, eq=False)
class _Call:
    """A call of the user's `score`."""

    answers: Sequence[Answer]
    late_at: float
    told: Callable[[], object]  # in the thread of the reward, when it has ended
    found: Any = None
    error: SemionError | None = None
    is_done: bool = False


class OwnReward(Reward):
    """A user's reward behind a deadline. Whatever it raises is a NumericsError that names it, file and line."""

    slots = 1  # groups that it judges at once

    def __init__(self, name: str, reward: Reward, timeout_seconds: float, *, spreads: bool = False) -> None:
        """`name`: as data.reward names its class. `timeout_seconds`: of one call of its `score`. `spreads`: whether it is asked
        group by group, on other nodes too."""
        self._name, self._reward, self._timeout = name, reward, timeout_seconds
        self.begins_early = spreads  # type: ignore[misc]  # of this class it depends on the user's
        self._nodes: tuple[NodePool, ...] = ()
        self._tasks: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._call: _Call | None = None  # the last one
        self._thread = threading.Thread(
            target=self._serve, name=f"reward {name}", daemon=True
        )  # one that hangs holds up no exit
        self._is_closed = False
        self._thread.start()

    def spread(self, nodes: Sequence[NodePool]) -> None:
        """Has these judge too, from the next judging on."""
        self._nodes = tuple(nodes)

    def judge(self, requests: Arrivals[Request], judged: Callable[[int, Outcome], object]) -> None:
        """Judges groups of another machine's rank 0, as they arrive, and tells the scores of each, by its place."""
        self._of_groups(requests, lambda request: request, lambda place, scores: judged(place, (scores, "ok", "")))

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        """One score an answer, in order. WatchdogError when a call takes longer than rewards.timeout_seconds."""
        return self.score_as_they_arrive(Arrivals.of(answers))

    def score_as_they_arrive(self, answers: Arrivals[Answer]) -> list[Score]:
        """The same, of each group when it is complete where it judges group by group."""
        if not self.begins_early:
            woken = threading.Event()
            call = self._begin(list(answers.all().values()), woken)
            self._await(call, woken)
            return self._checked(call)
        groups = Groups(answers)
        found = self._of_groups(groups, lambda group: tuple(group.values()))
        scores = dict[int, Score]()
        for place, group in groups.taken.items():
            scores.update(zip(group, found[place], strict=True))
        return [scores[place] for place in sorted(scores)]

    def close(self) -> None:
        """Closes the user's reward, unless it is still at work; a second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._tasks.put(None)
        if self._call is None or self._call.is_done:
            called(self._name, OPTION, self._reward.close)

    def _of_groups(
        self,
        arrivals: Arriving[Item],
        group_of: Callable[[Item], Sequence[Answer]],
        told: Callable[[int, list[Score]], object] = lambda place, scores: None,
    ) -> dict[int, list[Score]]:
        """The scores of each group that arrives, by its place; `told` hears of those that were judged here."""
        woken = threading.Event()
        groups: dict[int, Sequence[Answer]] = {}
        found: dict[int, list[Score]] = {}
        waiting, here, call = deque[int](), -1, None  # the place of the group that is judged here, and its call
        for node in self._nodes:
            node.begin(woken.set, 2 * self._timeout)  # a call that was given up may have to end before
        with arrivals.telling(woken.set):
            while True:
                woken.clear()
                for node in self._nodes:
                    outcomes, lost = node.heard()
                    found |= {place: scores for place, (scores, _, _) in outcomes.items()}
                    waiting.extendleft(reversed(lost))
                if call is not None and call.is_done:
                    found[here] = self._checked(call)
                    told(here, found[here])
                    call = None
                new, are_all = arrivals.take_now()
                groups |= {place: group_of(item) for place, item in new.items()}
                waiting.extend(new)
                if call is None and waiting:
                    here = waiting.popleft()
                    call = self._begin(groups[here], woken)
                self._give(waiting, groups)
                if are_all and call is None and not any(node.judging for node in self._nodes):
                    return found
                late_at = [late for node in self._nodes if (late := node.late_at) is not None]
                self._wait(woken, call, late_at)

    def _give(self, waiting: deque[int], groups: Mapping[int, Sequence[Answer]]) -> None:
        """Gives other nodes what waits and they have room for, each to where least is under way."""
        dealt: list[dict[int, Request]] = [{} for _ in self._nodes]
        while waiting:
            loads = [
                (len(node.judging) + len(own), number)
                for number, (node, own) in enumerate(zip(self._nodes, dealt, strict=True))
                if len(own) < node.room
            ]
            if not loads:
                break
            place = waiting.popleft()
            dealt[min(loads)[1]][place] = tuple(groups[place])
        for node, requests in zip(self._nodes, dealt, strict=True):
            if requests:
                node.give(requests)

    def _begin(self, answers: Sequence[Answer], woken: threading.Event) -> _Call:
        """Calls the user's `score`, in its thread; one that was given up ends before."""
        if self._call is not None and not self._call.is_done:
            ended = threading.Event()
            self._call.told = ended.set
            self._await(self._call, ended)
        self._call = _Call(answers, time.monotonic() + self._timeout, woken.set)
        self._tasks.put(self._call)
        return self._call

    def _serve(self) -> None:
        while (call := self._tasks.get()) is not None:
            try:
                call.found = called(self._name, OPTION, partial(self._reward.score, call.answers))
            except SemionError as error:
                call.error = error
            except SystemExit as leaving:
                said = f"{OPTION} = {self._name!r} must not end its process; found {leaving!r}: raise an exception instead"
                call.error = NumericsError(said)
            call.is_done = True
            call.told()

    def _await(self, call: _Call, woken: threading.Event) -> None:
        """Waits for a call to end."""
        while not call.is_done:
            self._wait(woken, call)

    def _wait(self, woken: threading.Event, call: _Call | None, late_at: Sequence[float] = ()) -> None:
        """Waits for news, until one of `late_at` at the longest; WatchdogError where `call` is late."""
        first = min((*late_at, *([call.late_at] if call is not None else [])), default=None)
        woken.wait(None if first is None else max(0.0, first - time.monotonic()))
        if call is not None and not call.is_done and time.monotonic() >= call.late_at:
            raise WatchdogError(
                f"{OPTION} = {self._name!r} must score {len(call.answers)} answers within rewards.timeout_seconds = "
                f"{self._timeout:g}; found it still at work: raise it, or mend the reward"
            )

    def _checked(self, call: _Call) -> list[Score]:
        """What a call has found, with Python's own values."""
        found, count = call.found, len(call.answers)
        if call.error is not None:
            raise call.error
        if not isinstance(found, (list, tuple)):
            raise self._broken(count, _shown(found))
        if len(found) != count:
            raise self._broken(count, f"{len(found)} values")
        scores = []
        for each in found:
            try:
                scores.append(_plain(each))
            except ValueError as wrong:
                raise self._broken(count, f"{count} values, one of them {_shown(each)}, {wrong}") from None
        return scores

    def _broken(self, count: int, found: str) -> NumericsError:
        return NumericsError(
            f"{OPTION} = {self._name!r} must return one Score with a finite value for each of {count} answers, in order; "
            f"found {found}: mend its score"
        )


def _plain(found: object) -> Score:
    """What should be a Score, as one of Python's own values, which records and other nodes can hold; a user's may have those of
    another library. ValueError says what is wrong with it."""
    if not isinstance(found, Score):
        raise ValueError("which is no Score")
    value = _number(found.value)
    if value is None:
        raise ValueError("whose value must be finite")
    status = next((each for each in get_args(Status) if isinstance(found.status, str) and found.status == each), None)
    if status is None:
        raise ValueError(f"whose status must be one of {', '.join(map(repr, get_args(Status)))}")
    if not isinstance(found.parts, tuple):
        raise ValueError(PARTS)
    parts = tuple(map(_part, found.parts))
    if not isinstance(found.problem, str):
        raise ValueError("whose problem must be a str")
    return Score(value, status, parts, _truth(found.right), str.__str__(found.problem))


def _part(pair: object) -> tuple[str, float]:
    if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
        raise ValueError(PARTS)
    value = _number(pair[1])
    if value is None:
        raise ValueError(PARTS)
    return str.__str__(pair[0]), value


def _number(value: Any) -> float | None:
    """A finite number as Python's; None for anything else."""
    try:
        return float(value) if math.isfinite(value) else None
    except UNUSABLE:  # no number, a tensor of two, or a whole number beyond floats
        return None


def _truth(right: Any) -> bool | None:
    """True, False or None; a number that equals one of them is that."""
    if right is None:
        return None
    try:
        if right == True or right == False:  # noqa: E712  # what numpy and torch have of them is not the same object
            return bool(right)
    except UNUSABLE:  # a tensor of two is neither
        pass
    raise ValueError("whose right must be True, False or None")


def _shown(found: object) -> str:
    """A user's value in a message; some cannot be printed."""
    return SHORT.repr(found)
