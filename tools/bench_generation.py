"""The product's own engine at a model's full shape with random weights: how long it takes to start, whether equal seeds give
equal tokens, tokens a second by requests at once, and how long it takes to sleep and to wake. It loads no checkpoint, trains
nothing and syncs nothing. Never run on a GPU so far; `--tiny` is its twin on a CPU.

    python -m tools.bench_generation [--model configs/models/llama-3.1-8b] [--at 64 256] [--tokens 256] [--prompt 150]
                                     [--kv-cache "36 GiB"] [--quantization fp8] [--tiny] [--json PATH]

Each row of `decode` has what the planner's constants are worked out from (tools/gpu_calibration.py).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RUNS_WITH = ("vllm", "torch", "model_runner", "attention", "scheduling")  # of what an engine says of itself
WARM_UP = 8  # requests of the first batch, which is compared with itself


def make_folder(folder: Path, model: Path, tiny: bool) -> int:
    """A model folder without weights, with a tokenizer of a few words; its vocabulary's size."""
    from tools.bench_sync import write_model

    write_model(folder, 50)  # a head of 64: vLLM's attention on a CPU has no narrower one than 32
    if not tiny:
        (folder / "model.safetensors").unlink()
        shutil.copy(model / "config.json", folder / "config.json")
    size: int = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
    return size


def without_weights() -> None:
    """Has vLLM fill the parameters at random instead of reading a checkpoint."""
    from vllm.engine import arg_utils

    real = arg_utils.EngineArgs

    def dummy(**given: Any) -> Any:
        return real(**(given | {"load_format": "dummy"}))

    arg_utils.EngineArgs = dummy  # type: ignore[assignment,misc]


def free_gib() -> float:
    """Of the device; 0 on a CPU."""
    return torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else 0.0


def measure(options: argparse.Namespace, row: Any) -> None:
    """Everything, a row at a time."""
    from engine.config.load import RunConfig
    from engine.core.arrays import TokenIds
    from engine.inference.sampling import SampleRequest
    from engine.inference.vllm_engine import VllmEngine
    from engine.run.spec import resolve

    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as name:
        vocabulary = make_folder(Path(name), options.model, options.tiny)
        tree = {
            "run": {"directory": "unused", "steps": 1},
            "model": {"path": name, "dtype": "float32" if options.tiny and options.quantization == "none" else "bfloat16"},
            "data": {"train": "unused", "max_prompt_tokens": options.prompt},
            "sampling": {"max_tokens": options.tokens},
            "inference": {
                "placement": "colocated" if on_gpu else "disaggregated",
                "max_model_tokens": options.prompt + options.tokens,
                "max_concurrent": max(options.at),
                "kv_cache": options.kv_cache,
                "quantization": options.quantization,
            },
        }
        config = RunConfig.model_validate(tree)
        spec = resolve(config, digests=False)
        assert spec.kv_cache is not None
        if not options.tiny:
            without_weights()
        started = time.monotonic()
        engine = VllmEngine(config, 0, spec.kv_cache)
        seconds = time.monotonic() - started
        told = engine.describe()
        row(what="start", seconds=seconds, free_GiB=free_gib(), **{name: told[name] for name in RUNS_WITH})
        draw = random.Random(0)
        for number, count in enumerate([min(WARM_UP, max(options.at)), *options.at]):
            prompts = [TokenIds.of(draw.randrange(3, vocabulary) for _ in range(options.prompt)) for _ in range(count)]

            def decoded(what: str, number: int = number, prompts: list[Any] = prompts) -> tuple[list[Any], float]:
                requests = [
                    SampleRequest(f"{what}:{number}:{i}", f"{i}", 0, 1000 * number + i, ids, 1.0, 1.0, options.tokens)
                    for i, ids in enumerate(prompts)
                ]
                started = time.monotonic()
                engine.submit(requests, 0)
                completions, _ = engine.collect([request.request_id for request in requests])
                return completions, time.monotonic() - started

            completions, seconds = decoded("first")
            lengths = [len(completion.token_ids) for completion in completions]
            if number == 0:
                again, _ = decoded("again")
                same = [one.token_ids for one in again] == [one.token_ids for one in completions]
                row(what="equal seeds", requests=count, equal_tokens=same)
                continue
            row(
                what="decode",
                at_once=count,
                seconds=seconds,
                tokens=sum(lengths),
                iterations=max(lengths),
                context=sum(options.prompt * length + length * (length - 1) // 2 for length in lengths),
                prompts=options.prompt * count,
                **{"tokens/s": sum(lengths) / seconds},
            )
        for _ in range(2 if on_gpu else 0):  # vLLM refuses to sleep on a CPU
            before, started = free_gib(), time.monotonic()
            engine.sleep()
            slept, freed = time.monotonic() - started, free_gib() - before
            started = time.monotonic()
            engine._wake("weights")
            weights, started = time.monotonic() - started, time.monotonic()
            engine._wake("kv_cache")
            row(
                what="turn",
                sleep_seconds=slept,
                freed_GiB=freed,
                wake_weights_seconds=weights,
                wake_kv_cache_seconds=time.monotonic() - started,
            )


def main() -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "configs" / "models" / "llama-3.1-8b")
    parser.add_argument("--at", type=int, nargs="+", default=[64, 256] if on_gpu else [4, 16], help="requests at once")
    parser.add_argument("--tokens", type=int, default=256 if on_gpu else 16, help="of each answer")
    parser.add_argument("--prompt", type=int, default=150 if on_gpu else 12, help="tokens of each prompt")
    parser.add_argument("--kv-cache", default="36 GiB" if on_gpu else "64 MiB")
    parser.add_argument("--quantization", choices=["none", "fp8"], default="none", help="of the engine's weights")
    parser.add_argument("--tiny", action="store_true", help="a model of 50 million parameters; in float32 where not quantized")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file too")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def row(**figures: Any) -> None:
        rows.append(figures)
        print(figures, flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    measure(options, row)
    return int(not all(found.get("equal_tokens", True) for found in rows))


if __name__ == "__main__":
    raise SystemExit(main())
