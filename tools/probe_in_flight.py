"""Whether runs with weights in flight (sync.in_flight) depend on time: many runs of one configuration whose trainer, engines
and rewards wait for up to two seconds at random moments (tools/late.py), some of them killed with every process and resumed,
each compared with one that nobody disturbs: rollouts with their tokens, log-probs and each token's version, metrics, held-out
answers' figures, weights and optimizer, to the last bit. It measures no speed.

    python -m tools.probe_in_flight CONFIG FOLDER [section.key=value ...] [--runs 50] [--killed 0.4] [--beside 2] [--seed 0]

The runs are of CONFIG with the options of IN_FLIGHT, the overrides after them. Engines stay for the runs that follow one
another; trainer ranks and what judges are new in each. A kill ends all processes, and what comes then, first the rest of that
run, has new ones. FOLDER, which is to be new, holds runs.jsonl with a row a run, and the files of runs that were not equal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil

from engine.api.preflight import check
from engine.config.load import RunConfig, dump_config, load_config
from engine.core.errors import ConfigError
from engine.core.files import locked
from engine.core.jsonl import JsonlLedger, read_rows
from engine.observe.rollouts import rollouts_of
from engine.rewards.registry import Judges
from engine.rollouts.ledger import RolloutLedger
from engine.run.checkpoint import latest
from engine.run.handles import RayEngine
from engine.run.hosted import ENGINE, RANK
from engine.run.nodes import ray_folder
from engine.run.processes import Cluster
from engine.run.spec import Spec
from tools.late import REWARDS_WAIT, WAITS

ROOT = Path(__file__).resolve().parents[1]
IN_FLIGHT = (  # a short run in which responses go on over several syncs, and that can be resumed at every step
    *("sync.sync_interval=1", "sync.lookahead=3", "sync.in_flight=true", "sync.reference=follow"),
    *("run.steps=6", "run.sinks=[]", "checkpoint.every=1"),
    *("evaluation.every=2", "evaluation.max_problems=4", "evaluation.samples=1"),
    *("algorithm.loss=grpo", "algorithm.kl_weight=0.05", "algorithm.samples_per_prompt=4", "data.prompts_per_step=4"),
    *("inference.engines=2", "inference.max_concurrent=6", "sampling.max_tokens=48", "trainer.tensor_parallel=1"),
    *("rewards.workers=1", "rewards.concurrency=16", "rewards.deadline_seconds=60", "inference.timeout_seconds=300"),
    *('data.reward=["math", "tools.late:late"]', f'rewards.environment=["{REWARDS_WAIT}"]'),
)
TIMES = ("_seconds", "_per_second", "_idle_share")  # metrics that are of time
ARRAYS = ("token_ids", "log_probs")  # of a rollout
DONE, BASE = "done", "base.toml"
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 1800.0  # for a run, on a machine that may be busy
MOST_SECONDS_LATER = 4.0  # after the step at which a run is to be killed
MOST_FAILURES = 20  # of all series, by themselves


@dataclass(frozen=True, slots=True)
class Series:
    """Runs one after another, in one process with engines that stay; what that process is told."""

    folder: str
    numbers: tuple[int, ...]
    seed: int | None  # of what waits; None: nothing does

    @property
    def directories(self) -> list[Path]:
        """Of its runs."""
        return [Path(self.folder) / f"run_{number:03}" for number in self.numbers]


class Kept(Cluster):
    """The processes of several runs: engines that stay, trainer ranks of each run."""

    def __init__(self, spec: Spec, logs: Path) -> None:
        super().__init__(spec)
        self._run_logs, self._series_logs = None, logs  # no run's own, for a run's files go when it was equal

    def _own_logs(self) -> Path:
        self._series_logs.mkdir(exist_ok=True)
        return self._series_logs

    def serve(self, seed: int | None) -> None:
        """Starts the engines, which load while the caller goes on."""
        kind, more = (ENGINE, ()) if seed is None else ("tools.late:LateEngine", (seed,))
        for index in range(self._config.inference.engines):
            journal = self._journal(f"engine {index}")
            start = self._starter(None, journal, kind, "config", index, self._spec.kv_cache, *more)
            self._engines.append(RayEngine(journal, start))

    def run(self, spec: Spec, seed: int | None, *, resume: bool) -> None:
        """A run from start to end, or from its newest checkpoint."""
        import ray

        self._spec, self._config = spec, spec.config
        kind = RANK if seed is None else "tools.late:LateRank"
        for _ in self.run_ranks("train", lambda rank: (self._engines if rank == 0 else None, Judges(), resume), kind):
            pass
        while self._ranks:
            ray.kill(self._ranks.pop())


def serve(series: Series) -> None:
    """In a process of its own: a series, whose first run may have a checkpoint to go on from."""
    configs = [load_config(Path(series.folder) / BASE, [f"run.directory={directory}"]) for directory in series.directories]
    resume = latest(configs[0].run_directory / "checkpoints") is not None
    if not resume:
        shutil.rmtree(configs[0].run_directory, ignore_errors=True)
    spec = check(configs[0], "train", resume=resume)
    kept = Kept(spec, configs[0].run_directory.with_suffix(".logs"))
    with kept:
        kept.serve(series.seed)
        for config in configs:
            if config is not configs[0]:
                resume, spec = False, check(config, "train")
            with locked(config.run_directory):
                kept.run(spec, series.seed, resume=resume)
            (config.run_directory / DONE).touch()


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills it and all that it has started, as a machine that fails does, and removes what Ray had for it on the disk."""
    with suppress(psutil.NoSuchProcess):
        for each in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()
    for session in ray_folder().glob(f"session_*_{process.pid}"):
        shutil.rmtree(session, ignore_errors=True)


class Probe:
    """All runs, and what was found of them."""

    def __init__(self, config: RunConfig, folder: Path, seed: int, killed_share: float) -> None:
        self._config, self._folder, self._seed, self._killed_share = config, folder, seed, killed_share
        self._ledger, self._lock = JsonlLedger(folder / "runs.jsonl"), threading.Lock()
        self.rows: list[dict[str, Any]] = []
        self.expected: dict[str, Any] = {}
        self.num_failures = 0  # series that ended by themselves

    def undisturbed(self) -> None:
        """Run 0, on which nobody waits."""
        series = Series(str(self._folder), (0,), None)
        ended = list[int]()
        while not ended:
            shutil.rmtree(series.directories[0], ignore_errors=True)
            self._follow(series, {}, ended.append)
        self.expected = found(self._config_of(series.directories[0]))

    def disturbed(self, numbers: Sequence[int]) -> None:
        """Runs one after another, with as many series as kills make of them."""
        left = list(numbers)
        draw = random.Random(f"{self._seed} kills {left}")
        # After how many steps, and how many seconds then, each attempt at a run is killed; few of those that were once again.
        due: dict[int, list[tuple[int, float]]] = {number: [] for number in left}
        for number in left:
            while draw.random() < self._killed_share and len(due[number]) < 2:
                due[number].append((draw.randrange(self._config.run.steps), draw.uniform(0.0, MOST_SECONDS_LATER)))
        kills = dict.fromkeys(left, 0)
        while left:
            series = Series(str(self._folder), tuple(left), self._seed + 1000 * left[0] + sum(kills.values()))

            def ended(number: int) -> None:
                left.remove(number)
                self._compare(number, kills[number])

            if self._follow(series, due, ended):
                kills[left[0]] += 1
                due[left[0]].pop(0)

    def _start(self, series: Series) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), REWARDS_WAIT: str(int(series.seed is not None))}
        log = (self._folder / f"series_{series.numbers[0]:03}.log").open("a")
        command = [sys.executable, "-m", "tools.probe_in_flight", "--series", json.dumps(asdict(series))]
        with log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def _follow(self, series: Series, due: dict[int, list[tuple[int, float]]], ended: Callable[[int], object]) -> bool:
        """Starts a series and watches it until its last run has ended, each told to `ended`, or one is killed, as is `due`:
        whether one was. A series that ends by itself, as where Ray does not start in time on a busy machine, is told, and may
        be followed by another a few times."""
        process = self._start(series)
        try:
            for number, directory in zip(series.numbers, series.directories, strict=True):
                deadline, moment = time.monotonic() + PATIENCE_SECONDS, None
                while not (directory / DONE).exists():
                    time.sleep(POLL_SECONDS)
                    if process.poll() is not None and not (directory / DONE).exists():
                        self.num_failures += 1
                        print(f"run {number} ended with {process.returncode}; {self._folder} has the logs", flush=True)
                        if self.num_failures <= MOST_FAILURES:
                            return False
                    if self.num_failures > MOST_FAILURES or time.monotonic() > deadline:
                        sys.exit(f"probe_in_flight: run {number} did not end; {self._folder} has the logs")
                    if due.get(number) and moment is None and _num_steps(directory) >= due[number][0][0]:
                        moment = time.monotonic() + due[number][0][1]
                    if moment is not None and time.monotonic() > moment:
                        return True
                ended(number)
            process.wait(PATIENCE_SECONDS)
            return False
        finally:
            kill(process)

    def _compare(self, number: int, num_kills: int) -> None:
        """Writes down whether a run was the undisturbed one, and removes its files where it was."""
        directory = Series(str(self._folder), (number,), 0).directories[0]
        own = found(self._config_of(directory))
        differs = [name for name in self.expected if own[name] != self.expected[name]]
        row = {"run": number, "equal": not differs, "kills": num_kills, "differs": differs}
        with self._lock:
            self._ledger.append([row])
            self.rows.append(row)
            print(json.dumps(row), flush=True)
        if not differs:
            shutil.rmtree(directory)

    def _config_of(self, directory: Path) -> RunConfig:
        return load_config(self._folder / BASE, [f"run.directory={directory}"])


def _num_steps(directory: Path) -> int:
    """Steps that a run has written down."""
    file = directory / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def found(config: RunConfig) -> dict[str, Any]:
    """What a run left, as digests; and of its rollouts how many have tokens of several versions, and of how many at most."""
    place = rollouts_of(config.run_directory)
    checkpoint = latest(config.run_directory / "checkpoints")
    assert place is not None and checkpoint is not None
    ledger = RolloutLedger(place)
    rows = [
        row.model_dump(exclude_unset=True, exclude={*ARRAYS}) | {name: list(getattr(row, name)) for name in ARRAYS}
        for step in ledger.steps
        for row in ledger.rows(step)
    ]
    metrics, evaluations = (
        [
            {name: value for name, value in row.items() if not any(part in name for part in TIMES)}
            for row in read_rows(config.run_directory / file)
        ]
        for file in ("metrics.jsonl", "evaluations.jsonl")
    )
    assert len(metrics) == config.run.steps and len(ledger.steps) == config.run.steps
    weights = sha256()
    for file in sorted(checkpoint.rglob("*.safetensors")):
        weights.update(str(file.relative_to(checkpoint)).encode() + file.read_bytes())
    versions = [len(row["spans"]) for row in rows]
    return {
        "rollouts": sha256(repr(rows).encode()).hexdigest(),
        "metrics": sha256(repr(metrics).encode()).hexdigest(),
        "evaluations": sha256(repr(evaluations).encode()).hexdigest(),
        "weights": weights.hexdigest(),
        "num_rollouts": len(rows),
        "of_several_versions": sum(count > 1 for count in versions),
        "most_versions": max(versions),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="a run's configuration")
    parser.add_argument("folder", metavar="FOLDER", help="for the runs, new")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--runs", type=int, default=50, help="that are disturbed (50)")
    parser.add_argument("--killed", type=float, default=0.4, help="share of them that is killed, and of those once more (0.4)")
    parser.add_argument("--beside", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--seed", type=int, default=0, help="of waits and kills")
    options = parser.parse_intermixed_args()
    folder = Path(options.folder).resolve()
    os.environ.setdefault(REWARDS_WAIT, "0")
    try:
        config = load_config(options.config, [*IN_FLIGHT, *options.overrides, f"run.directory={folder / 'run'}"])
    except ConfigError as error:
        sys.exit(f"probe_in_flight: {error}")
    folder.mkdir(parents=True)
    (folder / WAITS).touch()
    (folder / BASE).write_text(dump_config(config), encoding="utf-8")
    probe = Probe(config, folder, options.seed, options.killed)
    probe.undisturbed()
    print(json.dumps(probe.expected), flush=True)
    numbers = range(1, options.runs + 1)
    with ThreadPoolExecutor(options.beside) as threads:
        for done in [threads.submit(probe.disturbed, numbers[i :: options.beside]) for i in range(options.beside)]:
            done.result()
    equal, kills = sum(row["equal"] for row in probe.rows), sum(row["kills"] for row in probe.rows)
    waits = [float(line) for line in (folder / WAITS).read_text(encoding="utf-8").splitlines()]
    killed = sum(row["kills"] > 0 for row in probe.rows)
    told = {"runs": len(probe.rows), "equal": equal, "killed": killed, "kills": kills, "failures": probe.num_failures}
    told |= {"waits": len(waits), "waited_seconds": round(sum(waits), 1), "longest_seconds": round(max(waits, default=0), 2)}
    told |= {name: probe.expected[name] for name in ("num_rollouts", "of_several_versions", "most_versions")}
    print("RESULT " + json.dumps(told))
    return 0 if equal == options.runs else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--series"]:
        told = json.loads(sys.argv[2])
        serve(Series(told["folder"], tuple(told["numbers"]), told["seed"]))
        sys.exit(0)
    sys.exit(main())
