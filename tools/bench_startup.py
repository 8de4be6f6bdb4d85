"""What the start of a run costs, process by process: CPU seconds from the command to the first finished step, which a busy
machine distorts less than seconds on a clock. With --against, another checkout in turn with this one, each in its own folder:
relative paths in the configuration are of that folder. It judges no figure, and changes nothing of the run.

    python tools/bench_startup.py configs/quickstart.toml run.steps=1 [--pairs 3] [--against ../before] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.1
KINDS = {  # what stands in a process's command line, in the order in which it is looked for
    "ray::VllmEngine": "engine",
    "ray::engine": "engine",
    "ray::TrainerRank": "trainer rank",
    "ray::trainer rank": "trainer rank",
    "engine.cli": "command",
    "engine.rewards": "judging processes",
    "ray": "Ray's own processes",
}
OTHER = "other (compilers, probes)"


def kind_of(process: psutil.Process) -> str:
    """What a process of a run is, by its command line."""
    line = " ".join(process.cmdline())
    return next((kind for part, kind in KINDS.items() if part in line), OTHER)


class Sampler:
    """The CPU seconds of a process and all below it, by kind, of those that are gone too."""

    def __init__(self, root: psutil.Process) -> None:
        self._root = root
        self._seen: dict[tuple[int, float], tuple[str, float]] = {}

    def look(self) -> None:
        """Reads what every process has used so far."""
        for process in [self._root, *self._root.children(recursive=True)]:
            try:
                times = process.cpu_times()
                self._seen[process.pid, process.create_time()] = kind_of(process), times.user + times.system
            except psutil.Error:  # it has just ended
                continue

    def seconds(self) -> dict[str, float]:
        """CPU seconds by kind."""
        found: dict[str, float] = {}
        for kind, seconds in self._seen.values():
            found[kind] = found.get(kind, 0.0) + seconds
        return found


def start(tree: Path, config: str, overrides: list[str]) -> dict[str, float]:
    """CPU seconds by kind of process until the first step is done, and the seconds on the clock under "clock"."""
    folder = Path(tempfile.mkdtemp(prefix="semion-startup-"))
    command = [sys.executable, "-m", "engine.cli", "train", str(Path(config).resolve()), *overrides]
    command.append(f"run.directory={folder / 'run'}")
    environment = os.environ | {"PYTHONPATH": str(tree)}
    started = time.monotonic()
    with (folder / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=tree, env=environment, stdout=log, stderr=log)  # its own modules come first
    sampler, metrics = Sampler(psutil.Process(run.pid)), folder / "run" / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        sampler.look()
        time.sleep(SAMPLE_SECONDS)
    found = sampler.seconds() | {"clock": time.monotonic() - started}
    if run.wait() != 0:
        sys.exit(f"bench_startup: the run ended with {run.returncode}: {(folder / 'log').read_text()[-2000:]}")
    shutil.rmtree(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    parser.add_argument("--pairs", type=int, default=1, help="starts of each checkout")
    parser.add_argument("--against", type=Path, help="the root of another checkout, built")
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_intermixed_args()
    trees = {"this": ROOT} | ({"other": options.against.resolve()} if options.against else {})
    starts: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for _ in range(options.pairs):
        for name, tree in trees.items():
            starts[name].append(start(tree, options.config, options.overrides))
    kinds = dict.fromkeys(kind for runs in starts.values() for run in runs for kind in run)
    medians = {
        name: {kind: statistics.median(run.get(kind, 0.0) for run in runs) for kind in kinds} for name, runs in starts.items()
    }
    print(f"{'CPU seconds to the first step':34s}" + "".join(f"{name:>10s}" for name in trees))
    for kind in kinds:
        print(f"{kind:34s}" + "".join(f"{found[kind]:10.1f}" for found in medians.values()))
    if options.json:
        Path(options.json).write_text(json.dumps({"medians": medians, "starts": starts}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
