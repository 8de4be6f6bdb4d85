"""Holds `semion plan`'s seconds against real runs on this machine: fourteen tiny configurations, each trained for a few steps,
their median step beside what the planner says of them. What it is told of the machine comes from `semion calibrate` and from
one run of each model that is none of those. It wants the machine for itself, for a quarter of an hour on two cores:

    .venv/bin/python tools/validate_plan.py [NAME ...] [--json PATH] [--plot PATH]      all without a NAME

It makes runs/validate/: problems, two models with random weights, the runs. A calibration that is there is used again
(--calibrate measures anew); runs are always made anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

from engine.api.planning import MOST_LENGTHS, Run, inputs, recalibrated
from engine.capacity.transfer import Machine, plan_run
from engine.config.load import RunConfig, dump_config, load_config
from engine.core.jsonl import read_rows
from engine.forecast.calibration import Calibrated, calibrated, read_calibration
from engine.forecast.comparing import counted, workload_of
from engine.forecast.lengths import newest_lengths
from engine.forecast.seconds import Forecaster
from engine.observe.charts import Line, Point, chart
from engine.run.spec import resolve

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("runs/validate")
CONFIG = FOLDER / "base.toml"
BASE = '[run]\ndirectory = "x"\n[model]\npath = "x"\n[data]\ntrain = "x"\n'  # all else is said below
STEPS = 12
REWARD = '''"""A reward that is right of about every second answer, whoever says it."""


def odd(completion):
    return float(sum(map(ord, completion)) % 2)
'''
MODELS: dict[str, dict[str, int]] = {  # sizes beside the quickstart's
    "small": {},
    "large": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8},
}
COMMON = [
    f"run.steps={STEPS}",
    f"data.train={FOLDER}/data/rl.jsonl",
    f"data.reward={FOLDER}/reward.py:odd",
    "data.prompts_per_step=8",
    "data.max_prompt_tokens=96",
    "inference.max_model_tokens=192",
    "sync.reference=follow",
    "algorithm.samples_per_prompt=4",
    "sampling.max_tokens=64",
    "trainer.tensor_parallel=1",
    "trainer.microbatch_tokens=1024",
    "optimizer.learning_rate=1e-9",
    "inference.max_concurrent=64",
    "inference.kv_cache=64 MiB",
    "checkpoint.every=end",
    "guard.action=off",
]
DPO = ["algorithm.choose_truncated=true"]  # a model with random weights hardly ever ends
GRPO = ["algorithm.loss=grpo", "sync.reference=never"]
S4 = ["sync.sync_interval=4"]
ONLINE = ["sync.sync_interval=1"]
CASES: dict[str, tuple[str, list[str]]] = {  # name: model, options
    "dpo_online": ("small", [*DPO, *ONLINE]),
    "dpo_4": ("small", [*DPO, *S4]),
    "dpo_offline": ("small", [*DPO, "sync.sync_interval=never", "sync.reference=never", "checkpoint.every=4"]),
    "dpo_online_ahead": ("small", [*DPO, *ONLINE, "sync.lookahead=1"]),
    "dpo_4_ahead": ("small", [*DPO, *S4, "sync.lookahead=1", "run.steps=20"]),
    "grpo_online": ("small", [*GRPO, *ONLINE]),
    "grpo_4": ("small", [*GRPO, *S4]),
    "dpo_4_tp2": ("small", [*DPO, *S4, "trainer.tensor_parallel=2"]),
    "dpo_4_pp2": ("small", [*DPO, *S4, "trainer.pipeline_parallel=2"]),
    "dpo_4_dp2": ("small", [*DPO, *S4, "trainer.data_parallel=2"]),
    "dpo_4_two_engines": ("small", [*DPO, *S4, "inference.engines=2"]),
    "grpo_online_dp2_two_engines": ("small", [*GRPO, *ONLINE, "trainer.data_parallel=2", "inference.engines=2"]),
    "large_grpo_online": ("large", [*GRPO, *ONLINE]),
    "large_dpo_4": ("large", [*DPO, *S4]),
}
KNOWN_BY = [*GRPO, *ONLINE, "data.prompts_per_step=12"]  # the run of each model that the machine is known by


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--calibrate", action="store_true", help="measure the machine anew")
    parser.add_argument("--json", metavar="PATH", help="write the figures to this file too")
    parser.add_argument("--plot", metavar="PATH", help="draw predicted against measured seconds as an SVG file")
    options = parser.parse_args()
    if unknown := set(options.names) - set(CASES):
        parser.error(f"a NAME must be one of {', '.join(CASES)}; found {', '.join(sorted(unknown))}")
    chosen = {name: CASES[name] for name in options.names or CASES}
    prepare()
    known = {model: knowledge(model, anew=options.calibrate) for model in dict.fromkeys(model for model, _ in chosen.values())}
    rows = [row(name, model, settings, known[model]) for name, (model, settings) in chosen.items()]
    print(table(rows))
    figures = summary(rows)
    print(figures["sentence"])
    if options.json:
        Path(options.json).write_text(json.dumps(figures | {"rows": rows}, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        Path(options.plot).write_text(picture(rows), encoding="utf-8")
    return 0


def prepare() -> None:
    """Makes what is not there yet."""
    folder = ROOT / FOLDER
    if not (folder / "data").exists():
        sizes = ["--sft-problems", "64", "--rl-problems", "1024", "--held-out-problems", "16"]
        run("tools/make_seed.py", "--output", str(folder / "data"), *sizes)
    (ROOT / CONFIG).write_text(BASE, encoding="utf-8")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    for name, sizes_of in MODELS.items():
        if not (folder / name).exists():
            make_model(folder / "data" / "random_model", folder / name, sizes_of)


def make_model(base: Path, target: Path, sizes: dict[str, int]) -> None:
    """A model with random weights, of other sizes than the one that it takes everything else from."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(base, target)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(base)
    for name, value in sizes.items():
        setattr(config, name, value)
    LlamaForCausalLM(config).save_pretrained(target)


def knowledge(model: str, *, anew: bool) -> tuple[Calibrated, Path]:
    """What is known of the machine with this model: its constants, and the run that lengths are taken from."""
    file, directory = FOLDER / f"calibration_{model}.json", FOLDER / f"known_{model}"
    settings = [*KNOWN_BY, f"run.directory={directory}"]
    if anew or not (ROOT / file).exists() or not (ROOT / directory / "summary.json").exists():
        base = ROOT / FOLDER / f"calibrate_{model}.toml"
        base.write_text(dump_config(made(model, [*GRPO, *ONLINE])), encoding="utf-8")
        semion("calibrate", "--config", str(base), "--output", str(file))
        train(model, settings)
    config = made(model, settings)
    known = recalibrated(ROOT / directory, config, calibrated(read_calibration(ROOT / file)), Machine())
    return known, ROOT / directory


def made(model: str, settings: list[str]) -> RunConfig:
    return load_config(ROOT / CONFIG, [*COMMON, f"model.path={FOLDER}/{model}", *settings])


def train(model: str, settings: list[str]) -> float:
    """Trains anew; seconds of the command."""
    directory = made(model, settings).run_directory
    shutil.rmtree(ROOT / directory, ignore_errors=True)
    print(f"== {directory}", flush=True)
    started = time.monotonic()
    semion("train", str(CONFIG), *COMMON, f"model.path={FOLDER}/{model}", *settings, "--quiet")
    return time.monotonic() - started


def row(name: str, model: str, settings: list[str], known: tuple[Calibrated, Path]) -> dict[str, Any]:
    """A run's median step, and what is predicted of it."""
    settings = [*settings, f"run.directory={FOLDER}/{name}"]
    seconds = train(model, settings)
    config = made(model, settings)
    constants, lengths_of = known
    run_before = list(read_rows(lengths_of / "metrics.jsonl"))
    workload = workload_of(run_before, newest_lengths(lengths_of, MOST_LENGTHS), config, str(lengths_of))
    spec = resolve(config, digests=False)
    transfer = plan_run(spec, Machine())["seconds"]
    forecast = Forecaster(inputs(spec, constants.constants, workload, transfer, Machine())).forecast()
    seen = Run.read(ROOT / FOLDER / name, config)
    steps = counted(seen.rows, config)
    whole = interval_means([one["step_seconds"] for one in steps], config)
    return {
        "name": name,
        "model": model,
        "loss": config.algorithm.loss,
        "predicted": forecast.step_seconds,
        "measured": median(whole),
        "least": min(whole),
        "steps": len(steps),
        "run_seconds": seconds,
        "predicted_parts": forecast.parts,
        "measured_parts": seen.seen,
    }


def interval_means(seconds: list[float], config: RunConfig) -> list[float]:
    """Of each interval between weight syncs, or chunk, its mean step: single steps of it wait for different things."""
    length = len(config.schedule.opens(0)) // (1 + config.sync.lookahead)
    return [fmean(seconds[place : place + length]) for place in range(0, len(seconds) - length + 1, length)] or [fmean(seconds)]


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| run | predicted s a step | measured, median | least | predicted / measured |", "|---|---|---|---|---|"]
    for r in rows:
        seconds = f"{r['predicted']:.3f} | {r['measured']:.3f} | {r['least']:.3f}"
        lines.append(f"| {r['name']} | {seconds} | {r['predicted'] / r['measured']:.2f} |")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How far off, and whether the layout or regime that was said to be the fastest of its model and loss was."""
    errors = [abs(r["predicted"] / r["measured"] - 1) for r in rows]
    groups: dict[str, list[dict[str, Any]]] = {}
    for r in rows:
        groups.setdefault(f"{r['model']} {r['loss']}", []).append(r)
    picks = {
        group: {
            "said": min(of, key=lambda r: r["predicted"])["name"],
            "fastest": min(of, key=lambda r: r["measured"])["name"],
            "slower_by": min(of, key=lambda r: r["predicted"])["measured"] / min(r["measured"] for r in of) - 1,
        }
        for group, of in groups.items()
        if len(of) > 1
    }
    told = "; ".join(f"{g}: said {p['said']}, was {p['fastest']} (+{p['slower_by']:.0%})" for g, p in picks.items())
    sentence = f"median error {median(errors):.0%}, largest {max(errors):.0%} of {len(rows)} runs. Fastest of {told or 'none'}"
    return {"median_error": median(errors), "largest_error": max(errors), "picks": picks, "sentence": sentence}


def picture(rows: list[dict[str, Any]]) -> str:
    """Predicted over measured, a dot each, with the line on which they would be equal."""
    high = max(max(r["predicted"], r["measured"]) for r in rows) * 1.05
    equal = Line("equal", (Point(0.0, 0.0), Point(high, high)), colour=7, dash=1)
    dots = [Line(r["name"], (Point(r["measured"], r["predicted"]),), colour=place) for place, r in enumerate(rows)]
    return chart("Predicted seconds a step", "s", [equal, *dots], "measured, s")


def semion(*arguments: str) -> None:
    run("-m", "engine.cli", *arguments)


def run(*arguments: str) -> None:
    """A process of its own; ends this one when it fails."""
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(f"validate_plan: {' '.join(arguments)} ended with exit code {code}; its own error stands above")


if __name__ == "__main__":
    sys.exit(main())
