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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from engine.config.load import RunConfig
from engine.core.errors import EngineLostError, InferenceError
from engine.core.types import Message, Score
from engine.rewards.arrivals import Arrivals, Groups
from engine.rewards.base import Answer, Reward, Together

log = logging.getLogger(__name__)

# What decides the last bits of a score beside the model. 1: a step's distinct conversations were dealt over the engines. 2: one
# call for each group. Checkpoints before 2 say nothing of it.
ASKED, HOW_ASKED = "how the reward model is asked", "2"

Conversation = tuple[str | tuple[Message, ...], str]  # the user's message, or turns up to it, and the answer


@dataclass(frozen=True, slots=True)
class _Asked:
    """A group that an engine was asked for."""

    group: Mapping[int, Answer]  # by places
    conversations: tuple[Conversation, ...]  # the distinct ones
    engine: int
    future: Future


class Future(Protocol):
    """A call under way in the engine's process."""

    def result(self, timeout_seconds: float) -> Any:
        """Its value; the error it raised; TimeoutError after `timeout_seconds`; EngineLostError when the engine is gone."""
        ...


class ScoringEngine(Protocol):
    """A reward engine. Calls run one after another in the order they were made."""

    def call(self, method: str, *arguments: Any) -> Future:
        """Starts a method of RewardEngine and returns at once."""
        ...

    def restart(self) -> None:
        """Ends the engine, if it is still there, and starts it anew; returns at once."""
        ...


class ModelReward(Reward):
    """A reward model. The user's message is the problem as its file gives it, without the policy's template, or all turns of a
    conversation.

    Waits until the engines are up. InferenceError names one that is late or that was lost twice over one question.
    """

    uses_engine = True
    begins_early = True
    per_group = True
    OPTIONS = ("reward_model", "max_tokens")

    def __init__(self, engines: Sequence[ScoringEngine], timeout_seconds: float) -> None:
        self._engines, self._timeout = tuple(engines), timeout_seconds
        late_at = time.monotonic() + timeout_seconds
        starting = [engine.call("describe") for engine in self._engines]
        for number, future in enumerate(starting):
            self._answer(number, "describe", future, late_at)

    @classmethod
    def judged_together(cls, config: RunConfig, name: str) -> Together:
        """A group."""
        return "group"

    @classmethod
    def identity(cls, config: RunConfig, name: str) -> dict[str, str | None]:
        """How it is asked; and of the names and sizes of its files: reading them would take minutes at every checkpoint."""
        if config.reward_model.path is None:
            return {}
        if not Path(config.reward_model.path).is_dir():
            return {"reward_model.path": None, ASKED: HOW_ASKED}
        files = sorted((file.name, file.stat().st_size) for file in Path(config.reward_model.path).iterdir())
        return {"reward_model.path": hashlib.sha256(repr(files).encode()).hexdigest(), ASKED: HOW_ASKED}

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
        left. A lost one is then started anew, and asked again for what it owes."""
        groups, asked = Groups(answers), list[_Asked]()
        while (new := groups.take()) is not None:
            for group in new.values():
                number = next(iter(group.values())).group
                conversations = tuple(dict.fromkeys(map(_conversation, group.values())))
                asked.append(self._ask(group, conversations, number % len(self._engines)))
        scores: dict[int, Score] = {}
        lost = self._collect(asked, scores)
        for engine, error in lost.items():
            log.warning("%s: starting it anew", error)
            self._engines[engine].restart()
        owed = [one for one in asked if not one.group.keys() <= scores.keys()]
        again = [self._ask(one.group, one.conversations, one.engine) for one in owed]
        for error in self._collect(again, scores).values():
            raise error
        return [scores[place] for place in sorted(scores)]

    def _ask(self, group: Mapping[int, Answer], conversations: tuple[Conversation, ...], engine: int) -> _Asked:
        return _Asked(group, conversations, engine, self._engines[engine].call("score", conversations))

    def _collect(self, asked: Sequence[_Asked], scores: dict[int, Score]) -> dict[int, EngineLostError]:
        """Waits for what was asked and adds it to `scores`, by places; the engines that were lost."""
        late_at = time.monotonic() + self._timeout
        lost: dict[int, EngineLostError] = {}
        for one in asked:
            try:
                found = self._answer(one.engine, "score", one.future, late_at)
            except EngineLostError as error:
                lost[one.engine] = error
                continue
            judged = dict(zip(one.conversations, found, strict=True))
            for place, answer in one.group.items():
                scores[place] = judged[_conversation(answer)]
        return lost

    def _answer(self, number: int, method: str, future: Future, late_at: float) -> Any:
        try:
            return future.result(max(0.0, late_at - time.monotonic()))
        except TimeoutError as error:
            name = "the reward engine" if len(self._engines) == 1 else f"reward engine {number}"
            raise InferenceError(
                f"{name} did not answer {method!r} within reward_model.timeout_seconds = {self._timeout}: raise it, "
                f"or look at the engine's log"
            ) from error


def _conversation(answer: Answer) -> Conversation:
    return answer.prompt.messages or answer.prompt.problem, answer.completion
