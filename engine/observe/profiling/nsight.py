"""How processes of a run are started under Nsight Systems, so that it captures the profiled window, and how long they are
waited for when the run ends. It reads no report (profile.py does) and starts nothing.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

from engine.config.options import Profile
from engine.core.errors import ConfigError
from engine.observe.profiling.recorder import FOLDER, profiled_process

REPORT = ".nsys-rep"
PATIENCE_SECONDS = 300.0  # for a report to be written
OWN_PROCESSES = ("nsys", "QdstrmImporter")  # what their names begin with


def check_installed() -> None:
    """ConfigError without nsys."""
    if shutil.which("nsys") is None:
        raise ConfigError(
            "profile.tool = 'nsys' needs the command nsys in PATH; found none: install NVIDIA Nsight Systems (package "
            "nsight-systems-cli of NVIDIA's repository, or the CUDA toolkit), or set profile.tool = 'torch'"
        )


def report_file(directory: Path, kind: Literal["rank", "engine"], index: int) -> Path:
    """Where a process's report is written; `directory` is the run's."""
    return directory.resolve() / FOLDER / (profiled_process(kind, index) + REPORT)


def command(report: Path) -> list[str]:
    """What a program is started with: nothing is captured but between cudaProfilerStart and cudaProfilerStop."""
    return [
        *("nsys", "profile", "--capture-range=cudaProfilerApi", "--capture-range-end=stop"),
        *("--trace=cuda,nvtx,osrt", "--sample=none", "--force-overwrite=true", f"--output={report}"),
    ]


def runtime_env(options: Profile, directory: Path, kind: Literal["rank", "engine"], index: int) -> dict[str, Any]:
    """What Ray must know of this process: the Python of a profiled one is started by nsys. Nothing of any other."""
    chosen = options.ranks if kind == "rank" else options.engines
    if options.tool != "nsys" or index not in chosen:
        return {}
    report = report_file(directory, kind, index)
    report.parent.mkdir(parents=True, exist_ok=True)
    return {"py_executable": shlex.join([*command(report), sys.executable])}


def ray_environment(options: Profile) -> dict[str, str]:
    """What Ray must be started with, so that nsys outlives the process it profiles and writes its report."""
    return {"RAY_process_group_cleanup_enabled": "0"} if options.tool == "nsys" else {}


def await_reports(options: Profile) -> None:
    """Waits until nsys, of processes that have been ended, has written what it captured on this machine."""
    if options.tool == "nsys":
        import psutil

        children = psutil.Process().children(recursive=True)
        psutil.wait_procs([child for child in children if child.name().startswith(OWN_PROCESSES)], timeout=PATIENCE_SECONDS)
