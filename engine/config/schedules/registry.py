"""The regimes by name, and the one that a configuration asks for."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from engine.config.options import Options
from engine.config.schedules.base import Schedule
from engine.core.errors import ConfigError
from engine.core.registry import Registry

SCHEDULES: Registry[Schedule] = Registry(
    "sync.semantics", "engine.config.schedules", "engine.config.schedules.base:Schedule", support=("registry",)
)


def schedule_of(config: Options) -> Schedule:
    """The regime of a run. Offline generates as many steps at once as a checkpoint spans, 16 by default. ConfigError for a
    name without a class, and for a class that contradicts itself."""
    chunk = 16 if config.checkpoint.every == "end" else config.checkpoint.every
    sync = config.sync
    return _made(sync.semantics, sync.sync_interval, sync.reference, config.run.steps, chunk, sync.lookahead, sync.in_flight)


@lru_cache(maxsize=64)
def _made(
    name: str,
    interval: int | Literal["never"],
    reference: int | Literal["never", "follow"],
    num_steps: int,
    chunk: int,
    lookahead: int,
    updates_in_flight: bool,
) -> Schedule:
    schedule = SCHEDULES.load(name)(interval, reference, num_steps, chunk, lookahead, updates_in_flight)
    if ":" in name and (faults := schedule.contradictions()):
        raise ConfigError(f"sync.semantics must be a regime that the loop can follow; found {name!r} with {faults[0]}: mend it")
    return schedule
