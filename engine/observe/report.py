"""A run, or several laid over each other, as a page to read: what was run and how runs differ, the regime proven from the
records, curves, evaluations and what each problem came to, answers before and after, what the guard found, what was lost and
warned of on the way. One HTML file without scripts; live.py serves the same while a run goes on. It starts and judges nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, TypeVar

from engine.core.metrics import Metric
from engine.observe.curves import further_plots, plots
from engine.observe.predicted import HEADING
from engine.observe.problems import Problem, difference
from engine.observe.reading import RunRecords
from engine.observe.summary import TOOK

Item = TypeVar("Item")
NEVER_WITHIN = ("run.directory",)  # options that say nothing of what a run is
MOST_ROWS = 60  # of a table of findings, restarts or warnings: the first and the last of more
MOST_PROBLEMS, MOST_EVALUATIONS = 100, 20  # of the picture of all problems
MOST_WRONG = 8  # problems that are shown with an answer
METRICS = ("name", "unit", "meaning")
TOOK_MEANS = (
    "Seconds of each restart: notice, at most, from the loss until it was seen; end, to end what was left; start, until all "
    "trainer ranks are processes that have met; weights, to build the model and read it; state, to read the checkpoint; "
    "engines, to wait for them after that and to connect them; step, up to the end of the first step; rest, anything else. "
    "All is without notice."
)
RESTARTED = ("run", "went on after step", "steps done again", "what was lost", *(f"{name}, s" for name in TOOK))
WARNED = ("run", "process", "times, at least", "what it warned of")
SMOOTHING = (("raw", "as recorded"), ("some", "smoothed"), ("more", "smoothed more"))
STYLE = """
:root { color-scheme: light dark }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em }
body { color: #222; background: #fff }
h1 { margin: 0 0 .6em; overflow-wrap: anywhere } h2 { margin: 1.8em 0 .4em; font-size: 1.25em }
h3 { font-size: 1em; margin: 1.2em 0 .3em }
p { margin: .4em 0 } .note { color: #666; font-size: .9em }
table { border-collapse: collapse; margin: .6em 0 1em; display: block; overflow-x: auto; max-width: 100% }
th, td { padding: .25em .9em .25em 0; text-align: left; vertical-align: top } td { overflow-wrap: break-word; max-width: 40em }
th { font-weight: 600; white-space: nowrap }
tr { border-bottom: 1px solid #ddd } .wrong { color: #b00020 }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); gap: 1em }
svg { width: 100%; max-width: 620px; height: auto; display: block } svg g title + text { cursor: help }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; max-height: 16em; overflow-y: auto; font-size: .9em }
td pre { min-width: 16em } details > summary { cursor: pointer; margin: .8em 0; font-weight: 600 }
.wide { overflow-x: auto } .wide svg { max-width: 1100px; min-width: 760px }
.smoothing label { margin-right: 1em }
#raw:checked ~ main .raw { stroke-opacity: 1 } #raw:checked ~ main .smooth { display: none }
#more:checked ~ main .smooth { display: none } #more:checked ~ main .smoother { display: inline }
.paper { fill: #ffffff }
@media (max-width: 600px) {
  body { margin: 1em auto; padding: 0 .6em } h1 { font-size: 1.4em } svg text { font-size: 14px }
  th, td { font-size: .85em; padding-right: .6em } th { white-space: normal } td { overflow-wrap: anywhere; min-width: 3.3em }
  td pre { min-width: 11em } .wide svg text { font-size: 11px }
}
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #161616 } tr { border-color: #3a3a3a } .wrong { color: #ff6b7d } .note { color: #9a9a9a }
  svg .paper { fill: #161616 } svg text { fill: #ddd } svg .grid { stroke: #333 } svg .axis { stroke: #999 }
  svg [stroke="#000000"] { stroke: #fff } svg [fill="#000000"] { fill: #fff } svg [stroke="#0072b2"] { stroke: #4aa8e0 }
  svg [fill="#0072b2"] { fill: #4aa8e0 }
}
"""


def page(
    runs: Sequence[RunRecords],
    metrics: Mapping[str, Metric],
    groups: Mapping[str, Sequence[str]] | None = None,
    *,
    head: str = "",
    inside: str | None = None,
) -> str:
    """The HTML document. `metrics`: the declarations of what is on record; `groups`: their names under the headings that
    further curves have. `head`: what else stands in the document's head; `inside`: its content, where that is made already."""
    title = escape(", ".join(run.name for run in runs))
    meta = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
    buttons = "".join(
        f'<input type="radio" name="smoothing" id="{name}"{" checked" if name == "some" else ""}> '
        f'<label for="{name}">{text}</label> '
        for name, text in SMOOTHING
    )
    main = content(runs, metrics, groups) if inside is None else inside
    return (
        f'<!doctype html><html lang="en"><head>{meta}<style>{STYLE}</style>{head}</head>\n<body><h1>{title}</h1>\n'
        f"Curves of many points: {buttons}\n<main>\n{main}\n</main></body></html>\n"
    )


def document(title: str, sections: Iterable[tuple[str, str]]) -> str:
    """A page of the same style with headings and what stands below each as HTML; what has no heading comes as it is."""
    view = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    main = "\n".join(f"<h2>{escape(heading)}</h2>{text}" if heading else text for heading, text in sections)
    return (
        f'<!doctype html><html lang="en"><head>{view}<title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n<main>\n{main}\n</main></body></html>\n"
    )


def content(
    runs: Sequence[RunRecords], metrics: Mapping[str, Metric], groups: Mapping[str, Sequence[str]] | None = None
) -> str:
    """What stands below the page's title: all that changes while a run goes on."""
    told = [run for run in runs if run.options]
    names = dict.fromkeys(name for run in told for name, _ in run.facts)
    facts = [(name, *(dict(run.facts).get(name, "-") for run in told)) for name in names]
    findings = [(run.name, row["step"], row["text"]) for run in runs for row in run.findings]
    restarts = [
        (run.name, row["step"], row["lost_steps"], row["text"], *_took(row.get("took"))) for run in runs for row in run.restarts
    ]
    warnings = [(run.name, row["process"], row["count"], row["text"]) for run in runs for row in run.warnings]
    recorded = {name for run in runs for name in run.metrics.names}
    explained = [(m.name, m.unit, m.help) for m in metrics.values() if m.name in recorded]
    sections = [
        ("", table(("", *(run.name for run in told)), facts) if told else ""),
        ("What differs", _options(runs)),
        ("Regime", "<ul>" + "".join(map(_verdict, runs)) + "</ul>" if any(run.proof for run in runs) else ""),
        ("Guard", table(("run", "step", "what it found"), findings) if findings else ""),
        ("Restarts", table(RESTARTED, restarts) + f'<p class="note">{TOOK_MEANS}</p>' if restarts else ""),
        ("Warnings", table(WARNED, warnings) if warnings else ""),
        ("Evaluations", _evaluations(runs)),
        ("Curves", _thinned(runs) + f'<div class="charts">{"".join(plots(runs, metrics).values())}</div>'),
        ("", _further(runs, metrics, groups or {})),
        ("Time, predicted and measured", "".join(map(_predicted, runs))),
        ("Problems", "".join(map(_problems, runs))),
        ("Answers, before and after", _answers(runs)),
        ("Options", _all_options(told)),
        ("Metrics", _folded("What the names mean", METRICS, explained)),
    ]
    return "\n".join((f"<h2>{heading}</h2>{text}" if heading else text) for heading, text in sections if text)


def _took(seconds: Mapping[str, float] | None) -> list[str]:
    """The cells of what a restart took; dashes where it reached no step."""
    return [f"{seconds[name]:.1f}" if seconds is not None else "-" for name in TOOK]


def differing(options: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The options that are not the same in all runs, with the value of each; where a run writes to is no difference."""
    names = dict.fromkeys(name for each in options for name in each if name not in NEVER_WITHIN)
    rows = [(name, *(str(each.get(name, "-")) for each in options)) for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def _options(runs: Sequence[RunRecords]) -> str:
    differ = differing([run.options for run in runs])
    return table(("option", *(run.name for run in runs)), differ) if differ else ""


def _all_options(runs: Sequence[RunRecords]) -> str:
    names = dict.fromkeys(name for run in runs for name in run.options)
    rows = [(name, *(run.options.get(name, "-") for run in runs)) for name in names]
    heading = ("option", *(run.name for run in runs))
    return _folded("The whole configuration", heading, rows)


def _folded(title: str, heading: Iterable[str], rows: Sequence[Iterable[Any]]) -> str:
    """A long table behind its title."""
    return f"<details><summary>{title}</summary>{table(heading, rows, whole=True)}</details>" if rows else ""


def _thinned(runs: Sequence[RunRecords]) -> str:
    """What was done to long runs to keep the page small."""
    said = [f"{run.name}: {run.metrics.num_steps:,} steps" for run in runs if run.metrics.per > 1]
    return f'<p class="note">Many steps are drawn as means of neighbours ({escape("; ".join(said))}).</p>' if said else ""


def _further(runs: Sequence[RunRecords], metrics: Mapping[str, Metric], groups: Mapping[str, Sequence[str]]) -> str:
    """The curves of all other metrics, each group folded away under its heading; those of no group are a user's own."""
    charts = further_plots(runs, metrics)
    grouped = {name for names in groups.values() for name in names}
    own = [name for name in charts if name not in grouped]
    parts = []
    for heading, names in {"The user's own": own, **groups}.items():
        found = [charts[name] for name in names if name in charts]
        if found:
            label = f"{escape(heading)}: {len(found)} further curve{'s'[: len(found) > 1]}"
            opened = " open" if names is own else ""
            parts.append(f'<details{opened}><summary>{label}</summary><div class="charts">{"".join(found)}</div></details>')
    return "".join(parts)


def _evaluations(runs: Sequence[RunRecords]) -> str:
    """One table: every evaluation with what it has gained since the set's first, and at the end against the first run."""
    rows = []
    for run in runs:
        of_set: dict[str, list[dict[str, Any]]] = {}
        for row in run.evaluations:
            of_set.setdefault(row["set"], []).append(row)
        for name, all_of_it in of_set.items():
            first, last = all_of_it[0], all_of_it[-1]
            for row in all_of_it:
                gained = _gain(run, first, run, row) if row is not first else ""
                base = next((e for e in reversed(runs[0].evaluations) if e["set"] == name), None)
                against = _gain(runs[0], base, run, row) if run is not runs[0] and row is last and base is not None else ""
                mean, error = _shown(row)
                tokens = f"{row['completion_tokens_mean']:.1f}"
                rows.append((run.name, row["step"], name, mean, error, gained, *([against] if len(runs) > 1 else []), tokens))
    if not rows:
        return ""
    versus = [f"last, against {runs[0].name}"] if len(runs) > 1 else []
    heading = ("run", "after step", "set", "mean", "± s.e.", "since the first", *versus, "tokens")
    note = "± is a standard error over problems; of a difference, each problem is compared with itself"
    return f'{table(heading, rows)}<p class="note">{note}.</p>'


def _gain(base: RunRecords, before: Mapping[str, Any], run: RunRecords, after: Mapping[str, Any]) -> str:
    """The difference of two evaluations of a set, with its error where problems are on record."""
    found = difference(base.problems, before["step"], run.problems, after["step"], after["set"])
    if found is None and None not in (before["mean"], after["mean"]):
        found = after["mean"] - before["mean"], None
    if found is None:
        return "-"
    scale, unit = (1.0, "") if after["measure"] == "reward" else (100.0, " points")
    form = "{:.3f}" if after["measure"] == "reward" else "{:.1f}"
    gained = f"{'+' if found[0] >= 0 else '-'}{form.format(abs(found[0]) * scale)}"
    return gained + (f" ± {form.format(found[1] * scale)}" if found[1] is not None else "") + unit


def _problems(run: RunRecords) -> str:
    """Of each set: a picture of every problem over the evaluations, and those most often answered wrong with an answer."""
    parts = []
    for name in run.problems.sets:
        problems = run.problems.hardest(name)
        if not problems:
            continue
        parts.append(f"<h3>{escape(run.name)}: {escape(name)}</h3>{_picture(problems)}")
        steps = sorted({step for problem in problems for step in problem.means})
        wrong = [problem for problem in problems if problem.mean < 1][:MOST_WRONG]
        rows = [
            (
                f"<pre>{escape(problem.text)}</pre>",
                escape(problem.answer),
                *(f"{problem.means[step]:.2f}" if step in problem.means else "-" for step in (steps[0], steps[-1])),
                f"{problem.mean:.2f}",
                f"<pre>{escape(problem.worst)}</pre>",
            )
            for problem in wrong
        ]
        heading = ("problem", "right answer", "first", "last", "mean", "worst answer of the last evaluation")
        if rows:
            parts.append(f"<p>Most often wrong; mean reward over seeds:</p>{_cells(heading, rows)}")
    return "".join(parts)


def _picture(problems: Sequence[Problem]) -> str:
    """A row for each problem, the hardest at the top, a column for each evaluation, darker the better it was answered."""
    steps = sorted({step for problem in problems for step in problem.means})
    chosen = _spread(steps, MOST_EVALUATIONS)
    shown = _spread(problems, MOST_PROBLEMS)
    low = min(0.0, *(value for problem in shown for value in problem.means.values()))
    high = max(1.0, *(value for problem in shown for value in problem.means.values()))
    width, left, top = max(14, min(40, 480 // len(chosen))), 8, 18
    height = max(3, min(14, 420 // len(shown)))
    across, down = left + width * len(chosen) + 8, top + height * len(shown) + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {down}" style="width:{across}px;max-width:100%" '
        f'font-family="sans-serif" font-size="10" role="img" aria-label="every problem at every evaluation">'
    ]
    for column, step in enumerate(chosen):
        if column % -(-len(chosen) * 30 // (width * len(chosen))) == 0:
            parts.append(f'<text x="{left + width * column}" y="12" fill="#222222">{step}</text>')
    for row, problem in enumerate(shown):
        cells = [
            f'<rect x="{left + width * column}" y="{top + height * row}" width="{width - 1}" height="{height - (height > 4)}" '
            f'fill="#0072b2" fill-opacity="{0.08 + 0.92 * (problem.means[step] - low) / (high - low):.2f}"/>'
            for column, step in enumerate(chosen)
            if step in problem.means
        ]
        values = ", ".join(f"{step}: {problem.means[step]:.2f}" for step in chosen if step in problem.means)
        parts.append(f"<g><title>{escape(problem.text[:300])}\n{values}</title>{''.join(cells)}</g>")
    left_out = f"; {len(shown)} of {len(problems)} problems, evenly chosen" if len(shown) < len(problems) else ""
    fewer = f"; {len(chosen)} of {len(steps)} evaluations" if len(chosen) < len(steps) else ""
    legend = "A row is a problem, the hardest at the top; a column is an evaluation, by its step"
    legend += "; the stronger its colour, the better"
    note = f"{legend}{left_out}{fewer}."
    return "".join([*parts, "</svg>", f'<p class="note">{note}</p>'])


def _spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of them, the first and the last among them, as evenly as may be."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _answers(runs: Sequence[RunRecords]) -> str:
    rows = [
        (
            *(escape(str(cell)) for cell in (run.name, row["set"], row["step"], row.get("answer", ""))),
            *(f"<pre>{escape(str(row[name])[:4000])}</pre>" for name in ("problem", "text")),
        )
        for run in runs
        for row in run.answers.rows()
    ]
    return _cells(("run", "set", "step", "right answer", "problem", "answer at temperature 0"), rows) if rows else ""


def _predicted(run: RunRecords) -> str:
    """What a forecast says of each part of a step beside what was measured."""
    found = run.predicted
    if found is None:
        return ""
    note = f'<p class="note">{escape(run.name)}: {escape(found.note)}</p>'
    if not found.parts:
        return note
    means = f'<p class="note">Measured are means of {found.num_steps} steps, from step {found.first_step} on.</p>'
    return f"{table(HEADING, found.rows())}{note}{means}"


def _verdict(run: RunRecords) -> str:
    if run.proof is None:
        return ""
    wrong = ' class="wrong"' if run.proof.contradiction is not None else ""
    said = escape(run.proof.sentence())
    return f"<li{wrong}><b>{escape(run.name)}</b>: {said}; {run.metrics.num_steps} steps on record</li>"


def table(heading: Iterable[str], rows: Sequence[Iterable[Any]], *, whole: bool = False) -> str:
    """A table of texts; of very many rows, unless `whole`, the first and the last, with what was left out between."""
    left_out = len(rows) - MOST_ROWS if len(rows) > MOST_ROWS + 1 and not whole else 0
    cells = [[escape(str(cell)) for cell in row] for row in rows]
    if left_out:
        half = MOST_ROWS // 2
        cells = [*cells[:half], [f"… {left_out:,} more …"], *cells[-half:]]
    return _cells(heading, cells)


def _cells(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of what is HTML already."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heading)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _shown(row: Mapping[str, Any]) -> tuple[str, str]:
    """Mean and standard error; a dash for what is not known."""
    form = "{:.3f}" if row["measure"] == "reward" else "{:.1%}"
    mean, error = (form.format(row[key]) if row[key] is not None else "-" for key in ("mean", "standard_error"))
    return mean, error
