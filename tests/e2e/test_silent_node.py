"""A node that hangs while Ray still counts it as alive, with three real Ray nodes on one machine: the daemon of one is stopped,
and Ray is told to be patient with it. The run leaves it out by name and takes its spare."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.fake_slurm import NODES
from tests.e2e.ray_nodes import ray_nodes

pytestmark = pytest.mark.timeout(600)
PORT = 24_617
PROGRAM = """
import sys
from engine.run import nodes
from engine.run.processes import Cluster
from tests.builders import config, spec

nodes.SILENT_SECONDS = 10.0  # of a machine that may be busy
made = config(
    sys.argv[1],
    cluster={"nodes": 2, "gpus_per_node": 2},
    trainer={"data_parallel": 2, "timeout_seconds": 120.0},
    inference={"engines": 2},
)
with Cluster(spec(made)) as cluster:
    print("took", *[node.address for node in cluster._nodes], flush=True)
print("ended", flush=True)
"""


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, psutil.Process]]:
    """Three Ray nodes, by address. Ray counts a node that does not answer as alive."""
    with ray_nodes(NODES, PORT, tmp_path, monkeypatch, RAY_health_check_failure_threshold="1000") as started:
        yield started


def test_a_node_that_hangs_while_ray_counts_it_is_left_out_for_the_spare(
    nodes: dict[str, psutil.Process], tmp_path: Path
) -> None:
    silent = nodes[NODES[1]]
    (daemon,) = [process for process in silent.children(recursive=True) if process.name() == "raylet"]
    daemon.send_signal(signal.SIGSTOP)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == [f"took {NODES[0]} {NODES[2]}", "ended"], done.stdout
    assert f"semion: left out, for no process started there within 10 s: {NODES[1]}" in done.stderr
    assert daemon.status() == psutil.STATUS_STOPPED and silent.is_running(), "and Ray has not ended it meanwhile"
