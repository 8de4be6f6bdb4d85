"""tools/slurm/train.sbatch under a real Slurm of two nodes, which tools/slurm/try_locally starts and where it runs this file;
tools/test does not, for want of a Slurm. Everything is real but the machine: both nodes are namespaces of one."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from engine.config.load import RunConfig
from tests.e2e.test_commands import SEMI_ONLINE, Make, final, rollouts, rows, written
from tests.e2e.test_slurm import ROOT, SCRIPT, sent_alike

pytestmark = pytest.mark.timeout(1800)
DAEMONS = {"munged", "slurmctld", "slurmd", "slurmscriptd", "pytest", "bash"}


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Job:
    """A job and what Slurm says of it. A requeued one starts after two minutes, which are waited for: set to start at once on
    a busy machine, it was once hit by a signal that was meant for the same step of its first start."""

    def __init__(self, log: Path, *arguments: str, cwd: Path = ROOT) -> None:
        self.log, self.start = log, time.monotonic()
        options = ["sbatch", "--parsable", f"--output={log}", *arguments]
        self.number = subprocess.run(options, check=True, capture_output=True, text=True, cwd=cwd).stdout.strip()

    def show(self) -> dict[str, str]:
        """`scontrol show job` by key."""
        return dict(re.findall(r"(\S+?)=(\S*)", slurm("scontrol", "show", "job", "--oneliner", self.number)))

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def until(self, condition: Callable[[], bool], seconds: float = 900) -> float:
        """Waits for something, in seconds since the submission; fails with the log."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{self.show()}\n{self.text()[-6000:]}"
            time.sleep(0.05)
        return time.monotonic() - self.start

    def says(self, text: str, seconds: float = 900) -> float:
        return self.until(lambda: text in self.text(), seconds)

    def reaches(self, *states: str, seconds: float = 900) -> float:
        return self.until(lambda: self.show()["JobState"] in states, seconds)


def left_behind() -> list[str]:
    """Processes in this namespace that are neither Slurm's daemons nor ours."""
    found = []
    for process in psutil.process_iter(["pid", "name", "cmdline", "status"]):
        if process.info["name"] not in DAEMONS and process.pid != os.getpid() and process.info["status"] != "zombie":
            found.append(f"{process.pid} {process.info['name']} {' '.join(process.info['cmdline'] or [])[:150]}")
    return found


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Cancels what a failed test leaves, and fails where an ended job leaves a process."""
    yield
    subprocess.run(["scancel", "--user=root"], check=True)
    deadline = time.monotonic() + 60
    while slurm("squeue", "--noheader") or left_behind():
        assert time.monotonic() < deadline, left_behind()
        time.sleep(0.5)


def seen(job: Job) -> None:
    """Prints what a person wants to read after the test."""
    print(job.show(), job.text(), f"{time.monotonic() - job.start:.0f} s in all", sep="\n")


def equal(config: RunConfig, whole: RunConfig) -> None:
    """That a run is bit for bit the whole one."""
    assert rollouts(config) == rollouts(whole)
    assert sent_alike(rows(config, "metrics.jsonl")) == sent_alike(rows(whole, "metrics.jsonl"))
    assert final(config) == final(whole)


def token_of(job: Job) -> str:
    """From the environment of a process of the job, where it may be."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get("SLURM_JOB_ID") == job.number and "RAY_AUTH_TOKEN" in environment:
                return environment["RAY_AUTH_TOKEN"]
    raise AssertionError("no process of the job has the token")


def exposed(job: Job) -> list[str]:
    """Where the token can be read by who has no right to: on command lines, in what Slurm tells and in what it stores."""
    token, places = token_of(job), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            places += [f"command line of {process.name()}"] * (token in " ".join(process.cmdline()))
    for told in (("show", "job", "--details"), ("write", "batch_script"), ("show", "step")):
        target = [f"{job.number}.0"] if told[1] == "step" else [job.number]
        extra = ["-"] if told[0] == "write" else []
        done = subprocess.run(["scontrol", *told, *target, *extra], capture_output=True, text=True)
        places += [" ".join(told)] * (token in done.stdout)
    work = Path(os.environ["SEMION_TRY"])
    for file in [*work.rglob("*"), *(ROOT / "tools").rglob("*")]:
        if file.is_file() and not file.is_symlink():
            places += [str(file)] * (token.encode() in file.read_bytes())
    return places


def test_two_nodes_are_preempted_by_a_higher_partition_and_continue(
    semi_online: tuple[RunConfig, str], run_config: Make, tmp_path: Path
) -> None:
    whole, _ = semi_online
    config = run_config(*SEMI_ONLINE, "cluster.gpus_per_node=2", directory="job")
    job = Job(tmp_path / "log", "--nodes=2", "--time=30", SCRIPT, written(config, tmp_path), "algorithm.beta=0.1")
    print("starting after", job.says("starting 2 trainer ranks"))
    assert exposed(job) == []
    at = time.monotonic()
    urgent = Job(tmp_path / "urgent", "--nodes=2", "--time=5", "--partition=high", "--exclusive", "--wrap=sleep 5")
    job.says("semion: asked to stop")
    print(f"warned {time.monotonic() - at:.1f} s after the preempting job came")
    print("saved after", job.says("asked to stop: saved after 2 steps"))
    print("preempting job ran after", urgent.reaches("COMPLETED"))
    job.reaches("COMPLETED", "FAILED", seconds=600)
    seen(job)
    equal(config, whole)
    assert job.show()["Restarts"] == "1" and job.show()["ExitCode"] == "0:0"


def test_two_nodes_of_which_one_does_not_start_ray_at_once_and_loses_it_later_continue(
    semi_online: tuple[RunConfig, str], run_config: Make, tmp_path: Path
) -> None:
    whole, _ = semi_online
    config = run_config(*SEMI_ONLINE, "cluster.gpus_per_node=2", directory="job")
    options = ["--hold", "--nodes=2", "--time=30"]
    job = Job(tmp_path / "log", *options, SCRIPT, written(config, tmp_path), "algorithm.beta=0.1")
    obstacle = f"/tmp/ray-{os.getuid()}-{job.number}"  # a file where Ray wants a folder
    slurm("srun", "--nodelist=n2", "touch", obstacle)
    slurm("scontrol", "release", job.number)
    print("first attempt failed after", job.says("Ray did not start on n2 (10.77.0.2), attempt 1"))
    slurm("srun", "--overlap", f"--jobid={job.number}", "--nodes=1", "--ntasks=1", "--nodelist=n2", "rm", obstacle)
    print("starting after", job.says("starting 2 trainer ranks"))
    print("training after", job.says("train  1/4"))
    (raylet,) = [p for p in psutil.process_iter() if p.name() == "raylet" and "--node_ip_address=10.77.0.2" in p.cmdline()]
    raylet.kill()
    at = time.monotonic()
    job.says("restart 1; SEMION_RETRIES is 3")
    print(f"requeued {time.monotonic() - at:.1f} s after the loss")
    job.reaches("COMPLETED", "FAILED", seconds=600)
    seen(job)
    equal(config, whole)
    assert job.show()["Restarts"] == "1" and job.show()["ExitCode"] == "0:0"


def test_a_node_on_which_ray_never_starts_is_named(run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(*SEMI_ONLINE, "cluster.gpus_per_node=2")
    monkeypatch.setenv("SEMION_START_SECONDS", "60")
    monkeypatch.setenv("SEMION_RETRIES", "0")
    job = Job(tmp_path / "log", "--hold", "--nodes=2", SCRIPT, written(config, tmp_path))
    slurm("srun", "--nodelist=n2", "touch", f"/tmp/ray-{os.getuid()}-{job.number}")
    slurm("scontrol", "release", job.number)
    job.reaches("FAILED", "COMPLETED", seconds=200)
    seen(job)
    assert job.show()["ExitCode"] == "8:0"
    assert "node.py: Ray must start on n2 (10.77.0.2) within SEMION_START_SECONDS = 60; none did in" in job.text()


def test_one_node_is_warned_of_the_time_limit_and_continues(
    request: pytest.FixtureRequest, run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder with spaces, with nothing exported and without the environment on PATH."""
    config = run_config(*SEMI_ONLINE, directory="a job")
    place = tmp_path / "a place"
    place.symlink_to(ROOT)
    monkeypatch.setenv("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
    options = ["--nodes=1", "--time=30", "--export=NONE", "--signal=B:USR1@540"]
    job = Job(tmp_path / "log", *options, SCRIPT, written(config, tmp_path), cwd=place)
    print("starting after", job.says("starting 2 trainer ranks"))
    slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
    print("saved after", job.says("asked to stop: saved after 2 steps"))
    job.reaches("PENDING")
    slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    whole, _ = request.getfixturevalue("semi_online")  # while the job waits
    job.reaches("COMPLETED", "FAILED", "TIMEOUT", seconds=600)
    seen(job)
    equal(config, whole)
    assert job.show()["Restarts"] == "1" and job.show()["ExitCode"] == "0:0"


def test_a_failed_run_fails_the_job_with_its_code_and_is_not_requeued(run_config: Make, tmp_path: Path) -> None:
    config = run_config(*SEMI_ONLINE)
    job = Job(tmp_path / "log", "--nodes=1", SCRIPT, written(config, tmp_path), "sync.sync_interval=0")
    job.reaches("FAILED", "COMPLETED")
    seen(job)
    assert job.show()["ExitCode"] == "2:0" and job.show()["Restarts"] == "0"


def test_scancel_ends_everything(run_config: Make, tmp_path: Path) -> None:
    config = run_config(*SEMI_ONLINE, "cluster.gpus_per_node=2", "run.steps=400")
    job = Job(tmp_path / "log", "--nodes=2", SCRIPT, written(config, tmp_path))
    job.says("train  2/400")
    slurm("scancel", job.number)
    at = time.monotonic()
    job.reaches("CANCELLED")
    job.until(lambda: not left_behind(), 60)
    print(f"nothing is left {time.monotonic() - at:.1f} s after scancel")
    seen(job)
    assert job.show()["JobState"] == "CANCELLED" and job.show()["Restarts"] == "0"


def test_a_limit_that_comes_before_the_save_leaves_the_newest_checkpoint(run_config: Make, tmp_path: Path) -> None:
    long = ["run.steps=4000", "sync.sync_interval=2000", "checkpoint.every=2000"]
    config = run_config(*SEMI_ONLINE, "cluster.gpus_per_node=2", *long)
    job = Job(tmp_path / "log", "--nodes=2", "--time=30", SCRIPT, written(config, tmp_path))
    job.says("train  1/4000")
    slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=1")
    job.reaches("TIMEOUT", "PENDING", "COMPLETED", "FAILED")
    seen(job)
    assert job.show()["JobState"] == "TIMEOUT" and job.show()["Restarts"] == "0"
    job.until(lambda: not left_behind(), 60)
