"""The tool that holds the planner against real runs, without a run: its configurations can be read and planned, its figures are
worked out as they should be."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("validate_plan", ROOT / "tools/validate_plan.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["validate_plan"] = module
    spec.loader.exec_module(module)
    return module


def test_every_configuration_is_one_and_no_two_are_equal(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "CONFIG", tmp_path / "base.toml")
    (tmp_path / "base.toml").write_text(tool.BASE, "utf-8")
    told = [tool.made(model, [*settings, "run.directory=x"]) for model, settings in tool.CASES.values()]
    assert len(told) >= 12 and len({config.model_dump_json() for config in told}) == len(told)
    assert tool.made("small", [*tool.KNOWN_BY, "run.directory=x"]) not in told, "what the machine is known by is none of them"
    assert {config.algorithm.loss for config in told} == {"dpo", "grpo"}
    assert {config.sync.sync_interval for config in told} == {1, 4, "never"} and {c.sync.lookahead for c in told} == {0, 1}
    for axis in ("tensor_parallel", "pipeline_parallel", "data_parallel"):
        assert {getattr(config.trainer, axis) for config in told} == {1, 2}
    four = tool.made("small", [*tool.S4, "run.directory=x", "sync.lookahead=1"])
    assert tool.interval_means([1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0, 5.0, 9.0], four) == [2.5, 5.0]


def test_figures_and_picks(tool):
    rows = [
        {"name": name, "model": "small", "loss": loss, "predicted": said, "measured": was, "least": was}
        for name, loss, said, was in (("a", "dpo", 1.0, 2.0), ("b", "dpo", 1.5, 1.5), ("c", "grpo", 1.1, 1.0))
    ]
    found = tool.summary(rows)
    assert found["median_error"] == pytest.approx(0.1) and found["largest_error"] == 0.5
    assert found["picks"] == {"small dpo": {"said": "a", "fastest": "b", "slower_by": pytest.approx(1 / 3)}}
    assert "said a, was b (+33%)" in found["sentence"] and json.dumps(found)
    assert "| a | 1.000 | 2.000 | 2.000 | 0.50 |" in tool.table(rows)
    assert tool.picture(rows).count("<circle") >= 3
