"""`semion train` and `semion sft`: starts a run or goes on with one, and shows its progress."""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from engine.commands.common import evaluation_note, print_evaluations, write_figures
from engine.config.load import RunConfig, dump_config
from engine.core.errors import ConfigError, PreemptedError
from engine.core.files import locked
from engine.observe.journal import LOGS, WARNINGS
from engine.observe.summary import RESTARTS
from engine.run.spec import runnable


def train(options: argparse.Namespace) -> None:
    """Trains, from the start or from the newest checkpoint, and again from there where a process is lost."""
    from engine.run.checkpoint import latest
    from engine.run.processes import Cluster
    from engine.run.restarts import unbroken

    config = runnable(options)
    if config.sft.checkpoint_out is not None:
        raise ConfigError(f"sft.checkpoint_out is for `semion sft`; found {config.sft.checkpoint_out!r}: remove it")
    directory = config.run_directory

    def attempt(resume: bool) -> Iterator[dict[str, Any]]:
        with Cluster(config, verbose=options.verbose) as cluster:
            yield from cluster.train(resume=resume)

    with locked(directory), preemptible(config):
        resume = options.resume == "auto" and latest(directory / "checkpoints") is not None
        if not resume:
            check_fresh(config, may_start_over=options.resume == "auto")
        with closing(unbroken(config, attempt, resume=resume)) as events:
            engines = config.inference.engines if config.uses_engines else 0
            summary = show(config, "train", engines, events)
        if summary["evaluations"]:
            print_evaluations(summary["evaluations"])
        write_figures(summary, directory / "summary.json", options.json)


def fine_tune(options: argparse.Namespace) -> None:
    """Fine-tunes on worked solutions and writes a Hugging Face checkpoint."""
    from engine.models.hf import check_destination
    from engine.run.processes import Cluster

    config = runnable(options)
    if config.sft.checkpoint_out is None:
        raise ConfigError("sft.checkpoint_out is required by `semion sft` and missing: name the folder to make")
    check_destination(config.sft.checkpoint_out)
    with locked(config.run_directory):
        check_fresh(config, may_start_over=False)
        (config.run_directory / "config.toml").write_text(dump_config(config), encoding="utf-8")
        with Cluster(config, verbose=options.verbose) as cluster:
            summary = show(config, "sft", 0, cluster.fine_tune())
        print(f"checkpoint: {config.sft.checkpoint_out}")
        write_figures(summary, config.run_directory / "summary.json", options.json)


@contextmanager
def preemptible(config: RunConfig) -> Iterator[None]:
    """While entered, SIGTERM or SIGUSR1 (what srun passes on) has the run save and end where a run can go on from: before the
    next sync, or offline the next chunk of rollouts. A second one ends it at once. Both are a PreemptedError."""
    from engine.run.signals import stop_request

    request, asked = stop_request(config), 0
    request.unlink(missing_ok=True)

    def ask(*_: object) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            raise KeyboardInterrupt  # the one exception that comes out of a wait in Ray
        request.touch()
        os.write(2, b"semion: asked to stop: the run will save and end where it can go on from; a second time: at once\n")

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    except KeyboardInterrupt as error:
        if asked < 2:
            raise
        raise PreemptedError(
            "asked twice to stop: the newest checkpoint stands, and --resume auto goes on from it, or starts over without one"
        ) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        request.unlink(missing_ok=True)


def check_fresh(config: RunConfig, *, may_start_over: bool) -> None:
    """ConfigError when run.directory holds records that starting anew would take away.

    A run that was stopped before its first checkpoint may start over under --resume auto: equal configurations write equal
    records again.
    """
    directory = config.run_directory
    if not (directory / "metrics.jsonl").exists():
        for name in (RESTARTS, WARNINGS):
            (directory / name).unlink(missing_ok=True)  # of one that never took a step
        return
    before = directory / "config.toml"
    same = before.exists() and before.read_text(encoding="utf-8") == dump_config(config)
    if not may_start_over:
        raise ConfigError(f"run.directory must be new; found a run in {directory}: add --resume auto, or name another one")
    if not same:
        raise ConfigError(
            f"run.directory must be new or hold this run; found one with other options and no checkpoint in {directory}: use "
            f"the options it had, or name another directory"
        )
    print("no checkpoint was written before the run was stopped: starting over", flush=True)


def show(config: RunConfig, title: str, engines: int, events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Shows a run's events while they come; the summary of the run from its records."""
    from engine.observe.journal import sentence
    from engine.observe.progress import Progress
    from engine.observe.summary import summarize
    from engine.run.metrics import catalogue

    trainer, started, versions = config.trainer, time.monotonic(), {}
    with Progress(config.run.steps, title, catalogue(config.algorithm)) as progress:
        progress.note(
            f"starting {trainer.world_size} trainer ranks (tensor {trainer.tensor_parallel}, pipeline "
            f"{trainer.pipeline_parallel}, data {trainer.data_parallel}) and {engines} engines; their logs are in "
            f"{config.run_directory / LOGS}, --verbose shows them"
        )
        for event in events:
            kind = event.pop("kind")
            if kind == "step":
                progress.update(event)
            elif kind == "evaluation":
                progress.note(evaluation_note(event))
            elif kind == "restart":
                progress.note(event["text"])
                progress.rewind(event["step"])
            elif kind == "note":
                progress.note(event["text"])
            elif kind == "warning":
                progress.note(sentence(event))
            else:
                versions = event.get("engine_versions", {})
    return summarize(config.run_directory) | {"seconds": time.monotonic() - started, "versions": versions}
