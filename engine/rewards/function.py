"""A reward that the user wrote: a Python function that is called once a completion, or once a prompt, in a worker process of
its own. It is named in data.reward, as path/to/file.py:name or package.module:name, or in rewards.function by a source with
reward = 'function'.

    def name(problem: str, answer: str, completion: str) -> float

It is passed, by name, what its parameters ask for: `problem`, `answer`, `completion`, `row` (all columns of the row, frozen),
`num_tokens`, `finish_reason`; `**kwargs` takes them all. One that asks for `group` is called once a prompt and gets the
completions of a group as a tuple, `num_tokens` and `finish_reason` as tuples beside it, and returns a list of as many results.

A result is a finite number, or named ones ({"correct": 1.0, "format": 0.2}) whose sum, weighted with rewards.weights, is the
value. It must depend on the arguments only, since equal ones are judged once, unless `engine.rewards.base.reward` says
otherwise. An `async def` function is awaited for rewards.concurrency answers at once in one process. What it prints comes out
on stderr. It is loaded once a worker and called in a forked child, so a module of its own that starts threads or opens a GPU
while it is imported will not do.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

from engine.config.load import RunConfig
from engine.config.options import Rewards
from engine.core import registry
from engine.core.errors import ConfigError
from engine.core.types import Judging, Score
from engine.rewards.arrivals import Arrivals, Groups
from engine.rewards.base import Answer, Together
from engine.rewards.pool.workers import Outcome, Request, WorkerReward, check_environment, facts_of

BUILT_IN = "function"  # the name of a reward that rewards.function holds
MODULE = "engine.rewards.function_worker"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a worker says of what it has loaded."""

    is_class: bool  # then nothing else is known: it is loaded here
    asks: tuple[str, ...] = ()  # the parameters that are passed
    verifiable: bool = False
    deterministic: bool = True
    needs_answer: bool = False
    parts: tuple[str, ...] = ()  # that it declares to return


def facts(name: str, option: str, rewards: Rewards) -> Facts:
    """What is behind a user's name, looked at in a worker of its own, once a process and version of the file. ConfigError in
    one sentence when there is nothing that can judge."""
    return _facts(name, option, rewards.environment, registry.source_digest(name))


@lru_cache(maxsize=64)
def _facts(name: str, option: str, environment: tuple[str, ...], _: str | None) -> Facts:
    said = facts_of(MODULE, [option, name], environment)
    return Facts(**said | {name: tuple(said.get(name, ())) for name in ("asks", "parts")})


class FunctionReward(WorkerReward):
    """The user's function behind killable processes. A result of another form, or an exception, has the status `invalid` and
    counts as a failure; its traceback is the score's `problem`, and the first one of a worker stands on stderr."""

    OPTIONS = (*WorkerReward.OPTIONS, "function", "environment", "weights")
    MODULE = MODULE

    def __init__(self, config: Rewards, name: str | None = None, option: str = "rewards.function") -> None:
        """`name`: the function, that of rewards.function by default. Raises ConfigError when it is not named, or its file, name
        or signature is not as it must be."""
        named = _named(config, BUILT_IN if name is None else name)
        self.facts = facts(named, option, config)
        _require_function(self.facts, named, option)
        self.deterministic = self.facts.deterministic
        super().__init__(config, option, named, environment=config.environment)
        self.weights = config.weights or {}
        self.part_names = set(self.facts.parts)  # declared, or returned so far
        self.has_judged = False
        self.start()

    @classmethod
    def judging(cls, config: RunConfig, name: str) -> Judging:
        """As the function itself says."""
        found = facts(_named(config.rewards, name), _option(name), config.rewards)
        return Judging(found.verifiable, found.needs_answer, "row" in found.asks)

    @classmethod
    def judged_together(cls, config: RunConfig, name: str) -> Together:
        """A group where it asks for one."""
        found = facts(_named(config.rewards, name), _option(name), config.rewards)
        return "group" if "group" in found.asks else "answer"

    @classmethod
    def identity(cls, config: RunConfig, name: str) -> dict[str, str | None]:
        """The SHA-256 of its file, None where there is none; what that imports is not looked at."""
        option = _option(name)
        key = option if name == BUILT_IN else f"{option} {name}"
        return {key: registry.source_digest(_named(config.rewards, name))}

    @classmethod
    def check(cls, config: RunConfig, name: str) -> None:
        """Loads it once, in a worker."""
        check_function(_named(config.rewards, name), _option(name), config.rewards)

    @classmethod
    def open(cls, config: RunConfig, name: str, engines: Sequence[Any]) -> Self:
        """Starts its workers."""
        return cls(config.rewards, name, _option(name))

    def score_as_they_arrive(self, answers: Arrivals[Answer]) -> list[Score]:
        """One score an answer, in the order of places; a function that asks for `group` is called when a group is complete."""
        if "group" not in self.facts.asks:
            return super().score_as_they_arrive(answers)
        groups, scores = Groups(answers), dict[int, Score]()
        outcomes = self._outcomes(groups, self._group_request)
        for (_, group), outcome in zip(sorted(groups.taken.items()), outcomes, strict=True):
            given, status, problem = outcome
            each = given if status == "ok" else [given] * len(group)
            scores.update((place, self._score((value, status, problem))) for place, value in zip(group, each, strict=True))
        return [scores[place] for place in sorted(scores)]

    def _request(self, answer: Answer) -> Request:
        return tuple(_offered(answer, name) for name in self.facts.asks)

    def _group_request(self, group: Mapping[int, Answer]) -> Request:
        answers = list(group.values())
        each = {
            "group": tuple(answer.completion for answer in answers),
            "num_tokens": tuple(_offered(answer, "num_tokens") for answer in answers),
            "finish_reason": tuple(_offered(answer, "finish_reason") for answer in answers),
        }
        return tuple(each[name] if name in each else _offered(answers[0], name) for name in self.facts.asks)

    def _score(self, outcome: Outcome) -> Score:
        given, status, problem = outcome
        self.has_judged = self.has_judged or status == "ok"
        if not isinstance(given, dict):
            return Score(given, status, problem=problem)
        self.part_names.update(given)
        value = math.fsum(self.weights.get(name, 1.0) * part for name, part in given.items())
        if not math.isfinite(value):
            return Score(0.0, "invalid", problem=f"the weighted sum of its parts must be finite; found {value} of {given}")
        return Score(value, status, tuple(given.items()), problem=problem)


def _offered(answer: Answer, name: str) -> Hashable:
    prompt = answer.prompt
    offered = {
        "problem": prompt.problem,
        "answer": prompt.answer,
        "completion": answer.completion,
        "row": prompt.row,
        "num_tokens": answer.num_tokens,
        "finish_reason": answer.finish_reason,
        "parts": answer.parts,
    }
    return offered[name]


def _named(config: Rewards, name: str) -> str:
    """The place of the function that a source's reward means."""
    if name != BUILT_IN:
        return name
    if config.function is None:
        raise ConfigError("rewards.function is required by a reward 'function' and missing: name path/to/file.py:name")
    return config.function


def _option(name: str) -> str:
    return "rewards.function" if name == BUILT_IN else "data.reward"


def check_function(named: str, option: str, rewards: Rewards) -> None:
    """ConfigError when there is no function behind a name, or it asks for what it is not given there, or no file of code would
    say on resume that it is the same one."""
    registry.identity(named, option)
    check_environment(rewards.environment)
    _require_function(facts(named, option, rewards), named, option)


def _require_function(found: Facts, named: str, option: str) -> None:
    if found.is_class:
        raise ConfigError(f"{option} must name a function; found the class {named}: name it in data.reward")
    combines = option == "data.reward_combine"
    if "parts" in found.asks and not combines:
        raise ConfigError(f"{option}: `parts` is for a rule of data.reward_combine; found {named}: remove the parameter")
    if "group" in found.asks and combines:
        raise ConfigError(f"{option} combines the rewards of one completion; found {named} with `group`: remove the parameter")
