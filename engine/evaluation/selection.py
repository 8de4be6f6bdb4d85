"""Which step of a run is the best, from its own evaluation records. Pure arithmetic: what is done about it (BEST, what is
kept) is checkpoint.py's.

A step's score is the mean over its held-out sets of accuracy (verifiable) and of the reward or the length-normalised reward
(graded). The two have different scales and are averaged as they are, as in the paper's mixed runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from engine.config.options import BestBy


def scores(rows: Iterable[Mapping[str, Any]], best_by: BestBy | None) -> dict[int, float]:
    """Score by step from the rows of evaluations.jsonl, one a step and set; empty where `best_by` is None. A step whose
    score would lack a set's figure has none."""
    by_step: dict[int, list[float | None]] = {}
    for row in rows if best_by is not None else ():
        graded = "length_normalized_reward" if best_by == "length_normalized_reward" else "mean"
        by_step.setdefault(row["step"], []).append(row[graded if row["measure"] == "reward" else "mean"])
    known = {step: [figure for figure in figures if figure is not None] for step, figures in by_step.items()}
    return {step: sum(known[step]) / len(known[step]) for step in by_step if len(known[step]) == len(by_step[step])}
