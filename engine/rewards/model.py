"""The reward of tasks that no verifier can judge: the raw number that a reward model gives to a conversation. The model runs
on engines elsewhere, seen through handles; this file deals groups of conversations to them and replaces a lost engine.

What an engine runs together changes the last bits of its numbers. So it is asked for one group in each call: the distinct
answers to one prompt, in the order of their places, as soon as the last of them is there. Scores follow from the group and
nothing else: not from when its answers came, what was asked before, or how many engines there are. Groups go to engines in
turn, by their numbers in the step.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Protocol, Self

from engine.config.load import RunConfig
from engine.core.errors import EngineLostError, InferenceError
from engine.core.types import Message, Score
from engine.rewards.arrivals import Arrivals, Groups
from engine.rewards.base import Answer, Reward, Together

log = logging.getLogger(__name__)

FETCH_SECONDS = 30.0  # to have here what is known to be there

# What decides the last bits of a score beside the model. 1: a step's distinct conversations were dealt over the engines. 2: one
# call for each group. Checkpoints before 2 say nothing of it.
ASKED, HOW_ASKED = "how the reward model is asked", "2"
READ = "the files that say how the reward model reads"  # the name of their digest; earlier checkpoints have none
SAYING = {".json", ".jinja", ".model", ".txt"}  # what such files end with: the template, the tokenizer, the configuration

Conversation = tuple[str | tuple[Message, ...], str]  # the user's message, or turns up to it, and the answer


class Future(Protocol):
    """A call under way in the engine's process."""

    def result(self, timeout_seconds: float) -> Any:
        """Its value; the error it raised; TimeoutError after `timeout_seconds`; EngineLostError when the engine is gone."""
        ...

    def on_done(self, told: Callable[[], object]) -> None:
        """Has `told` called, in any thread, once there is a result."""
        ...


class ScoringEngine(Protocol):
    """A reward engine. Calls run one after another in the order they were made."""

    name: str  # as errors call it

    def call(self, method: str, *arguments: Any) -> Future:
        """Starts a method of RewardEngine and returns at once."""
        ...

    def restart(self) -> None:
        """Ends the engine, if it is still there, and starts it anew; returns at once."""
        ...


@dataclass(slots=True, eq=False)
class _Asked:
    """A group that is to be judged, and the call of an engine that is asked for it."""

    group: Mapping[int, Answer]  # by places
    conversations: tuple[Conversation, ...]  # the distinct ones
    engine: _Engine
    call: _Call
    num_lost: int = 0  # engines that were lost while they judged it


@dataclass(slots=True, eq=False)
class _Call:
    future: Future
    is_done: bool = False


@dataclass(slots=True, eq=False)
class _Engine:
    """An engine, and what is known of it. `starting`: under way where it is started anew."""

    handle: ScoringEngine
    starting: _Call | None = None
    is_fresh: bool = False  # started anew, and has judged nothing since
    is_seen: bool = False  # has answered something since this judging began, or since it was started anew
    is_out: bool = False  # lost again before it answered anything: it is asked nothing more


class ModelReward(Reward):
    """A reward model. The user's message is the problem as its file gives it, without the policy's template, or all turns of a
    conversation.

    Waits until the engines are up. An engine that is lost is noticed at once and started anew; what it owes is asked of the
    others, or where none is up of one that starts. EngineLostError, without a wait, when none is left, or two were lost over
    one group; InferenceError names one that is late.
    """

    uses_engine = True
    begins_early = True
    per_group = True
    OPTIONS = ("reward_model", "max_tokens")

    def __init__(self, engines: Sequence[ScoringEngine], timeout_seconds: float) -> None:
        self._engines, self._timeout = tuple(map(_Engine, engines)), timeout_seconds
        self._woken = Event()
        late_at = time.monotonic() + timeout_seconds
        starting = [(engine, engine.handle.call("describe")) for engine in self._engines]
        for engine, future in starting:
            try:
                future.result(max(0.0, late_at - time.monotonic()))
            except TimeoutError as error:
                raise self._late(engine, "describe") from error

    @classmethod
    def judged_together(cls, config: RunConfig, name: str) -> Together:
        """A group."""
        return "group"

    @classmethod
    def identity(cls, config: RunConfig, name: str) -> dict[str, str | None]:
        """How it is asked and how it reads; and of the names and sizes of its files: to read its weights would take minutes at
        every checkpoint."""
        if config.reward_model.path is None:
            return {}
        if not Path(config.reward_model.path).is_dir():
            return {"reward_model.path": None, ASKED: HOW_ASKED}
        files = sorted(Path(config.reward_model.path).iterdir())
        sizes = [(file.name, file.stat().st_size) for file in files]
        saying = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files if file.suffix in SAYING]
        digests = [hashlib.sha256(repr(found).encode()).hexdigest() for found in (sizes, saying)]
        return {"reward_model.path": digests[0], READ: digests[1], ASKED: HOW_ASKED}

    @classmethod
    def check(cls, config: RunConfig, name: str) -> None:
        """Reads what its folder says of itself."""
        from engine.data.conversations import Conversations

        Conversations(config.reward_model)

    @classmethod
    def open(cls, config: RunConfig, name: str, engines: Sequence[Any]) -> Self:
        """Waits for the engines, which somebody else has started."""
        assert engines
        return cls(engines, config.reward_model.timeout_seconds)

    def close(self) -> None:
        """Nothing to give back: who placed the engines ends them."""

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        """One score an answer, in order; statuses are those of RewardEngine.score."""
        return self.score_as_they_arrive(Arrivals.of(answers))

    def score_as_they_arrive(self, answers: Arrivals[Answer]) -> list[Score]:
        """The same, each group when it is complete. Once all are there, engines have reward_model.timeout_seconds for what is
        left, and as much again where one of them is lost then."""
        groups, asked, scores = Groups(answers), list[_Asked](), dict[int, Score]()
        late_at, may_wait_again = None, True
        for engine in self._engines:
            engine.is_seen = False
        with groups.telling(self._woken.set):
            while True:
                self._woken.clear()
                for engine in self._engines:
                    self._note_start(engine)
                new, are_all = groups.take_now()
                for group in new.values():
                    conversations = tuple(dict.fromkeys(map(_conversation, group.values())))
                    engine = self._engine_for(next(iter(group.values())).group)
                    asked.append(_Asked(group, conversations, engine, self._call(engine, "score", conversations)))
                if are_all and late_at is None:
                    late_at = time.monotonic() + self._timeout
                if self._collect(asked, scores):
                    if late_at is not None and may_wait_again:
                        late_at, may_wait_again = time.monotonic() + self._timeout, False
                    continue  # what was asked again may be there
                if are_all and not asked:
                    return [scores[place] for place in sorted(scores)]
                self._woken.wait(None if late_at is None else max(0.0, late_at - time.monotonic()))
                if late_at is not None and time.monotonic() >= late_at and not any(one.call.is_done for one in asked):
                    raise self._late(asked[0].engine, "score")

    def _call(self, engine: _Engine, method: str, *arguments: Any) -> _Call:
        call = _Call(engine.handle.call(method, *arguments))

        def done() -> None:
            call.is_done = True
            self._woken.set()

        call.future.on_done(done)
        return call

    def _engine_for(self, number: int) -> _Engine:
        """Who is asked for the group of that number in the step: its own engine, or where that is not up one of those that are,
        or at least start."""
        own = self._engines[number % len(self._engines)]
        left = [engine for engine in self._engines if not engine.is_out]
        usable = [engine for engine in left if engine.starting is None] or left
        return own if own in usable else usable[number % len(usable)]

    def _collect(self, asked: list[_Asked], scores: dict[int, Score]) -> bool:
        """Moves what has been judged from `asked`, which is in the order of calls, to `scores`, by places. Whether an engine
        was lost, and others were asked."""
        lost: dict[_Engine, EngineLostError] = {}
        for one in [one for one in asked if one.call.is_done]:
            try:
                found = one.call.future.result(FETCH_SECONDS)
            except EngineLostError as error:
                lost.setdefault(one.engine, error)
                continue
            except TimeoutError as error:
                raise self._late(one.engine, "score") from error
            asked.remove(one)
            one.engine.is_fresh, one.engine.is_seen = False, True
            judged = dict(zip(one.conversations, found, strict=True))
            scores.update({place: judged[_conversation(answer)] for place, answer in one.group.items()})
        for engine, loss in lost.items():
            owed = [one for one in asked if one.engine is engine]
            self._replace(engine, loss, owed)
            asked[:] = [one for one in asked if one not in owed] + owed  # in the order of calls again
        return bool(lost)

    def _replace(self, engine: _Engine, error: EngineLostError, owed: Sequence[_Asked]) -> None:
        """Starts a lost engine anew and has others asked for the groups that it `owed`, in the order of its calls: it was
        judging the first one, unless it was gone before. One that has answered nothing in this judging may have been."""
        owed[0].num_lost += engine.is_seen
        engine.is_seen = False
        what = f"{error}; it was asked for {sum(len(one.group) for one in owed)} answers to {len(owed)} prompts"
        if owed[0].num_lost > 1:
            raise type(error)(f"{what}, and is the second that was lost over one of them: look at its log")
        self._start_anew(engine, error)
        if all(each.is_out for each in self._engines):
            raise type(error)(f"{what}, and no reward engine is left: look at its log")
        for one in owed:
            one.engine = self._engine_for(next(iter(one.group.values())).group)
            one.call = self._call(one.engine, "score", one.conversations)
        then = "it is asked nothing more until the run is started again" if engine.is_out else "starting it anew"
        log.warning("%s: %s; asked for these now: %s", what, then, ", ".join(sorted({one.engine.handle.name for one in owed})))

    def _start_anew(self, engine: _Engine, error: EngineLostError) -> None:
        """Starts a lost engine, unless it was started before and has answered nothing since."""
        if engine.is_fresh:
            engine.is_out, engine.starting = True, None
            return
        engine.handle.restart()
        engine.is_fresh = True
        engine.starting = self._call(engine, "describe")

    def _note_start(self, engine: _Engine) -> None:
        """Looks whether an engine that was started anew is up, or cannot be."""
        if engine.starting is None or not engine.starting.is_done:
            return
        call, engine.starting = engine.starting, None
        try:
            call.future.result(FETCH_SECONDS)
            engine.is_seen = True
        except TimeoutError as error:
            raise self._late(engine, "describe") from error
        except EngineLostError as error:
            engine.is_out = True
            if all(each.is_out for each in self._engines):
                raise
            log.warning("%s: it is asked nothing more until the run is started again", error)

    def _late(self, engine: _Engine, method: str) -> InferenceError:
        return InferenceError(
            f"{engine.handle.name} did not answer {method!r} within reward_model.timeout_seconds = {self._timeout}: raise it, "
            f"or look at the engine's log"
        )


def _conversation(answer: Answer) -> Conversation:
    return answer.prompt.messages or answer.prompt.problem, answer.completion
