"""Watches trainer ranks at work: hands on their events and what any process warned of, notices when none gives a sign of life
any more, and raises, of several errors, the one that says what broke. It starts and ends no process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from engine.config.load import RunConfig
from engine.config.options import SYNC_ATTEMPTS
from engine.core.errors import SemionError, WatchdogError, telling
from engine.observe.journal import Journal
from engine.observe.telling import in_order
from engine.rewards.pool.nodes import SILENT_SECONDS, TAKE_SECONDS
from engine.rewards.pool.workers import stuck_seconds
from engine.run.handles import typed_error
from engine.run.signals import Event, sign_of_life

TOLD_SECONDS = 0.5  # how long what a process tells or warns of may wait to be shown
SETTLE_SECONDS = 2.0  # after a first error, how long to wait for one that says more


def watch(config: RunConfig, streams: Mapping[Any, Journal], fresh: Callable[[], list[Event]]) -> Iterator[Event]:
    """The events of Ray's `streams`, one a trainer rank, with the rank's journal; and in its place among them what any process
    tells or warns of (`fresh`: what came since it was last called). Returns when all have ended.

    Raises the error of whichever process failed, a typed one before any other; WatchdogError when all are silent for too long.
    """
    yield from in_order(fresh, _streamed(config, streams))


def _streamed(config: RunConfig, streams: Mapping[Any, Journal]) -> Iterator[Event | None]:
    """The events of the streams, and None whenever there is none for a moment."""
    import ray

    left = list(streams)
    patience = _patience_seconds(config)
    heard = time.monotonic()
    while left:
        ready, _ = ray.wait(left, num_returns=1, timeout=min(patience, TOLD_SECONDS))
        if ready:
            heard = time.monotonic()
        elif time.monotonic() - heard > patience and not _alive(config, patience):
            raise WatchdogError(f"no trainer rank gave a sign of life for {patience:.0f} s: look for a stopped process")
        if not ready:
            yield None
        for stream in ready:
            try:
                yield ray.get(next(stream))
            except StopIteration:
                left.remove(stream)
            except ray.exceptions.RayError as error:
                left.remove(stream)
                worst = _worst(_error_of(error, streams[stream]), left, streams)
                yield None
                raise worst from error


def _error_of(error: Exception, journal: Journal) -> SemionError:
    return typed_error(error, journal.process, journal.log)


def _patience_seconds(config: RunConfig) -> float:
    """Longer than any step with its sync and checkpoint may wait for all it waits for, the judges of other nodes included."""
    ranks, engines, rewards = (
        config.trainer.timeout_seconds,
        config.inference.timeout_seconds,
        config.reward_model.patience_seconds,
    )
    syncing = SYNC_ATTEMPTS * (config.sync.timeout_seconds + engines)  # each attempt may replace an engine
    judges = stuck_seconds(config.rewards) + TAKE_SECONDS + SILENT_SECONDS if config.cluster.nodes > 1 else 0.0
    return 2 * (ranks + engines + rewards) + syncing + judges


def _alive(config: RunConfig, patience: float) -> bool:
    """Whether rank 0 has waited for a part of a long evaluation, or of an interval's rollouts, within that time."""
    file = sign_of_life(config)
    return file.exists() and time.time() - file.stat().st_mtime < patience


def _worst(first: SemionError, left: list[Any], streams: Mapping[Any, Journal]) -> SemionError:
    """Of the errors that end a run within a moment, the one that says most: what broke first is often an echo."""
    import ray

    deadline = time.monotonic() + SETTLE_SECONDS
    while telling(first) < 3 and left and time.monotonic() < deadline:
        ready, _ = ray.wait(left, num_returns=1, timeout=SETTLE_SECONDS)
        for stream in ready:
            try:
                ray.get(next(stream))
            except StopIteration:
                left.remove(stream)
            except ray.exceptions.RayError as error:
                left.remove(stream)
                first = max(first, _error_of(error, streams[stream]), key=telling)
    return first
