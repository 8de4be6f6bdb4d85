"""A run, or several laid over each other, as a page to read: what was run and how runs differ, the regime proven from the
records, curves, evaluations, answers before and after, what the guard found, what was lost and warned of on the way. One HTML
file without scripts, and the same as data. It reads records; it starts and judges nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from html import escape
from itertools import count
from pathlib import Path
from typing import Any

from engine.config.schedules.base import Schedule
from engine.core.errors import DataError
from engine.core.jsonl import read_rows
from engine.core.metrics import Metric
from engine.observe.charts import Line, Point, chart
from engine.observe.journal import WARNINGS, read_warnings
from engine.observe.regime import Proof, prove
from engine.observe.summary import RESTARTS

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
    "sync": ("", (("", "sync_seconds"),)),
    "seconds": ("a step", (("whole", "step_seconds"), ("waiting for rollouts", "wait_seconds"))),
    "speed": ("throughput", (("generation", "generation_tokens_per_second"), ("training", "training_tokens_per_second"))),
}
AS_THEY_ARE = ("staleness", "learning_rate")  # metrics that follow a rule: a mean would hide it
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
RESTARTED = ("run", "went on after step", "steps done again", "what was lost")
WARNED = ("run", "process", "times, at least", "what it warned of")
EVALUATED = ("run", "step", "set", "mean", "± s.e.", "tokens")
NUM_ANSWERS = 4  # problems of which a run's answers are shown
STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.45 sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em; color: #222; background: #fff }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
th, td { padding: .25em .9em .25em 0; text-align: left; vertical-align: top } td { overflow-wrap: anywhere }
tr { border-bottom: 1px solid #ddd } .charts { display: flex; flex-wrap: wrap; gap: 1em } .wrong { color: #b00020 }
svg { max-width: 100%; height: auto } pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }
@media (max-width: 600px) { body { margin: 1em auto; padding: 0 .6em } h1 { font-size: 1.4em } }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #161616 } tr { border-color: #3a3a3a } .wrong { color: #ff6b7d }
  svg .paper { fill: #161616 } svg text { fill: #ddd } svg .grid { stroke: #333 } svg .axis { stroke: #999 }
  svg [stroke="#000000"] { stroke: #fff } svg [fill="#000000"] { fill: #fff } svg [stroke="#0072b2"] { stroke: #4aa8e0 }
  svg [fill="#0072b2"] { fill: #4aa8e0 }
}
"""


@dataclass(frozen=True, slots=True)
class RunRecords:
    """What a run wrote down, but for the texts of its rollouts."""

    name: str
    proof: Proof
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    findings: list[dict[str, Any]]
    restarts: list[dict[str, Any]]
    warnings: list[dict[str, Any]]
    answers: list[dict[str, Any]]  # greedy ones to some problems, at the first and the last evaluation
    options: Mapping[str, Any]  # of its configuration, by their full names
    versions: Mapping[str, str]  # of libraries, once the run has ended

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What it was, for people who have not seen it before."""
        times = [row["unix_seconds"] for row in self.metrics if row.get("unix_seconds")]
        began = f"{datetime.fromtimestamp(times[0], UTC):%Y-%m-%d %H:%M} UTC" if times else "-"
        lasted = str(timedelta(seconds=round(times[-1] - times[0]))) if times else "-"
        sampled = sum(row.get("generation_tokens") or 0 for row in self.metrics)
        names = (
            "model.path",
            "data.train",
            "algorithm.loss",
            "sync.sync_interval",
            "sync.reference",
            "optimizer.learning_rate",
        )
        return [
            *((name, str(self.options[name])) for name in names if name in self.options),
            ("steps done", f"{len(self.metrics)} of {self.options.get('run.steps', '?')}"),
            ("first step done", began),
            ("from the first step to the last", lasted),
            ("tokens sampled", f"{sampled:,.0f}"),
            ("versions", ", ".join(f"{name} {number}" for name, number in self.versions.items()) or "-"),
        ]

    def document(self) -> dict[str, Any]:
        """The same as JSON holds it, the steps' records left out."""
        regime = asdict(self.proof) | {"holds": self.proof.holds, "sentence": self.proof.sentence()}
        kept = {"evaluations": self.evaluations, "guard": self.findings, "restarts": self.restarts, "warnings": self.warnings}
        return {"run": self.name, "regime": regime, "steps": len(self.metrics)} | kept


def read_run(
    directory: Path,
    name: str,
    schedule: Schedule,
    replayed: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> RunRecords:
    """The records of a run, which may still be going on, and the `options` of its configuration by their full names; DataError
    for a line that is no row."""
    evaluations = [
        {key: value for key, value in row.items() if key != "records"} for row in read_rows(directory / "evaluations.jsonl")
    ]
    metrics, findings, restarts = (list(read_rows(directory / file)) for file in ("metrics.jsonl", "guard.jsonl", RESTARTS))
    warnings = read_warnings(directory / WARNINGS)
    return RunRecords(
        name=name,
        proof=prove(directory, schedule, replayed),
        metrics=metrics,
        evaluations=evaluations,
        findings=findings,
        restarts=restarts,
        warnings=warnings,
        answers=_first_and_last(read_rows(directory / "samples.jsonl")),
        options=options or {},
        versions=_versions(directory / "summary.json"),
    )


def _versions(summary: Path) -> dict[str, str]:
    if not summary.exists():
        return {}
    try:
        versions = json.loads(summary.read_text("utf-8")).get("versions", {})
    except ValueError as error:
        raise DataError(f"{summary} must be JSON; found {error}: mend or remove it") from error
    return {name: str(number) for name, number in versions.items()}


def _first_and_last(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each problem the answers at the first and the last evaluation of its set, of NUM_ANSWERS problems a set."""
    by_problem: dict[tuple[str, str], list[dict[str, Any]]] = {}
    of_set: dict[str, int] = {}
    for row in rows:
        key = (row["set"], row["problem"])
        if key not in by_problem:
            of_set[row["set"]] = of_set.get(row["set"], 0) + 1
            if of_set[row["set"]] > NUM_ANSWERS:
                by_problem[key] = []
                continue
            by_problem[key] = [row]
        elif by_problem[key]:
            by_problem[key][1:] = [row]
    return [row for kept in by_problem.values() for row in kept]


def plots(runs: Sequence[RunRecords], metrics: Mapping[str, Metric], further: Iterable[str] = ()) -> dict[str, str]:
    """SVG documents by file name, all runs in each. With several runs a colour is a run, else it is a curve. `metrics`: the
    declarations of what is on record; `further`: names that have a curve beside those of CURVES, as a user's own loss has."""
    made = {}
    for file, (title, series) in (CURVES | {name: ("", (("", name),)) for name in further}).items():
        curves = [[(label, _points(run.metrics, metric)) for label, metric in series] for run in runs]
        first = metrics[series[0][1]]
        name = title or first.title or first.name
        lines = [replace(line, smooth=first.name not in AS_THEY_ARE) for line in _lines(runs, curves)]
        made[file] = (name[:1].upper() + name[1:], first.unit, lines)
    for file, (title, unit, measure, figure) in VALIDATION.items():
        curves = [_of_sets([row for row in run.evaluations if row["measure"] == measure], figure) for run in runs]
        made[file] = (title, unit, _lines(runs, curves))
    charts = {file: chart(title, unit, lines) for file, (title, unit, lines) in made.items() if lines}
    for file, (name, axis) in OVER.items():
        over = [[("", _points_over(run.metrics, name, axis))] for run in runs]
        if lines := _lines(runs, over):
            charts[file] = chart((metrics[name].title or name).capitalize(), metrics[name].unit, lines, axis)
    return charts


def page(runs: Sequence[RunRecords], metrics: Mapping[str, Metric], further: Iterable[str] = ()) -> str:
    """The HTML document; `metrics` and `further` as for `plots`."""
    title = escape(", ".join(run.name for run in runs))
    findings = [(run.name, row["step"], row["text"]) for run in runs for row in run.findings]
    restarts = [(run.name, row["step"], row["lost_steps"], row["text"]) for run in runs for row in run.restarts]
    warnings = [(run.name, row["process"], row["count"], row["text"]) for run in runs for row in run.warnings]
    recorded = {name for run in runs for row in run.metrics for name in row}
    explained = [(m.name, m.unit, m.help) for m in metrics.values() if m.name in recorded]
    evaluated = [
        (run.name, row["step"], row["set"], *_shown(row), f"{row['completion_tokens_mean']:.1f}")
        for run in runs
        for row in run.evaluations
    ]
    told = [run for run in runs if run.options]
    facts = [(name, *(dict(run.facts).get(name, "-") for run in told)) for name in dict(told[0].facts)] if told else []
    differ, answers = differing([run.options for run in runs]), _answers(runs)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head>',
            f"<body><h1>{title}</h1>",
            *([_table(("", *(run.name for run in told)), facts)] if told else []),
            *(["<h2>What differs</h2>", _table(("option", *(run.name for run in runs)), differ)] if differ else []),
            "<h2>Regime</h2><ul>",
            *(_verdict(run) for run in runs),
            "</ul>",
            *(["<h2>Guard</h2>", _table(("run", "step", "what it found"), findings)] if findings else []),
            *(["<h2>Restarts</h2>", _table(RESTARTED, restarts)] if restarts else []),
            *(["<h2>Warnings</h2>", _table(WARNED, warnings)] if warnings else []),
            '<h2>Curves</h2><div class="charts">',
            *plots(runs, metrics, further).values(),
            "</div>",
            *(["<h2>Metrics</h2>", _table(("name", "unit", "meaning"), explained)] if explained else []),
            *(["<h2>Evaluations</h2>", _table(EVALUATED, evaluated)] if evaluated else []),
            *(["<h2>Answers, before and after</h2>", answers] if answers else []),
            "</body></html>\n",
        ]
    )


def differing(options: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The options that are not the same in all runs, with the value of each; where a run writes to is no difference."""
    names = dict.fromkeys(name for each in options for name in each if name != "run.directory")
    rows = [(name, *(str(each.get(name, "-")) for each in options)) for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def _answers(runs: Sequence[RunRecords]) -> str:
    rows = [
        "<tr>"
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in (run.name, row["set"], row["step"], row.get("answer", "")))
        + "".join(f"<td><pre>{escape(str(row[name]))}</pre></td>" for name in ("problem", "text"))
        + "</tr>"
        for run in runs
        for row in run.answers
    ]
    heading = "".join(
        f"<th>{name}</th>" for name in ("run", "set", "step", "right answer", "problem", "answer at temperature 0")
    )
    return f"<table><tr>{heading}</tr>{''.join(rows)}</table>" if rows else ""


def _verdict(run: RunRecords) -> str:
    wrong = ' class="wrong"' if run.proof.contradiction is not None else ""
    return f"<li{wrong}><b>{escape(run.name)}</b>: {escape(run.proof.sentence())}; {len(run.metrics)} steps on record</li>"


def _table(heading: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heading)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _shown(row: Mapping[str, Any]) -> tuple[str, str]:
    """Mean and standard error; a dash for what is not known."""
    form = "{:.3f}" if row["measure"] == "reward" else "{:.1%}"
    mean, error = (form.format(row[key]) if row[key] is not None else "-" for key in ("mean", "standard_error"))
    return mean, error


Curves = list[tuple[str, tuple[Point, ...]]]  # of one run: label and points


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
    points, tokens, began = [], 0.0, None
    for row in rows:
        tokens += row.get("generation_tokens") or 0.0
        began = row.get("unix_seconds") if began is None else began
        if row.get(key) is None or began is None:
            continue
        x = (row["unix_seconds"] - began) / 3600 if axis == "hours" else tokens / 1e6
        points.append(Point(x, float(row[key])))
    return tuple(points)


def _of_sets(evaluations: list[dict[str, Any]], figure: str) -> Curves:
    sets = dict.fromkeys(row["set"] for row in evaluations)
    error = "standard_error" if figure == "mean" else ""
    return [(name, _points([row for row in evaluations if row["set"] == name], figure, error)) for name in sets]
