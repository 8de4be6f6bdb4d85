"""The regimes by name, and the one that a configuration asks for."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from engine.config.options import Options
from engine.config.schedules.base import Schedule
from engine.config.schedules.pilot import Pilot
from engine.core.errors import ConfigError
from engine.core.registry import Registry

SCHEDULES: Registry[Schedule] = Registry(
    "sync.semantics", "engine.config.schedules", "engine.config.schedules.base:Schedule", support=("registry", "pilot")
)

BOUNDS = {  # what is said to somebody who has none, by metric
    "log_prob_gap_mean": "set it to a few times what the metric is at s = 1, as 0.05",
    "ess_share": "set it to the least share, as 0.9",
}


def schedule_of(config: Options) -> Schedule:
    """The regime of a run. Offline generates as many steps at once as a checkpoint spans, 16 by default. One that decides as
    the run goes on is made anew by every call: a run has that of its `RunConfig.schedule`. ConfigError for a name without a
    class, for a class that contradicts itself, and for "auto" without a bound."""
    chunk = 16 if config.checkpoint.every == "end" else config.checkpoint.every
    sync = config.sync
    if sync.sync_interval == "auto":
        if sync.auto_bound is None:
            raise ConfigError(
                f"sync.sync_interval = 'auto' needs sync.auto_bound, up to which sync.auto_metric may go; found none: "
                f"{BOUNDS[sync.auto_metric]}"
            )
        given = sync.auto_most, sync.reference, config.run.steps, chunk
        return Pilot(*given, metric=sync.auto_metric, bound=sync.auto_bound)
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
