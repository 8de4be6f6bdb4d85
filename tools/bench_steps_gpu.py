"""Whole trainer steps of the product on a model's own vocabulary: the reference's pass, forward, backward, output layer, clip
and optimizer, by variant of the trainer: tokens a second, MFU, peak memory, and loss and gradient norm, by which the variants
are held against each other. It samples nothing and syncs nothing. Never run on a GPU so far; `--tiny` is its twin on a CPU.

    python -m tools.bench_steps_gpu [FOLDER] [--rows 1 4] [--tokens 8192] [--length 950] [--only NAME ...] [--json PATH]

FOLDER is a checkpoint; where none is there, a Llama of 2.8 B random parameters, 8B's width and a quarter of its layers, is
written into it first. The MFU is of --ceiling, dense bf16, for FP8 too, so that variants compare.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.algorithms.registry import make_loss
from engine.config.load import RunConfig
from engine.config.options import Trainer
from engine.core.arrays import NO_LOG_PROBS, TokenIds
from engine.core.types import Sequence
from engine.megatron.packing import make_batch
from engine.megatron.parallel_state import ParallelState, open_parallel_state
from engine.megatron.policy import Policy
from engine.models.base import ModelShape
from engine.run.spec import resolve
from tools.bench_layers import REFUSALS, flops, peak_of
from tools.bench_sync import write_model

SAID = {"layers": "local", "fuse_gradient_accumulation": False}  # of every variant that says nothing else: never "auto"
TE = {"layers": "transformer_engine", "distributed_optimizer": True}
SMALL = {"implementation": "te", "moment_dtype": "bfloat16"}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options of trainer and optimizer
    "te": (TE, SMALL),
    "te, fused accumulation": (TE | {"fuse_gradient_accumulation": True}, SMALL),
    "te, fused lm head": (TE | {"fused_lm_head": True}, SMALL),
    "te, fp8 current": (TE | {"fp8": "current"}, SMALL),
    "te, fp8 blockwise": (TE | {"fp8": "blockwise"}, SMALL),
    "local": ({}, {}),
    "local, fused lm head": ({"fused_lm_head": True}, {}),
    "local, fused accumulation": ({"fuse_gradient_accumulation": True}, {}),
}
NEEDS = {"te": "transformer_engine"}  # modules, by a word of a variant's name
PROMPT = 50  # tokens of each sequence that no loss looks at


def pairs_of(shape: ModelShape, count: int, length: int) -> list[Sequence]:
    """So many pairs of DPO, each sequence of `length` random tokens with a prompt of its own."""
    draw = random.Random(0)

    def tokens(number: int) -> TokenIds:
        return TokenIds.of(draw.randrange(shape.vocab_size) for _ in range(number))

    prompt = min(PROMPT, length // 2)
    return [
        Sequence(tokens(prompt), tokens(length - prompt), NO_LOG_PROBS, 0.0, pair, chosen)
        for pair in range(count)
        for chosen in (True, False)
    ]


def variant_rows(name: str, folder: Path, parallel: ParallelState, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One variant's figures for each number of rows; the first step of each warms up."""
    trainer, optimizer = VARIANTS[name]
    tree = {
        "run": {"directory": "unused", "steps": 100},
        "model": {"path": str(folder), "dtype": "float32" if options.tiny else "bfloat16"},
        "data": {"train": "unused", "max_prompt_tokens": PROMPT},
        "sampling": {"max_tokens": options.length - min(PROMPT, options.length // 2)},
        "algorithm": {"loss": "dpo"},
        "sync": {"reference": "never"},
        "trainer": {"microbatch_tokens": options.tokens, **SAID, **trainer},
        "optimizer": {"learning_rate": 1e-6, **optimizer},
    }
    spec = resolve(RunConfig.model_validate(tree), digests=False)
    config = spec.config
    policy = Policy(config, parallel, make_loss(config.algorithm), folder, spec.shape, spec.trainer, copies=spec.copies)
    found = []
    for rows in options.rows:
        pairs = max(1, rows * options.tokens // (2 * options.length))
        made = pairs_of(spec.shape, pairs, options.length)
        batch = make_batch(made, step=0, num_prompts=pairs, trainer=config.trainer, dp_rank=0)
        num_tokens = sum(row.token_ids.numel() for row in batch.microbatches)
        peak, seconds, metrics = peak_of(parallel.device), [], dict[str, float]()
        for _ in range(options.repeats + 1):
            started = clock(parallel)
            scored = policy.score(batch)
            between = clock(parallel)
            metrics = policy.train_step(scored)
            seconds.append((between - started, clock(parallel) - between))
        score, train = (statistics.median(part) for part in zip(*seconds[1:], strict=True))
        operations = flops(spec.shape, num_tokens, options.length)  # of forward and backward; a forward is a third
        rate = operations * 4 / 3 / (score + train) / 1e12
        found.append(
            {
                "variant": name,
                "rows": len(batch.microbatches),
                "tokens": num_tokens,
                "flops": operations,
                "score_seconds": score,
                "train_seconds": train,
                "first_seconds": sum(seconds[0]),
                "tokens/s": num_tokens / (score + train),
                "TFLOP/s": rate,
                "MFU": rate / options.ceiling,
                "loss": metrics["loss"],
                "grad_norm": metrics["grad_norm"],
                "peak GiB": peak(),
            }
        )
    return found


def clock(parallel: ParallelState) -> float:
    """The time when the device has done everything it was asked."""
    if parallel.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4], help="packed rows of a step")
    parser.add_argument("--tokens", type=int, default=8192 if on_gpu else 256, help="of a row")
    parser.add_argument("--length", type=int, default=950 if on_gpu else 40, help="of a sequence")
    parser.add_argument("--ceiling", type=float, default=989.0, metavar="TFLOPS", help="of dense bf16 products")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--tiny", action="store_true", help="a model of a million parameters in float32")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file too")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder: Path = options.folder or Path(scratch)
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            device = "cuda" if on_gpu else "cpu"
            write_model(folder, 1 if options.tiny else 2800, "float32" if options.tiny else "bfloat16", device)
        store = dist.FileStore(f"{scratch}/store", 1)
        parallel = open_parallel_state(Trainer(), rank=0, world_size=1, store=store, timeout=timedelta(seconds=120))
        for name in options.only:
            try:
                words = name.replace(",", "").split()
                if lacking := [module for word, module in NEEDS.items() if word in words and find_spec(module) is None]:
                    rows.append({"variant": name, "not run": f"{lacking[0]} is not installed"})
                else:
                    rows += variant_rows(name, folder, parallel, options)
            except REFUSALS as error:
                rows.append({"variant": name, "refused": f"{type(error).__name__}: {error}"[:300]})
            if on_gpu:
                torch.cuda.empty_cache()
            print(rows[-1], flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        parallel.close()
    return int(any("refused" in row for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
