"""To train, and to fine-tune on worked solutions, as an iterator of typed events: the preflight, the lock on the run's
directory, restarts after a loss, and the summary. What the events look like on a terminal is for the commands.
"""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from engine.api.events import Done, Event, Note, Step, typed
from engine.api.faults.directory import check_fresh, has_steps
from engine.api.preflight import check
from engine.config.load import RunConfig, dump_config, flat
from engine.config.unused import unused_options
from engine.core.errors import ConfigError, PreemptedError, SemionError
from engine.core.files import locked, writing
from engine.observe.journal import LOGS, WARNINGS
from engine.observe.origin import FORK
from engine.observe.predicted import CALIBRATION
from engine.observe.sinks.base import End
from engine.observe.sinks.follow import FOLDER
from engine.observe.sinks.followers import Followers
from engine.observe.summary import RESTARTS, summarize
from engine.observe.telling import Doing
from engine.observe.timeline import EVENTS, STARTUP, Timeline
from engine.observe.writing import write_json
from engine.run import signals
from engine.run.checkpoint import latest
from engine.run.machine import visible_gpus
from engine.run.metrics import catalogue
from engine.run.processes import Cluster
from engine.run.restarts import unbroken
from engine.run.spec import Spec, resolve

STOPPING = "semion: asked to stop: the run will save and end where it can go on from; a second time: at once"


def train(
    config: RunConfig, resume: Literal["auto"] | None = None, *, verbose: bool = False, began_unix: float | None = None
) -> Generator[Event]:
    """Trains, from the start or with resume="auto" from the newest checkpoint, and again from there where a process is lost.

    Nothing happens before the first event is asked for; to leave early, close the iterator, which ends every process. The last
    event is `Done`, and summary.json is then written. `verbose`: processes print what they log. `began_unix`: the time of day
    from which the start is counted, where that is not now. In the main thread, a first Ctrl-C, SIGTERM or SIGUSR1 has the run
    save and end with PreemptedError, a second one ends it at once, as does a Ctrl-C before the first step, when there is
    nothing to save.

    Raises the SemionError of what the preflight or the run found.
    """
    if resume not in (None, "auto"):
        raise ConfigError(f"resume must be None or 'auto'; found {resume!r}: choose one")
    directory, started = config.run_directory, time.monotonic()
    timeline = Timeline(time.time() if began_unix is None else began_unix)
    with interruptible() as stop:
        spec = yield from _checked(config, timeline, began_unix, "train", resume=resume == "auto")
        config = spec.config  # as resolved
        stop.check()

    def attempt(again: bool, layout: RunConfig) -> Iterator[signals.Event]:
        fitting = spec if layout is config else replace(resolve(layout, digests=False), digests=spec.digests)
        if fitting is not spec:
            yield _starting(fitting)
        yield from _processes(fitting, lambda cluster: cluster.train(resume=again), verbose=verbose)

    with locked(directory), preemptible(config) as stop:
        yield from _alone(directory)
        goes_on = resume == "auto" and latest(directory / "checkpoints") is not None
        if not goes_on and begins_again(config, may_start_over=resume == "auto"):
            yield Note("no checkpoint was written before the run was stopped: starting over", time.time())
        keep_calibration(directory)
        timeline.open(directory)
        yield typed(timeline.add(_starting(spec)))
        with (
            closing(unbroken(config, attempt, resume=goes_on)) as events,
            closing(_followed(config, map(typed, map(timeline.add, events)), started, verbose=verbose)) as followed,
        ):
            for event in followed:
                stop.check()
                stop.worth_saving |= isinstance(event, Step)
                stop.over |= isinstance(event, Done)
                yield event


def _alone(directory: Path) -> Generator[Event]:
    """Waits until no process of a command that was killed writes there any more."""
    notes: list[Event] = []
    told = "a process of a command that was killed still wrote the records: waited until it had ended"
    with writing(directory, waits=lambda: notes.append(Note(told, time.time()))):
        pass
    yield from notes


def keep_calibration(directory: Path) -> None:
    """Copies the constants of this machine, where the folder that the run is started in has them, into the run's directory: its
    report holds a forecast by them against what the run took."""
    if Path(CALIBRATION).is_file():
        shutil.copyfile(CALIBRATION, directory / CALIBRATION)


def fine_tune(config: RunConfig, *, verbose: bool = False, began_unix: float | None = None) -> Generator[Event]:
    """Fine-tunes on worked solutions and writes a Hugging Face checkpoint at sft.checkpoint_out; otherwise as `train`, without
    checkpoints to go on from."""
    started, timeline = time.monotonic(), Timeline(time.time() if began_unix is None else began_unix)
    spec = yield from _checked(config, timeline, began_unix, "sft", resume=False)
    config = spec.config  # as resolved
    with locked(config.run_directory):
        check_fresh(config, may_start_over=False)
        (config.run_directory / "config.toml").write_text(dump_config(config), encoding="utf-8")
        timeline.open(config.run_directory)
        yield typed(timeline.add(_starting(spec)))
        with closing(_processes(spec, lambda cluster: cluster.fine_tune(), verbose=verbose)) as events:
            yield from _followed(config, map(typed, map(timeline.add, events)), started, verbose=verbose)


def _followed(config: RunConfig, events: Iterator[Event], started: float, *, verbose: bool) -> Generator[Event]:
    """The events of a run that its sinks are told of, and what those warn of; the last one is `Done`, with the summary."""
    metrics = {m.name: {"unit": m.unit, "help": m.help, "title": m.title} for m in catalogue(config.algorithm).values()}
    options = flat(config.model_dump(mode="json"))
    with Followers(config.run.sinks, config.run_directory, options, metrics, verbose=verbose) as sinks:
        for event in events:
            if not isinstance(event, Done):
                yield event
                yield from map(typed, sinks.fresh())
                continue
            done = _finished(config, event, started)
            yield from map(typed, sinks.end(End("finished")))
            yield done


def _checked(
    config: RunConfig, timeline: Timeline, began_unix: float | None, purpose: Literal["train", "sft"], *, resume: bool
) -> Generator[Event, None, Spec]:
    """The preflight, what it cost, and which options would change nothing; the run as resolved."""
    if began_unix is not None:
        imports = Doing("imports").event("done")
        yield typed(timeline.add(imports | {"seconds": imports["unix_seconds"] - began_unix}))
    checking = Doing("preflight")
    yield typed(checking.event("begins"))
    spec = check(config, purpose, resume=resume)
    yield typed(timeline.add(checking.event("done")))
    for sentence in unused_options(config):
        yield typed(timeline.add({"kind": "note", "text": f"warning: {sentence}", "unix_seconds": time.time()}))
    return spec


def _processes(spec: Spec, run: Callable[[Cluster], Iterator[signals.Event]], *, verbose: bool) -> Generator[signals.Event]:
    """The events of a run's processes from the start of Ray to their end."""
    opening = Doing("ray")
    yield opening.event("begins")
    with Cluster(spec, verbose=verbose) as cluster:
        yield opening.event("done")
        try:
            for event in run(cluster):
                if event["kind"] == "done":
                    yield Doing("end").event("begins")
                yield event
        except SemionError as error:
            error.seen_unix = time.time()
            raise


def begins_again(config: RunConfig, *, may_start_over: bool) -> bool:
    """Whether a run that starts without a checkpoint replaces the records of one that was stopped; removes what a run that
    never took a step left. ConfigError as `check_fresh`: another run may have come since the preflight."""
    check_fresh(config, may_start_over=may_start_over)
    if has_steps(config.run_directory):
        return True
    for name in (RESTARTS, WARNINGS, EVENTS, STARTUP, FORK):
        (config.run_directory / name).unlink(missing_ok=True)
    shutil.rmtree(config.run_directory / FOLDER, ignore_errors=True)
    return False


def _starting(spec: Spec) -> signals.Event:
    t = spec.config.trainer
    engines = spec.config.inference.engines if spec.starts_engines else 0
    cache = ""
    if spec.kv_cache is not None:
        is_known = spec.kv_cache.asked_bytes is not None or not visible_gpus()
        size = spec.kv_cache.told(spec.kv_cache.num_bytes(None)) if is_known else "what its GPU has left, as `semion plan` says"
        cache = f"; KV cache of an engine: {size}"
    text = (
        f"starting {t.world_size} trainer rank{'s' * (t.world_size > 1)} (tensor {t.tensor_parallel}, pipeline "
        f"{t.pipeline_parallel}, data {t.data_parallel}) and {engines} engine{'s' * (engines != 1)}{cache}; their logs are in "
        f"{spec.config.run_directory / LOGS}, --verbose shows them"
    )
    return {"kind": "note", "text": text, "unix_seconds": time.time()}


def _finished(config: RunConfig, done: Done, started: float) -> Done:
    """The last event with the summary of the run's records, which is written down too."""
    summary: dict[str, Any] = summarize(config.run_directory) | {"seconds": time.monotonic() - started} | dict(done.summary)
    write_json(config.run_directory / "summary.json", summary)
    return Done(summary, done.checkpoint, done.unix_seconds)


@dataclass(slots=True)
class Stop:
    """What a signal finds of a run, and what it did."""

    worth_saving: bool = False  # a step was taken since the command began
    over: bool = False  # all steps are done, and all is saved
    requested: bool = False  # rank 0 is asked to save and end
    at_once: bool = False

    def check(self) -> None:
        """KeyboardInterrupt where one was raised and some library lost it: in a callback or while it was imported."""
        if self.at_once:
            raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[Stop]:
    """While entered in the main thread, a Ctrl-C is a KeyboardInterrupt, as ever, and remembered."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def interrupt(number: int, _: object) -> None:
        stop.at_once = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def preemptible(config: RunConfig) -> Iterator[Stop]:
    """While entered in the main thread, Ctrl-C, SIGTERM or SIGUSR1 (what srun passes on) has the run save and end where a run
    can go on from: before the next sync, or offline the next chunk of rollouts. A second one ends it at once. Both are a
    PreemptedError. A Ctrl-C of a run that is not `worth_saving` yet is a KeyboardInterrupt. Signals cannot be taken in any
    other thread."""
    request, stop = signals.stop_request(config), Stop()
    request.unlink(missing_ok=True)  # of a command that was killed after it was asked to stop
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _: object) -> None:
        if stop.over:
            signals.say(signals.ENDING)
            return
        if stop.requested or (number == signal.SIGINT and not stop.worth_saving):
            stop.at_once = True
            raise KeyboardInterrupt  # the one exception that comes out of a wait in Ray
        stop.requested = True
        request.touch()
        signals.say(STOPPING)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield stop
    except KeyboardInterrupt as error:
        if not stop.requested:
            raise
        newest = latest(config.run_directory / "checkpoints")
        where = f"goes on from {newest.name}" if newest is not None else "starts over, for there is no checkpoint yet"
        raise PreemptedError(f"asked twice to stop: ended at once; --resume auto {where}") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        request.unlink(missing_ok=True)
