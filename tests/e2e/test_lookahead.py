"""Runs that sample ahead (sync.lookahead): the version of every rollout is the one that the schedule says, and its log-probs
are of those weights, recomputed in float64. A run that is killed and goes on from a checkpoint ends with every bit of an
undisturbed one, although the rollouts of its next steps come from weights which that checkpoint does not hold. Nightly: other
intervals, and two intervals ahead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.core.segments import segments_of
from engine.rollouts.ahead import AHEAD
from tests.e2e.test_commands import Make, rollouts, rows, semion, started, tensors, until, untimed, written
from tests.e2e.test_golden_check import agreed

pytestmark = pytest.mark.timeout(1800)
NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize(
    ("interval", "lookahead", "num_steps"),
    [
        (2, 1, 6),
        pytest.param(1, 1, 4, marks=NIGHTLY),
        pytest.param(4, 1, 10, marks=NIGHTLY),
        pytest.param(1, 2, 5, marks=NIGHTLY),
    ],
)
def test_a_run_that_samples_ahead_is_proven_and_resumes_bit_for_bit(
    run_config: Make, tmp_path: Path, interval: int, lookahead: int, num_steps: int
) -> None:
    options = [
        *(f"sync.sync_interval={interval}", f"sync.lookahead={lookahead}", "sync.reference=follow"),
        *(f"run.steps={num_steps}", f"checkpoint.every={interval}", f"evaluation.every={interval + 1}"),
        *("checkpoint.keep=9", "inference.engines=2", "algorithm.nll_weight=0.2"),
    ]
    whole, other = run_config(*options, directory="whole"), run_config(*options, directory="killed")
    semion("train", written(whole, tmp_path))
    ledger, versions = rollouts(whole), [max(0, t // interval - lookahead) * interval for t in range(num_steps)]
    assert [(row["step"], row["version"]) for row in ledger[:: len(ledger) // num_steps]] == list(enumerate(versions))
    proof = semion("report", str(whole.run_directory), "--output", str(tmp_path / "report.html"))
    oldest = max(step - version for step, version in enumerate(versions))
    assert f"sampled {lookahead} interval" in proof and f"staleness 0..{oldest}, proven from {len(ledger)} rollouts" in proof
    recomputed = agreed(whole, *range(0, num_steps, interval))
    assert max(recomputed["rollout log-probs"]) < 1e-4, "the older weights, which are on disk, are those that sampled"
    file, log = written(other, tmp_path), tmp_path / "log"
    with started(file, log) as run:
        saved = other.run_directory / "checkpoints" / "LATEST"
        until(lambda: saved.exists() and (other.run_directory / "metrics.jsonl").read_text().count("\n") > interval, run, log)
        run.kill()
    checkpoint = other.run_directory / "checkpoints" / saved.read_text()
    kept = [json.loads(line.data)["step"] for segment in segments_of(checkpoint / AHEAD) for line in segment.lines()]
    done = int(checkpoint.name.removeprefix("step_"))
    assert sorted(set(kept)) == list(range(done, min(done + lookahead * interval, num_steps)))
    semion("train", file, "--resume", "auto")
    assert rollouts(other) == ledger
    assert untimed(rows(other, "metrics.jsonl")) == untimed(rows(whole, "metrics.jsonl"))
    assert rows(other, "evaluations.jsonl") == rows(whole, "evaluations.jsonl")
    assert tensors(other) == tensors(whole)
