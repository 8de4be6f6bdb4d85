"""Pictures of the display from a run's records: what was told by then stands in them, and nothing is fetched from elsewhere."""

import json
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

from engine.config.load import dump_config
from tests import builders
from tools import screens


def activity(what: str, unix_seconds: float, seconds: float, about: str = "", where: str = "trainer rank 0") -> dict[str, Any]:
    counted = {"done": 5, "total": 5, "unit": "problems"} if what == "evaluation" else {"done": None, "total": None, "unit": ""}
    return {
        "kind": "activity",
        "what": what,
        "where": where,
        "about": about,
        "unix_seconds": unix_seconds,
        "seconds": seconds,
        **counted,
    }


@pytest.fixture
def run(tmp_path) -> Path:
    """The records of a run of three steps that began at 1000."""
    (tmp_path / "config.toml").write_text(dump_config(builders.config(tmp_path, run={"steps": 3})))
    phases = [{"name": "engine", "process": "engine 0", "about": "", "after_seconds": 5.0, "seconds": 15.0}]
    figures = {"measure": "accuracy", "mean": 0.5, "standard_error": 0.1, "num_problems": 5, "num_seeds": 2, "num_too_long": 0}
    records: dict[str, list[dict[str, Any]]] = {
        "startup": [{"step": 0, "unix_seconds": 1000.0, "seconds": 31.0, "phases": phases}],
        "events": [
            activity("ray", 1005.0, 5.0),
            {"kind": "note", "text": "data.train: 20 prompts", "unix_seconds": 1010.0},
            activity("engine", 1020.0, 15.0, where="engine 0"),
            activity("evaluation", 1030.0, 9.0, "step 0 on sums"),
        ],
        "metrics": [{"step": n, "unix_seconds": 1031.0 + n, "step_seconds": 1.0, "loss": 0.5 - 0.1 * n} for n in range(3)],
        "evaluations": [{"step": 0, "set": "sums"} | figures],
        "samples": [{"step": 0, "set": "sums", "problem": "1+1", "answer": "2", "text": "$2$"}],
    }
    for name, rows in records.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def text_of(svg: str) -> str:
    return "".join(xml.etree.ElementTree.fromstring(svg).itertext()).replace("\xa0", " ")


@pytest.mark.parametrize("theme", screens.THEMES)
def test_a_picture_has_what_was_told_by_then(run, theme):
    events = screens.happenings(run)
    times = screens.moments(run, events)
    start = screens.picture(run, events, times["start"], 80, 24, theme, "semion train")
    assert "Ray is up, 5.0 s" in text_of(start) and "engine 0 is loading, 15 s" in text_of(start)
    assert "data.train: 20 prompts" in text_of(start) and "held-out" not in text_of(start)
    running = screens.picture(run, events, times["running"], 80, 24, theme, "semion train")
    for words in ("engine 0 is up, 15 s", "held-out accuracy 50.0%", "? 1+1", "> $2$, right: 2", "3/3", "0.3000"):
        assert words in text_of(running), words
    assert "http" not in start.replace('xmlns="http://www.w3.org/2000/svg"', "").replace("https://www.textualize.io", "")
