"""What one machine of a run has: the interface that carries an address, its GPUs, processes that must be gone, a node that
must answer. It places nothing, and starts nothing but nvidia-smi.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from engine.core.errors import ConfigError, MissingNodeError

HEAD_SECONDS = 30.0  # for the first node of a Ray cluster to answer
QUERY = ("name", "memory.total", "compute_cap", "driver_version")
QUERY_SECONDS = 30.0  # for nvidia-smi, which waits for a driver that hangs
GRACE_SECONDS = 5.0  # Ray's own daemons take a few seconds to notice that their driver has left


def look(address: str, num_gpus: float) -> tuple[str, tuple[str, ...], int]:
    """Of the node that this runs on: the interface that carries its address, its GPUs, and the bytes of its memory."""
    return interface_of(address), devices(num_gpus), host_bytes()


def host_bytes(root: Path = Path("/")) -> int:
    """The memory of this machine, or what the control groups leave this process of it, as those of a container or of a Slurm
    job: the least counts. `root`: where /proc and /sys are."""
    limits = [psutil.virtual_memory().total]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux, or /proc is hidden
        return limits[0]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        tree = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        own = tree / path.lstrip("/")
        # In a container its own path may be that on the machine, which is not there: what is there is the top.
        for group in (own, *own.parents) if own.is_relative_to(tree) else (tree,):
            with suppress(OSError, ValueError):  # no file at the top, and "max" where nothing is limited
                limits.append(int((group / ("memory.limit_in_bytes" if controllers else "memory.max")).read_text()))
            if group == tree:
                break
    return min(limits)


def devices(num_gpus: float) -> tuple[str, ...]:
    """This machine's GPUs by CUDA's names: those that CUDA_VISIBLE_DEVICES names, or all that Ray found."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(named.split(",") if named else map(str, range(int(num_gpus)))) if num_gpus else ()


def visible_gpus() -> int:
    """GPUs of this machine that a run could see, counted without opening one: the driver's device files, or as many of them as
    CUDA_VISIBLE_DEVICES names."""
    there = len([file for file in Path("/dev").glob("nvidia*") if file.name.removeprefix("nvidia").isdigit()])
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return there if named is None else min(there, len([name for name in named.split(",") if name.strip()]))


@dataclass(frozen=True, slots=True)
class Gpu:
    """What nvidia-smi says of one GPU."""

    name: str
    memory_mebibytes: str
    capability: str
    driver: str


def listed_gpus() -> tuple[list[Gpu], str | None]:
    """(Every GPU that nvidia-smi lists, what it says where it is there but fails.) No device is opened for it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return [], None
    command = [tool, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=QUERY_SECONDS)
    except subprocess.TimeoutExpired:
        return [], f"gave no answer within {QUERY_SECONDS:.0f} s"
    if done.returncode != 0:
        return [], " ".join((done.stdout + done.stderr).split())[:120] or f"ends with {done.returncode}"
    return [Gpu(*(part.strip() for part in line.split(","))) for line in done.stdout.splitlines() if line.strip()], None


def least_gpu_bytes(gpus: Iterable[Gpu]) -> int | None:
    """The memory of the smallest one; None where there is none, or nvidia-smi does not say."""
    return min((int(gpu.memory_mebibytes) << 20 for gpu in gpus if gpu.memory_mebibytes.isdecimal()), default=None)


def gpu_name() -> str | None:
    """The GPU that this process computes on, as its driver calls it; None where it has opened none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_initialized() else None


def interface_of(address: str) -> str:
    """The interface of this machine that has the IPv4 address, or into whose network it falls, as 127.0.0.2 into lo's."""
    wanted = ipaddress.ip_address(address)
    found = [
        (name, ipaddress.ip_interface(f"{own.address}/{own.netmask}"))
        for name, addresses in psutil.net_if_addrs().items()
        for own in addresses
        if own.family == socket.AF_INET and own.netmask
    ]
    carrying = [name for name, own in found if own.ip == wanted] + [name for name, own in found if wanted in own.network]
    if not carrying:
        raise ConfigError(f"a Ray node's address must be of its machine; found no interface with {address}: start it anew")
    return carrying[0]


def descendants() -> set[psutil.Process]:
    """Everything that this process has started, directly or not, and that still runs."""
    return set(psutil.Process().children(recursive=True))


def families(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    """These processes that still run, and everything that they have started, directly or not."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found |= {process, *process.children(recursive=True)}
    return found


def end(processes: Iterable[psutil.Process], grace_seconds: float = GRACE_SECONDS) -> None:
    """Waits until these processes are gone, and kills those that stay: a stopped one ends by nothing else, and whoever starts
    next needs its GPU."""
    deadline = time.monotonic() + grace_seconds
    left = [process for process in processes if runs(process)]
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [process for process in left if runs(process)]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    deadline = time.monotonic() + grace_seconds
    while any(map(runs, left)) and time.monotonic() < deadline:
        time.sleep(0.05)


def runs(process: psutil.Process) -> bool:
    """Whether a process is there and no corpse whose parent has not looked."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def await_head(address: str, patience_seconds: float = HEAD_SECONDS) -> None:
    """Returns when something listens at `host:port`, and at once where that is not what the address is. MissingNodeError when
    the patience ends: Ray itself would look for its first node for minutes, and say nothing."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + patience_seconds
    while host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=patience_seconds).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise MissingNodeError(
                    f"the Ray cluster's first node must answer at RAY_ADDRESS = {address}; found {error} for "
                    f"{patience_seconds:.0f} s: start the run with tools/slurm/train.sbatch, or set RAY_ADDRESS"
                ) from error
            time.sleep(0.2)
