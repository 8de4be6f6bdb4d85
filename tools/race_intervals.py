"""Semion's regimes against each other on one machine: the seconds a step of an online run, of one that syncs every tenth
step, and of ones that sample ahead or take weights in flight; equal model, prompts, samples, rewards and loss, the sides in
turn. Beside each stands the best that its halves allow, as the run of the same s without overlap measured them: where nothing
overlaps their sum, otherwise the longer. Load on the machine counts, so leave it alone.

    python tools/race_intervals.py quickstart|larger [--rounds 2] [--sides NAME ...] [--json FILE] [semion.option=value ...]

It wants what tools/quickstart has made; `larger` makes the 48 M model of tools/race.py, where sampling is most of the work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.core.jsonl import read_rows  # noqa: E402
from tools.race import REWARD, larger_model  # noqa: E402

SIDES = {  # name: options, steps that are not counted at the start, steps that are, steps at the end while nothing is sampled
    "s=1": (["sync.sync_interval=1"], 3, 9, 0),
    "s=1, lookahead 1": (["sync.sync_interval=1", "sync.lookahead=1"], 4, 10, 1),
    "s=1, lookahead 2, in flight": (["sync.sync_interval=1", "sync.lookahead=2", "sync.in_flight=true"], 4, 10, 2),
    "s=10": (["sync.sync_interval=10"], 10, 20, 0),
    "s=10, reference from rollouts": (["sync.sync_interval=10", "sync.reference_log_probs=rollouts"], 10, 20, 0),
    "s=10, lookahead 1": (["sync.sync_interval=10", "sync.lookahead=1"], 20, 20, 10),
}
ALONE = {  # where the same halves do not overlap, so that each is measured by itself
    "s=1, lookahead 1": "s=1",
    "s=1, lookahead 2, in flight": "s=1",
    "s=10, lookahead 1": "s=10",
}
OPTIONS = {
    "quickstart": ["trainer.tensor_parallel=1", "optimizer.learning_rate=1e-9"],  # so that lengths stay what they are
    "larger": [
        "trainer.tensor_parallel=1",
        "data.prompts_per_step=2",
        "algorithm.samples_per_prompt=2",
        "algorithm.choose_truncated=true",
        "sampling.max_tokens=64",
        "optimizer.learning_rate=1e-9",
        f"data.reward={REWARD}:all_bits",
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=OPTIONS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of all sides")
    parser.add_argument("--rounds", type=int, default=2, help="of all sides in turn (2)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="NAME")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file too")
    options = parser.parse_intermixed_args()
    model = ROOT / "runs/quickstart/seed_model"
    if options.model == "larger":
        model = larger_model(model)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    for round_ in range(options.rounds):
        for side in options.sides:
            found[side].append(run(side, [*OPTIONS[options.model], f"model.path={model}", *options.overrides]))
            print(f"round {round_ + 1}, {side}: {found[side][-1]['step']:.3f} s a step", flush=True)
    table = {side: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for side, runs in found.items()}
    first = table[options.sides[0]]
    print(f"{'':30} {'step':>6} {'times':>6} {'sampling':>9} {'training':>9} {'best':>6} {'trainer idle':>13} {'trained':>8}")
    for side, row in table.items():
        alone = table.get(ALONE.get(side, side))
        halves = [alone["sampling"], alone["training"]] if alone else []
        overlaps = side != "s=1"  # there alone a step is sampled before anything trains
        row["best"] = float("nan") if not halves else max(halves) if overlaps else sum(halves)
        print(
            f"{side:30} {row['step']:6.2f} {first['step'] / row['step']:6.2f} {row['sampling']:9.2f} {row['training']:9.2f} "
            f"{row['best']:6.2f} {row['trainer_idle']:13.0%} {row['tokens']:8.0f}"
        )
    if options.json:
        Path(options.json).write_text(json.dumps({"runs": found, "medians": table}, indent=2) + "\n", encoding="utf-8")
    return 0


def run(side: str, overrides: list[str]) -> dict[str, float]:
    """Means over the counted steps of one run, which are whole intervals; seconds from the end of one to that of the next, and
    the completions' tokens that were trained on."""
    own, before, counted, after = SIDES[side]
    with tempfile.TemporaryDirectory(prefix="semion-race-") as folder:
        directory = Path(folder) / "run"
        settings = [f"run.directory={directory}", f"run.steps={before + counted + after}", "data.held_out=", "run.sinks=[]"]
        options = [*settings, "checkpoint.every=end", *overrides, *own]
        command = [sys.executable, "-m", "engine.cli", "train", "configs/quickstart.toml", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{side}: ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        rows = list(read_rows(directory / "metrics.jsonl"))
    rows = rows[before - 1 : before + counted]
    seconds = (rows[-1]["unix_seconds"] - rows[0]["unix_seconds"]) / counted
    rows = rows[1:]
    waited = statistics.fmean(row["trainer_idle_share"] * row["step_seconds"] for row in rows)
    found = {"step": seconds, "sampling": mean(rows, "generation_seconds"), "training": mean(rows, "train_seconds")}
    return found | {"trainer_idle": waited / seconds, "tokens": mean(rows, "target_tokens")}


def mean(rows: list[dict[str, Any]], name: str) -> float:
    """Of what was measured; steps that have none are passed over."""
    values = [float(row[name]) for row in rows if row.get(name) is not None]
    return statistics.fmean(values) if values else 0.0


if __name__ == "__main__":
    sys.exit(main())
