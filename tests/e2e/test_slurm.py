"""tools/slurm/train.sbatch under a stand-in for Slurm, with everything else real: two Ray nodes, trainer ranks on one and
engines on the other, a signal, a requeue, and the weights of a run on one node; the same of two nodes that each have a trainer
rank and an engine, which take turns. What the script does with the command's exit codes, and with a Ray that does not start, is
tested with programs that only exit. A job that loses a node goes on on a spare one, or with fewer replicas. real_slurm.py is
run under a real Slurm."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from engine.config.load import RunConfig
from tests.e2e import fake_slurm
from tests.e2e.test_commands import ONLINE, SEMI_ONLINE, Make, final, rollouts, rows, sent_alike, tensors, untimed, written
from tests.e2e.test_restarts import check_times

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "tools/slurm/train.sbatch"
pytestmark = pytest.mark.timeout(1800)
PATIENCE_SECONDS = 600  # of a machine that may be busy


def until(condition: Callable[[], bool], job: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for something the job does; fails with its log when it ends before, or takes too long."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline and job.poll() is None, log.read_text()[-4000:]
        time.sleep(0.05)


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
    assert job.wait(timeout=PATIENCE_SECONDS) == 75, log.read_text()[-4000:]
    assert "asked to stop: saved after 2 steps" in log.read_text()
    assert record.read_text() == f"requeue {environment['SLURM_JOB_ID']}\n"
    assert (config.run_directory / "checkpoints" / "LATEST").read_text() == "step_00000002"
    assert submit().wait(timeout=PATIENCE_SECONDS) == 0, log.read_text()[-4000:]
    assert len(record.read_text().splitlines()) == 1, "a finished job is not requeued"
    assert rollouts(config) == rollouts(whole)
    assert sent_alike(rows(config, "metrics.jsonl")) == sent_alike(rows(whole, "metrics.jsonl"))
    assert final(config) == final(whole)


DELAYS = str(Path(__file__).with_name("delays"))  # see there: trainer, engines and rewards wait now and then, and change no bit
SLOWLY = {"SEMION_TEST_DELAY": "0.4", "PYTHONPATH": os.pathsep.join([DELAYS, *filter(None, [os.environ.get("PYTHONPATH")])])}


def node_with_engines(job: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """All of the job's node that has them: Ray, what it runs, and what keeps it. Which one it is depends on which nodes were
    the first to answer."""
    keepers = [process for process in psutil.Process(job.pid).children(recursive=True) if is_keeper(process)]
    nodes = [[*keeper.children(recursive=True), keeper] for keeper in keepers]
    (found,) = [node for node in nodes if any(has_engine(process) for process in node)]
    return found


def has_engine(process: psutil.Process) -> bool:
    """Whether it is an engine's process, as Ray names it before its first call and while one runs."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()).startswith(("ray::VllmEngine", "ray::engine "))
    return False


def send(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def lose_node(job: subprocess.Popen[bytes], config: RunConfig, log: Path) -> None:
    """Ends all of the node with the engines at once, in the interval after the first checkpoint: whoever needs them is held
    until that is written."""
    until(lambda: "data.train: " in log.read_text(), job, log)  # the engines are up, and made to take their time (SLOWLY)
    node = node_with_engines(job)
    workers = [process for process in node if process.name().startswith("ray::")]
    steps, metrics = int(config.checkpoint.every), config.run_directory / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text().count("\n") >= steps, job, log)
    send(workers, signal.SIGSTOP)
    until((config.run_directory / "checkpoints" / "LATEST").exists, job, log)
    send(node, signal.SIGKILL)


def is_keeper(process: psutil.Process) -> bool:
    """Whether this is what srun has started on a node but the first, which has the command."""
    try:
        if process.cmdline()[1:2] != ["tools/slurm/node.py"]:
            return False
        return process.environ().get("SLURMD_NODENAME") in fake_slurm.NODES[1:]
    except psutil.Error:
        return False


def end_after_a_loss(config: RunConfig, folder: Path, num_nodes: int, spares: str, *options: str) -> str:
    """What a job says that loses a node and ends all the same, without having been requeued."""
    environment, log = fake_slurm.install(folder / "slurm") | SLOWLY | {"SEMION_SPARES": spares}, folder / "log"
    command = ["sbatch", f"--nodes={num_nodes}", SCRIPT, written(config, folder), *options]
    job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log.open("ab"), stderr=subprocess.STDOUT)
    try:
        lose_node(job, config, log)
        assert job.wait(timeout=PATIENCE_SECONDS) == 0, log.read_text()[-4000:]
    finally:
        job.terminate()
    assert not (folder / "slurm" / "scontrol").exists(), "it was not requeued"
    return log.read_text()


def test_a_job_that_loses_a_node_goes_on_by_itself_on_its_spare_and_changes_no_bit(
    semi_online: tuple[RunConfig, str], run_config: Make, tmp_path: Path
) -> None:
    """Three Ray nodes of which the run uses two. The one with the engines is killed amid the run; nobody requeues the job."""
    whole, _ = semi_online
    config = run_config(*SEMI_ONLINE, "cluster.gpus_per_node=2", directory="job")
    said = end_after_a_loss(config, tmp_path, 3, "1", "algorithm.beta=0.1")
    assert {row["step"] for row in rows(config, "restarts.jsonl")} == {2}, said[-4000:]
    assert rollouts(config) == rollouts(whole)
    assert sent_alike(rows(config, "metrics.jsonl")) == sent_alike(rows(whole, "metrics.jsonl"))
    assert final(config) == final(whole)
    check_times(json.loads((config.run_directory / "summary.json").read_text())["restarts"][-1]["took"])


def test_a_job_that_loses_a_node_for_good_goes_on_with_fewer_replicas_and_trains_on_the_same(
    online: RunConfig, run_config: Make, tmp_path: Path
) -> None:
    """Two replicas on one node and two engines on the other, which is killed: one replica and one engine do the remaining steps
    of the same samples, on the node that is left, and losses are those of the run that nobody disturbed but for sums' order."""
    may = ["run.on_lost_node=shrink", "checkpoint.other_layout=allow"]
    config = run_config(*ONLINE, "cluster.nodes=2", "cluster.gpus_per_node=2", *may, directory="job")
    said = end_after_a_loss(config, tmp_path, 2, "0")
    lost, fewer = rows(config, "restarts.jsonl")
    whole = {"cluster.nodes": 2, "trainer.data_parallel": 2, "inference.engines": 2}
    assert lost["step"] == fewer["step"] == 1 and (lost["layout"], fewer["error"]) == (whole, "MissingNodeError")
    assert fewer["layout"] == {"cluster.nodes": 1, "trainer.data_parallel": 1, "inference.engines": 1}
    assert "resumed after 1 steps in another layout than before (TP 1 PP 1 DP 2 -> TP 1 PP 1 DP 1)" in said
    theirs, ours = rows(online, "metrics.jsonl"), rows(config, "metrics.jsonl")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [0, 1, 2]
    for before, now in zip(theirs, ours, strict=True):
        assert now["num_tokens"] == before["num_tokens"]
        assert now["loss"] == pytest.approx(before["loss"], abs=1e-5)
        assert now["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-4)
    sampled = [[(row["step"], row["token_ids"], row["reward"]) for row in rollouts(run)] for run in (config, online)]
    assert sampled[0] == sampled[1]


@pytest.mark.parametrize(("spares", "nodes"), [("1", 2), ("3", 3), ("one", 3)])
def test_spares_that_leave_no_two_nodes_are_refused(tmp_path: Path, spares: str, nodes: int) -> None:
    found, log, _ = submitted(tmp_path, nodes, {"SEMION_SPARES": spares}, semion="exit 9", python="exit 9")
    assert found == 2 and f"leaves the run two nodes; found '{spares}' of {nodes} nodes: give sbatch more --nodes" in log


@pytest.mark.nightly  # of what is in it, tests/e2e/test_commands.py has engines in turn, the test above two nodes
def test_nodes_that_serve_their_own_engines_in_turn_change_no_bit(online: RunConfig, run_config: Make, tmp_path: Path) -> None:
    """A whole replica and an engine on each of two nodes. That weights stay there is the plan's, tested in tests/unit: these
    two nodes share one machine's memory."""
    turns = ["inference.placement=colocated", "sync.transport=ipc", "cluster.nodes=2", "cluster.gpus_per_node=1"]
    config = run_config(*ONLINE, *turns, directory="turns")
    environment, log = fake_slurm.install(tmp_path / "slurm"), tmp_path / "log"
    command = ["sbatch", "--nodes=2", SCRIPT, written(config, tmp_path)]
    with log.open("wb") as said:
        job = subprocess.run(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT, timeout=400)
    assert job.returncode == 0, log.read_text()[-4000:]
    assert rollouts(config) == rollouts(online)
    metrics = rows(config, "metrics.jsonl")
    assert untimed(metrics) == untimed(rows(online, "metrics.jsonl"))
    assert all("rollout_seconds" in row for row in metrics), "they took turns"
    assert tensors(config) == tensors(online)


def submitted(tmp_path: Path, nodes: int, environment: dict[str, str], **programs: str) -> tuple[int, str, list[str]]:
    """A job in which `programs` stand before the real ones; its exit code, its log, what it asked of scontrol."""
    install = fake_slurm.install(tmp_path / "slurm")
    for name, text in programs.items():
        program = tmp_path / "slurm" / "bin" / name
        program.write_text(f"#!/bin/bash\n{text}\n")
        program.chmod(0o755)
    command = ["sbatch", f"--nodes={nodes}", SCRIPT, "a configuration.toml"]
    done = subprocess.run(command, cwd=ROOT, env=install | environment, capture_output=True, text=True, timeout=120)
    record = tmp_path / "slurm" / "scontrol"
    return done.returncode, done.stdout + done.stderr, record.read_text().splitlines() if record.exists() else []


@pytest.mark.parametrize(
    ("code", "restarts", "is_requeued"),
    [(0, None, False), (2, None, False), (7, None, False), (75, "9", True), (5, None, True), (6, "2", True), (8, "3", False)],
)
def test_a_stopped_run_is_requeued_always_a_lost_one_a_few_times_and_no_other(
    tmp_path: Path, code: int, restarts: str | None, is_requeued: bool
) -> None:
    environment = {} if restarts is None else {"SLURM_RESTART_COUNT": restarts}
    found, log, asked = submitted(tmp_path, 1, environment, semion=f'printf "%s|" "$@"; exit {code}')
    assert found == code, log
    assert "train|a configuration.toml|cluster.nodes=1|--resume|auto|" in log
    assert len(asked) == is_requeued, log
    assert ("SEMION_RETRIES is 3" in log) is (code in (5, 6, 8))


@pytest.mark.parametrize("mounts", [None, "/data:/data"])
def test_every_step_is_in_the_container_that_is_named(tmp_path: Path, mounts: str | None) -> None:
    """As far as a stand-in can show it: pyxis is told image, mounts and folder, and no semion is looked for outside."""
    environment = {"IMAGE": "registry#semion:1"} | ({} if mounts is None else {"MOUNTS": mounts})
    found, log, _ = submitted(tmp_path / "two", 2, environment, semion="exit 0", python="exit 8")
    steps = (tmp_path / "two" / "slurm" / "containers").read_text().splitlines()
    assert found == 8 and steps[0].endswith("|python"), log
    where = f"{mounts or f'{ROOT}:{ROOT}'},/tmp:/tmp"
    assert all(step.startswith(f"registry#semion:1|{where}|{ROOT}|") for step in steps) and len(steps) >= 1
    found, log, _ = submitted(tmp_path / "one", 1, environment, semion="exit 0")
    (step,) = (tmp_path / "one" / "slurm" / "containers").read_text().splitlines()
    assert found == 0 and step == f"registry#semion:1|{where}|{ROOT}|semion", log


def test_what_ray_starts_outlives_the_signal_that_slurm_sends_to_all_of_a_step(run_config: Make, tmp_path: Path) -> None:
    """One node: the command and its Ray are one step."""
    program = """
import os, signal, sys, psutil
from engine.config.load import load_config
from engine.run.processes import Cluster
from engine.run.spec import resolve
heard = []
signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
with Cluster(resolve(load_config(sys.argv[1], []))) as cluster:
    started = psutil.Process().children(recursive=True)
    assert {"gcs_server", "raylet"} <= {process.name() for process in started}
    for process in [*started, psutil.Process()]:
        process.send_signal(signal.SIGUSR1)
    psutil.wait_procs(started, timeout=2)
    assert heard and all(process.is_running() and process.status() != "zombie" for process in started), started
"""
    command = [sys.executable, "-c", program, written(run_config(), tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=PATIENCE_SECONDS)


def test_a_command_that_is_asked_before_it_can_listen_is_requeued(tmp_path: Path) -> None:
    found, log, asked = submitted(tmp_path, 1, {}, semion="kill -USR1 $$; sleep 60")
    assert found == 75 and len(asked) == 1, log


@pytest.mark.parametrize(("state", "is_requeued"), [("RUNNING", True), ("COMPLETING", False)])
def test_a_job_that_slurm_terminates_waits_for_the_save_and_is_requeued_unless_slurm_ends_it(
    tmp_path: Path, state: str, is_requeued: bool
) -> None:
    """scancel lets a command save, too: only the job's state tells that it is not to come back."""
    shell = "$(ps --format ppid= --pid $PPID)"  # srun's parent
    semion = f"trap 'sleep 2; echo saved; exit 75' TERM; kill -TERM {shell} $$; while :; do sleep 1; done"
    found, log, asked = submitted(tmp_path, 1, {fake_slurm.STATE: state}, semion=semion)
    assert found == 75 and "saved" in log, log
    assert len(asked) == is_requeued, log
    assert ("not requeued here: the job is COMPLETING" in log) is not is_requeued


def test_a_node_on_which_ray_does_not_start_ends_the_job_by_name_and_requeues_it(tmp_path: Path) -> None:
    slow = f'[ "$2" != start ] || [ "$SLURMD_NODENAME" = {fake_slurm.NODES[1]} ] || sleep 300'
    python = f'{slow}\nexec {sys.executable} "$@"'
    found, log, asked = submitted(tmp_path, 2, {"SEMION_START_SECONDS": "2"}, python=python, semion="exit 9")
    assert found == 8 and len(asked) == 1, log
    assert "node.py: Ray must start on 127.0.0.3 (127.0.0.3) within SEMION_START_SECONDS = 2; its head at" in log
    assert "train.sbatch: Ray did not start, as said above" in log


@pytest.mark.parametrize("spares", ["", "1"])
def test_a_command_that_outlives_ray_is_ended(tmp_path: Path, spares: str) -> None:
    """Here it hears of USR1 alone, and of nothing else. With a spare node Ray outlives the others, but not its head. The half
    minute that the command is given is waited for."""
    ready = "import socket, sys, time; s = [socket.create_server(('127.0.0.2', int(p))) for p in sys.argv[1:]]; time.sleep(3)"
    port = "$((${RAY_ADDRESS##*:} + 5000)) ${RAY_ADDRESS##*:}"
    python = f'[ "$2" != start ] && exec {sys.executable} "$@"\n[ "$SLURMD_NODENAME" = 127.0.0.2 ] || sleep 300\n'
    python += f'{sys.executable} -c "{ready}" {port}; exit 8'
    semion, spare = "trap : USR1 TERM; while :; do sleep 1; done", {"SEMION_SPARES": spares}
    found, log, asked = submitted(tmp_path, 3 if spares else 2, spare, python=python, semion=semion)
    assert found == 8 and len(asked) == 1, log
    assert "Ray ended on a node, as said above; the command has 30 s" in log
