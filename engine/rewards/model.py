"""The reward of tasks that no verifier can judge: the raw number that a reward model gives to a conversation. The model runs
on engines elsewhere, seen through handles; this file deals conversations to them, equal ones once, and replaces a lost engine.

The first distinct conversation of a call goes to the first engine, the second to the next, and so on around. What an engine
runs together changes the last bits of its numbers, so they follow from the call and the number of engines, and nothing else.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from engine.config.load import RunConfig
from engine.core.errors import EngineLostError, InferenceError
from engine.core.types import Message, Score
from engine.rewards.base import Answer, Reward

log = logging.getLogger(__name__)
Conversation = tuple[str | tuple[Message, ...], str]  # the user's message, or turns up to it, and the answer


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
    OPTIONS = ("reward_model", "max_tokens")

    def __init__(self, engines: Sequence[ScoringEngine], timeout_seconds: float) -> None:
        self._engines, self._timeout = tuple(engines), timeout_seconds
        late_at = time.monotonic() + timeout_seconds
        starting = [engine.call("describe") for engine in self._engines]
        for number, future in enumerate(starting):
            self._answer(number, "describe", future, late_at)

    @classmethod
    def identity(cls, config: RunConfig, name: str) -> dict[str, str | None]:
        """Of the names and sizes of its files: reading them would take minutes at every checkpoint."""
        if config.reward_model.path is None:
            return {}
        if not Path(config.reward_model.path).is_dir():
            return {"reward_model.path": None}
        files = sorted((file.name, file.stat().st_size) for file in Path(config.reward_model.path).iterdir())
        return {"reward_model.path": hashlib.sha256(repr(files).encode()).hexdigest()}

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
        if not answers:
            return []
        conversations = [(answer.prompt.messages or answer.prompt.problem, answer.completion) for answer in answers]
        distinct = list(dict.fromkeys(conversations))
        parts = {number: distinct[number :: len(self._engines)] for number in range(min(len(self._engines), len(distinct)))}
        judged: dict[Conversation, Score] = {}
        lost = self._ask(parts, judged)
        for number, error in lost.items():
            log.warning("%s: starting it anew", error)
            self._engines[number].restart()
        for error in self._ask({number: parts[number] for number in lost}, judged).values():
            raise error
        return [judged[conversation] for conversation in conversations]

    def _ask(self, parts: Mapping[int, list[Conversation]], judged: dict[Conversation, Score]) -> dict[int, EngineLostError]:
        """Asks engines, by their numbers, at once, and adds what they say; those that were lost."""
        late_at = time.monotonic() + self._timeout
        asked = {number: self._engines[number].call("score", part) for number, part in parts.items()}
        lost: dict[int, EngineLostError] = {}
        for number, future in asked.items():
            try:
                judged.update(zip(parts[number], self._answer(number, "score", future, late_at), strict=True))
            except EngineLostError as error:
                lost[number] = error
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
