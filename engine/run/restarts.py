"""A run that loses a process goes on by itself: which losses count, how often, from where, and what is written down of each.
It starts nothing; an attempt at the run is given to it, and a lost one is followed by another from the newest checkpoint.

A loss is an error that says of itself that it may pass (errors.py): something outside failed. All processes are started anew,
not the lost one alone: to resume is exact, and is the same for an engine, a rank and a weight sync.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

from engine.config.load import RunConfig
from engine.core.errors import MissingNodeError, PreemptedError, SemionError
from engine.core.jsonl import JsonlLedger, last_row
from engine.observe.summary import RESTARTS
from engine.run.shrinking import Room, shrunk, told
from engine.run.signals import Event, stop_request


def restarts_in_a_row(error: SemionError, before: int, after: int, so_far: int, limit: int) -> int | None:
    """How many restarts in a row without a new checkpoint one after `error` would make; None where the run ends with it.

    `before`, `after`: steps in the newest checkpoint when the lost attempt began, and now; 0 without one. `so_far`: restarts in
    a row up to that attempt. `limit`: run.restarts.
    """
    number = 1 if after > before else so_far + 1
    return number if error.may_pass and number <= limit else None


def unbroken(config: RunConfig, attempt: Callable[[bool, RunConfig], Iterator[Event]], *, resume: bool) -> Generator[Event]:
    """The events of a run over as many attempts as run.restarts allows, and {"kind": "restart", "step", "text"} between two.

    `attempt(resume, layout)` starts the run's processes, yields their events, and has ended them all when it returns or raises.
    `layout` is the configuration, but on fewer nodes with run.on_lost_node = "shrink" where nodes are missing: that is an
    attempt more, which does not count. Every other attempt asks for all nodes again. Raises the error that ended the last
    attempt, or PreemptedError where a loss came to a run that had been asked to stop.
    """
    number, before, layout = 0, saved_steps(config) if resume else 0, config
    while True:
        has_moved = False  # else the records are still those that the attempt before left
        heard = time.time()
        try:
            for event in attempt(resume, layout):
                has_moved, heard = has_moved or event["kind"] == "step", event.get("unix_seconds", time.time())
                yield event
            return
        except SemionError as error:
            ended, after, so_far = time.time(), saved_steps(config), number
            seen = error.seen_unix or ended
            if (error.may_pass or isinstance(error, MissingNodeError)) and stop_request(config).exists():
                raise PreemptedError(f"asked to stop, and lost: {error}; --resume auto {_where(after)}") from error
            smaller = _smaller(config, layout, error) if after else None
            again = so_far if smaller is not None else restarts_in_a_row(error, before, after, so_far, config.run.restarts)
            if again is None:
                raise _tried(error, so_far) from error
            number, before, resume, layout = again, after, after > 0, smaller or config
            took = {"unix_seconds": ended, "silent_seconds": max(0.0, seen - heard), "ending_seconds": ended - seen}
            write_down(layout, after, number, error, has_moved=has_moved, took=took)
            how = f"restart {number} of {config.run.restarts}" if smaller is None else f"on fewer nodes ({_sizes(layout)})"
            text = f"lost: {error}; the run {_where(after)}, {how}"
            yield {"kind": "restart", "step": after, "text": text, "unix_seconds": ended}


def _smaller(config: RunConfig, layout: RunConfig, error: SemionError) -> RunConfig | None:
    """The configuration on the nodes that are left; None where that is not asked for, not what was lost, or fits neither
    them nor their GPUs."""
    if config.run.on_lost_node == "wait" or not isinstance(error, MissingNodeError) or not error.nodes_left:
        return None
    return shrunk(config, error.nodes_left, Room.here(config)) if error.nodes_left < layout.cluster.nodes else None


def _sizes(layout: RunConfig) -> str:
    return ", ".join(f"{option} = {value}" for option, value in told(layout).items())


def saved_steps(config: RunConfig) -> int:
    """Steps in the newest checkpoint; 0 without one."""
    from engine.run.checkpoint import latest, read_manifest

    newest = latest(config.run_directory / "checkpoints")
    return int(read_manifest(newest)["step"]) if newest is not None else 0


def write_down(
    config: RunConfig, step: int, number: int, error: SemionError, *, has_moved: bool, took: Mapping[str, float]
) -> None:
    """Adds a row to the record: the step gone on from, how many that the lost attempt did are to be done again, what was lost,
    and the layout gone on in, which is `config`'s. `has_moved`: the lost attempt did any. `took`: when the next start began
    (the `unix_seconds` of its row in startup.jsonl), and what the loss had taken until then, in seconds: since the last word of
    any process, and to end what was left."""
    last = last_row(config.run_directory / "metrics.jsonl")
    done = last["step"] + 1 if last is not None else 0
    lost_steps = max(0, done - step) if has_moved else 0
    what: dict[str, Any] = {"layout": told(config), "restart": number, "error": type(error).__name__, "text": str(error)}
    ledger = JsonlLedger(config.run_directory / RESTARTS)
    ledger.append([{"step": step, "lost_steps": lost_steps, **what, **took}])
    ledger.close()


def _where(step: int) -> str:
    return f"goes on from the checkpoint of {step} steps" if step else "starts over, for there is no checkpoint yet"


def _tried(error: SemionError, so_far: int) -> SemionError:
    """The error that ends the run; where it might have passed, it says how often that was tried in vain."""
    if not so_far or not error.may_pass:
        return error
    times = "once" if so_far == 1 else f"{so_far} times in a row"
    return type(error)(f"{error}; started again {times} without reaching a new checkpoint, as run.restarts allows")
