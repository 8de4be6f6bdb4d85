"""The reward of verifiable problems: 1 where the completion's answer equals the gold one, else 0. It says what a worker is
asked; the verdict is engine/rewards/math/worker.py's, and cases.jsonl beside it is the table of what it must be.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Self

from engine.config.load import RunConfig
from engine.config.options import Rewards
from engine.rewards.base import Answer
from engine.rewards.math.answers import after_reasoning, asks_for_value
from engine.rewards.pool.workers import Request, WorkerReward

# What a verdict means. 1: Math-Verify as it comes, behind killable processes. 2: with checks of the answer's text and the
# objections of exact.py. 3: both sides in one way of writing, so that a gold answer equals itself; numbers, quantities, choices
# and intervals compared as such (compare.py); what the parser drops is an objection, an unsolved equation is no value. 4:
# distances, left-out points, fractions of units, quantifiers, digits in groups of two; sums and binomials by exact values.
# 5: units converted (units.py). Congruences, ratios, vectors, constants of integration, words and letters in lists, named
# values (notation.py); exact numbers by their digits.
# Every case of cases.jsonl says since which version it holds.
VERIFIER_VERSION = "5"

PACKAGES = ("math-verify", "sympy")  # whose versions may change a verdict

MAX_CHARACTERS = 4000  # of an answer, its end


def versions() -> dict[str, str]:
    """What a verdict depends on: the verifier, and the packages that it asks."""
    return {"verifier": VERIFIER_VERSION} | {name: version(name) for name in PACKAGES}


class MathReward(WorkerReward):
    """Math-Verify with its known holes closed, behind killable processes. Gold answers are parsed as LaTeX, wrapped in a
    box where they carry no delimiters; of a completion, what follows the last reasoning block, and of that the last
    `MAX_CHARACTERS` characters.

    Beside the pool's statuses: `unparsable` when the gold answer cannot be read; its value is 0. A lack of memory that
    Math-Verify itself notices reads as an answer it cannot parse: value 0, `ok`.
    """

    verifiable = True
    needs_answer = True
    OPTIONS = (*WorkerReward.OPTIONS, "unevaluated")
    MODULE = "engine.rewards.math.worker"
    CLOCK = "cpu"

    def __init__(self, config: Rewards) -> None:
        super().__init__(config)
        self._refuses = config.unevaluated == "refuse"

    @classmethod
    def identity(cls, config: RunConfig, name: str) -> dict[str, str | None]:
        """What its verdicts mean."""
        return {"the version of the verifier": VERIFIER_VERSION}

    @classmethod
    def open(cls, config: RunConfig, name: str, engines: Sequence[Any]) -> Self:
        """Starts its workers; they are waited for when something is to be judged."""
        return cls(config.rewards)

    def _request(self, answer: Answer) -> Request:
        prompt = answer.prompt
        wants_value = self._refuses and asks_for_value(prompt.problem)
        return prompt.answer[-MAX_CHARACTERS:], after_reasoning(answer.completion)[-MAX_CHARACTERS:], wants_value
