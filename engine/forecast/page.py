"""A plan as a page in the report's style: who does what when in one interval, where a step's seconds go, the memory of every
kind of device. One HTML file without scripts; it works nothing out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Many
from html import escape
from typing import Any

from engine.capacity.kv_cache import GIB
from engine.config.load import RunConfig
from engine.forecast.played import Played
from engine.forecast.seconds import Forecast, Regime
from engine.forecast.telling import binding, hosts_table, intervals_table, parts_table, run_table
from engine.forecast.training import TrainingStep
from engine.observe.gantt import Bar, Lane, lanes
from engine.observe.report import document, table

MOST_ENGINES = 6  # of a picture
TRAINED = {  # what a step's training is drawn as, in the order of time
    "reference, split groups": ("reference", "again"),
    "forward and backward": ("compute", "imbalance", "pipeline", "tensor_parallel"),
    "gradients, optimizer": ("gradients", "optimizer", "fixed"),
}


def interval_lanes(played: Played, steps: range, trained: Many[TrainingStep]) -> list[Lane]:
    """Trainer, sync, engines and rewards from the first of these steps to the last; what is partly outside is cut off there."""
    first, last = played.steps[steps.start].start, played.steps[steps.stop - 1].end
    found = [Lane("trainer", tuple(_training(played, steps, trained)))]
    of_lane: dict[str, list[Bar]] = {"sync": [], "rewards": []}
    for span in played.spans:
        if span.lane in of_lane:
            of_lane[span.lane].append(Bar(span.start, span.end, KINDS[span.lane], span.name, f"{span.lane}, {span.name}"))
    found.append(Lane("weight sync", tuple(of_lane["sync"])))
    for number, engine in enumerate(played.engines[:MOST_ENGINES]):
        found.append(Lane(f"engine {number}", tuple(_sampling(engine.stretches, engine.finished))))
    found.append(Lane("rewards", tuple(of_lane["rewards"])))
    return [Lane(lane.name, tuple(_cut(lane.bars, first, last))) for lane in found]


KINDS = {"sync": "weight sync", "rewards": "rewards"}


def _training(played: Played, steps: range, trained: Many[TrainingStep]) -> Iterable[Bar]:
    for number in steps:
        step, parts = played.steps[number], trained[number % len(trained)].seconds
        clock = step.end - step.train - step.host
        if step.host:
            yield Bar(clock, clock + step.host, "handing out, packing", "", f"step {number}, handing out and packing")
        clock += step.host
        for kind, names in TRAINED.items():
            seconds = step.train * sum(getattr(parts, name) for name in names) / parts.total
            if seconds:
                yield Bar(clock, clock + seconds, kind, f"step {number}", f"step {number}, {kind}")
            clock += seconds


def _sampling(stretches: Many[tuple[float, float]], finished: Mapping[int, float]) -> Iterable[Bar]:
    """Stretches cut where the last response of a step is in; one that completes a single step has its name."""
    ends = sorted((moment, step) for step, moment in finished.items())
    for begin, end in stretches:
        start = begin
        within = [(moment, step) for moment, step in ends if start < moment <= end + 1e-9]
        for moment, step in within:
            label = f"step {step}" if len(within) == 1 else ""
            yield Bar(start, moment, "sampling", label, f"sampling, until step {step} is complete here")
            start = moment
        if start < end - 1e-9:
            yield Bar(start, end, "sampling", "", "sampling")


def _cut(bars: Iterable[Bar], first: float, last: float) -> Iterable[Bar]:
    for bar in bars:
        start, end = max(bar.start, first), min(bar.end, last)
        if end > start:
            yield Bar(start - first, end - first, bar.kind, bar.label, bar.about)


def memory_lanes(memory: Mapping[str, Any]) -> list[Lane]:
    """A bar for each kind of device, of its components, in GiB."""
    found = []
    for device in memory["devices"]:
        bars, held = [], 0.0
        for name, size in device["components"].items():
            if size:
                bars.append(Bar(held, held + size / GIB, name, "", f"{device['name']}, {name}"))
                held += size / GIB
        found.append(Lane(device["name"], tuple(bars)))
    return found


def plan_page(
    name: str,
    figures: Mapping[str, Any],
    config: RunConfig,
    forecast: Forecast | None,
    intervals: Many[Forecast],
    picture: tuple[Played, range, Many[TrainingStep]] | None,
    constants: Many[tuple[str, ...]],
    trust: str,
) -> str:
    """The HTML document. `figures`: `planned`'s; `picture`: `Forecaster.interval`; `constants`: their table, heading first."""
    memory = figures["memory"]
    sections = []
    if forecast is not None and picture is not None:
        played, steps, trained = picture
        drawn = lanes("One interval, as replayed", "s", interval_lanes(played, steps, trained))
        shown = min(len(played.engines), MOST_ENGINES)
        told = f"Steps {steps.start} to {steps.stop - 1}; {shown} of {config.inference.engines} engines, cut where a step ends."
        binds = "".join(f"<li>{share:.0%}: {escape(text)}</li>" for share, text in binding(forecast, config)[:4])
        sections += [
            ("", f"<p>{forecast.step_seconds:.2f} s a step, {escape(forecast.regime)}. What takes it:</p><ul>{binds}</ul>"),
            ("Timeline", f'<div class="wide">{drawn}</div><p class="note">{told}</p>'),
            ("A step", table(*_split(parts_table(forecast)))),
        ]
    bars = lanes("Memory of each kind of device", "GiB", memory_lanes(memory), limit=memory["gpu_bytes"] / GIB)
    fits = "fits" if memory["fits"] else "does not fit"
    spare = f"The fullest, {memory['fullest']}, {fits}: {memory['spare_bytes'] / GIB:.1f} GiB to spare; the line is the GPU's."
    sections.append(("Memory", f'<div class="wide">{bars}</div><p class="note">{escape(spare)}</p>'))
    sections.append(("Nodes and disk", table(*_split(hosts_table(figures)))))
    if forecast is not None:
        sections += [
            ("The run", table(*_split(run_table(forecast)))),
            (
                "Other intervals",
                table(*_split(intervals_table(intervals, Regime.asked(config)))),
            ),
        ]
    folded = f"<details><summary>Constants, with their sources</summary>{table(*_split(constants))}</details>"
    sections.append(("How far to trust it", "".join(f"<p>{escape(line)}</p>" for line in trust.splitlines()) + folded))
    return document(f"Plan of {name}", sections)


def _split(rows: Many[tuple[str, ...]]) -> tuple[tuple[str, ...], Many[tuple[str, ...]]]:
    return rows[0], rows[1:]
