"""tools/slurm/train.sbatch under a stand-in for Slurm, with everything else real: two Ray nodes, trainer ranks on one and
engines on the other, a signal, a requeue, and the weights of a run on one node; the same of two nodes that each have a trainer
rank and an engine, which take turns."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config import RunConfig
from tests.e2e import fake_slurm
from tests.e2e.test_commands import FINAL, ONLINE, SEMI_ONLINE, Make, rows, tensors, untimed, written

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "tools/slurm/train.sbatch"
pytestmark = pytest.mark.timeout(900)


def until(condition: Callable[[], bool], job: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for something the job does; fails with its log when it ends before, or takes five minutes."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline and job.poll() is None, log.read_text()[-4000:]
        time.sleep(0.05)


def sent_alike(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the bytes of a sync: on one machine each engine takes its own, between machines one copy is passed on."""
    return [{key: value for key, value in row.items() if key != "sync_mebibytes"} for row in untimed(metrics)]


def test_a_job_on_two_nodes_is_preempted_requeued_and_ends_with_the_weights_of_one_node(
    semi_online: tuple[RunConfig, str], run_config: Make, tmp_path: Path
) -> None:
    whole, _ = semi_online
    config = run_config(*SEMI_ONLINE, "cluster.gpus_per_node=2", directory="job")
    environment, log = fake_slurm.install(tmp_path / "slurm"), tmp_path / "log"
    command = ["sbatch", "--nodes=2", SCRIPT, written(config, tmp_path), "algorithm.beta=0.1"]
    record = tmp_path / "slurm" / "scontrol"

    def submit() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log.open("ab"), stderr=subprocess.STDOUT)

    job = submit()
    until(lambda: "starting 2 trainer ranks" in log.read_text(), job, log)
    job.send_signal(signal.SIGUSR1)  # what --signal sends to the batch shell ahead of the time limit
    assert job.wait(timeout=300) == 75, log.read_text()[-4000:]
    assert "asked to stop: saved after 2 steps" in log.read_text()
    assert record.read_text() == f"requeue {environment['SLURM_JOB_ID']}\n"
    assert (config.run_directory / "checkpoints" / "LATEST").read_text() == "step_00000002"
    assert submit().wait(timeout=300) == 0, log.read_text()[-4000:]
    assert len(record.read_text().splitlines()) == 1, "a finished job is not requeued"
    assert rows(config, "rollouts.jsonl") == rows(whole, "rollouts.jsonl")
    assert sent_alike(rows(config, "metrics.jsonl")) == sent_alike(rows(whole, "metrics.jsonl"))
    assert (config.run_directory / FINAL).read_bytes() == (whole.run_directory / FINAL).read_bytes()


def test_nodes_that_serve_their_own_engines_in_turn_change_no_bit(
    online: RunConfig, run_config: Make, tmp_path: Path
) -> None:
    """A whole replica and an engine on each of two nodes. Weights stay there: over `ipc` the plan has no other way."""
    turns = ["inference.placement=colocated", "sync.transport=ipc", "cluster.nodes=2", "cluster.gpus_per_node=1"]
    config = run_config(*ONLINE, *turns, directory="turns")
    environment, log = fake_slurm.install(tmp_path / "slurm"), tmp_path / "log"
    command = ["sbatch", "--nodes=2", SCRIPT, written(config, tmp_path)]
    with log.open("wb") as said:
        job = subprocess.run(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT, timeout=400)
    assert job.returncode == 0, log.read_text()[-4000:]
    assert rows(config, "rollouts.jsonl") == rows(online, "rollouts.jsonl")
    metrics = rows(config, "metrics.jsonl")
    assert untimed(metrics) == untimed(rows(online, "metrics.jsonl"))
    assert all("rollout_seconds" in row for row in metrics), "they took turns"
    assert tensors(config) == tensors(online)
