"""`semion train` and `semion sft`: starts a run or goes on with one, and shows its progress."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from contextlib import closing
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from engine.commands.common import evaluation_note, print_evaluations, write_figures
from engine.config.load import RunConfig, load_config

if TYPE_CHECKING:
    from engine.api.events import Event


def train(options: argparse.Namespace) -> None:
    """Trains, from the start or from the newest checkpoint, and again from there where a process is lost."""
    from engine.api.training import train

    config = load_config(options.config, options.overrides)
    with closing(train(config, options.resume, verbose=options.verbose)) as events:
        summary = show(config, "train", events)
    if summary["evaluations"]:
        print_evaluations(summary["evaluations"])
    write_figures(dict(summary), options.json)


def fine_tune(options: argparse.Namespace) -> None:
    """Fine-tunes on worked solutions and writes a Hugging Face checkpoint."""
    from engine.api.training import fine_tune

    config = load_config(options.config, options.overrides)
    with closing(fine_tune(config, verbose=options.verbose)) as events:
        summary = show(config, "sft", events)
    print(f"checkpoint: {config.sft.checkpoint_out}")
    write_figures(dict(summary), options.json)


def show(config: RunConfig, title: str, events: Iterable[Event]) -> Mapping[str, Any]:
    """Shows a run's events while they come; the summary that the last one has."""
    from engine.api.events import Done, Evaluation, Note, Restart, Step, Warning
    from engine.observe.progress import Progress
    from engine.run.metrics import catalogue

    summary: Mapping[str, Any] = {}
    events = iter(events)
    first = list(islice(events, 1))  # before anything is drawn: what the preflight finds is told alone
    with Progress(config.run.steps, title, catalogue(config.algorithm)) as progress:
        for event in chain(first, events):
            match event:
                case Step():
                    progress.update(event.metrics)
                case Evaluation():
                    progress.note(evaluation_note(event.figures))
                case Note(text):
                    progress.note(text)
                case Warning():
                    progress.note(str(event))
                case Restart(step, text):
                    progress.note(text)
                    progress.rewind(step)
                case Done():
                    summary = event.summary
    return summary
