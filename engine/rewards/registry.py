"""The rewards of a run: which class is behind a name, what must be known of them before anything starts, and several in one run
or on one prompt. Each prompt's completions go to the rewards that its source names. It judges nothing itself.
"""

from __future__ import annotations

import logging
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from engine.config.load import RunConfig
from engine.config.options import Source
from engine.config.rewards import REWARDS, RULES, label
from engine.core import registry
from engine.core.errors import ConfigError, SemionError, WatchdogError
from engine.core.types import Judging, Score
from engine.rewards import function
from engine.rewards.arrivals import Arrivals
from engine.rewards.base import Answer, Reward, Together
from engine.rewards.function import FunctionReward
from engine.rewards.math.reward import MathReward, versions
from engine.rewards.model import ScoringEngine
from engine.rewards.own_class import OwnReward, require_class, says_per_group, spreads
from engine.rewards.pool.nodes import NodeHandle, NodePool, closing, named
from engine.rewards.pool.workers import WorkerReward, fitted

COMBINE = "data.reward_combine"
log = logging.getLogger(__name__)


def reward_class(config: RunConfig, name: str) -> type[Reward]:
    """The class behind a name of data.reward: one of ours, a user's own, or what calls a user's function. ConfigError when
    there is none."""
    if ":" not in name:
        return REWARDS.load(name)
    if not function.facts(name, "data.reward", config.rewards).is_class:
        return FunctionReward
    kind: type[Reward] = REWARDS.load(name)
    require_class(kind, name)
    return kind


def is_own(name: str, kind: type[Reward]) -> bool:
    """Whether it is a reward class of the user's, whatever it extends: it judges in the process that opens it, behind
    OwnReward."""
    return ":" in name and kind is not FunctionReward


def judging_of(config: RunConfig, source: Source) -> Judging:
    """What who loads a source's prompts must know of its rewards: whether the first one says right or wrong, and whether any of
    them looks at the answer or the row."""
    found = [_judging(config, name) for name in source.rewards]
    rule = source.reward_combine
    asks = function.facts(rule, COMBINE, config.rewards).asks if rule not in RULES else ()
    return Judging(
        verifiable=found[0].verifiable,
        needs_answer=any(judging.needs_answer for judging in found),
        wants_row=any(judging.wants_row for judging in found) or "row" in asks,
    )


def _judging(config: RunConfig, name: str) -> Judging:
    kind = reward_class(config, name)
    found = _asked(name, kind, kind.judging, config, name)
    if not isinstance(found, Judging):
        raise ConfigError(f"data.reward = {name!r} must return a Judging from judging; found {found!r}: mend it")
    return found


def _asked(name: str, kind: type[Reward], method: Callable[..., Any], *arguments: Any) -> Any:
    """What a class method of a reward returns. ConfigError names a user's own, with file and line, for whatever it raises."""
    if is_own(name, kind):
        return registry.called(name, "data.reward", method, *arguments, error=ConfigError)
    return method(*arguments)


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


def judged_together(config: RunConfig) -> Together:
    """What the run's rewards wait for, by the one that waits longest: an answer, its group, or all of a step. ConfigError where
    a user's own cannot be loaded."""
    found = {where.together for where in where_judged(config).values()}
    return max(found, key=("answer", "group", "step").index)


@dataclass(frozen=True, slots=True)
class Where:
    """What a reward gets in each call, and what it judges with."""

    together: Together
    kind: Literal["processes", "engines", "class"]
    every_node: bool  # else on rank 0's alone


def where_judged(config: RunConfig) -> dict[str, Where]:
    """Of each reward of the run's sources. ConfigError where a user's own cannot be loaded."""
    found = {}
    for name in sorted({name for source in config.data.sources for name in source.rewards}):
        kind = reward_class(config, name)
        if is_own(name, kind):
            found[name] = Where("group" if spreads(kind) else "step", "class", spreads(kind))
        else:
            together = kind.judged_together(config, name)
            found[name] = Where(together, "engines" if kind.uses_engine else "processes", not kind.uses_engine)
    return found


def check_pairing(config: RunConfig) -> None:
    """ConfigError where the algorithm pairs right with wrong answers and no source's reward says which is which."""
    verifiable = [judging_of(config, source).verifiable for source in config.data.sources]
    pairing = getattr(config.algorithm, "pairing", "random")  # an option of the losses that have it
    if pairing != "random" and ":" not in pairing and not any(verifiable):
        raise ConfigError(
            f"algorithm.pairing is for sources whose (first) reward says right or wrong, such as 'math'; the others pair the "
            f"highest reward with the lowest; found {pairing!r} and no such source: leave it at 'random'"
        )


def check_streaming(config: RunConfig) -> None:
    """ConfigError where sync.streaming would have a reward judge a step in parts that gets a step's answers together."""
    names = sorted({name for source in config.data.sources for name in source.rewards}) if config.sync.streaming else []
    for name in names:
        kind = reward_class(config, name)
        if says_per_group(kind) if is_own(name, kind) else kind.per_group:
            continue
        says = "inherits per_group, which was said of another score" if kind.per_group else "judges a step together"
        raise ConfigError(
            f"sync.streaming needs rewards that can judge a step's groups apart: 'math', functions, or a class that says "
            f"per_group = True itself; found data.reward = {name!r}, which {says}: set per_group = True in the class, if "
            f"its scores depend on no answer of another group, else sync.streaming = false"
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
    if _are_all(config, sources):
        yield partial(check_weights, config)


def _check(config: RunConfig, name: str) -> None:
    kind = reward_class(config, name)
    _asked(name, kind, kind.check, config, name)


def check_weights(config: RunConfig) -> None:
    """ConfigError for a name in rewards.weights that no function declares as one of its parts. Where one declares none, only
    what it returns tells (`RoutedReward`)."""
    declared: set[str] = set()
    for source in config.data.sources if config.rewards.weights else ():
        named = [(name, "data.reward") for name in source.rewards if ":" in name]
        named += [(rule, COMBINE) for rule in (source.reward_combine,) if rule not in RULES]
        if function.BUILT_IN in source.rewards and config.rewards.function is not None:
            named.append((config.rewards.function, "rewards.function"))
        for name, option in named:
            found = function.facts(name, option, config.rewards)
            if not found.is_class and not found.parts:
                return
            declared |= set(found.parts)
    _require_parts(config.rewards.weights or {}, declared)


def _are_all(config: RunConfig, sources: Iterable[Source] | None) -> bool:
    """Whether these are all sources of a run, as an evaluation's need not be."""
    return sources is None or {source.judge for source in config.data.sources} <= {source.judge for source in sources}


def _require_parts(weights: Mapping[str, float], found: set[str]) -> None:
    if unknown := sorted(weights.keys() - found):
        raise ConfigError(
            f"rewards.weights must name parts that a reward function returns; found {', '.join(unknown)}, and the parts "
            f"{', '.join(sorted(found)) or 'none'}: mend the name, or declare a part that only some rows have with "
            f"@reward(parts=...)"
        )


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
        *,
        are_all: bool = True,
        nodes: Sequence[NodeHandle] = (),
    ) -> None:
        """`recipes`: by what Prompt.reward says; what is none of them is the name of a reward. `rules`: users' combining rules
        by their names. `are_all`: whether these are all rewards of the run, so that a weight of no part of theirs is wrong.
        `nodes`: those that have opened some of them too, which they close with these."""
        self._rewards = dict(rewards)
        self._recipes = dict(recipes or {})
        self._rules = dict(rules or {})
        functions = [reward for reward in (*rewards.values(), *self._rules.values()) if isinstance(reward, FunctionReward)]
        self._nodes = tuple(nodes)
        self._weighing = functions if are_all else []
        self.problems: dict[str, str] = {}  # the first traceback of each reward whose answer was invalid

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        """One score an answer, in order, from the rewards that its prompt names."""
        return self.score_as_they_arrive(Arrivals.of(answers))

    def score_as_they_arrive(self, answers: Arrivals[Answer]) -> list[Score]:
        """The same. Rewards that may begin early do so meanwhile, each in a thread; the others, and users' rules, when all
        answers are there, in the order of places and one after another."""
        early: dict[str, Arrivals[Answer]] = {}
        judging: dict[str, Future[list[Score]]] = {}
        arrived: dict[int, Answer] = {}
        with ThreadPoolExecutor(max(1, len(self._rewards)), "reward") as threads:
            try:
                with ExitStack() as arriving:
                    for name, reward in self._rewards.items():
                        if reward.begins_early:
                            early[name] = arriving.enter_context(Arrivals[Answer]())
                            judging[name] = threads.submit(reward.score_as_they_arrive, early[name])
                    while (new := answers.take()) is not None:
                        arrived |= new
                        for name, own in early.items():
                            own.put({place: answer for place, answer in new.items() if name in self._names(answer)})
                for future in judging.values():  # of those without an answer too: what they met ends the run
                    future.result()
            except BaseException:  # Ctrl-C: nobody may close a reward that still judges
                for own in early.values():
                    own.abandon()
                raise
        scores = self._combined_scores([arrived[place] for place in sorted(arrived)], judging)
        if not answers.is_part:  # a part of a step may lack what only some prompts' answers return
            self._require_weights()
        return scores

    def _combined_scores(self, answers: Sequence[Answer], judged: Mapping[str, Future[list[Score]]]) -> list[Score]:
        """One score an answer. `judged`: the scores of those rewards that have judged theirs."""
        places: dict[str, list[int]] = {}
        for place, answer in enumerate(answers):
            for name in self._names(answer):
                places.setdefault(name, []).append(place)
        found: dict[tuple[int, str], Score] = {}
        for name, where in places.items():
            asked = [answers[place] for place in where]
            scores = judged[name].result() if name in judged else self._rewards[name].score(asked)
            self._note_problem(name, scores)
            found.update(zip(((place, name) for place in where), scores, strict=True))
        results = [
            self._combined(answer, [found[place, name] for name in self._names(answer)]) for place, answer in enumerate(answers)
        ]
        self._apply_rules(answers, results)
        return results

    def _require_weights(self) -> None:
        """ConfigError, once every function has judged an answer, for a weight of a part that none of them has returned."""
        if self._weighing and all(reward.has_judged for reward in self._weighing):
            _require_parts(self._weighing[0].weights, set().union(*(reward.part_names for reward in self._weighing)))
            self._weighing = []

    def close(self) -> None:
        """Closes every reward, here and on other nodes, also when one of them fails to close."""
        with ExitStack() as stack:
            nodes, self._nodes = self._nodes, ()
            stack.callback(closing(nodes))
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
            scores = reward.score(asked) if asked else []
            self._note_problem(rule, scores)
            for place, score in zip(where, scores, strict=True):
                if score.status == "ok":
                    score = replace(score, parts=results[place].parts + score.parts, right=results[place].right)
                results[place] = score

    def _note_problem(self, name: str, scores: Sequence[Score]) -> None:
        problem = next((score.problem for score in scores if score.problem), None)
        if problem is not None and name not in self.problems:
            self.problems[name] = problem
            log.warning("reward %s raised at an answer, which counts as not judged: %s", name, problem)


def _opened(config: RunConfig, name: str, engines: Sequence[Any]) -> Reward:
    kind = reward_class(config, name)
    if is_own(name, kind):
        return _own(config, name, kind, engines)
    return kind.open(config, name, engines)


def _own(config: RunConfig, name: str, kind: type[Reward], engines: Sequence[Any] = ()) -> OwnReward:
    opened: Reward = _asked(name, kind, kind.open, config, name, engines)
    return OwnReward(name, opened, config.rewards.timeout_seconds, spreads=spreads(kind))


@dataclass(frozen=True, slots=True)
class Judges:
    """What judges elsewhere than in processes of the one that has the rewards, and what this machine does beside."""

    engines: Sequence[ScoringEngine] = ()  # the reward model's; none where no source is judged by it
    nodes: Sequence[NodeHandle] = ()  # the run's other nodes, whose processes judge too
    threads: int = 0  # of this machine's ranks and engines, to which its judging processes leave the cores


@dataclass(frozen=True, slots=True)
class Opened:
    """What a node says of the pools that it has opened (engine/rewards/serving.py)."""

    slots: Mapping[str, int]  # of each pool, the answers that are judged at once
    identities: Mapping[str, str | None]  # what `pool_identities` says there


Pool = WorkerReward | OwnReward  # what judges on every node


def pools(config: RunConfig, sources: Sequence[Source] | None = None) -> dict[str, Callable[[], Pool]]:
    """What starts each of the rewards of the run's sources, or of `sources`, that judge on every node, by a name of its own: a
    user's combining rule is called with its option. A user's class is one of them where it spreads, and then gets no engines,
    which are rank 0's to ask."""
    names, rules = _named(config.data.sources if sources is None else sources)
    found: dict[str, Callable[[], Pool]] = {}
    for name in names:
        kind = reward_class(config, name)
        if is_own(name, kind):
            if spreads(kind):
                found[name] = partial(_own, config, name, kind)
        elif issubclass(kind, WorkerReward):
            found[name] = partial(kind.open, config, name, ())
    return found | {f"{COMBINE} {rule}": partial(FunctionReward, config.rewards, rule, COMBINE) for rule in rules}


def fitted_to(config: RunConfig, threads: int, sources: Sequence[Source] | None = None) -> RunConfig:
    """The configuration with rewards.workers as it is on this machine, whose ranks and engines have `threads`: what judges in
    worker processes shares the cores that these leave."""
    names, rules = _named(config.data.sources if sources is None else sources)
    in_workers = [name for name in names if issubclass(reward_class(config, name), WorkerReward)]
    return fitted(config, threads, len(in_workers) + len(rules))


def pool_identities(config: RunConfig, sources: Sequence[Source] | None = None) -> dict[str, str | None]:
    """What must be the same on every node: `identities` of those alone, and the versions of what judges there. A checkpoint has
    none of these versions, for a run may go on with others."""
    found: dict[str, str | None] = {}
    for name in pools(config, sources):
        if name.startswith(COMBINE):
            found[name] = registry.source_digest(name.removeprefix(COMBINE).strip())
            continue
        if issubclass(reward_class(config, name), MathReward):
            found |= {f"the version of {what}": number for what, number in versions().items()}
        found |= (FunctionReward if ":" in name else REWARDS.load(name)).identity(config, name)
    return found | {"the version of Python": platform.python_version()} if found else {}


def _named(sources: Sequence[Source]) -> tuple[list[str], list[str]]:
    """The rewards that sources name, and users' combining rules."""
    names = sorted({name for source in sources for name in source.rewards})
    combining = [source for source in sources if source.judge not in source.rewards]
    return names, sorted({source.reward_combine for source in combining} - set(RULES))


def open_rewards(
    config: RunConfig,
    judges: Judges = Judges(),
    sources: Sequence[Source] | None = None,
) -> RoutedReward:
    """The rewards that the run's sources name, or those of `sources`, started, on `judges` too. ConfigError or WatchdogError
    where another node cannot judge as this one does."""
    opening = [(node, node.call("open", sources)) for node in judges.nodes]
    config = fitted_to(config, judges.threads, sources)
    sources = config.data.sources if sources is None else sources
    names, rules = _named(sources)
    everywhere = pools(config, sources)
    with ExitStack() as started:
        opened: dict[str, Any] = {}
        for name in (*names, *(f"{COMBINE} {rule}" for rule in rules)):
            start = everywhere.get(name, partial(_opened, config, name, judges.engines))
            opened[name] = start()
            started.callback(opened[name].close)
        _spread(config, opening, sources, {name: opened[name] for name in everywhere})
        recipes = {source.judge: Recipe.of(config, source) for source in sources if source.judge not in source.rewards}
        routed = RoutedReward(
            {name: opened[name] for name in names},
            recipes,
            {rule: opened[f"{COMBINE} {rule}"] for rule in rules},
            are_all=_are_all(config, sources),
            nodes=judges.nodes,
        )
        started.pop_all()
    return routed


def _said(identity: str | None) -> str:
    """A version, or the beginning of a digest."""
    return "none" if identity is None else identity[:12]


def _spread(
    config: RunConfig,
    opening: Sequence[tuple[NodeHandle, Any]],
    sources: Sequence[Source],
    rewards: Mapping[str, Pool],
) -> None:
    """Waits until the other nodes are ready, and has them judge too."""
    own, late_at = pool_identities(config, sources) if opening else {}, time.monotonic() + config.trainer.timeout_seconds
    slots: dict[str, list[NodePool]] = {name: [] for name in rewards}
    for node, future in opening:
        try:
            found: Opened = future.result(max(0.0, late_at - time.monotonic()))
        except TimeoutError as error:
            raise WatchdogError(
                f"{node.name} did not start within trainer.timeout_seconds = {config.trainer.timeout_seconds:g}: raise it, or "
                f"look at the node's log"
            ) from error
        except SemionError as error:
            raise named(node, error) from error
        for what, digest in own.items():
            if found.identities.get(what) != digest:
                raise ConfigError(
                    f"{what} must be the same on every node, for any of them may judge an answer; found {_said(digest)} here "
                    f"and {_said(found.identities.get(what))} at {node.name}: have the same environment and files on all nodes"
                )
        for name in rewards:
            slots[name].append(NodePool(node, name, found.slots[name]))
    for name, reward in rewards.items():
        reward.spread(slots[name])
