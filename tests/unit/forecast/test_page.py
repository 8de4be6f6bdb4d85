"""The page of a plan: lanes that say what the replay says, and a document that holds and fetches nothing else."""

from __future__ import annotations

from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from engine import cli
from engine.config.load import load_config
from engine.forecast.constants import Constants
from engine.forecast.page import interval_lanes, memory_lanes
from engine.forecast.seconds import Forecaster, Inputs, assumed_workload
from engine.observe.gantt import Bar, Lane, lanes
from engine.run.spec import resolve

ROOT = Path(__file__).parents[3]


class Open(HTMLParser):
    """Tags that are open."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in ("meta", "input", "path", "rect", "line", "circle"):
            self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "rect", "line", "circle"):
            assert self.tags.pop() == tag


def test_the_lanes_of_an_interval_add_up_to_the_steps():
    overrides = [f"model.path={ROOT}/configs/models/llama-3.1-8b", "data.prompts_per_step=8", "run.steps=40"]
    config = load_config(ROOT / "configs/scale/llama-3.1-8b-4x4.toml", [*overrides, "checkpoint.every=10"])
    spec = resolve(config, digests=False)
    found = Forecaster(Inputs(spec, Constants(), assumed_workload(spec), 0.25, 139 << 30))
    played, steps, trained = found.interval()
    assert steps == range(10, 20), "the last whole interval of those that are replayed"
    of = {lane.name: lane.bars for lane in interval_lanes(played, steps, trained)}
    chosen = played.steps[10:20]
    length = chosen[-1].end - chosen[0].start
    assert sum(bar.end - bar.start for bar in of["trainer"]) == pytest.approx(sum(s.train + s.host for s in chosen))
    assert [bar.label for bar in of["weight sync"]] == ["version 10"]
    assert of["weight sync"][0].end == pytest.approx(0.25 + 0.05)
    assert {f"engine {number}" for number in range(4)} <= of.keys()
    busy = sum(bar.end - bar.start for number in range(4) for bar in of[f"engine {number}"]) / 4
    assert busy == pytest.approx(sum(end - start for e in played.engines for start, end in e.stretches) / 4 / 2, rel=0.25)
    assert [bar.label for bar in of["rewards"]] == [f"step {step}" for step in range(10, 20)]
    for bars in of.values():
        assert all(0 <= bar.start < bar.end <= length * (1 + 1e-9) for bar in bars)
        assert all(before.end <= after.start + 1e-9 for before, after in pairwise(bars)), "one at a time"


def test_bars_lie_where_their_numbers_say():
    svg = lanes("what", "s", [Lane("a <lane>", (Bar(1.0, 3.0, "k", "long enough"), Bar(3.0, 5.0, "m")))], limit=9.0)
    assert 'x="140.0"' in svg and f'width="{(900 - 154) / 8 * 2 - 0.6:.1f}"' in svg
    assert "a &lt;lane&gt;" in svg and "long enough: 2 s, from 1 to 3" in svg and ">long enough<" in svg
    assert "stroke-dasharray" in svg and lanes("nothing", "s", []).count("<rect") == 1


def test_memory_stands_side_by_side():
    memory = {"devices": [{"name": "one", "components": {"weights": 2 << 30, "none": 0, "rest": 1 << 30}}]}
    assert memory_lanes(memory)[0].bars == (Bar(0, 2, "weights", "", "one, weights"), Bar(2, 3, "rest", "", "one, rest"))


@pytest.mark.parametrize("override", ["sync.sync_interval=10", "sft.checkpoint_out=x"])
def test_the_command_writes_a_page(override, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    page = tmp_path / "plan.html"
    small = ["data.prompts_per_step=4", "run.steps=20", "checkpoint.every=10"]
    assert cli.main(["plan", "configs/scale/llama-3.1-8b-4x4.toml", *small, override, "--html", str(page)]) == 0
    html = page.read_text("utf-8")
    parsed = Open()
    parsed.feed(html)
    assert parsed.tags == [] and parsed.fetched == [] and "<script" not in html
    assert ("Timeline" in html) == (override != "sft.checkpoint_out=x") and "Memory of each kind of device" in html
    assert cli.main(["plan", "configs/scale/llama-3.1-8b-4x4.toml", "--optimize", "--gpus", "8", "--html", str(page)]) == 2
    assert "--html must be left out with --optimize" in capsys.readouterr().err
