"""Not a test: stands in for Slurm's sbatch, srun, squeue and scontrol on one machine, as far as tools/slurm uses them. Nodes
are named by addresses of the loopback network. It does what Slurm 22.05 did (real_slurm.py): USR1 to srun goes to all processes
of its step, TERM kills them at once, whatever a task has started ends with its step, a job's environment reaches a task only if
srun is told so, as under `sbatch --export=NONE`, and with --kill-on-bad-exit=1 a task that fails has the others ended."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tools.contained import become_subreaper, leftovers

NODES = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
ROLES = ("sbatch", "srun", "squeue", "scontrol")
FOLDER = "FAKE_SLURM"  # environment variable: where the stand-in keeps its spool and its records
STATE = "FAKE_SLURM_STATE"  # environment variable: what squeue says of the job, RUNNING where unset


def install(folder: Path) -> dict[str, str]:
    """Makes the commands in `folder`; the environment that finds them before any other."""
    (folder / "bin").mkdir(parents=True)
    for role in ROLES:
        program = folder / "bin" / role
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m {__name__} {role} "$@"\n')
        program.chmod(0o755)
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, FOLDER: str(folder), "SLURM_JOB_ID": str(os.getpid())}


def sbatch(arguments: list[str]) -> None:
    """Becomes the batch shell: on the first node, from a copy of the script as in Slurm's spool."""
    nodes, script, *rest = arguments
    copy = shutil.copy(script, Path(os.environ[FOLDER]) / "slurm_script")
    os.environ.update(
        SLURM_JOB_NUM_NODES=nodes.removeprefix("--nodes="),
        SLURM_SUBMIT_DIR=os.getcwd(),
        SLURM_CPUS_ON_NODE="1",
        SLURMD_NODENAME=NODES[0],
        SLURM_EXPORT_ENV="NONE",
    )
    os.execvp("bash", ["bash", str(copy), *rest])


def srun(arguments: list[str]) -> int:
    """Runs one task on each node of a step; the highest of their exit codes."""
    assert os.environ["RAY_AUTH_TOKEN"] not in " ".join(arguments), "the token is on a command line"
    parser = argparse.ArgumentParser()
    parser.add_argument("--overlap", action="store_true", required=True)
    for option in ("--ntasks-per-node", "--mem", "--nodes", "--ntasks"):
        parser.add_argument(option, type=int, required=True)
    parser.add_argument("--cpu-bind", choices=["none"], required=True)  # else a task of one processor is held to one
    parser.add_argument("--export", default=os.environ["SLURM_EXPORT_ENV"])
    parser.add_argument("--kill-on-bad-exit", type=int, default=0)
    parser.add_argument("--no-kill", action="store_true")  # the step outlives a node that Slurm finds dead
    parser.add_argument("--nodelist")
    for option in ("--container-image", "--container-mounts", "--container-workdir"):  # pyxis's; only written down
        parser.add_argument(option)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    step = parser.parse_args(arguments)
    job = NODES[: int(os.environ["SLURM_JOB_NUM_NODES"])]
    chosen = [node for node in job if step.nodelist in (None, node)][: step.nodes]
    assert len(chosen) == step.nodes == step.ntasks, arguments
    if step.container_image is not None:
        with (Path(os.environ[FOLDER]) / "containers").open("a") as record:
            record.write(f"{step.container_image}|{step.container_mounts}|{step.container_workdir}|{step.command[0]}\n")
    become_subreaper()
    environment = {key: value for key, value in os.environ.items() if step.export == "ALL" or key.startswith("SLURM")}
    tasks = [subprocess.Popen(step.command, env=environment | {"SLURMD_NODENAME": node}) for node in chosen]

    def pass_on(number: int, _: object) -> None:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL if number == signal.SIGTERM else number)

    signal.signal(signal.SIGUSR1, pass_on)
    signal.signal(signal.SIGTERM, pass_on)
    while any(task.poll() is None for task in tasks):
        if step.kill_on_bad_exit and any(task.poll() for task in tasks):
            for task in tasks:
                task.terminate()
        time.sleep(0.05)
    codes = [task.wait() for task in tasks]
    leftovers(0.0)
    return max(code if code >= 0 else 128 - code for code in codes)


def squeue(arguments: list[str]) -> None:
    """The job's state, which scancel and the time limit make COMPLETING before the batch shell hears of them."""
    assert arguments == ["--noheader", f"--jobs={os.environ['SLURM_JOB_ID']}", "--format=%T"], arguments
    print(os.environ.get(STATE, "RUNNING"))


def scontrol(arguments: list[str]) -> None:
    """Writes down what was asked for."""
    with (Path(os.environ[FOLDER]) / "scontrol").open("a") as record:
        record.write(" ".join(arguments) + "\n")


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "squeue": squeue, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
