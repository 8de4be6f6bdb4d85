"""Layers of Llama 8B's shape on one device, forward and backward in every precision: tokens a second, and the share of a
ceiling their arithmetic reaches (MFU); then one optimizer step over the same parameters by every implementation. No vocabulary
to speak of, no data, no training. Never run on a GPU so far; `--tiny` is its twin on a CPU.

    python -m tools.bench_layers [--layers 4] [--tokens 8192] [--ceiling 790] [--only NAME ...] [--tiny] [--json PATH]

The ceiling is in TFLOP/s of dense bf16, for FP8 too, so that precisions compare: FP8 may pass 1. Causal attention is counted
as the half that is computed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from engine.config.options import Optimizer, Trainer
from engine.core.errors import SemionError
from engine.megatron import build
from engine.megatron.attention import Row
from engine.megatron.optimizer import PolicyOptimizer
from engine.megatron.parallel_state import ParallelState, open_parallel_state
from engine.models.base import ModelShape
from engine.models.sharding import trainer_layout
from tools.bench_ceilings import median_seconds

VARIANTS: dict[str, dict[str, Any]] = {  # trainer options, the plainest first
    "bf16 local": {},
    "bf16 te": {"layers": "transformer_engine"},
    "fp8 blockwise te": {"layers": "transformer_engine", "fp8": "blockwise"},
    "fp8 current te": {"layers": "transformer_engine", "fp8": "current"},
    "fp8 delayed te": {"layers": "transformer_engine", "fp8": "delayed"},
}
OPTIMIZERS = ("torch", "te", "apex")
LIBRARIES = {"te": "transformer_engine", "apex": "amp_C"}  # modules, by the last word of a name
# How a variant that this machine cannot run fails: torch and CUDA (RuntimeError), missing libraries, checks of megatron and TE.
REFUSALS = (SemionError, RuntimeError, ImportError, AssertionError, ValueError, TypeError, AttributeError)


def llama_8b(layers: int, *, tiny: bool) -> ModelShape:
    """Llama 3.1 8B with so many layers and a vocabulary of 1,024; or the same proportions 64 times narrower."""
    hidden, heads, kv_heads, ffn = (64, 4, 2, 224) if tiny else (4096, 32, 8, 14336)
    return ModelShape(
        num_layers=layers,
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        ffn_hidden=ffn,
        vocab_size=1024,
        rope_theta=500000.0,
        rope_scaling=None,
        norm_eps=1e-5,
        tied=False,
        max_positions=131072,
    )


def flops(shape: ModelShape, num_tokens: int, length: int) -> float:
    """Operations of forward and backward over sequences of one length: 6 a parameter and token, and causal attention's."""
    attention = shape.num_heads * shape.head_dim
    kv = shape.num_kv_heads * shape.head_dim
    layer = shape.hidden * (2 * attention + 2 * kv) + 3 * shape.hidden * shape.ffn_hidden
    parameters = shape.num_layers * layer + shape.vocab_size * shape.hidden  # the embedding multiplies nothing
    return 6.0 * parameters * num_tokens + 6.0 * shape.num_layers * attention * length * num_tokens


def build_chunk(shape: ModelShape, options: dict[str, Any], parallel: ParallelState) -> tuple[Any, Any]:
    """(megatron's configuration, the model in random bf16 weights)."""
    trainer = Trainer(**{"fuse_gradient_accumulation": False} | options)
    config = build.megatron_config(shape, trainer_layout(trainer), trainer, torch.bfloat16)
    (chunk,) = build.build_chunks(shape, config, parallel)
    return config, chunk.to(parallel.device)


def layer_row(name: str, shape: ModelShape, parallel: ParallelState, tokens: int, length: int, repeats: int) -> dict[str, Any]:
    """Tokens a second of one variant."""
    device = parallel.device
    _, chunk = build_chunk(shape, VARIANTS[name], parallel)
    ids = torch.randint(0, shape.vocab_size, (1, tokens), device=device)
    positions = torch.arange(length, device=device).repeat(tokens // length)[None]
    bounds = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device)
    packed = Row(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=length,
        max_seqlen_kv=length,
        lengths=[length] * (tokens // length),
        parents=torch.full((tokens // length,), -1, device=device),
        target_positions=torch.arange(tokens, device=device),
    )
    slope = torch.randn(1, tokens, shape.vocab_size, device=device).to(torch.bfloat16)

    def step(_: int) -> None:
        for parameter in chunk.parameters():
            parameter.grad = None
        chunk(ids, positions, None, packed_seq_params=packed).backward(slope)

    peak = peak_of(device)
    seconds = median_seconds(step, device.type, repeats)
    linear = type(chunk.decoder.layers[0].self_attention.linear_qkv)
    return {
        "measured": name,
        "by": f"{linear.__module__.split('.')[0]} {linear.__name__}",
        "ms": 1e3 * seconds,
        "tokens/s": tokens / seconds,
        "TFLOP/s": flops(shape, tokens, length) / seconds / 1e12,
        "peak GiB": peak(),
    }


def optimizer_row(name: str, shape: ModelShape, parallel: ParallelState, repeats: int) -> dict[str, Any]:
    """Seconds of one step, the gradient's norm and clipping included, over a bf16 model with fp32 copies and moments."""
    config, chunk = build_chunk(shape, {}, parallel)
    options = DistributedDataParallelConfig(use_distributed_optimizer=False, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(config, options, chunk)
    names = {parameter: name for name, parameter in chunk.named_parameters()}
    chosen: Any = name
    optimizer = PolicyOptimizer(Optimizer(implementation=chosen), [wrapped], names, dtype=torch.bfloat16, distributed=False)
    parameters: list[Any] = list(chunk.parameters())
    for parameter in parameters:
        parameter.main_grad.normal_()
    seconds = median_seconds(optimizer.apply, parallel.device.type, repeats)
    count = sum(parameter.numel() for parameter in parameters)
    # Reads the gradient twice (once for its norm), fp32 weight and both moments; writes those three and the bf16 weight.
    own = type(optimizer._optimizer.optimizer)
    return {
        "measured": f"optimizer {name}",
        "by": f"{own.__module__.split('.')[0]} {own.__name__}",
        "ms": 1e3 * seconds,
        "parameters": count,
        "TB/s": 34 * count / seconds / 1e12,
    }


def peak_of(device: torch.device) -> Callable[[], float]:
    """Starts counting; the result tells the most memory allocated since, in GiB (0 on a CPU)."""
    if device.type == "cpu":
        return lambda: 0.0
    torch.cuda.reset_peak_memory_stats()
    return lambda: torch.cuda.max_memory_allocated() / 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192, help="of one packed row")
    parser.add_argument("--length", type=int, default=2048, help="of each of its sequences")
    parser.add_argument("--ceiling", type=float, default=790.0, metavar="TFLOPS", help="of dense bf16 products")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS, *OPTIMIZERS], default=[*VARIANTS, *OPTIMIZERS], metavar="NAME")
    parser.add_argument("--tiny", action="store_true", help="64 times narrower")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file too")
    options = parser.parse_args()
    shape = llama_8b(options.layers, tiny=options.tiny)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        parallel = open_parallel_state(Trainer(), rank=0, world_size=1, store=store, timeout=timedelta(seconds=60))
        torch.manual_seed(0)
        for name in options.only:
            library = LIBRARIES.get(name.split()[-1])
            try:
                if library is not None and find_spec(library) is None:
                    row = {"measured": name, "not run": f"{library} is not installed"}
                elif name in VARIANTS:
                    row = layer_row(name, shape, parallel, options.tokens, options.length, options.repeats)
                    row["MFU"] = row["TFLOP/s"] / options.ceiling
                else:
                    row = optimizer_row(name, shape, parallel, options.repeats)
            except REFUSALS as error:
                row = {"measured": name, "refused": f"{type(error).__name__}: {error}"[:200]}
            rows.append(row)
            print(row, flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        parallel.close()
    return int(any("refused" in row for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
