"""What the loop asks of a reward: one verb over a list of answers, and what must be known of it before. How a reward judges (a
verifier in worker processes, a reward model on an engine) is the business of its own file. A user's own file may import this
one, also in a judging process, so it imports nothing heavy.

A reward is one file in this folder, or a folder with a `reward.py`, that holds one class which extends `Reward`. A user's own,
named `path/to/file.py:Name` or `package.module:Name`, is such a class or a plain function (function.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Self, TypeVar

if TYPE_CHECKING:
    from engine.config.load import RunConfig
    from engine.core.types import Completion, Judging, Prompt, Score
    from engine.rewards.arrivals import Arrivals

Function = TypeVar("Function", bound=Callable[..., object])
Together = Literal["answer", "group", "step"]  # from what waits least to what waits longest


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion to judge, with what a reward may look at."""

    prompt: Prompt
    completion: str  # its text
    num_tokens: int | None = None  # of the completion, the end token included; None where nobody counted
    finish_reason: Literal["stop", "length"] | None = None
    group: int = 0  # answers to one prompt that have one number are judged together by who judges groups
    group_size: int | None = None  # how many these are; None where nobody counted
    parts: tuple[tuple[str, float], ...] = ()  # for a combining rule: what each reward gave

    @property
    def row(self) -> FrozenDict:
        """All columns of the prompt's row, frozen; empty where its reward has not asked for it (`wants_row`)."""
        return frozen_row(self.prompt.row)


def answer_of(prompt: Prompt, completion: Completion, group: int, group_size: int | None = None) -> Answer:
    """What is to judge of a completion that was sampled as one of a group."""
    return Answer(prompt, completion.text, len(completion.token_ids), completion.finish_reason, group, group_size)


class Reward:
    """Judges completions; may hold processes or devices until closed. The class attributes and class methods say what must be
    known before anything is started; `name` is how data.reward names it."""

    verifiable: ClassVar[bool] = False  # whether a value above 0 means right, any other wrong; else values are degrees
    needs_answer: ClassVar[bool] = False  # whether a row without an answer is an error
    wants_row: ClassVar[bool] = False  # whether it looks at further columns of the row, which are kept in memory then
    uses_engine: ClassVar[bool] = False  # whether it judges on the reward model's engine
    # Whether it judges each answer, or each group of answers to a prompt, by itself, and as soon as that is there: every score
    # is the same whenever that was. False where it gets a step's answers together, in their order. True only where
    # `score_as_they_arrive` is its own.
    begins_early: ClassVar[bool] = False
    # Whether an answer's score depends on no answer but those of its own group, to the bit, so that groups may be judged apart.
    # A user's class says it itself, for what it inherits was said of another `score`; it is then asked for one group in each
    # call, and on several nodes opened on each.
    per_group: ClassVar[bool] = False
    OPTIONS: ClassVar[tuple[str, ...]] = ()  # the options of [rewards], or [reward_model], that it looks at

    @classmethod
    def judged_together(cls, config: RunConfig, name: str) -> Together:
        """What it judges together, and so waits for."""
        return "answer" if cls.begins_early else "step"

    @classmethod
    def judging(cls, config: RunConfig, name: str) -> Judging:
        """What who loads prompts must know. ConfigError when the reward cannot be loaded."""
        from engine.core.types import Judging

        return Judging(cls.verifiable, cls.needs_answer, cls.wants_row)

    @classmethod
    def identity(cls, config: RunConfig, name: str) -> dict[str, str | None]:
        """What a checkpoint and an evaluation record of it, by what a message calls it: another value is another reward. Of a
        user's own it is always the SHA-256 of its file, which is not run to say so."""
        return {}

    @classmethod
    def check(cls, config: RunConfig, name: str) -> None:
        """ConfigError when it could not judge; asked before any process starts."""

    @classmethod
    def open(cls, config: RunConfig, name: str, engines: Sequence[Any]) -> Self:
        """Starts it. `engines`: the reward model's (each a model.ScoringEngine), none where no source is judged by it, or the
        reward judges on every node."""
        return cls()

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        """One score an answer, in the order given. An answer that cannot be judged is a score with a status, never an
        exception."""
        raise NotImplementedError

    def score_as_they_arrive(self, answers: Arrivals[Answer]) -> list[Score]:
        """The same of answers that still arrive, in the order of their places, once all are judged. CancelledError where the
        rest is abandoned."""
        return self.score(list(answers.all().values()))

    def close(self) -> None:
        """Gives back all processes and devices; a second call does nothing."""


def reward(
    *,
    verifiable: bool = False,
    deterministic: bool = True,
    needs_answer: bool = False,
    parts: Sequence[str] = (),
) -> Callable[[Function], Function]:
    """Says of a user's function what its signature cannot. `verifiable`: above 0 is right, any other value wrong, so that
    accuracy and pairs of right and wrong exist. `deterministic`: False where equal answers may get different values, and are
    judged one by one. `needs_answer`: a row without an answer is an error. `parts`: all names that a result may have, where
    rewards.weights names some that only some rows have."""

    def marked(function: Function) -> Function:
        function.__dict__.update(verifiable=verifiable, deterministic=deterministic, needs_answer=needs_answer, parts=parts)
        return function

    return marked


class FrozenDict(dict[str, Any]):
    """A mapping of JSON that cannot be changed: another answer of the same row sees it too."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("a row is frozen: copy it with dict(row) to change it")

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _refuse  # type: ignore[assignment]


@lru_cache(maxsize=64)  # the rollouts of one prompt come together
def frozen_row(row: str) -> FrozenDict:
    """The columns of a row that is kept as JSON; lists in it are tuples."""
    found: FrozenDict = _frozen(json.loads(row) if row else {})
    return found


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return FrozenDict((key, _frozen(inner)) for key, inner in value.items())
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
