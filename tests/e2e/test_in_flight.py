"""Weights that engines take in the middle of responses (sync.in_flight), at moments of a logical clock: whatever is delayed,
and wherever the run is cut, every bit is what it is without. Nightly: an interval of several steps, evaluated in its middle,
and a few runs of tools/probe_in_flight.py, of which docs/results.md has many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from engine.core.segments import segments_of
from engine.rollouts.paused import PAUSED
from tests.e2e.test_commands import PATIENCE_SECONDS, Make, rollouts, rows, semion, started, tensors, until, untimed, written
from tests.e2e.test_golden_check import agreed

pytestmark = pytest.mark.timeout(1800)
SCHEDULES = 50
DELAYS = Path(__file__).with_name("delays")
ROOT = Path(__file__).resolve().parents[2]


def kill(run: subprocess.Popen[bytes]) -> None:
    """Kills a command and all that it has started, as a machine that fails does."""
    for process in (psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    run.wait()


def test_a_real_engine_under_random_delays_evaluations_and_resumes_gives_the_same_bits(
    run_config: Make, tmp_path: Path
) -> None:
    """One engine with the run's own loop around it: fifty schedules against the one without delays."""
    options = ["sync.sync_interval=1", "sync.lookahead=3", "sync.in_flight=true", "run.steps=6", "sampling.max_tokens=24"]
    options += ["data.prompts_per_step=3", "algorithm.samples_per_prompt=3", "inference.max_concurrent=12"]
    probe = [sys.executable, str(Path(__file__).with_name("in_flight_probe.py"))]
    run = subprocess.run(
        [*probe, written(run_config(*options), tmp_path), str(SCHEDULES)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    found = json.loads(run.stdout.split("RESULT ")[1])
    assert found["equal"] == SCHEDULES
    assert found["resumed"] > SCHEDULES and found["evaluated"] > SCHEDULES
    assert found["most_versions"] == 3 and found["texts_hold"]
    assert found["decoding_steps"]["in flight"] < found["decoding_steps"]["drained"]
    assert all(set(versions) <= set(range(max(0, step - 3), max(1, step))) for step, versions in enumerate(found["versions"]))


@pytest.mark.parametrize(
    ("interval", "num_steps", "evaluated", "longest_delay_seconds"),
    [(1, 5, 2, 0.5), pytest.param(2, 9, 3, 2.0, marks=pytest.mark.nightly)],
)
def test_a_delayed_and_killed_run_is_bit_for_bit_the_undisturbed_one(
    run_config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interval: int,
    num_steps: int,
    evaluated: int,
    longest_delay_seconds: float,
) -> None:
    options = [
        *(f"sync.sync_interval={interval}", "sync.lookahead=2", "sync.in_flight=true", "sync.reference=follow"),
        *(f"run.steps={num_steps}", f"checkpoint.every={interval}", f"evaluation.every={evaluated}", "checkpoint.keep=9"),
        *("algorithm.loss=grpo", "algorithm.kl_weight=0.05", "sampling.max_tokens=24"),
        *("inference.engines=2", "inference.max_concurrent=6"),
    ]
    whole, other = run_config(*options, directory="whole"), run_config(*options, directory="delayed")
    semion("train", written(whole, tmp_path))
    ledger, schedule = rollouts(whole), whole.schedule
    allowed = {(step, version) for step in range(num_steps) for version in schedule.versions(step)}
    assert {(row["step"], version) for row in ledger for version, _ in row["spans"]} <= allowed
    assert any(len(row["spans"]) > 1 for row in ledger), "no response went on under new weights"
    told = rows(whole, "metrics.jsonl")
    assert max(row["updated_in_flight"] for row in told) > 0
    proof = semion("report", str(whole.run_directory), "--output", str(tmp_path / "report.html"))
    assert f"with weights updated in flight: staleness 0..{int(max(row['staleness_max'] for row in told))}" in proof
    assert f"proven from {len(ledger)} rollouts, token by token, of {num_steps} steps" in proof
    recomputed = agreed(whole, *range(0, num_steps, interval))
    assert max(recomputed["rollout log-probs"]) < 1e-4, "each token's log-prob is that of the weights it is said to be of"
    monkeypatch.setenv("SEMION_TEST_DELAY", str(longest_delay_seconds))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(DELAYS), *filter(None, [os.environ.get("PYTHONPATH")])]))
    file, log = written(other, tmp_path), tmp_path / "log"
    with started(file, log) as run:
        saved = other.run_directory / "checkpoints" / "LATEST"
        until(lambda: saved.exists() and (other.run_directory / "metrics.jsonl").read_text().count("\n") > interval, run, log)
        kill(run)
    checkpoint = other.run_directory / "checkpoints" / saved.read_text()
    paused = [json.loads(line.data) for segment in segments_of(checkpoint / PAUSED) for line in segment.lines()]
    assert any(row["num_tokens"] for row in paused)
    with started(file, log, "--resume", "auto") as run:
        assert run.wait(PATIENCE_SECONDS) == 0, log.read_text()[-4000:]
    assert sum(row["train_seconds"] for row in rows(other, "metrics.jsonl")) > longest_delay_seconds / 4, "nothing was delayed"
    assert rollouts(other) == ledger
    assert untimed(rows(other, "metrics.jsonl")) == untimed(told)
    assert rows(other, "evaluations.jsonl") == rows(whole, "evaluations.jsonl")
    assert tensors(other) == tensors(whole)


@pytest.mark.nightly
def test_runs_with_engines_that_stay_waits_and_kills_are_all_the_undisturbed_one(run_config: Make, tmp_path: Path) -> None:
    file = written(run_config("algorithm.loss=grpo"), tmp_path)
    probe = [sys.executable, "-m", "tools.probe_in_flight", file, str(tmp_path / "runs")]
    run = subprocess.run([*probe, "--runs", "3", "--killed", "0.7"], capture_output=True, text=True, timeout=1700, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    found = json.loads(run.stdout.split("RESULT ")[1])
    assert found["equal"] == found["runs"] == 3
    assert found["kills"] > 0 and found["waited_seconds"] > 10 and found["most_versions"] > 1
