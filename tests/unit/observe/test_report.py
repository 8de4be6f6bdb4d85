"""The report: charts whose points lie where their values say, a regime proven from records and refuted by any altered row,
and a page that fetches nothing and can be read whatever the names in it.
"""

import json
import math
import re
import shutil
import tracemalloc
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import cli
from engine.config.load import dump_config, load_config
from engine.config.schedules.base import Schedule
from engine.config.schedules.fairseq2 import Fairseq2
from engine.config.schedules.paper import Paper
from engine.config.schedules.pilot import Pilot
from engine.core.errors import DataError
from engine.core.jsonl import read_rows
from engine.core.metrics import Metric
from engine.core.segment_writer import SegmentWriter
from engine.core.segments import segments_of
from engine.observe import charts
from engine.observe.charts import Line, Mark, Point, chart
from engine.observe.curves import further_plots, plots
from engine.observe.live import LiveRun
from engine.observe.problems import Problems, difference
from engine.observe.reading import MOST_ROWS, NUM_ANSWERS, MetricRows, read_run
from engine.observe.regime import prove
from engine.observe.report import page
from engine.run.metrics import catalogue, groups

METRICS = catalogue()
SVG = "{http://www.w3.org/2000/svg}"
REQUIRED = """
[run]
directory = "unused"
steps = 12
[model]
path = "seed"
[data]
train = "train.jsonl"
prompts_per_step = 1
[algorithm]
samples_per_prompt = 3
[sync]
sync_interval = 4
[trainer]
microbatch_tokens = 8192
"""
SCHEDULE = Paper(4, "never", 12, 16)


# -- charts


def test_a_run_that_replays_has_no_regime_and_contradicts_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "loss": 1.0}) + "\n")
    (tmp_path / "rollouts.jsonl").touch()
    proof = prove(tmp_path, SCHEDULE, "pairs.jsonl")
    assert (proof.contradiction, proof.holds) == (None, False)
    assert proof.sentence() == "replayed pairs.jsonl: nothing was sampled, so there is no regime to prove"
    assert prove(tmp_path, SCHEDULE).contradiction is not None


def drawn(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def curves(svg: str) -> list[list[tuple[float, float]]]:
    """The points of every curve in pixels."""
    paths = [element.get("d", "") for element in drawn(svg).iter(f"{SVG}path") if element.get("stroke-width") == "1.5"]
    return [[(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)] for path in paths]


values = st.floats(-1e6, 1e6).map(lambda value: round(value, 3))


@given(st.lists(st.tuples(st.integers(0, 500), values), min_size=2, max_size=40, unique_by=lambda point: point[0]))
def test_points_lie_where_their_values_say(points):
    """Whatever the values: inside the frame, and the map from values to pixels is linear, upwards in y."""
    points = sorted(points)
    (curve,) = curves(chart("title", "unit", [Line("a", tuple(Point(x, y) for x, y in points))]))
    assert len(curve) == len(points)
    assert all(charts.LEFT <= x <= charts.WIDTH - charts.RIGHT for x, _ in curve)
    assert all(charts.TOP <= y <= charts.PLOT_HEIGHT - charts.BOTTOM for _, y in curve)
    for axis, sign in ((0, 1), (1, -1)):
        low, high = (choose(range(len(points)), key=lambda i: points[i][axis]) for choose in (min, max))
        span = points[high][axis] - points[low][axis]
        if span > 1e-6:
            scale = (curve[high][axis] - curve[low][axis]) / span
            assert scale * sign > 0
            for value, pixel in zip(points, curve, strict=True):
                assert pixel[axis] == pytest.approx(curve[low][axis] + scale * (value[axis] - points[low][axis]), abs=0.2)


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6))
def test_ticks_are_a_few_round_numbers_in_order_inside_the_axis(low, span):
    ticks = charts.ticks(low, low + span)
    assert 2 <= len(ticks) <= 9
    assert all(low - span * 1e-6 <= tick <= low + span * (1 + 1e-6) for tick in ticks)
    gaps = [after - before for before, after in pairwise(ticks)]
    assert all(gap == pytest.approx(gaps[0], rel=1e-6) for gap in gaps)
    assert float(f"{gaps[0]:.6e}".split("e")[0]) in (1.0, 2.0, 5.0)


def test_error_bars_and_dots_of_few_points():
    svg = chart("v", "", [Line("a", (Point(0, 1.0, 0.5), Point(4, 2.0)))])
    bars = [element for element in drawn(svg).iter(f"{SVG}path") if "h6" in element.get("d", "")]
    assert len(bars) == 1, "a point without an error has no bar"
    assert len(list(drawn(svg).iter(f"{SVG}circle"))) == 2


def test_many_points_are_averaged_in_blocks():
    many = tuple(Point(float(x), float(x % 2)) for x in range(4 * charts.MOST_POINTS))
    (curve,) = curves(chart("v", "", [Line("a", many)]))
    assert len(curve) == charts.MOST_POINTS
    assert len({y for _, y in curve}) == 1, "every block of four has the mean 1/2"
    assert "<circle" not in chart("v", "", [Line("a", many)])


def test_every_line_is_told_apart_and_named_and_nothing_breaks_the_document():
    names = ["plain", "a < b & c", '"quoted"', "x" * 60]
    svg = chart("<title> & more", "tokens", [Line(n, (Point(0, 1), Point(1, i))) for i, n in enumerate(names)])
    said = [element.text for element in drawn(svg).iter(f"{SVG}text")]
    assert {"<title> & more (tokens)", *names} <= set(said)
    bottom = max(float(element.get("y", 0)) for element in drawn(svg).iter(f"{SVG}text"))
    assert bottom < float(drawn(svg).get("height", 0)), "the legend fits"
    strokes = {
        (e.get("stroke"), e.get("stroke-dasharray"))
        for colour in range(3)
        for dash in range(3)
        for e in drawn(chart("t", "", [Line("a", (Point(0, 1),), colour, dash)])).iter(f"{SVG}path")
        if e.get("stroke-width") == "1.5"
    }
    assert len(strokes) == 9


@pytest.mark.parametrize("lines", [[], [Line("none", ())], [Line("one", (Point(3.0, 7.0),))]])
def test_a_chart_of_nothing_or_of_one_point_is_still_one(lines):
    assert drawn(chart("empty", "", lines)).tag == f"{SVG}svg"


# -- the regime


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def records(schedule: Schedule, steps: int, group: int = 3) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rollouts, metrics) as a run of this schedule writes them."""
    rollouts = [{"step": t, "version": schedule.version(t)} for t in range(steps) for _ in range(group)]
    metrics: list[dict[str, Any]] = []
    for t in range(steps):
        synced = {"sync_seconds": 0.5} if schedule.sync_due(t) else {}
        lengths = {"completion_tokens_mean": 10.0 + t, "incorrect_tokens_mean": None if t % 2 else 3.0}
        metrics.append({"step": t, "staleness": float(schedule.staleness(t)), "reward_mean": t / 10} | lengths | synced)
    return rollouts, metrics


def write_run(folder: Path, schedule: Schedule = SCHEDULE, steps: int = 12) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.toml").write_text(REQUIRED, encoding="utf-8")
    (folder / "config.toml").write_text(dump_config(load_config(folder / "run.toml")), encoding="utf-8")
    rollouts, metrics = records(schedule, steps)
    write(folder / "rollouts.jsonl", rollouts)
    write(folder / "metrics.jsonl", metrics)
    return folder


intervals = st.one_of(st.just("never"), st.integers(1, 6))
schedule_fields = intervals, st.just("never"), st.integers(1, 15), st.integers(1, 5)
ahead = st.builds(Paper, st.integers(1, 6), *schedule_fields[1:], st.integers(1, 3))
schedules = st.one_of(st.builds(Paper, *schedule_fields), st.builds(Fairseq2, *schedule_fields), ahead)


@given(schedules, st.data())
def test_the_records_of_a_run_prove_its_regime_and_any_altered_version_refutes_it(tmp_path_factory, schedule, data):
    folder = tmp_path_factory.mktemp("run")
    steps = data.draw(st.integers(1, schedule.num_steps))
    rollouts, metrics = records(schedule, steps)
    write(folder / "rollouts.jsonl", rollouts)
    write(folder / "metrics.jsonl", metrics)
    proof = prove(folder, schedule)
    assert proof.holds
    ages = [schedule.staleness(t) for t in range(steps)]
    assert proof.staleness == (min(ages), max(ages))
    assert (proof.num_rollouts, proof.num_steps) == (3 * steps, steps)
    place = data.draw(st.integers(0, len(rollouts) - 1))
    rollouts[place]["version"] += data.draw(st.sampled_from([-1, 1, 7]))
    write(folder / "rollouts.jsonl", rollouts)
    contradiction = prove(folder, schedule).contradiction
    assert contradiction is not None and contradiction.startswith(f"rollouts.jsonl line {place + 1} must have version")
    assert "is contradicted: rollouts.jsonl line" in prove(folder, schedule).sentence()


IN_FLIGHT = Paper(2, "never", 12, 4, 2, True)


def in_flight_records(schedule: Schedule, steps: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """As `records`, but each rollout has tokens of all versions that it may have, or of the first or the last one alone."""
    rollouts, metrics = records(schedule, steps)
    for place, row in enumerate(rollouts):
        versions = schedule.versions(row["step"])
        own = (versions, versions[:1], versions[-1:])[place % 3]
        spans = [[version, place % 4 + 1] for version in own]
        row |= {"version": own[0], "spans": spans, "prompt_id": "p", "num_tokens": sum(count for _, count in spans)}
    for row in metrics:
        own_spans = [one["spans"] for one in rollouts if one["step"] == row["step"]]
        spans = [span for one in own_spans for span in one]
        row |= {"staleness": sum((row["step"] - v) * count for v, count in spans) / sum(count for _, count in spans)}
        row |= {"staleness_max": float(max(row["step"] - v for v, _ in spans))}
        row |= {"updated_in_flight": sum(len(one) > 1 for one in own_spans) / len(own_spans)}
    return rollouts, metrics


def test_with_updates_in_flight_the_regime_is_proven_token_by_token(tmp_path):
    rollouts, metrics = in_flight_records(IN_FLIGHT, 12)
    write(tmp_path / "rollouts.jsonl", rollouts)
    write(tmp_path / "metrics.jsonl", metrics)
    proof = prove(tmp_path, IN_FLIGHT, rollouts_per_step=3)
    assert proof.holds
    assert proof.sentence() == (
        "s = 2 (semi-online), sampled 2 intervals ahead with weights updated in flight: staleness 0..5, proven from 36 "
        "rollouts, token by token, of 12 steps"
    )
    assert not prove(tmp_path, replace(IN_FLIGHT, updates_in_flight=False)).holds, "an answer of one version has no spans"


@pytest.mark.parametrize(
    ("file", "line", "change", "said"),
    [
        ("rollouts.jsonl", 31, {"version": 4, "spans": [[4, 1]]}, "line 31 must have spans of versions 6, 8, rising from"),
        ("rollouts.jsonl", 31, {"spans": [[6, 1], [10, 1]]}, "at step 10; found [[6, 1], [10, 1]]"),
        ("rollouts.jsonl", 31, {"version": 8, "spans": [[8, 1], [6, 1]]}, "must have spans"),
        ("rollouts.jsonl", 31, {"version": 8}, "must have spans"),
        ("rollouts.jsonl", 31, {"spans": [[6, 0]]}, "must have spans"),
        ("rollouts.jsonl", 31, {"spans": [6]}, "must have spans"),
        ("rollouts.jsonl", 31, {"spans": None}, "must have spans"),
        ("metrics.jsonl", 11, {"staleness": 4.0}, "line 11 must have staleness 3."),
        ("rollouts.jsonl", 31, {"spans": [[6, 9]], "num_tokens": 9}, "metrics.jsonl line 11 must have staleness 3."),
        ("rollouts.jsonl", 31, {"spans": [[6, 9]]}, "line 31 must have spans of as many tokens as `num_tokens` says"),
        ("rollouts.jsonl", 31, {"num_tokens": 10}, "line 31 must have spans of as many tokens as `num_tokens` says, 10; found"),
        ("rollouts.jsonl", 31, {"num_tokens": None}, "as `num_tokens` says, None; found"),
        (
            "metrics.jsonl",
            11,
            {"staleness_max": 99.0},
            "line 11 must have staleness_max 4 at step 10, that of its oldest token",
        ),
        ("metrics.jsonl", 11, {"staleness_max": None}, "line 11 must have staleness_max 4 at step 10"),
        ("metrics.jsonl", 11, {"updated_in_flight": 0.77}, "line 11 must have updated_in_flight 0.33"),
        ("metrics.jsonl", 11, {"updated_in_flight": None}, "line 11 must have updated_in_flight 0.33"),
    ],
)
def test_with_updates_in_flight_the_first_token_that_contradicts_is_named(tmp_path, file, line, change, said):
    both = dict(zip(("rollouts.jsonl", "metrics.jsonl"), in_flight_records(IN_FLIGHT, 12), strict=True))
    both[file][line - 1] |= change
    for name, rows in both.items():
        write(tmp_path / name, rows)
    contradiction = prove(tmp_path, IN_FLIGHT).contradiction
    assert contradiction is not None and said in contradiction


@pytest.mark.parametrize(
    ("file", "line", "change", "said"),
    [
        ("metrics.jsonl", 6, {"staleness": 0.0}, "line 6 must have staleness 1 at step 5; found 0.0"),
        ("metrics.jsonl", 6, {"staleness": None}, "line 6 must have staleness 1 at step 5; found None"),
        ("metrics.jsonl", 6, {"sync_seconds": 0.1}, "line 6 must tell of no weight sync at step 5; found a"),
        ("metrics.jsonl", 6, {"step": 6}, "line 6 must be of step 5; found step 6"),
        (
            "metrics.jsonl",
            6,
            {"staleness_max": 9.0},
            "line 6 must have no staleness_max, for no weights were updated in flight",
        ),
        ("metrics.jsonl", 6, {"updated_in_flight": 0.5}, "line 6 must have no updated_in_flight"),
        ("rollouts.jsonl", 2, {"x": 1, "spans": [[0, 5]]}, "line 2 must have version 0 at step 0; found spans [[0, 5]]"),
        ("rollouts.jsonl", 36, {"step": 12}, "line 36 must be of steps 0..11; found step 12"),
        ("rollouts.jsonl", 2, {"version": None}, "line 2 must have version 0 at step 0; found None"),
        ("rollouts.jsonl", 2, {"step": 1}, "one step after another; found out of its place step 0"),
    ],
)
def test_the_first_row_that_contradicts_is_named(tmp_path, file, line, change, said):
    run = write_run(tmp_path / "run")
    rows = [json.loads(text) for text in (run / file).read_text("utf-8").splitlines()]
    rows[line - 1] |= change
    write(run / file, rows)
    contradiction = prove(run, SCHEDULE).contradiction
    assert contradiction is not None and contradiction.startswith(file)
    assert said in contradiction


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ('{"step": 0, "version": 0, "x": 1, "spans": [[0, 5]]}', "found spans [[0, 5]]"),
        ('{"step": 0, "version": 0, "x": 1, "version" : 7}', "found 7"),
        ('{"step": 0, "version": 0, "x": 1, "step": 3}', "one step after another; found out of its place step 3"),
        ('{"step": 0, "version": 0, "\\u0073pans": [[0, 5]]}', "found spans [[0, 5]]"),
        ('{"step": 0, "version": 0, "text": "\\"spans\\": [[0, 5]], \\\\u0073"}', None),
    ],
)
def test_what_a_row_says_behind_its_beginning_counts_too(tmp_path, written, said):
    """Where a name comes twice JSON has the last one, and so have those who replay the rollouts."""
    run = write_run(tmp_path / "run")
    first, _, *rest = (run / "rollouts.jsonl").read_text("utf-8").splitlines()
    (run / "rollouts.jsonl").write_text("\n".join([first, written, *rest]) + "\n", encoding="utf-8")
    contradiction = prove(run, SCHEDULE).contradiction
    assert contradiction is None if said is None else said in str(contradiction)


def test_a_missing_sync_and_missing_rollouts_contradict_and_a_step_under_way_does_not(tmp_path):
    run = write_run(tmp_path / "run")
    rollouts, metrics = records(SCHEDULE, 12)
    write(run / "metrics.jsonl", metrics[:11])
    assert prove(run, SCHEDULE).contradiction is None, "the rollouts of a step are written before it is trained on"
    write(run / "metrics.jsonl", metrics)
    write(run / "rollouts.jsonl", rollouts[:33])
    assert "them end before step 11" in str(prove(run, SCHEDULE).contradiction)
    del metrics[8]["sync_seconds"]
    write(run / "metrics.jsonl", metrics)
    assert "line 9 must tell of a weight sync at step 8; found no" in str(prove(run, SCHEDULE).contradiction)


def piloted(steps: int, num_steps: int = 24) -> tuple[Pilot, list[dict[str, Any]], list[dict[str, Any]]]:
    """(a regime that decides its intervals, the rollouts and the metrics of a run that it drove so far)."""
    schedule, gaps = Pilot(8, "never", num_steps, 16, bound=0.03), list[dict[str, Any]]()
    for t in range(steps):
        gap = None if t == 4 else 0.004 * schedule.staleness(t) * (1 if t < 12 else 3)
        gaps.append({"log_prob_gap_mean": gap, "interval_steps": float(schedule.observe(t, gap))})
    rollouts, metrics = records(schedule, steps)
    return schedule, rollouts, [row | gap for row, gap in zip(metrics, gaps, strict=True)]


@pytest.mark.parametrize("steps", [1, 13, 24])
def test_a_regime_that_measures_is_proven_by_deciding_it_anew_from_the_metrics(tmp_path, steps):
    """The schedule that is given has decided nothing, as of a configuration that was read; asked twice, it says the same."""
    grown, rollouts, metrics = piloted(steps)
    write(tmp_path / "rollouts.jsonl", rollouts)
    write(tmp_path / "metrics.jsonl", metrics)
    proof = prove(tmp_path, replace(grown), rollouts_per_step=3)
    assert proof.holds and proof == prove(tmp_path, grown, rollouts_per_step=3)
    assert proof.regime == grown.regime
    if steps == 24:
        assert proof.sentence() == (
            "s = auto (1 to 8 in 7 intervals, log_prob_gap_mean at most 0.03, s at most 8): staleness 0..7, proven from 72 "
            "rollouts of 24 steps"
        )


def test_rollouts_that_came_after_the_metrics_were_read_contradict_nothing(tmp_path):
    """A run goes on while it is read: of steps beyond the last interval decided the metrics say nothing yet."""
    grown, rollouts, metrics = piloted(24)
    write(tmp_path / "rollouts.jsonl", rollouts)
    for known in (1, 4, 13):
        write(tmp_path / "metrics.jsonl", metrics[:known])
        assert prove(tmp_path, replace(grown)).contradiction is None, known


@pytest.mark.parametrize(
    ("line", "change", "said"),
    [
        (1, {"interval_steps": None}, "metrics.jsonl line 1 must have interval_steps 1 at step 0"),
        (9, {"interval_steps": 7.0}, "line 9 must have interval_steps 8 at step 8, as log_prob_gap_mean of the steps before"),
        (3, {"log_prob_gap_mean": 0.05}, "line 4 must have interval_steps 1 at step 3"),  # another would have been decided
    ],
)
def test_an_interval_that_does_not_follow_from_the_metrics_is_named(tmp_path, line, change, said):
    grown, _, metrics = piloted(24)
    metrics[line - 1] |= change
    write(tmp_path / "metrics.jsonl", metrics)
    write(tmp_path / "rollouts.jsonl", records(grown, 24)[0])
    contradiction = prove(tmp_path, grown).contradiction
    assert contradiction is not None and said in contradiction


def test_the_sentence_says_the_regime(tmp_path):
    run = write_run(tmp_path / "run")
    assert prove(run, SCHEDULE).sentence() == "s = 4 (semi-online): staleness 0..3, proven from 36 rollouts of 12 steps"
    shifted = Fairseq2(4, "never", 12, 16)
    sentence = prove(write_run(tmp_path / "shifted", shifted), shifted).sentence()
    assert sentence.startswith("s = 4 (semi-online, counted as in fairseq2): staleness 0..3, proven")
    regimes: list[tuple[int | Literal["never"], str]] = [(1, "online"), ("never", "offline")]
    for s, name in regimes:
        schedule = Paper(s, "never", 12, 16)
        assert f"s = {s} ({name}): staleness" in prove(write_run(tmp_path / name, schedule), schedule).sentence()
    (run / "rollouts.jsonl").unlink()
    write(run / "metrics.jsonl", [{"step": 0, "nll_mean": 2.0}])
    assert prove(run, SCHEDULE).sentence() == "s = 4 (semi-online): no rollouts on record", "as of a supervised run"
    assert not prove(run, SCHEDULE).holds
    (run / "rollouts.jsonl").write_text('{"step": 0, "version": 0}\nbroken\n')
    with pytest.raises(DataError, match=r"rollouts\.jsonl, line 2: must"):
        prove(run, SCHEDULE)


# -- the page and the command


EVALUATIONS = [
    {"step": step, "set": name, "measure": measure, "mean": mean, "standard_error": 0.01, "length_normalized_reward": normal}
    | {"completion_tokens_mean": 12.0, "records": ["long"]}
    for step, mean in ((0, 0.25), (12, 0.75))
    for name, measure, normal in (("sums", "accuracy", None), ("chats", "reward", -mean))
]


class Reader(HTMLParser):
    """Collects a page's words and whatever it would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [tag] * (tag in ("script", "link", "img", "iframe"))
        self.fetched += [name for name, value in attrs if name in ("src", "href", "onload", "onclick") or "url(" in str(value)]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def run(tmp_path):
    folder = write_run(tmp_path / "first <run> & co")
    write(folder / "evaluations.jsonl", EVALUATIONS)
    write(folder / "guard.jsonl", [{"step": 7, "what": "length", "text": "length collapsed: <b>1</b>"}])
    write(folder / "restarts.jsonl", [{"step": 4, "lost_steps": 2, "restart": 1, "text": "the process of <engine> 0 ended"}])
    warned = {"unix_seconds": 1.0, "process": "trainer rank 0", "text": "<gloo>"}
    (folder / "warnings.jsonl").write_text("".join(json.dumps(warned | {"count": count}) + "\n" for count in (1, 10)))
    return folder


def test_the_page_holds_everything_and_fetches_nothing(run):
    reader = Reader()
    reader.feed(page([read_run(run, run.name, SCHEDULE)], METRICS))
    assert reader.fetched == []
    words = " ".join(reader.words)
    for expected in (run.name, "staleness 0..3, proven from 36 rollouts", "length collapsed: <b>1</b>", "75.0%", "0.750"):
        assert expected in words
    assert "over the step's judged rollouts" in words, "what the curves are"
    assert "next-token entropy" not in words, "what is not on record has no chart and no explanation"


JUDGED = '{"step": 1, "set": "a", "measure": "reward", "mean": 0.5, "standard_error": null, "completion_tokens_mean": 3}'


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("metrics.jsonl", '{"step": 0, "loss": "x"}', "line 1: `loss` must be a number or null; found 'x'"),
        ("metrics.jsonl", '{"step": 0}\n{"step": 1, "loss": [1]}', "line 2: `loss` must be a number or null; found [1]"),
        ("metrics.jsonl", '{"step": 0, "loss": NaN}', "line 1: `loss` must be a number or null; found nan"),
        ("metrics.jsonl", '{"step": 0, "loss": 1' + "0" * 400 + "}", "line 1: `loss` must be a number or null; found 1"),
        ("metrics.jsonl", '{"step": 0, "loss": true}', "line 1: `loss` must be a number or null; found True"),
        ("evaluations.jsonl", '{"step": 1}', "line 1: `set` must be there"),
        ("evaluations.jsonl", '{"step": 1, "set": "a", "measure": "reward"}', "line 1: `mean` must be there"),
        ("evaluations.jsonl", JUDGED.replace("0.5", '"x"'), "line 1: `mean` must be a number or null; found 'x'"),
        ("samples.jsonl", '{"step": 1, "set": "a"}', "line 1: `problem` must be there"),
        ("guard.jsonl", '{"step": 1}', "line 1: `text` must be there"),
        ("restarts.jsonl", '{"step": 1, "text": "x"}', "line 1: `lost_steps` must be there"),
        ("warnings.jsonl", '{"a": 1}', "line 1: `process` must be there"),
        ("warnings.jsonl", "[]", "line 1: `process` must be there"),
        ("summary.json", "[]", "must be an object with an object of versions; found []"),
        ("summary.json", '{"versions": 1}', "must be an object with an object of versions"),
    ],
)
def test_records_that_somebody_else_wrote_are_told_by_file_and_line(run, name, text, told):
    (run / name).write_text(text + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(name) + ".*" + re.escape(told)):
        read_run(run, run.name, SCHEDULE)
    live = LiveRun(run, run.name, {})
    with pytest.raises(DataError, match=re.escape(name)):
        live.look()


def test_what_a_proof_holds_does_not_grow_with_the_steps(tmp_path):
    """Four times as many steps, in four times as many segments: rows of metrics and of rollouts go by one after another."""

    def peak(steps: int) -> int:
        run, schedule = tmp_path / str(steps), Paper(2, "never", steps, 4, 2, True)
        rollouts, metrics = in_flight_records(schedule, steps)
        run.mkdir()
        write(run / "metrics.jsonl", [row | {f"metric_{n}": n / 7 for n in range(60)} for row in metrics])
        writer = SegmentWriter(run / "rollouts", {}, segment_bytes=20_000)
        for step in range(steps):
            writer.append(step, [row | {"text": "x" * 1000} for row in rollouts if row["step"] == step], {})
        writer.close()
        assert len(segments_of(run / "rollouts")) > steps / 10
        prove(run, schedule)  # loads its libraries
        tracemalloc.start()
        proof = prove(run, schedule)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert proof.holds and proof.num_rollouts == 3 * steps
        return size

    assert peak(200) < 1.5 * peak(50)


def test_the_page_says_what_each_part_of_a_restart_took(run):
    lost = {"step": 4, "lost_steps": 2, "restart": 1, "text": "gone", "unix_seconds": 7.5, "silent_seconds": 12.25}
    phase = {"process": "trainer rank 0", "name": "resume", "about": "", "after_seconds": 0.0, "seconds": 3.5}
    write(run / "restarts.jsonl", [lost | {"ending_seconds": 1.5}, lost | {"unix_seconds": 8.5}])
    write(run / "startup.jsonl", [{"step": 4, "unix_seconds": 7.5, "seconds": 10.0, "phases": [phase]}])
    made = page([read_run(run, run.name, SCHEDULE)], METRICS)
    cells = "".join(f"<td>{cell}</td>" for cell in ("12.2", "1.5", "0.0", "0.0", "3.5", "0.0", "0.0", "6.5", "11.5"))
    assert "<th>notice, s</th>" in made and cells in made
    assert "<td>-</td>" * 9 in made, "the second was lost again before it reached a step"


def test_curves_are_those_of_the_records(run):
    made = plots([read_run(run, "a", SCHEDULE)], METRICS)
    assert made.keys() == {
        *("reward", "lengths", "staleness", "sync"),
        *("validation_accuracy", "validation_reward", "validation_length_normalized"),
    }
    assert [len(curve) for curve in curves(made["lengths"])] == [12, 6], "steps without a value are left out"
    assert [len(curve) for curve in curves(made["sync"])] == [3]
    heights = [y for _, y in curves(made["reward"])[0]]
    assert heights == sorted(heights, reverse=True), "a reward that grows goes up"
    assert "h6" in made["validation_accuracy"], "error bars"
    assert "h6" not in made["validation_length_normalized"]
    write(run / "evaluations.jsonl", [row | {"standard_error": None} for row in EVALUATIONS])
    unsure = read_run(run, "a", SCHEDULE)
    assert "h6" not in plots([unsure], METRICS)["validation_accuracy"], "of one problem: the value without an error"
    assert "<td>75.0%</td><td>-</td>" in page([unsure], METRICS)


def test_a_metric_of_the_users_own_has_a_curve(run):
    own = Metric("residual_mean", "what is left", unit="nats", title="residual")
    rows = [json.loads(text) for text in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    write(run / "metrics.jsonl", [row | {"residual_mean": 1.0} for row in rows])
    records = [read_run(run, "a", SCHEDULE)]
    made = further_plots(records, METRICS | {own.name: own})
    said = {element.text for element in drawn(made["residual_mean"]).iter(f"{SVG}text")}
    assert "Residual (nats)" in said
    about = [element.text for element in drawn(made["residual_mean"]).iter(f"{SVG}title")]
    assert "residual_mean: what is left" in about, "under the pointer"
    assert "residual_mean" in further_plots(records, METRICS), "one that nothing declares too, such as a part of a reward"
    html = page(records, METRICS | {own.name: own}, groups())
    assert "The user's own: 1 further curve" in html.replace("&#x27;", "'")


def test_several_runs_share_charts_a_colour_each(run):
    both = [read_run(run, name, SCHEDULE) for name in ("one", "two")]
    svg = plots(both, METRICS)["lengths"]
    assert len(curves(svg)) == 4
    said = {element.text for element in drawn(svg).iter(f"{SVG}text")}
    assert {"one all", "one incorrect", "two all", "two incorrect"} <= said
    strokes = [
        (element.get("stroke"), element.get("stroke-dasharray"))
        for element in drawn(svg).iter(f"{SVG}path")
        if element.get("stroke-width") == "1.5"
    ]
    assert len(set(strokes)) == 4
    assert len({colour for colour, _ in strokes}) == 2


def test_the_command_writes_page_plots_and_figures(run, tmp_path, capsys):
    figures, folder, other = tmp_path / "figures.json", tmp_path / "plots", tmp_path / "second"
    shutil.copytree(run, other)
    told = (run / "config.toml").read_text("utf-8")
    (other / "config.toml").write_text(told.replace("learning_rate = 1e-06", "learning_rate = 0.5"), "utf-8")
    assert cli.main(["report", str(run), str(other), "--json", str(figures), "--plots", str(folder)]) == 0
    assert (run / "report.html").exists()
    assert {path.name for path in folder.iterdir()} >= {"reward.svg", "validation_accuracy.svg"}
    assert all(drawn(path.read_text("utf-8")) is not None for path in folder.iterdir())
    document = json.loads(figures.read_text("utf-8"))
    assert len(document["runs"]) == 2
    first = document["runs"][0]
    assert first["regime"]["holds"] is True
    assert first["regime"]["staleness"] == [0, 3]
    assert "records" not in first["evaluations"][0]
    assert first["guard"][0]["what"] == "length"
    assert first["restarts"][0]["lost_steps"] == 2
    assert [(row["text"], row["count"]) for row in first["warnings"]] == [("<gloo>", 10)]
    said = capsys.readouterr().out
    assert "proven from 36 rollouts" in said and "of 12 steps; 1 restart\n" in said
    html = (run / "report.html").read_text("utf-8")
    assert "<td>4</td><td>2</td><td>the process of &lt;engine&gt; 0 ended</td>" in html
    assert "<td>trainer rank 0</td><td>10</td><td>&lt;gloo&gt;</td>" in html
    assert "<tr><td>optimizer.learning_rate</td><td>1e-06</td><td>0.5</td></tr>" in html, "how the two differ"
    differs = html[html.index("What differs") : html.index("<h2>Regime")]
    assert differs.count("<tr><td>") == 1, "and nothing else differs"
    assert cli.main(["report", str(run), f"{run}/../{run.name}"]) == 3
    assert "more than once: name it once" in capsys.readouterr().err


def test_a_page_tells_what_was_run_and_what_it_answers_before_and_after(run, tmp_path):
    rows = read_rows(run / "metrics.jsonl")
    timed = [row | {"unix_seconds": 1.8e9 + 1800 * row["step"], "generation_tokens": 5e5} for row in rows]
    write(run / "metrics.jsonl", timed)
    write(
        run / "samples.jsonl",
        [
            {"step": step, "set": "held", "problem": f"<{n}>+1", "answer": str(n + 1), "text": f"so {n} at {step}"}
            for step in (0, 4, 12)
            for n in range(9)
        ],
    )
    (run / "summary.json").write_text(json.dumps({"versions": {"vllm": "0.32"}}))
    options = {"model.path": "models/llama", "run.steps": 12, "algorithm.loss": "dpo"}
    record = read_run(run, "a", SCHEDULE, None, options)
    assert dict(record.facts) == {
        "model.path": "models/llama",
        "algorithm.loss": "dpo",
        "steps done": "12 of 12",
        "first step done": "2027-01-15 08:00 UTC",
        "from the first step to the last": "5:30:00",
        "tokens sampled": "6,000,000",
        "versions": "vllm 0.32",
    }
    html = page([record], METRICS)
    said = {f"so {n} at {step}" for n in range(NUM_ANSWERS) for step in (0, 12)}
    assert set(re.findall(r"so \d at \d+", html)) == said, "of some problems, the first and the last answer"
    assert "<pre>&lt;0&gt;+1</pre>" in html
    hours = drawn(plots([record], METRICS)["reward_over_hours"])
    told = [element.text or "" for element in hours.iter(f"{SVG}title")]
    assert told[1].startswith("a, hours 0: ") and told[-1].startswith("a, hours 5.5: "), "under the pointer"


def test_many_points_have_a_smooth_line_over_a_pale_one():
    noisy = tuple(Point(float(x), 10.0 + (-1) ** x) for x in range(600))
    svg = drawn(chart("v", "", [Line("a", noisy)]))
    pale, smooth, smoother = (
        path for path in svg.iter(f"{SVG}path") if path.get("stroke-width") in ("1.5", "2") and "h22" not in path.get("d", "")
    )
    assert (pale.get("class"), smooth.get("class"), smoother.get("class")) == ("raw", "smooth", "smoother")
    assert smoother.get("display") == "none", "where no page says otherwise"
    assert pale.get("stroke-opacity") == "0.3"
    heights = [float(y) for _, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", smooth.get("d", ""))]
    assert max(heights[15:-15]) - min(heights[15:-15]) < 0.1 * (charts.PLOT_HEIGHT - charts.TOP - charts.BOTTOM)
    assert 100 <= len(list(svg.iter(f"{SVG}title"))) <= 120


def test_a_contradicted_regime_is_reported_with_an_exit_code_of_its_own(run, tmp_path, capsys):
    rows = [json.loads(text) for text in (run / "rollouts.jsonl").read_text("utf-8").splitlines()]
    rows[20]["version"] = 5
    write(run / "rollouts.jsonl", rows)
    output = tmp_path / "out" / "page.html"
    assert cli.main(["report", str(run), "--output", str(output), "--json", str(tmp_path / "f.json")]) == 1
    assert "line 21 must have version 4 at step 6; found 5" in capsys.readouterr().out
    assert 'class="wrong"' in output.read_text("utf-8")
    assert json.loads((tmp_path / "f.json").read_text("utf-8"))["runs"][0]["regime"]["holds"] is False


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 3
    assert "RUN must be the directory of a run" in capsys.readouterr().err


def test_the_records_of_a_run_that_goes_on_are_only_read(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "half a li')
    before = (run / "metrics.jsonl").read_bytes()
    assert read_run(run, "a", SCHEDULE).metrics.num_steps == 12
    assert (run / "metrics.jsonl").read_bytes() == before
    assert math.isclose(read_run(run, "a", SCHEDULE).metrics.rows()[11]["reward_mean"], 1.1)


# -- what a ledger lost


def test_a_ledger_that_lost_rows_proves_nothing_whichever_they_are(tmp_path):
    run = write_run(tmp_path / "run")
    rollouts, metrics = records(SCHEDULE, 12)
    assert prove(run, SCHEDULE, None, 3).sentence().endswith("proven from 36 rollouts of 12 steps")
    for place, step in ((35, 11), (4, 1)):
        write(run / "rollouts.jsonl", rollouts[:place] + rollouts[place + 1 :])
        assert prove(run, SCHEDULE).holds, "as far as versions tell"
        contradiction = prove(run, SCHEDULE, None, 3).contradiction
        assert contradiction == (
            f"rollouts.jsonl must hold 3 rollouts of each of 12 steps, 36 in all; found 2 of step {step}, 35 in all"
        )
    write(run / "metrics.jsonl", metrics[:11])
    write(run / "rollouts.jsonl", rollouts[:34])
    assert prove(run, SCHEDULE, None, 3).contradiction is None, "the rollouts of a step under way are being written"


def test_a_run_that_keeps_its_last_steps_is_proven_from_them_and_must_have_them(tmp_path):
    """In segments, of which full ones are packed."""
    run = write_run(tmp_path / "run")
    rollouts, _ = records(SCHEDULE, 12)
    (run / "rollouts.jsonl").unlink()
    writer = SegmentWriter(run / "rollouts", {}, segment_bytes=100)
    for step in range(12):
        writer.append(step, [row for row in rollouts if row["step"] == step], {})
    writer.close()
    there = segments_of(run / "rollouts")
    assert len(there) > 3 and there[0].is_packed
    assert prove(run, SCHEDULE, None, 3).sentence().endswith("proven from 36 rollouts of 12 steps")
    there[0].rows.unlink()
    lacking = there[1].first
    assert "must hold the rollouts of steps 0..11" in str(prove(run, SCHEDULE, None, 3).contradiction)
    told = f"proven from {36 - 3 * lacking} rollouts of {12 - lacking} steps; those of the first {lacking} are not kept"
    assert prove(run, SCHEDULE, None, 3, keep_steps=12 - lacking).sentence().endswith(told)
    assert "steps 0..11" in str(prove(run, SCHEDULE, None, 3, keep_steps=12).contradiction)


def test_the_report_holds_the_count_against_the_configuration(run, capsys):
    lines = (run / "rollouts.jsonl").read_bytes()
    (run / "rollouts.jsonl").write_bytes(lines[:-10])
    assert cli.main(["report", str(run)]) == 1
    assert "must hold 3 rollouts of each of 12 steps, 36 in all; found 2 of step 11, 35 in all" in capsys.readouterr().out


def test_a_run_without_a_step_is_no_report(run, capsys):
    (run / "metrics.jsonl").write_text("")
    (run / "rollouts.jsonl").write_text("")
    assert cli.main(["report", str(run)]) == 3
    assert "RUN must have a step on record; found none" in capsys.readouterr().err
    assert not (run / "report.html").exists()


# -- long runs, problems, marks


def test_a_long_run_is_kept_as_means_and_its_page_does_not_grow(run):
    kept = MetricRows()
    for step in range(50_000):
        kept.add({"step": step, "loss": step % 2, "generation_tokens": 2.0, "unix_seconds": 1e9 + step})
    rows = kept.rows()
    assert len(rows) <= MOST_ROWS + 2 and kept.per == 64
    assert (kept.num_steps, kept.tokens) == (50_000, 100_000.0)
    assert {row["loss"] for row in rows} == {0.5} and rows[0]["step"] == 31.5
    kept.add({"step": 25_000, "loss": 9.0})
    assert kept.rows() == rows, "a step that is done again has the same values"
    record = read_run(run, "a", SCHEDULE)
    record.metrics = kept
    html = page([record], METRICS)
    assert "Many steps are drawn as means of neighbours (a: 50,000 steps)" in html
    assert len(html) < 200_000


def judged(step, rewards):
    """An evaluation in which each problem has these rewards."""
    records = [
        {"prompt_id": f"p{n}", "problem": f"<{n}>+1", "answer": str(n), "reward": reward, "text": f"says {reward} at {step}"}
        for n, values in enumerate(rewards)
        for reward in values
    ]
    mean = sum(sum(values) / len(values) for values in rewards) / len(rewards)
    known = {"measure": "accuracy", "mean": mean, "standard_error": 0.1, "completion_tokens_mean": 9.0}
    return {"step": step, "set": "sums", "records": records, "length_normalized_reward": None, **known}


def test_the_gain_of_an_evaluation_is_over_problems_each_compared_with_itself():
    problems = Problems()
    problems.add(judged(0, [[0, 0], [1, 0], [1, 1]]))
    problems.add(judged(8, [[1, 0], [1, 0], [1, 1]]))
    gain, error = difference(problems, 0, problems, 8, "sums") or (0.0, None)
    assert gain == pytest.approx(1 / 6)
    assert error == pytest.approx(math.sqrt(((0.5 - 1 / 6) ** 2 + 2 * (1 / 6) ** 2) / 2 / 3))
    assert difference(problems, 0, problems, 9, "sums") is None
    assert [problem.text for problem in problems.hardest("sums")] == ["<0>+1", "<1>+1", "<2>+1"]


def test_the_page_has_one_table_of_evaluations_and_what_each_problem_came_to(run):
    write(run / "evaluations.jsonl", [judged(0, [[0, 0], [1, 0], [1, 1]]), judged(12, [[1, 0], [1, 0], [1, 1]])])
    html = page([read_run(run, name, SCHEDULE) for name in ("one", "two")], METRICS)
    assert "<td>one</td><td>12</td><td>sums</td><td>66.7%</td><td>10.0%</td><td>+16.7 ± 16.7 points</td>" in html
    assert "<td>+16.7 ± 16.7 points</td><td>+0.0 ± 0.0 points</td><td>9.0</td>" in html, "two against one, at the end"
    assert "<pre>&lt;0&gt;+1</pre></td><td>0</td><td>0.00</td><td>0.50</td><td>0.25</td><td><pre>says 0 at 12</pre>" in html
    assert "<pre>&lt;2&gt;+1</pre>" not in html, "always right"
    assert "&lt;1&gt;+1\n0: 0.50, 12: 0.50" in html, "each problem under the pointer"


def test_restarts_and_findings_stand_on_the_axis(run):
    svg = plots([read_run(run, "a", SCHEDULE)], METRICS)["reward"]
    told = [element.text or "" for element in drawn(svg).iter(f"{SVG}title")]
    assert "restart, step 4: the process of <engine> 0 ended" in told
    assert "guard, step 7: length collapsed: <b>1</b>" in told
    (mark,) = [
        element.get("d", "")
        for element in drawn(
            chart("t", "", [Line("a", (Point(0, 1), Point(10, 2)))], marks=[Mark(5, "x"), Mark(11, "y")])
        ).iter()
        if element.get("class") == "mark"
    ]
    middle = (charts.LEFT + charts.WIDTH - charts.RIGHT) / 2
    assert mark.startswith(f"M{middle - 5:.1f} "), "where the step is; one outside the axis is left out"


def test_very_many_warnings_are_not_all_on_the_page(run):
    warned = [{"unix_seconds": 1.0, "process": "engine 0", "text": f"odd {n}", "count": 1} for n in range(500)]
    (run / "warnings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in warned))
    html = page([read_run(run, "a", SCHEDULE)], METRICS)
    assert "odd 0<" in html and "odd 499<" in html and "odd 250<" not in html and "… 440 more …" in html


def test_a_record_of_an_evaluation_that_is_none_says_nothing_of_a_problem(run):
    (run / "evaluations.jsonl").write_text(
        JUDGED[:-1] + ', "records": [1, {"reward": 1}, {"prompt_id": "p", "reward": "x"}]}\n'
    )
    problems = read_run(run, run.name, SCHEDULE).problems
    assert problems.sets["a"].keys() == {"p"} and problems.sets["a"]["p"].means == {1: 0.0}
