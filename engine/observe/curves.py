"""Which charts a report has: the ones that every run is looked at by, each set's evaluations, and one for every other metric on
record. It knows records and metrics; how a chart is drawn is in charts.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from itertools import count
from typing import Any

from engine.core.metrics import Metric
from engine.observe.charts import Line, Mark, Point, chart
from engine.observe.reading import TOKENS, RunRecords

# file name: title of several curves, (label, metric) of each; what no run has on record is left out. One curve has its metric's
# title, and all have the unit of their first metric
CURVES: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "reward": ("", (("", "reward_mean"),)),
    "accuracy": ("", (("", "accuracy"),)),
    "entropy": ("", (("", "rollout_entropy"),)),
    "lengths": (
        "length of rollouts",
        (("all", "completion_tokens_mean"), ("correct", "correct_tokens_mean"), ("incorrect", "incorrect_tokens_mean")),
    ),
    "length_percentiles": (
        "length of rollouts, percentiles",
        (("50 %", "completion_tokens_p50"), ("90 %", "completion_tokens_p90"), ("99 %", "completion_tokens_p99")),
    ),
    "pair_lengths": (
        "length of what is compared",
        (("chosen", "chosen_tokens_mean"), ("rejected", "rejected_tokens_mean")),
    ),
    "log_probs": (
        "log-probs of what is compared",
        (("chosen", "chosen_log_prob_mean"), ("rejected", "rejected_log_prob_mean")),
    ),
    "loss": ("", (("", "loss"),)),
    "margin": ("", (("", "margin_mean"),)),
    "preferred": ("", (("", "preferred_share"),)),
    "kl": ("", (("", "kl_mean"),)),
    "ratio": ("", (("", "ratio_mean"),)),
    "clipped": ("", (("", "clipped_share"),)),
    "gap": ("", (("", "log_prob_gap_mean"),)),
    "learning_rate": ("", (("", "learning_rate"),)),
    "grad_norm": ("", (("", "grad_norm"),)),
    "lost": (
        "share without use: of prompts without signal, of rollouts cut off or not judged",
        (("no signal", "skipped_share"), ("cut off", "truncated"), ("not judged", "unjudged_share")),
    ),
    "staleness": ("", (("", "staleness"),)),
    "interval": ("", (("", "interval_steps"),)),
    "sync": ("", (("", "sync_seconds"),)),
    "seconds": ("a step", (("whole", "step_seconds"), ("waiting for rollouts", "wait_seconds"))),
    "speed": ("throughput", (("generation", "generation_tokens_per_second"), ("training", "training_tokens_per_second"))),
}
COVERED = frozenset(metric for _, series in CURVES.values() for _, metric in series)
UNDECLARED = "as a reward or a loss of the user's own has it"
NO_CURVE = ("step", "unix_seconds", TOKENS)
AS_THEY_ARE = ("staleness", "interval_steps", "learning_rate")  # metrics that follow a rule: a mean would hide it
# file name: metric, what it is drawn over instead of steps
OVER: dict[str, tuple[str, str]] = {
    "reward_over_hours": ("reward_mean", "hours"),
    "reward_over_tokens": ("reward_mean", "million tokens sampled"),
}
# file name: title, unit, what the sets are measured by, figure of the evaluation
VALIDATION: dict[str, tuple[str, str, str, str]] = {
    "validation_accuracy": ("Validation accuracy", "mean ± standard error", "accuracy", "mean"),
    "validation_reward": ("Validation reward", "mean ± standard error", "reward", "mean"),
    "validation_length_normalized": ("Validation reward, length-normalised", "mean", "reward", "length_normalized_reward"),
}
Curves = list[tuple[str, tuple[Point, ...]]]  # of one run: label and points


def plots(runs: Sequence[RunRecords], metrics: Mapping[str, Metric]) -> dict[str, str]:
    """SVG documents by file name, all runs in each: what every run is looked at by. With several runs a colour is a run, else
    it is a curve. `metrics`: the declarations of what is on record."""
    rows = [run.metrics.rows() for run in runs]
    marks = _marks(runs)
    charts = {}
    for file, (title, unit, measure, figure) in VALIDATION.items():
        curves = [_of_sets([row for row in run.evaluations if row["measure"] == measure], figure) for run in runs]
        if lines := _lines(runs, curves):
            charts[file] = chart(title, unit, lines, marks=marks)
    for file, (title, series) in CURVES.items():
        curves = [[(label, _points(own, metric)) for label, metric in series] for own in rows]
        first = metrics[series[0][1]]
        lines = [replace(line, smooth=first.name not in AS_THEY_ARE) for line in _lines(runs, curves)]
        about = "\n".join(f"{metrics[name].name}: {metrics[name].help}" for _, name in series)
        if lines:
            charts[file] = chart(_title(title or first.title or first.name), first.unit, lines, marks=marks, about=about)
    for file, (name, axis) in OVER.items():
        over = [[("", _points_over(own, name, axis))] for own in rows]
        if lines := _lines(runs, over):
            about = f"{name}: {metrics[name].help}"
            charts[file] = chart(_title(metrics[name].title or name), metrics[name].unit, lines, axis, about=about)
    return charts


def further_plots(runs: Sequence[RunRecords], metrics: Mapping[str, Metric]) -> dict[str, str]:
    """The same for every other declared metric on record, by its name."""
    rows = [run.metrics.rows() for run in runs]
    recorded = {name for run in runs for name in run.metrics.names}
    marks = _marks(runs)
    charts = {}
    for name in further_metrics(metrics, recorded):
        metric = metrics.get(name) or Metric(name, UNDECLARED)
        if lines := _lines(runs, [[("", _points(own, name))] for own in rows]):
            charts[name] = chart(_title(metric.title or name), metric.unit, lines, marks=marks, about=f"{name}: {metric.help}")
    return charts


def further_metrics(metrics: Mapping[str, Metric], recorded: Set[str]) -> list[str]:
    """Those on record that no chart of `plots` has: declared ones first, then a user's parts of a reward and the like."""
    named = (*metrics, *sorted(recorded - metrics.keys()))
    return [name for name in named if name in recorded and name not in COVERED and name not in NO_CURVE]


def _title(text: str) -> str:
    return text[:1].upper() + text[1:]


def _marks(runs: Sequence[RunRecords]) -> list[Mark]:
    """Where a run went back, and where the guard found something."""
    marks = []
    for place, run in enumerate(runs):
        whose = f"{run.name}, " if len(runs) > 1 else ""
        found = [(row["step"], "restart", row["text"]) for row in run.restarts]
        found += [(row["step"], "guard", row["text"]) for row in run.findings]
        marks += [Mark(step, f"{whose}{kind}, step {step}: {text}", kind == "restart", place) for step, kind, text in found]
    return marks


def _lines(runs: Sequence[RunRecords], curves: Sequence[Curves]) -> list[Line]:
    """The runs' curves as lines of one chart, each label the same in every run."""
    numbers: dict[str, int] = {}
    fresh = count()
    lines = []
    for place, (run, own) in enumerate(zip(runs, curves, strict=True)):
        for label, points in own:
            if not points:
                continue
            number = numbers[label] if label in numbers else numbers.setdefault(label, next(fresh))
            if len(runs) == 1:
                lines.append(Line(label or run.name, points, colour=number))
            else:
                lines.append(Line(f"{run.name} {label}".strip(), points, colour=place, dash=number))
    return lines


def _points(rows: Iterable[Mapping[str, Any]], key: str, error: str = "") -> tuple[Point, ...]:
    known = (row for row in rows if row.get(key) is not None)
    return tuple(Point(float(row["step"]), float(row[key]), float(row.get(error) or 0.0)) for row in known)


def _points_over(rows: Sequence[Mapping[str, Any]], key: str, axis: str) -> tuple[Point, ...]:
    """The metric over the hours since the first step was done, or over the tokens sampled so far. Restarts count."""
    points, began = [], None
    for row in rows:
        began = row.get("unix_seconds") if began is None else began
        if row.get(key) is None or began is None:
            continue
        x = (row["unix_seconds"] - began) / 3600 if axis == "hours" else row[TOKENS] / 1e6
        points.append(Point(x, float(row[key])))
    return tuple(points)


def _of_sets(evaluations: list[dict[str, Any]], figure: str) -> Curves:
    sets = dict.fromkeys(row["set"] for row in evaluations)
    error = "standard_error" if figure == "mean" else ""
    return [(name, _points([row for row in evaluations if row["set"] == name], figure, error)) for name in sets]
