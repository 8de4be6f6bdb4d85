"""The rewards of a run: which class is behind a name, what must be known of them before anything starts, and several in one run
or on one prompt. Each prompt's completions go to the rewards that its source names. It judges nothing itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from engine.config.load import RunConfig
from engine.config.options import Source
from engine.config.rewards import REWARDS, RULES, label
from engine.core import registry
from engine.core.errors import ConfigError
from engine.core.types import Judging, Score
from engine.rewards import function
from engine.rewards.base import Answer, Reward
from engine.rewards.function import FunctionReward

COMBINE = "data.reward_combine"
log = logging.getLogger(__name__)


def reward_class(config: RunConfig, name: str) -> type[Reward]:
    """The class behind a name of data.reward: one of ours, a user's own, or what calls a user's function. ConfigError when
    there is none."""
    if ":" in name and not function.facts(name, "data.reward", config.rewards).is_class:
        return FunctionReward
    return REWARDS.load(name)


def judging_of(config: RunConfig, source: Source) -> Judging:
    """What who loads a source's prompts must know of its rewards: whether the first one says right or wrong, and whether any of
    them looks at the answer or the row."""
    found = [reward_class(config, name).judging(config, name) for name in source.rewards]
    rule = source.reward_combine
    asks = function.facts(rule, COMBINE, config.rewards).asks if rule not in RULES else ()
    return Judging(
        verifiable=found[0].verifiable,
        needs_answer=any(judging.needs_answer for judging in found),
        wants_row=any(judging.wants_row for judging in found) or "row" in asks,
    )


def identities(config: RunConfig, sources: Iterable[Source] | None = None) -> dict[str, str | None]:
    """What a checkpoint and an evaluation record of the rewards of the run's sources, or of `sources`: by what a message calls
    it, the version, the SHA-256 of the code, or the names and sizes of files. Nothing of the user's is run."""
    found: dict[str, str | None] = {}
    for source in config.data.sources if sources is None else sources:
        for name in source.rewards:
            # A user's function is not loaded for this: its file says who it is, as a class's does
            found |= (FunctionReward if ":" in name else REWARDS.load(name)).identity(config, name)
        if source.reward_combine not in RULES:
            found |= {f"{COMBINE} {source.reward_combine}": registry.source_digest(source.reward_combine)}
    return found


def uses_engine(sources: Iterable[Source]) -> bool:
    """Whether one of the sources is judged on the reward model's engine, which a user's own never is."""
    names = {name for source in sources for name in source.rewards if ":" not in name}
    return any(REWARDS.load(name).uses_engine for name in names)


def check_pairing(config: RunConfig) -> None:
    """ConfigError where the algorithm pairs right with wrong answers and no source's reward says which is which."""
    verifiable = [judging_of(config, source).verifiable for source in config.data.sources]
    pairing = getattr(config.algorithm, "pairing", "random")  # an option of the losses that have it
    if pairing != "random" and ":" not in pairing and not any(verifiable):
        raise ConfigError(
            f"algorithm.pairing is for sources whose (first) reward says right or wrong, such as 'math'; the others pair the "
            f"highest reward with the lowest; found {pairing!r} and no such source: leave it at 'random'"
        )


def checks(config: RunConfig, sources: Iterable[Source] | None = None) -> Iterator[Callable[[], None]]:
    """What is to be looked at before the rewards of the run's sources, or of `sources`, judge: each raises ConfigError for one
    that could not. Nothing of the run is started."""
    seen = set()
    for source in config.data.sources if sources is None else sources:
        for name in source.rewards:
            if name not in seen:
                yield partial(_check, config, name)
            seen.add(name)
        rule = source.reward_combine
        if rule not in RULES and rule not in seen:
            yield partial(function.check_function, rule, COMBINE, config.rewards)
            seen.add(rule)


def _check(config: RunConfig, name: str) -> None:
    reward_class(config, name).check(config, name)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How several rewards of one answer become one."""

    names: tuple[str, ...]
    weights: tuple[float, ...]  # one a name
    rule: str  # "sum", "product", "min", or a user's function as data.reward_combine names it
    verifiable: bool  # whether the first one says right or wrong

    @classmethod
    def of(cls, config: RunConfig, source: Source) -> Recipe:
        """That of a source."""
        weights = source.reward_weights or (1.0,) * len(source.rewards)
        return cls(source.rewards, weights, source.reward_combine, judging_of(config, source).verifiable)

    def combined(self, scores: Sequence[Score]) -> Score:
        """The one score: not `ok` where one of them is not. Each reward's own value is a part, and its own parts below it. A
        user's rule has the last word on the value (RoutedReward)."""
        parts: list[tuple[str, float]] = []
        for name, score in zip(self.names, scores, strict=True):
            parts.append((label(name), score.value))
            parts += [(f"{label(name)}/{part}", value) for part, value in score.parts]
        failed = next((score for score in scores if score.status != "ok"), None)
        if failed is not None:
            return Score(0.0, failed.status, problem=failed.problem)
        values = [weight * score.value for weight, score in zip(self.weights, scores, strict=True)]
        value = _combine(self.rule, values)
        right = scores[0].correct if self.verifiable else None
        if not math.isfinite(value):
            return Score(0.0, "invalid", problem=f"the combined reward must be finite; found {value} of {dict(parts)}")
        return Score(value, "ok", tuple(parts), right)


def _combine(rule: str, values: Sequence[float]) -> float:
    if rule == "product":
        return math.prod(values)
    return min(values) if rule == "min" else math.fsum(values)  # a user's rule goes on from the parts


class RoutedReward(Reward):
    """Rewards by name, and how those of one prompt are put together; owns and closes them."""

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        recipes: Mapping[str, Recipe] | None = None,
        rules: Mapping[str, Reward] | None = None,
    ) -> None:
        """`recipes`: by what Prompt.reward says; what is none of them is the name of a reward. `rules`: users' combining rules
        by their names."""
        self._rewards = dict(rewards)
        self._recipes = dict(recipes or {})
        self._rules = dict(rules or {})
        self.problems: dict[str, str] = {}  # the first traceback of each reward whose answer was invalid

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        """One score an answer, in order, from the rewards that its prompt names."""
        places: dict[str, list[int]] = {}
        for place, answer in enumerate(answers):
            for name in self._names(answer):
                places.setdefault(name, []).append(place)
        found: dict[tuple[int, str], Score] = {}
        for name, where in places.items():
            scores = self._judged(name, self._rewards[name], [answers[place] for place in where])
            found.update(zip(((place, name) for place in where), scores, strict=True))
        results = [
            self._combined(answer, [found[place, name] for name in self._names(answer)]) for place, answer in enumerate(answers)
        ]
        self._apply_rules(answers, results)
        return results

    def close(self) -> None:
        """Closes every reward, also when one of them fails to close."""
        with ExitStack() as stack:
            for reward in (*self._rewards.values(), *self._rules.values()):
                stack.callback(reward.close)

    def __enter__(self) -> RoutedReward:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _names(self, answer: Answer) -> tuple[str, ...]:
        recipe = self._recipes.get(answer.prompt.reward)
        return (answer.prompt.reward,) if recipe is None else recipe.names

    def _combined(self, answer: Answer, scores: Sequence[Score]) -> Score:
        recipe = self._recipes.get(answer.prompt.reward)
        return scores[0] if recipe is None else recipe.combined(scores)

    def _apply_rules(self, answers: Sequence[Answer], results: list[Score]) -> None:
        """Lets users' rules say the value of what all rewards could judge."""
        for rule, reward in self._rules.items():
            where = [
                place
                for place, answer in enumerate(answers)
                if (recipe := self._recipes.get(answer.prompt.reward)) is not None
                and recipe.rule == rule
                and results[place].status == "ok"
            ]
            asked = [replace(answers[place], parts=results[place].parts) for place in where]
            for place, score in zip(where, self._judged(rule, reward, asked), strict=True):
                if score.status == "ok":
                    score = replace(score, parts=results[place].parts + score.parts, right=results[place].right)
                results[place] = score

    def _judged(self, name: str, reward: Reward, answers: list[Answer]) -> list[Score]:
        scores = reward.score(answers) if answers else []
        problem = next((score.problem for score in scores if score.problem), None)
        if problem is not None and name not in self.problems:
            self.problems[name] = problem
            log.warning("reward %s raised at an answer, which counts as not judged: %s", name, problem)
        return scores


def open_rewards(config: RunConfig, engine: Any, sources: Sequence[Source] | None = None) -> RoutedReward:
    """The rewards that the run's sources name, or those of `sources`, started. `engine`: the reward model's, None where it is
    not among them."""
    sources = config.data.sources if sources is None else sources
    names = sorted({name for source in sources for name in source.rewards})
    combining = [source for source in sources if source.judge not in source.rewards]
    rules = sorted({source.reward_combine for source in combining} - set(RULES))
    with ExitStack() as started:
        rewards: dict[str, Reward] = {}
        for name in names:
            rewards[name] = reward_class(config, name).open(config, name, engine)
            started.callback(rewards[name].close)
        opened: dict[str, Reward] = {}
        for rule in rules:
            opened[rule] = FunctionReward(config.rewards, rule, COMBINE)
            started.callback(opened[rule].close)
        routed = RoutedReward(rewards, {source.judge: Recipe.of(config, source) for source in combining}, opened)
        started.pop_all()
    return routed
