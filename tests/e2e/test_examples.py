"""The examples as a reader would run them, on the tiny world: each is a script of at most 30 lines that trains for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config.load import RunConfig
from engine.observe.rollouts import heads
from tests.e2e.test_commands import written

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def example(name: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_an_example_is_short() -> None:
    found = {path.name: len(path.read_text("utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert found.keys() == {"own_loss.py", "own_reward.py", "sweep.py"}
    assert max(found.values()) <= 30, found


@pytest.mark.nightly  # two runs; what s does is in tests/e2e/test_commands.py
def test_a_sweep_over_s(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = run_config("run.steps=2")
    file = written(config, tmp_path)
    said = example("sweep", file, "1", "never")
    for s in ("1", "never"):
        assert f"s = {s}: 2 steps" in said
        folder = Path(f"{config.run.directory}-s{s}")
        assert json.loads((folder / "summary.json").read_text())["steps"] == 2
    versions = [{head.version for head in heads(Path(f"{config.run.directory}-s{s}") / "rollouts")} for s in ("1", "never")]
    assert versions == [{0, 1}, {0}]


def test_a_reward_of_ones_own(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = run_config()
    said = example("own_reward", str(tmp_path / "base.toml"), "run.steps=2")
    assert "step 1: reward " in said
    lines = (config.run_directory / "rollouts" / "00000000.jsonl").read_text().splitlines()
    rewards = {json.loads(line)["reward"] for line in lines}
    assert len(rewards) > 1 and rewards <= {0.0, 0.1, 1.0, 1.1}


def test_a_loss_of_ones_own(semi_online: tuple[RunConfig, str], run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """On rollouts that are there already, so that nothing is sampled."""
    run_config()
    base, ledger = tmp_path / "base.toml", semi_online[0].run_directory / "rollouts"
    base.write_text("".join(line for line in base.read_text().splitlines(True) if not line.startswith("held_out")))
    replay = ["sync.sync_interval=never", f"data.replay={ledger}"]
    said = example("own_loss", str(base), "run.steps=2", *replay)  # a file that sets no option of another loss
    assert "step 1: loss " in said
