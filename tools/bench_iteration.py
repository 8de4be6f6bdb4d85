"""What a decoding iteration of an engine on a CPU is made of: CPU time by part, of a real engine of one thread, here.

    python -m tools.bench_iteration --model FOLDER [--requests 32] [--tokens 32] [--prompt 12] [--rounds 5] [--json PATH]

Rounds are taken in turn with vLLM's own layers and with ours (engine/inference/cpu_decoder.py) in one engine, of the same
requests, which must give the same tokens. Of a part a round has the median of its iterations, without the first one, which
computes the prompts, and the least round is told. A part's time is without what it calls where that is a part of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.run.nodes import PROCESS_ENVIRONMENT

ITERATION = "vLLM's loop, and ours"  # what is in no other part


class Parts:
    """CPU seconds of the parts of the present iteration, each without those it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._open: list[tuple[str, float]] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is a part's."""

        def call(*args: Any, **options: Any) -> Any:
            self._turn()
            self._open.append((name, time.thread_time()))
            self.calls[name] += 1
            try:
                return function(*args, **options)
            finally:
                self._turn()
                self._open.pop()
                if self._open:
                    self._open[-1] = (self._open[-1][0], time.thread_time())

        return call

    def _turn(self) -> None:
        """Books what the innermost open part has used up to now."""
        if self._open:
            name, since = self._open[-1]
            now = time.thread_time()
            self.seconds[name] += now - since
            self._open[-1] = (name, now)

    def take(self) -> dict[str, float]:
        """What has been booked since the last call."""
        found, self.seconds = dict(self.seconds), defaultdict(float)
        return found


def open_engine(model: Path, requests: int, tokens: int, prompt: int) -> Any:
    """An engine as a run makes it."""
    from engine.config.load import RunConfig
    from engine.inference.vllm_engine import VllmEngine
    from engine.run.spec import resolve

    tree = {
        "run": {"directory": "unused", "steps": 1},
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": "unused", "max_prompt_tokens": prompt},
        "sampling": {"max_tokens": tokens},
        "inference": {
            "placement": "disaggregated",
            "max_model_tokens": max(192, prompt + tokens),
            "max_concurrent": max(64, requests),
            "kv_cache": "256 MiB",
        },
    }
    config = RunConfig.model_validate(tree)
    spec = resolve(config, digests=False)
    assert spec.kv_cache is not None
    return VllmEngine(config, 0, spec.kv_cache)


def watch(engine: Any, parts: Parts) -> None:
    """Has every part of an iteration tell its time."""
    import torch

    core = engine._llm.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    for owner, name, told in (
        (core.scheduler, "schedule", "scheduler: schedule"),
        (core.scheduler, "update_from_output", "scheduler: update"),
        (runner, "execute_model", "runner: inputs"),
        (runner, "_model_forward", "layers"),
        (runner.model, "compute_logits", "output layer"),
        (runner, "sample_tokens", "runner: outputs"),
        (runner, "_sample", "sampler"),
        (engine._llm.output_processor, "process_outputs", "output processor"),
        (engine, "_decode", ITERATION),
    ):
        setattr(owner, name, parts.timed(told, getattr(owner, name)))
    for namespace, operators in {
        torch.ops.semion: {
            "few_rows_product": "products",
            "rms_norm": "norms, activation",
            "swiglu": "norms, activation",
            "cached_attention": "attention",
        },
        torch.ops._C: {
            "cpu_attention_with_kv_cache": "attention",
            "cpu_attn_reshape_and_cache": "attention",
            "rotary_embedding": "attention",
        },
    }.items():
        for name, told in operators.items():
            timed = parts.timed(told, getattr(namespace, name))
            timed.default = parts.timed(told, getattr(namespace, name).default)  # type: ignore[attr-defined]
            setattr(namespace, name, timed)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a way and part, of the least round."""
    from engine.core.arrays import TokenIds
    from engine.inference.sampling import SampleRequest

    engine = open_engine(options.model, options.requests, options.tokens, options.prompt)
    words = json.loads((options.model / "config.json").read_text("utf-8"))["vocab_size"]
    parts = Parts()
    watch(engine, parts)
    draw = random.Random(0)
    prompts = [TokenIds.of(draw.randrange(3, words) for _ in range(options.prompt)) for _ in range(options.requests)]

    def decoded(name: str) -> tuple[list[dict[str, float]], list[Any]]:
        asked = [
            SampleRequest(f"{name}:{i}", f"{i}", 0, 1000 + i, prompt, 1.0, 1.0, options.tokens)
            for i, prompt in enumerate(prompts)
        ]
        engine.submit(asked, 0)
        engine._decode()
        parts.take()
        iterations = []
        while engine._open.keys() - engine._done.keys():
            engine._decode()
            iterations.append(parts.take())
        completions, _ = engine.collect([request.request_id for request in asked])
        return iterations, [completion.token_ids for completion in completions]

    model = engine._llm.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model.model
    ours = model.forward
    ways = {"vLLM's": ours._elsewhere, "ours": ours}
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    sampled: dict[str, list[Any]] = {}
    for number in range(-1, options.rounds):
        for way, forward in ways.items():
            model.forward = forward
            iterations, sampled[way] = decoded(f"{way} {number}")
            if number < 0:  # to warm up
                continue
            for part in sorted({name for iteration in iterations for name in iteration}):
                found[way, part].append(statistics.median(iteration.get(part, 0.0) for iteration in iterations))
            found[way, "all"].append(statistics.median(sum(iteration.values()) for iteration in iterations))
            beside = [sum(iteration.values()) - iteration["products"] for iteration in iterations]
            found[way, "all but products"].append(statistics.median(beside))
    if sampled["ours"] != sampled["vLLM's"]:
        raise SystemExit("both ways must sample the same tokens; found others: their numbers differ by more than rounding")
    return [{"way": way, "part": part, "milliseconds": 1e3 * min(rounds)} for (way, part), rounds in found.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    os.environ.update(PROCESS_ENVIRONMENT)
    rows = measure(options)
    for row in rows:
        print(f"{row['way']:8} {row['part']:28} {row['milliseconds']:8.2f} ms")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
