"""Weights that engines take in the middle of responses (sync.in_flight), at moments of a logical clock: whatever is delayed, and
wherever the run is cut, every bit is what it is without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_commands import Make, written

pytestmark = pytest.mark.timeout(1800)
SCHEDULES = 50


def test_a_real_engine_under_random_delays_evaluations_and_resumes_gives_the_same_bits(
    run_config: Make, tmp_path: Path
) -> None:
    """One engine with the run's own loop around it: fifty schedules against the one without delays."""
    options = ["sync.sync_interval=1", "sync.lookahead=3", "sync.in_flight=true", "run.steps=6", "sampling.max_tokens=24"]
    options += ["data.prompts_per_step=3", "algorithm.samples_per_prompt=3", "inference.max_concurrent=12"]
    probe = [sys.executable, str(Path(__file__).with_name("in_flight_probe.py"))]
    run = subprocess.run(
        [*probe, written(run_config(*options), tmp_path), str(SCHEDULES)], capture_output=True, text=True, timeout=1200
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    found = json.loads(run.stdout.split("RESULT ")[1])
    assert found["equal"] == SCHEDULES
    assert found["resumed"] > SCHEDULES and found["evaluated"] > SCHEDULES
    assert found["most_versions"] == 3 and found["texts_hold"]
    assert all(set(versions) <= set(range(max(0, step - 3), max(1, step))) for step, versions in enumerate(found["versions"]))
