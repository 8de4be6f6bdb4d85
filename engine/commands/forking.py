"""`semion fork`: a new run that starts from a checkpoint of another, with other options; it prints how to train it."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, and what is changed."""
    parser.add_argument("checkpoint", metavar="RUN", help="the directory of the run to start from, which is not touched")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="options set anew; run.directory is one of them",
    )
    parser.add_argument("--at", type=int, metavar="STEP", help="the checkpoint of so many steps (the newest)")


def fork(options: argparse.Namespace) -> None:
    """Makes the new run's directory."""
    from engine.api.forking import fork

    made = fork(Path(options.checkpoint), options.overrides, options.at)
    directory = made.config.run_directory
    print(f"{directory}: begins with {made.origin.sentence()}; changed: {made.origin.differences()}")
    print(f"semion train {directory / 'config.toml'} --resume auto")
