"""What stands between the engines and an optimizer step on the host, as batches and data-parallel ranks become many. No model
runs: rollouts are drawn, and the run's own functions do with them what a run does. Prints tables, and JSON on request.

    python -m tools.bench_scale path --tokens 0.5 2 8 --ranks 1 8 64 512
    python -m tools.bench_scale balance
    python -m tools.bench_scale records --texts answers.jsonl
    python -m tools.bench_scale checkpoint --layers 12 --ranks 4

`path`: seconds of CPU and bytes a million tokens of each stage, from what vLLM returns to the packed rows of one rank.
`balance`: the work of the fullest data-parallel rank over the mean, and a pipeline's step over the ideal one, for lengths drawn
as 700 and as 4,000 tokens. `records`: what keeping rollouts costs, and going on from a checkpoint of runs of several ages.
`checkpoint`: bytes and seconds of one of a model of real size.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import pickle
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np

from engine.config.load import RunConfig, load_config
from engine.config.options import RolloutRecords, Trainer
from engine.core.arrays import TokenIds
from engine.core.types import Completion, Prompt, Rollout, RolloutGroup, Score
from engine.core.types import Sequence as Trained
from engine.inference.pool import Usage
from engine.inference.sampling import SampleRequest
from engine.inference.vllm_engine import VllmEngine
from engine.megatron.dealing import deal_step
from engine.megatron.outlines import outlines_of
from engine.megatron.packing import fill_batch
from engine.megatron.scatter import Coded, encode
from engine.rollouts.batch import step_data
from engine.rollouts.metrics import rollout_metrics
from engine.rollouts.writer import RolloutFolder, RolloutWriter
from tools import scale_checkpoint
from tools.scale_balance import ATTENTION, PROMPT, balance
from tools.scale_records import records

END = 128_009
CONFIG = "configs/scale/llama-3.1-8b-16x24.toml"
Value = TypeVar("Value")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parts = parser.add_subparsers(dest="part", required=True)
    path = parts.add_parser("path")
    path.add_argument("--tokens", type=float, nargs="*", default=[0.5, 2, 8], help="millions of sampled tokens of a step")
    path.add_argument("--ranks", type=int, nargs="*", default=[1, 8, 64, 512], help="data-parallel ranks")
    path.add_argument("--lengths", type=float, nargs="*", default=[700, 8000], help="mean lengths of a response")
    path.add_argument("--repeats", type=int, default=3, help="of each stage, of which the fastest counts")
    dealing = parts.add_parser("balance")
    dealing.add_argument("--draws", type=int, default=6)
    kept = parts.add_parser("records")
    kept.add_argument("--texts", metavar="FILE", help="JSON lines with an `answer` each; without, words drawn by Zipf's law")
    kept.add_argument("--steps", type=int, default=4)
    kept.add_argument("--ages", type=int, nargs="*", default=[10, 1000, 10_000], help="steps of the runs that are gone on with")
    saving = parts.add_parser("checkpoint")
    saving.add_argument("--layers", type=int, default=12, help="of Llama 3.2 1B's width; 12 make a billion parameters")
    saving.add_argument("--ranks", type=int, default=4, help="data-parallel ranks, a process each")
    saving.add_argument("--folder", type=Path, default=Path(), help="on the disk that is measured")
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": machine()}
    print(" ".join(f"{name} {value};" for name, value in found["machine"].items()))
    if options.part == "path":
        found["path"] = [
            show_path(path_of(Step(tokens, length), options.ranks, options.repeats))
            for length in options.lengths
            for tokens in options.tokens
        ]
    elif options.part == "balance":
        found |= balance(options.draws)
    elif options.part == "checkpoint":
        found["checkpoint"] = scale_checkpoint.show(scale_checkpoint.checkpoint(options.layers, options.ranks, options.folder))
    else:
        found["records"] = records(options.texts, options.steps, options.ages)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Where it was measured."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }


# -- the path of a step


class Step:
    """The responses of a step as vLLM returns them: lists of numbers. 16 to a prompt; lengths are log-normal."""

    def __init__(self, millions: float, mean: float) -> None:
        draw, sigma = np.random.default_rng(0), 0.6
        self.mean, self.outputs, self.requests = mean, list[Any](), list[SampleRequest]()
        self.prompts: list[Prompt] = []
        self.num_tokens = 0
        while self.num_tokens < millions * 1e6:
            place = len(self.prompts)
            ids = TokenIds.of(draw.integers(0, END, PROMPT).tolist())
            self.prompts.append(Prompt(f"{place:016x}", ids, "", "", "", ""))
            for sample in range(16):
                length = max(1, round(draw.lognormal(math.log(mean) - sigma**2 / 2, sigma)))
                tokens = [*draw.integers(0, END, length - 1).tolist(), END]
                log_probs = (-draw.exponential(0.5, length).astype(np.float32)).tolist()
                flat = SimpleNamespace(token_ids=list(tokens), logprobs=log_probs)
                self.outputs.append(SimpleNamespace(token_ids=tokens, logprobs=flat, finish_reason="stop"))
                self.requests.append(
                    SampleRequest(f"{place}:{sample}", f"{place:016x}", sample, place * 16 + sample, ids, 1.0, 1.0, length)
                )
                self.num_tokens += length


class Clock:
    """Stages in their order: seconds of CPU of the fastest of some repeats. Before each the memory that is free goes back to
    the system, as it does where a step's training comes between."""

    def __init__(self, repeats: int) -> None:
        self._repeats = repeats
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, action: Callable[[], Value]) -> Value:
        """What the action gives; measured."""
        best = math.inf
        for _ in range(self._repeats):
            give_back_memory()
            started = time.process_time()
            value = action()
            best = min(best, time.process_time() - started)
        self.seconds[name] = best
        return value


def give_back_memory() -> None:
    """Has the C library give free memory back; nothing where it is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def path_of(step: Step, ranks: Sequence[int], repeats: int) -> dict[str, Any]:
    """Seconds of CPU and bytes of a step's stages."""
    clock = Clock(repeats)
    gc.freeze()  # vLLM's lists are in an engine's process, where rank 0's collector never looks
    completions = clock("completions, in an engine", lambda: _completions(step))
    sent = clock("pickle, in an engine", lambda: pickle.dumps(completions, 5))
    arrived: list[Completion] = clock("unpickle", lambda: pickle.loads(sent))
    groups = [
        RolloutGroup(
            prompt, 0, tuple(Rollout(c, Score(float(c.seed % 2), "ok")) for c in arrived[16 * place : 16 * place + 16])
        )
        for place, prompt in enumerate(step.prompts)
    ]
    usage = Usage(step.num_tokens, 1.0)
    metrics = clock("metrics", lambda: rollout_metrics(groups, usage, (END,)))
    config = grpo(16)
    shares = [(len(step.prompts), len(step.prompts))]
    data = clock("sequences", lambda: step_data(groups, shares, metrics, config))
    handed, bytes_kept = _recorded(groups)
    found: dict[str, Any] = {
        "tokens": step.num_tokens,
        "mean": step.mean,
        "responses": len(step.outputs),
        "pickled_bytes": len(sent),
        "kept_bytes": bytes_kept,
        "before_dealing": clock.seconds | {"records, handed over": handed},
        "by_ranks": {count: _dealt(data.sequences, count, repeats) for count in ranks},
    }
    return found


def _completions(step: Step) -> list[Completion]:
    """What `VllmEngine.collect` makes of vLLM's outputs, but for the tokenizer's text."""
    engine: Any = VllmEngine.__new__(VllmEngine)
    engine._index, engine._version = 0, 0
    engine._config = SimpleNamespace(log_prob_temperature=1.0, sync=SimpleNamespace(in_flight=False))
    engine._tokenizer = SimpleNamespace(decode=lambda *_, **__: "")
    engine._open = {request.request_id: (request, 0) for request in step.requests}
    engine._done = {request.request_id: output for request, output in zip(step.requests, step.outputs, strict=True)}
    return [engine._completion(request.request_id) for request in step.requests]


def _recorded(groups: Sequence[RolloutGroup]) -> tuple[float, int]:
    """Seconds of CPU of this thread until the step may go on, and bytes on disk."""
    with tempfile.TemporaryDirectory() as folder:
        writer = RolloutWriter(RolloutFolder(Path(folder) / "rollouts", RolloutRecords()))
        started = time.thread_time()
        writer.append(0, groups)
        seconds = time.thread_time() - started
        writer.close()
        return seconds, sum(path.stat().st_size for path in (Path(folder) / "rollouts").iterdir())


def _dealt(sequences: Sequence[Trained], num_ranks: int, repeats: int) -> dict[str, Any]:
    """What rank 0 does for so many data-parallel ranks, and the one with the most tokens for itself."""
    trainer, clock = Trainer(data_parallel=num_ranks, microbatch_tokens=65_536), Clock(repeats)
    outlines = clock("outlines", lambda: outlines_of(sequences))
    shares = clock("dealing", lambda: deal_step(outlines, step=0, num_prompts=1, trainer=trainer, attention=ATTENTION))
    payloads = clock("encode, all", lambda: [encode(share, sequences) for share in shares])
    largest = max(range(num_ranks), key=lambda rank: len(payloads[rank]))
    coded = clock("decode, own", lambda: Coded(payloads[largest]))
    clock("pack, own", lambda: fill_batch(coded.share, coded.sequences.__getitem__, trainer))
    return {
        "seconds": clock.seconds,
        "sent_bytes": sum(map(len, payloads)),
        "largest_bytes": len(payloads[largest]),
        "rows": len(shares[0].rows),
    }


def grpo(samples: int) -> RunConfig:
    """A configuration whose loss trains on all samples."""
    return load_config(CONFIG, ["algorithm.loss=grpo", f"algorithm.samples_per_prompt={samples}"])


def show_path(found: dict[str, Any]) -> dict[str, Any]:
    """A table of one step."""
    million = 1e6 / found["tokens"]
    print(
        f"\n{found['tokens'] / 1e6:.1f} M tokens in {found['responses']:,} responses of {found['mean']:.0f} on the mean; "
        f"seconds of CPU a million tokens"
    )
    before = found["before_dealing"]
    for name, seconds in before.items():
        print(f"  {name:28s} {seconds * million:8.4f}")
    pickled, kept = found["pickled_bytes"] / found["tokens"], found["kept_bytes"] / found["tokens"]
    print(f"  bytes a token: pickled {pickled:.2f}, on disk without text {kept:.2f}")
    in_rank_0 = sum(seconds for name, seconds in before.items() if not name.endswith("in an engine"))
    by_ranks = found["by_ranks"]
    print("  ranks".ljust(31) + "".join(f"{count:>10d}" for count in by_ranks))
    for name in next(iter(by_ranks.values()))["seconds"]:
        print(f"  {name:28s} " + "".join(f"{one['seconds'][name] * million:10.4f}" for one in by_ranks.values()))
    totals = {count: (in_rank_0 + sum(one["seconds"].values())) * million for count, one in by_ranks.items()}
    print("  in all, on the critical path " + "".join(f"{total:10.4f}" for total in totals.values()))
    print(
        "  bytes sent, a token          " + "".join(f"{one['sent_bytes'] / found['tokens']:10.2f}" for one in by_ranks.values())
    )
    print(
        "  of them to the fullest rank  "
        + "".join(f"{one['largest_bytes'] / found['tokens']:10.4f}" for one in by_ranks.values())
    )
    return found | {"critical_seconds_per_million": totals}


if __name__ == "__main__":
    main()
