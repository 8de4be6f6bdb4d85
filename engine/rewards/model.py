"""The reward of tasks that no verifier can judge: the raw number that a reward model gives to a conversation. The model runs
on an engine elsewhere, seen through a handle; this file asks it, once for equal conversations, and replaces it when lost.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from engine.config.load import RunConfig
from engine.core.errors import EngineLostError, InferenceError
from engine.core.types import Score
from engine.rewards.base import Answer, Reward

log = logging.getLogger(__name__)


class Future(Protocol):
    """A call under way in the engine's process."""

    def result(self, timeout_seconds: float) -> Any:
        """Its value; the error it raised; TimeoutError after `timeout_seconds`; EngineLostError when the engine is gone."""
        ...


class ScoringEngine(Protocol):
    """The reward engine. Calls run one after another in the order they were made."""

    def call(self, method: str, *arguments: Any) -> Future:
        """Starts a method of RewardEngine and returns at once."""
        ...

    def restart(self) -> None:
        """Ends the engine, if it is still there, and starts it anew; returns at once."""
        ...


class ModelReward(Reward):
    """A reward model. The user's message is the problem as its file gives it, without the policy's template, or all turns of a
    conversation.

    Waits until the engine is up. InferenceError names an engine that is late or that was lost twice over one question.
    """

    uses_engine = True
    OPTIONS = ("reward_model", "max_tokens")

    def __init__(self, engine: ScoringEngine, timeout_seconds: float) -> None:
        self._engine, self._timeout = engine, timeout_seconds
        self._ask("describe")

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
    def open(cls, config: RunConfig, name: str, engine: Any) -> Self:
        """Waits for the engine, which somebody else has started."""
        assert engine is not None
        return cls(engine, config.reward_model.timeout_seconds)

    def close(self) -> None:
        """Nothing to give back: who placed the engine ends it."""

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        """One score an answer, in order; statuses are those of RewardEngine.score."""
        if not answers:
            return []
        conversations = [(answer.prompt.messages or answer.prompt.problem, answer.completion) for answer in answers]
        distinct = list(dict.fromkeys(conversations))
        try:
            scores = self._ask("score", distinct)
        except EngineLostError as error:
            log.warning("%s: starting it anew", error)
            self._engine.restart()
            scores = self._ask("score", distinct)
        judged = dict(zip(distinct, scores, strict=True))
        return [judged[conversation] for conversation in conversations]

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return self._engine.call(method, *arguments).result(self._timeout)
        except TimeoutError as error:
            raise InferenceError(
                f"the reward engine did not answer {method!r} within reward_model.timeout_seconds = {self._timeout}: raise it, "
                f"or look at the engine's log"
            ) from error
