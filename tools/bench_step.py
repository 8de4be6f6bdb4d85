"""What a training step costs, scoring with the reference included, of random rollouts on one trainer rank: the seconds, the
CPU's seconds of the process, the tokens that its rows hold, and the loss and gradient norm, by which the sides are compared.
The sides are processes that take turns, step by step, so that a busy machine slows all of them: read the ratios.

    .venv/bin/python tools/bench_step.py [--against CHECKOUT] [--case NAME] [--steps 6] [--set trainer.recompute=true]

Without `--against` the peer is this checkout with trainer.share_prompts = false; with it also the code of that checkout. It
measures no generation, no weight sync and no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIZES: dict[str, int] = {"vocab_size": 640, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
HEADS: dict[str, int] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
LARGER: dict[str, int] = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
LARGER_HEADS: dict[str, int] = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}


@dataclass(frozen=True)
class Case:
    """Prompts of a step, samples of each, their tokens, and the options of the run."""

    prompts: int
    samples: int
    prompt: int
    completion: int
    options: dict[str, Any]
    model: dict[str, int]


GRPO: dict[str, Any] = {"algorithm.loss": "grpo"}
DPO: dict[str, Any] = {"algorithm.loss": "dpo", "sync.reference": "follow"}
CASES = {  # by name; the quickstart's model, but for the last
    "grpo_quickstart": Case(32, 8, 25, 18, GRPO, SIZES | HEADS),
    "grpo_longer": Case(8, 8, 150, 100, GRPO, SIZES | HEADS),
    "grpo_follow": Case(32, 8, 25, 18, GRPO | {"sync.reference": "follow"}, SIZES | HEADS),
    "dpo_quickstart": Case(32, 2, 25, 18, DPO, SIZES | HEADS),
    "grpo_48m": Case(4, 4, 25, 32, GRPO, LARGER | LARGER_HEADS),
}


def write_model(folder: Path, sizes: dict[str, int]) -> None:
    """A Llama of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**sizes, max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=0.08)
    LlamaForCausalLM(config).save_pretrained(folder)


def sequences(case: Case, step: int) -> list[Any]:
    """The step's rollouts: prompts and completions of random tokens, log-probs of -0.3, an advantage of either sign; of DPO a
    pair a prompt."""
    from engine.core.arrays import LogProbs, TokenIds
    from engine.core.types import Sequence

    draw, made, pairs = random.Random(step), [], case.options["algorithm.loss"] == "dpo"

    def tokens(mean: int) -> TokenIds:
        return TokenIds.of(draw.randrange(3, case.model["vocab_size"]) for _ in range(max(4, round(draw.gauss(mean, 4)))))

    for group in range(case.prompts):
        prompt = tokens(case.prompt)
        for sample in range(case.samples):
            completion = tokens(case.completion)
            credit = 0.5 if sample % 2 else -0.5
            log_probs = LogProbs.of([-0.3] * len(completion))
            made.append(Sequence(prompt, completion, log_probs, credit, group if pairs else -1, bool(sample % 2)))
    return made


def configuration(case: Case, model: Path, options: list[str]) -> Any:
    """The run's, as far as a policy reads it."""
    from engine.config.load import RunConfig, override

    tree = {
        "run": {"directory": "unused", "steps": 1000},
        "model": {"path": str(model)},
        "data": {"train": "unused", "max_prompt_tokens": 1024},
        "sampling": {"max_tokens": 1024},
        "trainer": {"microbatch_tokens": 4096},
        "optimizer": {"learning_rate": 4e-4, "eps": 1e-8},
        "algorithm": {"loss": case.options["algorithm.loss"]},
    }
    config = RunConfig.model_validate(tree)
    given = dict(option.split("=", 1) for option in options)
    changes = {name: json.loads(value) if value[:1] in "0123456789tf[" else value for name, value in given.items()}
    return override(config, case.options | changes)


def serve(case: Case, model: Path, options: list[str], folder: Path) -> None:
    """One side: a policy that takes a step for every line of its input, and answers with a line of JSON."""
    import torch
    import torch.distributed as dist

    from engine.algorithms.registry import make_loss
    from engine.megatron.packing import make_batch
    from engine.megatron.parallel_state import open_parallel_state
    from engine.megatron.policy import Policy
    from engine.run.spec import resolve

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    spec = resolve(configuration(case, model, options), digests=False)
    config = spec.config
    store = dist.FileStore(str(folder / f"store{os.getpid()}"), 1)
    parallel = open_parallel_state(config.trainer, rank=0, world_size=1, store=store, timeout=timedelta(seconds=60))
    policy = Policy(config, parallel, make_loss(config.algorithm), model, spec.shape, spec.trainer, copies=spec.copies)
    for step, _ in enumerate(sys.stdin):
        made = sequences(case, step)
        batch = make_batch(made, step=step, num_prompts=case.prompts, trainer=config.trainer, dp_rank=0)
        if config.schedule.reference_due(step):
            policy.refresh_reference()
        started, cpu = time.perf_counter(), time.process_time()
        metrics = policy.train_step(policy.score(batch))
        found = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
        print(
            json.dumps(found | {name: metrics[name] for name in ("num_tokens", "loss", "grad_norm")}),
            file=sys.__stdout__,
            flush=True,
        )


class Side:
    """A process of `serve` with the code of a checkout."""

    def __init__(self, checkout: Path, case: str, model: Path, options: list[str], folder: Path) -> None:
        more = [word for option in options for word in ("--set", option)]
        arguments = ["--serve", case, "--model", str(model), "--folder", str(folder), *more]
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | threads | {"PYTHONPATH": str(checkout)},
        )

    def step(self) -> dict[str, float]:
        """What one more step cost. RuntimeError when the process ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, float] = json.loads(line)
                return found
        raise RuntimeError(f"a side ended with {self._process.wait()}")

    def close(self) -> None:
        """Lets the process end."""
        self._process.kill()
        self._process.wait()


def compare(name: str, steps: int, options: list[str], against: Path | None) -> dict[str, Any]:
    """The medians of each side but for its first step, and of the ratios of steps taken in turn."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_model(folder / "model", CASES[name].model)
        wanted = [("shared", ROOT, options), ("not shared", ROOT, [*options, "trainer.share_prompts=false"])]
        if against is not None:
            wanted.append((str(against), against, options))
        sides = {label: Side(checkout, name, folder / "model", its_options, folder) for label, checkout, its_options in wanted}
        rows: dict[str, list[dict[str, float]]] = {label: [] for label in sides}
        try:
            for _ in range(steps + 1):
                for label, side in sides.items():
                    rows[label].append(side.step())
        finally:
            for side in sides.values():
                side.close()
    found: dict[str, Any] = {"case": name}
    for label, all_steps in rows.items():
        timed = all_steps[1:]
        found[label] = {key: statistics.median(row[key] for row in timed) for key in ("seconds", "cpu_seconds", "num_tokens")}
        found[label] |= {"first_loss": all_steps[0]["loss"], "first_grad_norm": all_steps[0]["grad_norm"]}
        pairs = zip(timed, rows["shared"][1:], strict=True)
        found[label]["times_shared"] = statistics.median(one["cpu_seconds"] / ours["cpu_seconds"] for one, ours in pairs)
    return found


def main() -> None:
    """Prints JSON, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--serve", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(CASES[options.serve], options.model, options.set, options.folder)
        return
    for name in options.case or list(CASES):
        found = compare(name, options.steps, options.set, options.against and options.against.resolve())
        print(json.dumps(found))
        print(f"{name:>16} {'tokens':>8} {'seconds':>8} {'CPU s':>8} {'of ours':>8}  first loss, gradient norm")
        for label, row in found.items():
            if isinstance(row, dict):
                numbers = (
                    f"{row['num_tokens']:8.0f} {row['seconds']:8.3f} {row['cpu_seconds']:8.3f} {row['times_shared']:7.2f}x"
                )
                print(f"{label[-16:]:>16} {numbers}  {row['first_loss']:.7g}, {row['first_grad_norm']:.7g}")


if __name__ == "__main__":
    main()
