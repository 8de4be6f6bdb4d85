"""The sinks that run.sinks may name, found without importing them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from engine.core.errors import ConfigError
from engine.core.registry import Registry
from engine.observe.sinks.base import Sink

SINKS: Registry[Sink] = Registry(
    "run.sinks", "engine.observe.sinks", "engine.observe.sinks.base:Sink", ("registry", "follow", "followers", "redact")
)


def check_sinks(names: Sequence[str]) -> list[ConfigError]:
    """What is wrong with these, each a fault: no such sink, one that is named twice, and what a sink needs and misses."""
    faults = []
    for place, name in enumerate(names):
        if name in names[:place]:
            faults.append(ConfigError(f"run.sinks must name each sink once; found {name!r} twice: remove one"))
            continue
        try:
            missing = SINKS.load(name).missing()
        except ConfigError as error:
            faults.append(error)
            continue
        if missing is not None:
            faults.append(
                ConfigError(f"run.sinks has {name!r}, which cannot work here: {missing}, or remove it from run.sinks")
            )
    return faults


def label(name: str) -> str:
    """What a sink is called in messages and file names: our own by name, a user's by its file and class."""
    place, _, attribute = name.rpartition(":")
    if not place:
        return name
    return re.sub(r"\W+", "_", f"{place.removesuffix('.py').rpartition('/')[2]}_{attribute}")
