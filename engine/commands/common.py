"""What several commands share: tables and figures for people and machines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def print_evaluations(evaluations: list[dict[str, Any]]) -> None:
    """A table of evaluations (`Accuracy.summary`, with the step and the set)."""
    from engine.observe.progress import print_table

    rows = [
        (
            str(e["step"]),
            e["set"],
            f"{shown(e, 'mean')} ± {shown(e, 'standard_error')}",
            f"± {shown(e, 'seed_spread')}",
            f"{e['num_problems']} × {e['num_seeds']}",
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
        f"({e['set']}: {e['num_problems']} problems, {e['num_seeds']} seeds)"
    )


def shown(evaluation: Mapping[str, Any], name: str) -> str:
    """A share in percent, a reward as it is, and a dash for what is not known."""
    if evaluation[name] is None:
        return "-"
    return f"{evaluation[name]:.3f}" if evaluation["measure"] == "reward" else f"{evaluation[name]:.1%}"


def write_figures(document: dict[str, Any], *paths: str | Path | None) -> None:
    """Writes the figures as JSON to every path that was asked for."""
    from engine.observe.sinks import write_json

    for path in paths:
        if path is not None:
            write_json(path, document)
