"""`semion train` and `semion sft`: starts a run or goes on with one, and shows its progress."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

import psutil

from engine.commands.common import evaluation_note, print_evaluations, write_figures
from engine.config.load import RunConfig, load_config
from engine.observe.pace import Pace

if TYPE_CHECKING:
    from rich.console import Console

    from engine.api.events import Event


def add_flags(parser: argparse.ArgumentParser) -> None:
    """How much is said while it runs."""
    parser.add_argument("--quiet", action="store_true", help="no display and no line a step: evaluations, warnings, the end")
    parser.add_argument(
        "--log-every", type=_steps, metavar="STEPS", help="without a terminal: a line each so many steps (every 5 seconds)"
    )


def add_samples_flags(parser: argparse.ArgumentParser) -> None:
    """What is shown of what the policy says."""
    parser.add_argument("--samples", type=_steps, metavar="N", help="with each evaluation, N greedy answers, a line each")
    parser.add_argument(
        "--samples-every", type=_steps, metavar="STEPS", help="as many rollouts (2 without --samples) each so many steps"
    )


def _steps(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more; found {text!r}")
    return int(text)


def train(options: argparse.Namespace) -> None:
    """Trains, from the start or from the newest checkpoint, and again from there where a process is lost."""
    from engine.api.training import train

    config = load_config(options.config, options.overrides)
    with closing(train(config, options.resume, verbose=options.verbose, began_unix=_began())) as events:
        summary = show(
            config,
            "train",
            events,
            pace_of(config),
            log_every=options.log_every,
            quiet=options.quiet,
            samples=options.samples or 0,
            samples_every=options.samples_every,
        )
    if summary["evaluations"]:
        print_evaluations(summary["evaluations"])
    write_figures(dict(summary), options.json)


def fine_tune(options: argparse.Namespace) -> None:
    """Fine-tunes on worked solutions and writes a Hugging Face checkpoint."""
    from engine.api.training import fine_tune

    config = load_config(options.config, options.overrides)
    with closing(fine_tune(config, verbose=options.verbose, began_unix=_began())) as events:
        summary = show(config, "sft", events, log_every=options.log_every, quiet=options.quiet)
    print(f"checkpoint: {config.sft.checkpoint_out}")
    write_figures(dict(summary), options.json)


def _began() -> float:
    """When somebody pressed Enter: the time of day at which this process began."""
    return psutil.Process().create_time()


def reader() -> Console:
    """Whoever reads standard output; where nobody does any more (`| head`), that is a Ctrl-C."""
    from rich.console import Console

    class Reader(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.stderr.write("semion: nobody reads the output any more, which ends the run as Ctrl-C does\n")
            signal.raise_signal(signal.SIGINT)

    return Reader()


def pace_of(config: RunConfig) -> Pace:
    """Of a run whose rollouts are sampled by the interval, offline by the chunk, and that is judged now and then."""
    steps, schedule = config.run.steps, config.schedule.planned
    together = schedule.sync_interval if isinstance(schedule.sync_interval, int) else schedule.offline_chunk
    return Pace(steps, together, lambda done: sum(map(config.evaluation_due, range(done, steps + 1))))


def show(
    config: RunConfig,
    title: str,
    events: Iterable[Event],
    pace: Pace | None = None,
    *,
    log_every: int | None = None,
    quiet: bool = False,
    samples: int = 0,
    samples_every: int | None = None,
) -> Mapping[str, Any]:
    """Shows a run's events while they come; the summary that the last one has. `samples`: so many greedy answers with each
    evaluation. `samples_every`: as many rollouts, or two, each so many steps."""
    from engine.api.events import Activity, Done, Evaluation, Note, Restart, Step, Warning
    from engine.observe.answers import greedy_answers, rollouts
    from engine.observe.progress import Progress
    from engine.run.metrics import catalogue

    summary: Mapping[str, Any] = {}
    metrics = catalogue(config.algorithm)
    with Progress(config.run.steps, title, metrics, reader(), pace=pace, log_every=log_every, quiet=quiet) as progress:
        for event in events:
            match event:
                case Step():
                    progress.update(event.metrics)
                    if samples_every is not None and (event.step + 1) % samples_every == 0:
                        progress.answers(rollouts(config.run_directory, event.step, samples or 2))
                case Evaluation():
                    progress.note(evaluation_note(event.figures))
                    if samples:
                        progress.answers(greedy_answers(config.run_directory, event.step, event.set, samples))
                case Note(text):
                    progress.note(text)
                case Activity():
                    progress.activity(event)
                case Warning():
                    progress.note(str(event))
                case Restart(step, text):
                    progress.note(text)
                    progress.rewind(step)
                case Done():
                    summary = event.summary
    return summary
