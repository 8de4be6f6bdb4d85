"""A run that decides its own intervals (sync.sync_interval = "auto"): s moves with what is measured, the report decides every
interval anew from the records, and a run that is killed and goes on from a checkpoint ends with every bit of an undisturbed
one.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from tests.e2e.test_commands import Make, rollouts, rows, semion, started, tensors, until, untimed, written
from tests.e2e.test_golden_check import agreed

pytestmark = pytest.mark.timeout(1800)
BOUND, MOST, STEPS = 0.2, 4, 9


def test_a_run_that_decides_its_intervals_is_proven_and_resumes_bit_for_bit(run_config: Make, tmp_path: Path) -> None:
    """Two data-parallel ranks, which must decide alike. Every sync has a checkpoint, so that what its weights sampled can be
    recomputed in float64."""
    options = [
        *("sync.sync_interval=auto", f"sync.auto_bound={BOUND}", f"sync.auto_most={MOST}", "algorithm.loss=grpo"),
        *(f"run.steps={STEPS}", "checkpoint.every=1", "checkpoint.keep=9", "evaluation.every=4", "trainer.data_parallel=2"),
    ]
    whole, other = run_config(*options, directory="whole"), run_config(*options, directory="killed")
    semion("train", written(whole, tmp_path))
    metrics = rows(whole, "metrics.jsonl")
    lengths = [int(row["interval_steps"]) for row in metrics]
    syncs = [row["step"] for row in metrics if "sync_seconds" in row]
    assert len({*lengths}) > 1 and all(lengths[sync] == after - sync for sync, after in pairwise(syncs))
    saved = [int(path.name.removeprefix("step_")) for path in sorted((whole.run_directory / "checkpoints").glob("step_*"))]
    assert saved == [*syncs[1:], STEPS] and len(saved) < STEPS
    assert max(agreed(whole, *syncs)["rollout log-probs"]) < 1e-4, "the weights of the last sync are those that sampled"
    proof = semion("report", str(whole.run_directory), "--output", str(tmp_path / "report.html"))
    assert re.search(rf"s = auto \(1 to \d in {len(syncs)} intervals, .*: staleness 0..\d, proven from", proof), proof
    assert "Sync interval (steps)" in (tmp_path / "report.html").read_text("utf-8"), "s over the steps is drawn"
    file, log = written(other, tmp_path), tmp_path / "log"
    with started(file, log) as run:
        latest = other.run_directory / "checkpoints" / "LATEST"
        until(lambda: latest.exists() and (other.run_directory / "metrics.jsonl").read_text().count("\n") > 3, run, log)
        run.kill()
    assert int(latest.read_text().removeprefix("step_")) < STEPS
    semion("train", file, "--resume", "auto")
    assert rollouts(other) == rollouts(whole)
    assert untimed(rows(other, "metrics.jsonl")) == untimed(metrics)
    assert tensors(other) == tensors(whole)
    semion("report", str(other.run_directory), "--output", str(tmp_path / "other.html"))
