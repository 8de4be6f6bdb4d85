"""What several commands share: tables and figures for people and machines."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.core.errors import ConfigError, combined
from engine.core.places import CONTROL, obstacle

TARGETS = ("output", "json", "plots", "write", "html")  # flags of what a command writes
DESTINATIONS = ("folder", "destination")  # arguments that name a folder to make
INPUTS = (
    "config",
    "file",
    "answers",
    "against",
    "questions",
    "sources",
    "exclude",
    "suite",
    "paths",
    "checkpoint",
    "calibration",
    "lengths",
    "from_run",
)  # what a command reads


def print_evaluations(evaluations: list[dict[str, Any]]) -> None:
    """A table of evaluations (`Accuracy.summary`, with the step and the set)."""
    from engine.observe.progress import print_table

    rows = [
        (
            str(e["step"]),
            e["set"],
            f"{shown(e, 'mean')} ± {shown(e, 'standard_error')}",
            f"± {shown(e, 'seed_spread')}",
            f"{_problems(e)} × {e['num_seeds']}",
            f"{e['completion_tokens_mean']:.1f}",
        )
        for e in evaluations
    ]
    heading = ("step", "set", "mean ± s.e.", "over seeds", "problems × seeds", "tokens")
    print_table("held-out accuracy, or reward of graded sets", [heading, *rows])


def evaluation_note(e: Mapping[str, Any]) -> str:
    """An evaluation in a line."""
    return (
        f"step {e['step']}: held-out {e['measure']} {shown(e, 'mean')} ± {shown(e, 'standard_error')} "
        f"({e['set']}: {_problems(e)} problems, {e['num_seeds']} seeds)"
    )


def _problems(e: Mapping[str, Any]) -> str:
    """How many problems there are, and of how many that were too long to be asked."""
    too_long = e.get("num_too_long", 0)
    return f"{e['num_problems']}" + (f" ({too_long} too long)" if too_long else "")


def shown(evaluation: Mapping[str, Any], name: str) -> str:
    """A share in percent, a reward as it is, and a dash for what is not known."""
    if evaluation[name] is None:
        return "-"
    return f"{evaluation[name]:.3f}" if evaluation["measure"] == "reward" else f"{evaluation[name]:.1%}"


def check_targets(options: argparse.Namespace) -> None:
    """ConfigError for places that a command was told to write to and cannot, before any work is done. A parser names its
    flags of folders in `folders`; all others of TARGETS are files."""
    folders = (*getattr(options, "folders", ()), *DESTINATIONS)
    seen: dict[Path, str] = {}
    for name in INPUTS:
        said = getattr(options, name, None) or []
        for file in [said] if isinstance(said, str) else said:
            if file and not CONTROL.search(file):
                seen[Path(file).absolute()] = (
                    f"--{name.replace('_', '-')}"
                    if name in ("against", "questions", "exclude", "suite", "calibration", "lengths", "from_run")
                    else name.upper()
                )
    faults = []
    for name in (*TARGETS, *DESTINATIONS):
        said = getattr(options, name, None)
        if said is not None:
            flag = f"--{name}" if name in TARGETS else name.upper()
            faults += _target_faults(flag, said, "folder" if name in folders else "file", seen)
    if faults:
        raise combined(faults)


def _target_faults(flag: str, said: str, kind: str, seen: dict[Path, str]) -> list[ConfigError]:
    """The fault of one place to write to. `seen`: the files that the command reads and writes so far, which it joins."""
    if not said.strip() or CONTROL.search(said):
        what = "an empty name" if not said.strip() else "a control character"
        return [ConfigError(f"{flag} must name a {kind}; found {what} at {said!r}: name another")]
    path = Path(said).absolute()
    if why := obstacle(path):
        return [ConfigError(f"{flag} must be a {kind} that can be written; found {why}: name another")]
    if path.exists() and path.is_dir() != (kind == "folder"):
        what = "a folder" if path.is_dir() else "a file"
        return [ConfigError(f"{flag} must name a {kind}; found {what} at {said!r}: name another")]
    if path.exists() and not path.is_dir() and not path.is_file():
        return [ConfigError(f"{flag} is replaced when it is written; found a device or a pipe at {said!r}: name a file")]
    if (other := seen.setdefault(path, flag)) != flag:
        return [ConfigError(f"{flag} must be a file of its own; found {said!r}, which is also {other}: name another")]
    return []


def write_figures(document: dict[str, Any], *paths: str | Path | None) -> None:
    """Writes the figures as JSON to every path that was asked for."""
    from engine.observe.writing import write_json

    for path in paths:
        if path is not None:
            write_json(path, document)
