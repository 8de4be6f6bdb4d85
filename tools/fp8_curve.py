"""Does a lower precision train as the reference does? One small Llama, the same data step by step, the loss of every step: the
reference with two seeds of its first weights, every candidate with the first of them. A candidate's distance from the
reference is judged beside the distance of the two seeds, which is what chance alone makes.

    python -m tools.fp8_curve [--steps 200] [--json PATH]

On a GPU: bf16 against the three FP8 recipes, Transformer Engine's layers; on a CPU with --stand-in the same, a smaller model
(`--tiny`), with the kernels of tests/te_cpu, which round as a GPU's do. On a CPU without it fp32 against bf16, local layers.
Never run on a GPU so far.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

if "--stand-in" in sys.argv:
    from tests import te_cpu

    te_cpu.install()  # before megatron-core is imported

from engine.algorithms.nll import NllLoss
from engine.config.load import RunConfig
from engine.config.options import Trainer
from engine.core.arrays import TokenIds
from engine.core.types import Batch, Sequence
from engine.megatron.packing import make_batch
from engine.megatron.parallel_state import ParallelState, open_parallel_state
from engine.megatron.policy import Policy
from engine.models.config_file import read_shape
from engine.models.sharding import trainer_layout

VOCABULARY, LENGTH = 512, 128
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
TINY = SIZES | {  # the narrowest that FP8 in blocks of 128 takes
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TE = {"layers": "transformer_engine"}
Variant = tuple[str, dict[str, Any]]  # model.dtype, trainer options
ON_GPU: dict[str, Variant] = {  # the reference first
    "bf16": ("bfloat16", TE),
    "fp8 blockwise": ("bfloat16", {**TE, "fp8": "blockwise"}),
    "fp8 current": ("bfloat16", {**TE, "fp8": "current"}),
    "fp8 delayed": ("bfloat16", {**TE, "fp8": "delayed"}),
}
ON_CPU: dict[str, Variant] = {"fp32": ("float32", {}), "bf16": ("bfloat16", {})}
LAST_SHARE = 0.25  # of the steps, over whose losses distances are means


def write_model(folder: Path, seed: int, sizes: dict[str, int]) -> None:
    """A Llama with random weights of that seed."""
    torch.manual_seed(seed)
    with torch.device("cpu"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=LENGTH))
    model.save_pretrained(folder)


def draw_batch(step: int, num_sequences: int, trainer: Trainer) -> Batch:
    """Sequences that can be learned in part: each token follows from the one before by a fixed rule, but for one in five."""
    draw = random.Random(step)
    made = []
    for _ in range(num_sequences):
        tokens = [draw.randrange(VOCABULARY)]
        while len(tokens) < LENGTH:
            tokens.append(draw.randrange(VOCABULARY) if draw.random() < 0.2 else (tokens[-1] * 5 + 17) % VOCABULARY)
        made.append(Sequence(TokenIds.of(tokens[:1]), TokenIds.of(tokens[1:])))
    return make_batch(made, step=step, num_prompts=num_sequences, trainer=trainer, dp_rank=0)


def curve(variant: Variant, folder: Path, steps: int, num_sequences: int, parallel: ParallelState) -> list[float]:
    """The loss of every step."""
    dtype, trainer = variant
    config = RunConfig.model_validate(
        {
            "run": {"directory": "unused", "steps": steps},
            "model": {"path": str(folder), "dtype": dtype},
            "data": {"train": "unused", "max_prompt_tokens": 1},
            "sampling": {"max_tokens": LENGTH},
            "trainer": {"microbatch_tokens": LENGTH * num_sequences, "fuse_gradient_accumulation": False, **trainer},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 20, "eps": 1e-8},
        }
    )
    policy = Policy(config, parallel, NllLoss(), folder, read_shape(folder), trainer_layout(config.trainer))
    return [policy.train_step(draw_batch(step, num_sequences, config.trainer))["loss"] for step in range(steps)]


def distance(one: list[float], other: list[float]) -> float:
    """Mean absolute difference over the last steps."""
    last = max(1, round(LAST_SHARE * len(one)))
    return statistics.fmean(abs(a - b) for a, b in zip(one[-last:], other[-last:], strict=True))


def compare(curves: dict[str, list[float]], reference: str, noise: float) -> list[dict[str, Any]]:
    """A row for every curve; `of_noise` below 1 says that the precision shows less than the seed."""
    last = max(1, round(LAST_SHARE * len(curves[reference])))
    rows = []
    for name, losses in curves.items():
        row = {"curve": name, "first loss": losses[0], "mean of last": statistics.fmean(losses[-last:])}
        if name != reference:
            far = distance(losses, curves[reference])
            row |= {"distance": far, "of_noise": far / noise}
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tiny", action="store_true", help="two narrow layers, four sequences a step")
    parser.add_argument("--stand-in", action="store_true", help="Transformer Engine on a CPU, by tests/te_cpu")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write figures and curves to this file too")
    options = parser.parse_args()
    variants = ON_GPU if torch.cuda.is_available() or options.stand_in else ON_CPU
    reference = next(iter(variants))
    num_sequences = 4 if options.tiny else 32
    curves: dict[str, list[float]] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(seed) for seed in range(2)]
        for seed, folder in enumerate(folders):
            write_model(folder, seed, TINY if options.tiny else SIZES)
        store = dist.FileStore(f"{name}/store", 1)
        parallel = open_parallel_state(Trainer(), rank=0, world_size=1, store=store, timeout=timedelta(seconds=60))
        curves[reference] = curve(variants[reference], folders[0], options.steps, num_sequences, parallel)
        second = f"{reference}, second seed"
        curves[second] = curve(variants[reference], folders[1], options.steps, num_sequences, parallel)
        noise = distance(curves[reference], curves[second])
        for candidate in list(variants)[1:]:
            curves[candidate] = curve(variants[candidate], folders[0], options.steps, num_sequences, parallel)
            rows = compare(curves, reference, noise)
            print(rows[-1], flush=True)
            if options.json:
                options.json.write_text(json.dumps({"figures": rows, "curves": curves}, indent=1) + "\n", encoding="utf-8")
        parallel.close()
    far = [row["curve"] for row in rows if row.get("of_noise", 0) > 1 and row["curve"] != second]
    print(f"{reference}: {rows[0]}; further than chance: {', '.join(far) or 'none'}")
    return int(bool(far))


if __name__ == "__main__":
    raise SystemExit(main())
