"""One seed model through several regimes on equal prompts. Prints a table of held-out accuracy with standard errors and of what
the time went into, and draws the means over the seeds. A run that is there already is not made again. The studies:

- paper: offline, semi-online (s = 100 and 10) and online DPO, GRPO, and offline and online DPO with the reference the other way
  round;
- ahead: online DPO and GRPO and s = 10 with rollouts sampled ahead, and with weights in flight;
- grpo: what the paper leaves open, semi-online GRPO: s = 1, 5, 10 and 40 with no correction but the clip, with the ratio
  truncated (at s = 1 there is nothing to truncate: the ratio is 1), and with OAPL.

It wants what tools/quickstart has made:

    .venv/bin/python tools/compare_regimes.py run.steps=120 --seeds 0 1 2 [--study grpo [--regimes "OAPL, s = 1"]]
        [--json PATH] [--plots FOLDER]
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from engine.core.jsonl import read_rows
from engine.observe.charts import Line, Point, chart

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "regimes"
REGIMES = {
    "offline DPO": ["sync.sync_interval=never", "sync.reference=never"],
    "offline DPO, reference every 10": ["sync.sync_interval=never", "sync.reference=10"],
    "semi-online DPO, s = 100": ["sync.sync_interval=100", "sync.reference=follow"],
    "semi-online DPO, s = 10": ["sync.sync_interval=10", "sync.reference=follow"],
    "online DPO": ["sync.sync_interval=1", "sync.reference=follow"],
    "online DPO, fixed reference": ["sync.sync_interval=1", "sync.reference=never"],
    "GRPO": ["algorithm.loss=grpo", "sync.sync_interval=1", "sync.reference=never"],
}
GRPO = ["algorithm.loss=grpo", "sync.reference=never"]
TRUNCATED = [*GRPO, "algorithm.correction=truncate", "algorithm.correction_high=2"]
OAPL = ["algorithm.loss=oapl", "sync.reference=never"]
AHEAD, IN_FLIGHT = ["sync.lookahead=1"], ["sync.lookahead=2", "sync.in_flight=true"]
DPO = ["sync.reference=follow"]
STUDIES = {
    "paper": REGIMES,
    "ahead": {
        f"{name}{how}": ["sync.sync_interval=1", *loss, *more]
        for name, loss in (("online DPO", DPO), ("GRPO", GRPO))
        for how, more in (("", []), (", lookahead 1", AHEAD), (", lookahead 2, in flight", IN_FLIGHT))
    }
    | {"semi-online DPO, s = 10, lookahead 1": ["sync.sync_interval=10", *DPO, *AHEAD]},
    "grpo": {f"{name}, s = 1": [*loss, "sync.sync_interval=1"] for name, loss in (("GRPO", GRPO), ("OAPL", OAPL))}
    | {
        f"{name}, s = {s}": [*loss, f"sync.sync_interval={s}"]
        for s in (5, 10, 40)
        for name, loss in (("GRPO", GRPO), ("GRPO, truncated", TRUNCATED), ("OAPL", OAPL))
    },
}
CURVES = {  # file: title, unit, metric
    "entropy": ("Next-token entropy of the rollouts", "nats a token", "rollout_entropy"),
    "length": ("Length of the rollouts", "tokens", "completion_tokens_mean"),
    "accuracy": ("Training prompts answered correctly", "share", "accuracy"),
}
LAST = 5  # steps at the end over which entropy and length are averaged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options set anew in every regime")
    parser.add_argument("--config", default="configs/quickstart.toml")
    parser.add_argument("--study", choices=STUDIES, default="paper")
    parser.add_argument("--regimes", nargs="+", metavar="NAME", help="only these of the study, as its table names them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run of every regime for each")
    parser.add_argument(
        "--grpo", nargs="*", default=[], metavar="section.key=value", help="options of the runs with GRPO alone"
    )
    parser.add_argument("--json", metavar="PATH", help="write the figures to this file too")
    parser.add_argument("--plots", metavar="FOLDER", help="write curves as SVG files, means over the seeds")
    options = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    regimes = STUDIES[options.study]
    if unknown := [name for name in options.regimes or () if name not in regimes]:
        parser.error(f"--regimes must be of the study's {', '.join(map(repr, regimes))}; found {unknown[0]!r}")
    regimes = {name: own for name, own in regimes.items() if name in (options.regimes or regimes)}
    for seed in options.seeds:
        for regime, overrides in regimes.items():
            own = options.grpo if "algorithm.loss=grpo" in overrides else []
            name = folder_of(regime, seed).name
            settings = [*overrides, *own, *options.overrides, f"run.seed={seed}", "checkpoint.every=end"]
            results.setdefault(regime, []).append(run(options.config, name, settings))
    if options.plots:
        draw(Path(options.plots), list(regimes), options.seeds)
    rows = [row(regime, runs) for regime, runs in results.items()]
    print(table(rows))
    if options.json:
        Path(options.json).write_text(json.dumps({"rows": rows, "runs": results}, indent=2) + "\n", encoding="utf-8")
    return 0


def folder_of(regime: str, seed: int) -> Path:
    """Where a run's records are."""
    return FOLDER / f"{regime.replace(' ', '_').replace(',', '').replace('=', '')}_{seed}"


def draw(folder: Path, regimes: list[str], seeds: list[int]) -> None:
    """A file for each of CURVES, a line for each regime."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (title, unit, metric) in CURVES.items():
        lines = []
        for place, regime in enumerate(regimes):
            runs = [list(read_rows(folder_of(regime, seed) / "metrics.jsonl")) for seed in seeds]
            steps = [[row[metric] for row in rows] for rows in zip(*runs, strict=True)]
            points = [Point(step, sum(values) / len(values)) for step, values in enumerate(steps)]
            lines.append(Line(regime, tuple(points), colour=place))
        (folder / f"{name}.svg").write_text(chart(title, unit, lines), encoding="utf-8")


def run(config: str, name: str, settings: list[str]) -> dict[str, Any]:
    """One run, or what it left when it has been made before with the same settings."""
    directory = FOLDER / name
    marker = directory / "settings.json"
    if not marker.exists() or sorted(json.loads(marker.read_text())) != sorted(
        settings
    ):  # another study may order them otherwise
        subprocess.run(["rm", "-rf", str(directory)], check=True)
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", "engine.cli", "train", config, *settings, f"run.directory={directory}"]
        subprocess.run(command, cwd=ROOT, check=True)
        marker.write_text(json.dumps(settings))
    summary = json.loads((directory / "summary.json").read_text())
    metrics = list(read_rows(directory / "metrics.jsonl"))
    before, after = summary["evaluations"][0], summary["evaluations"][-1]
    tail = metrics[-LAST:]
    return {
        "before": before["mean"],
        "after": after["mean"],
        "standard_error": after["standard_error"],
        "step_seconds": sum(m["step_seconds"] for m in metrics[1:]) / len(metrics[1:]),
        "wait_seconds": sum(m["wait_seconds"] for m in metrics[1:]) / len(metrics[1:]),
        "entropy_first": metrics[0]["rollout_entropy"],
        "entropy_last": sum(m["rollout_entropy"] for m in tail) / len(tail),
        "tokens_first": metrics[0]["completion_tokens_mean"],
        "tokens_last": sum(m["completion_tokens_mean"] for m in tail) / len(tail),
        "max_staleness": max(m["staleness"] for m in metrics),
    }


def row(regime: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds; the standard error is that of the problems, and with several seeds that of the seeds too."""
    means = {name: math.fsum(run[name] for run in runs) / len(runs) for name in runs[0]}
    spread = None
    if len(runs) > 1:
        spread = math.sqrt(math.fsum((run["after"] - means["after"]) ** 2 for run in runs) / (len(runs) - 1) / len(runs))
    return {"regime": regime, "runs": len(runs), "spread_over_seeds": spread} | means


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, for docs/results.md."""
    lines = [
        "| regime | before | after ± s.e. (problems) | ± (seeds) | s a step | waited | entropy | tokens | staleness |",
        "|---|" + "---|" * 8,
    ]
    for r in rows:
        seeds = "" if r["spread_over_seeds"] is None else f"{r['spread_over_seeds']:.1%}"
        lines.append(
            f"| {r['regime']} | {r['before']:.1%} | {r['after']:.1%} ± {r['standard_error']:.1%} | {seeds} | "
            f"{r['step_seconds']:.2f} | {r['wait_seconds']:.2f} | {r['entropy_first']:.2f} → {r['entropy_last']:.2f} | "
            f"{r['tokens_first']:.1f} → {r['tokens_last']:.1f} | ≤ {r['max_staleness']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
