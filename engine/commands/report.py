"""`semion report`: what runs wrote down as a page, plots and figures. It starts no process and needs no run to have ended."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.commands.common import write_figures
from engine.config.load import flat, load_config
from engine.core.errors import DataError


def report(options: argparse.Namespace) -> int:
    """Writes the page, and the plots and figures that were asked for; 1 when the records contradict a regime."""
    from engine.observe.report import page, plots, read_run
    from engine.observe.writing import write_text
    from engine.run.metrics import catalogue

    directories = [Path(run) for run in options.runs]
    for directory in directories:
        if not (directory / "config.toml").is_file() or not (directory / "metrics.jsonl").is_file():
            raise DataError(
                f"RUN must be the directory of a run, with config.toml and metrics.jsonl; found neither or one in {directory}: "
                f"name a run.directory"
            )
    places = [directory.resolve() for directory in directories]
    if twice := {str(place) for place in places if places.count(place) > 1}:
        raise DataError(f"every RUN must be another one; found {', '.join(sorted(twice))} more than once: name it once")
    names = [directory.resolve().name for directory in directories]
    names = [str(d) if names.count(name) > 1 else name for d, name in zip(directories, names, strict=True)]
    configs = [load_config(directory / "config.toml") for directory in directories]
    runs = [
        read_run(directory, name, config.schedule, config.data.replay, flat(config.model_dump()))
        for directory, name, config in zip(directories, names, configs, strict=True)
    ]
    metrics = {name: metric for config in configs for name, metric in catalogue(config.algorithm).items()}
    further = [name for name in metrics if name not in catalogue()]
    output = Path(options.output) if options.output else directories[0] / "report.html"
    write_text(output, page(runs, metrics, further))
    if options.plots:
        for name, svg in plots(runs, metrics, further).items():
            write_text(Path(options.plots) / f"{name}.svg", svg)
    write_figures({"runs": [run.document() for run in runs]}, options.json)
    for run in runs:
        again = f"; {number} restart{'s'[: number > 1]}" if (number := len(run.restarts)) else ""
        print(f"{run.name}: {run.proof.sentence()}{again}")
    print(output)
    return int(any(run.proof.contradiction is not None for run in runs))
