"""`semion report`: what runs wrote down as a page, plots and figures, or a page that is served while they go on. It starts no
other process and needs no run to have ended.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.commands.common import write_figures
from engine.config.load import RunConfig, flat, load_config
from engine.core.errors import ConfigError, DataError


def report(options: argparse.Namespace) -> int:
    """Writes the page, and the plots and figures that were asked for; 1 when the records contradict a regime."""
    from engine.api.planning import predicted_beside
    from engine.observe.curves import further_plots, plots
    from engine.observe.reading import read_run
    from engine.observe.report import page
    from engine.observe.writing import write_text
    from engine.run.metrics import groups

    needed = ("config.toml",) if options.serve else ("config.toml", "metrics.jsonl")
    directories = _directories(options.runs, needed)
    names = _names(directories)
    configs = [load_config(directory / "config.toml") for directory in directories]
    metrics = _declared(configs)
    told = [flat(config.model_dump()) for config in configs]
    if options.serve:
        return _serve(options, directories, names, told, metrics)
    runs = [
        read_run(directory, name, config.schedule, config.data.replay, own, config.rollouts_per_step, config.records.keep_steps)
        for directory, name, config, own in zip(directories, names, configs, told, strict=True)
    ]
    if empty := [str(directory) for directory, run in zip(directories, runs, strict=True) if not run.metrics.num_steps]:
        raise DataError(
            f"RUN must have a step on record; found none in {', '.join(empty)}: it ended before its first one, and logs/ "
            f"there say why, or has not come to it yet (--serve waits)"
        )
    for run, directory, config in zip(runs, directories, configs, strict=True):
        run.predicted = predicted_beside(directory, config, options.calibration)
    output = Path(options.output) if options.output else directories[0] / "report.html"
    write_text(output, page(runs, metrics, groups()))
    if options.plots:
        for name, svg in (plots(runs, metrics) | further_plots(runs, metrics)).items():
            write_text(Path(options.plots) / f"{name}.svg", svg)
    write_figures({"runs": [run.document() for run in runs]}, options.json)
    for run in runs:
        again = f"; {number} restart{'s'[: number > 1]}" if (number := len(run.restarts)) else ""
        assert run.proof is not None
        print(f"{run.name}: {run.proof.sentence()}{again}")
    print(output)
    return int(any(run.proof is not None and run.proof.contradiction is not None for run in runs))


def _serve(
    options: argparse.Namespace,
    directories: Sequence[Path],
    names: Sequence[str],
    told: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
) -> int:
    """Serves the page until Ctrl-C."""
    from engine.observe.live import LivePage, LiveRun, make_server
    from engine.run.metrics import groups

    for flag in ("output", "json", "plots", "calibration"):
        if getattr(options, flag) is not None:
            raise ConfigError(f"--{flag} must be left out with --serve, which writes no file; found {getattr(options, flag)!r}")
    runs = [LiveRun(*each) for each in zip(directories, names, told, strict=True)]
    with make_server(LivePage(runs, metrics, groups()), options.host, options.port) as server:
        print(f"http://{options.host}:{server.server_port}/ shows {', '.join(names)}; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print()
    return 0


def _declared(configs: Sequence[RunConfig]) -> dict[str, Any]:
    """The declarations of all that may be on record."""
    from engine.run.metrics import catalogue

    return {name: metric for config in configs for name, metric in catalogue(config.algorithm).items()}


def _directories(runs: Sequence[str], needed: Sequence[str]) -> list[Path]:
    """The runs' directories. DataError where one is no run's, or is named twice."""
    directories = [Path(run) for run in runs]
    for directory in directories:
        if any(not (directory / file).is_file() for file in needed):
            raise DataError(
                f"RUN must be the directory of a run, with {' and '.join(needed)}; found neither or one in {directory}: "
                f"name a run.directory"
            )
    places = [directory.resolve() for directory in directories]
    if twice := {str(place) for place in places if places.count(place) > 1}:
        raise DataError(f"every RUN must be another one; found {', '.join(sorted(twice))} more than once: name it once")
    return directories


def _names(directories: Sequence[Path]) -> list[str]:
    """The folders' names, or where two are equal what was given."""
    names = [directory.resolve().name for directory in directories]
    return [str(d) if names.count(name) > 1 else name for d, name in zip(directories, names, strict=True)]
