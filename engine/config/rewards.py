"""Which rewards there are, found by their files without importing one, and what a configuration may say of them. What a reward
itself needs, such as a file of code, is its own to check (engine/rewards/registry.py) when a run is about to start.
"""

from __future__ import annotations

from typing import Any

from engine.config.options import Options, Source, source_key
from engine.core.registry import Registry

SUPPORT = ("registry", "arrivals", "pool", "serving", "function_worker", "own_class")  # of engine/rewards: no rewards
REWARDS: Registry[Any] = Registry("data.reward", "engine.rewards", "engine.rewards.base:Reward", SUPPORT)
RULES = ("sum", "product", "min")  # how several rewards of one answer become one


def label(name: str) -> str:
    """What a reward is called among the parts of a score and in the names of metrics: a user's own by its last name."""
    return name.rpartition(":")[2]


def broken_reward_rules(c: Options) -> list[str]:
    """Sentences for rewards that cannot be, or do not go together: key, rule, value found, fix."""
    broken: list[str] = []
    for place, source in enumerate(c.data.sources):
        broken += broken_source_rules(source_key(place), source)
    judged_by = sorted({name for source in c.data.sources for name in source.rewards})
    shown = ", ".join(map(repr, judged_by))
    if c.rewards.function is None and "function" in judged_by:
        broken.append(
            "data.reward = 'function' needs rewards.function; found none: set it to path/to/file.py:name or package.module:name"
        )
    if c.rewards.function is not None and "function" not in judged_by:
        broken.append(
            f"rewards.function judges sources with reward = 'function'; found {c.rewards.function!r} and sources with "
            f"{shown}: set data.reward = 'function', or remove it"
        )
    return broken


def broken_source_rules(key: str, source: Source) -> list[str]:
    """Sentences for the rewards of one source; `key`: what its options are called."""
    broken = []
    for name in source.rewards:
        if ":" not in name and name not in REWARDS.names:
            fix = f"write {name}:NAME, with the function's name" if name.endswith(".py") else "choose one"
            broken.append(
                f"{key}.reward must be one of {', '.join(map(repr, REWARDS.names))}, or your own as path/to/file.py:name or "
                f"package.module:name; found {name!r}: {fix}"
            )
    labels = [label(name) for name in source.rewards]
    if len(set(labels)) < len(labels):
        broken.append(
            f"{key}.reward must name rewards that are called differently; found {', '.join(source.rewards)}: rename a function"
        )
    weights, rule = source.reward_weights, source.reward_combine
    if weights is not None and len(weights) != len(source.rewards):
        broken.append(
            f"{key}.reward_weights must be one a reward of {key}.reward; found {len(weights)} for {len(source.rewards)}: add "
            f"or remove some"
        )
    if rule not in RULES and ":" not in rule:
        broken.append(
            f"{key}.reward_combine must be one of {', '.join(map(repr, RULES))}, or your own as path/to/file.py:name; found "
            f"{rule!r}: choose one"
        )
    if rule != "sum" and len(source.rewards) == 1:
        broken.append(
            f"{key}.reward_combine puts several rewards together; found {rule!r} with one: leave it at 'sum', or name more"
        )
    if weights is not None and rule != "sum":
        broken.append(f"{key}.reward_weights are of a sum; found them with reward_combine = {rule!r}: remove one of the two")
    return broken
