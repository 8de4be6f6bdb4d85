"""Runs a command and then proves that nothing it started is still alive; what is, is named, killed and made a failure.

Usage: contained.py COMMAND [ARGUMENT ...]

Linux gives orphans to the nearest ancestor that is a subreaper, so whatever daemonised itself below the command
(ray's raylet, a vLLM engine, a trainer rank) is found again as a child of this process, whatever it calls itself.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys

import psutil

PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
GRACE_SECONDS = 15.0  # ray's daemons take a few seconds to notice that their driver is gone


def become_subreaper() -> None:
    """Makes orphaned descendants children of this process. Raises OSError where the kernel refuses."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def leftovers(grace_seconds: float = GRACE_SECONDS) -> list[str]:
    """Kills the descendants that outlive `grace_seconds`; returns one line "pid command" for each of them."""
    psutil.wait_procs(psutil.Process().children(recursive=True), timeout=grace_seconds)
    lines = []
    while processes := psutil.Process().children(recursive=True):
        for process in processes:
            try:
                if process.status() != psutil.STATUS_ZOMBIE:
                    lines.append(f"{process.pid} {' '.join(process.cmdline())[:200]}")
                    process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=5.0)
    return lines


def main(command: list[str]) -> int:
    """Runs `command`; returns its exit status, or 1 where it succeeded and left something behind."""
    become_subreaper()
    status = subprocess.run(command, check=False).returncode
    lines = leftovers()
    for line in lines:
        print(f"left behind, killed: {line}", file=sys.stderr)
    return status or int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
