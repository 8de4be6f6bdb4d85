"""A checkpoint of a model of real size over data-parallel ranks, by the run's own snapshot and writer: bytes, seconds for
which training waits, seconds until it is named, and of them the digests'. There is no model: what a rank would copy from its
device is a block of random numbers, over and over. bench_scale.py prints it.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import shutil
import tempfile
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SPAWN = multiprocessing.get_context("spawn")
PATIENCE = timedelta(minutes=20)
BLOCK = 16 << 20  # numbers that are copied at a time
KINDS = ("exp_avg", "exp_avg_sq", "fp32_param")  # of an optimizer's state, 4 bytes each
PROCESS_BYTES = 500_000_000  # of a rank's libraries
WEIGHTS, STATE = 2, 12  # bytes a parameter: bfloat16, and a state in float32


class Digest:
    """SHA-256 that knows how long it took; in place of hashlib's."""

    seconds = 0.0

    def __init__(self) -> None:
        self._own = hashlib.sha256()

    def update(self, block: Any) -> None:
        """As hashlib's."""
        started = time.perf_counter()
        self._own.update(block)
        Digest.seconds += time.perf_counter() - started

    def hexdigest(self) -> str:
        """As hashlib's."""
        return self._own.hexdigest()


def checkpoint(layers: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Of a Llama of 2,048 wide layers with tied embeddings, a replica a rank, distributed optimizer. Seconds are those of the
    slowest rank. MemoryError where the machine has no room for what all ranks copy to their host."""
    from engine.models.config_file import read_shape
    from engine.models.headers import num_elements

    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        (place / "model").mkdir()
        (place / "model" / "config.json").write_text(json.dumps(llama(layers)), encoding="utf-8")
        parameters = num_elements(read_shape(place / "model"))
        needed = (WEIGHTS + STATE) * parameters + ranks * PROCESS_BYTES
        if needed > (free := free_bytes()):
            raise MemoryError(f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} are free: fewer --layers")
        ends = []
        for rank in range(ranks):
            end, theirs = SPAWN.Pipe()
            SPAWN.Process(target=rank_process, args=(theirs, rank, ranks, place), daemon=True).start()
            theirs.close()
            ends.append(end)
        found: list[dict[str, float]] = [end.recv() for end in ends]
        num_bytes = sum(path.stat().st_size for path in (place / "checkpoints").rglob("*") if path.is_file())
        shutil.rmtree(place / "checkpoints")
    slowest = {name: max(one[name] for one in found) for name in found[0]}
    before = ranks * 2 * WEIGHTS * parameters + STATE * parameters + WEIGHTS * parameters
    return {"parameters": parameters, "ranks": ranks, "num_bytes": num_bytes, "bytes_before": before, **slowest}


def rank_process(end: Connection, rank: int, ranks: int, place: Path) -> None:
    """One trainer rank."""
    import torch
    import torch.distributed as dist

    from engine.bridge.host_group import HostGroup
    from engine.config.load import RunConfig
    from engine.core import tensor_files
    from engine.models.config_file import read_shape
    from engine.models.export_plan import export_files
    from engine.models.sharding import TrainerLayout, tensors
    from engine.run.model_folder import Weights
    from engine.run.saving import Checkpoints, Snapshot

    torch.set_num_threads(1)
    tables = {"run": {"directory": str(place), "steps": 4}, "model": {"path": str(place / "model"), "dtype": "bfloat16"}}
    config = RunConfig.model_validate(tables | {"data": {"train": "unused"}, "sampling": {"max_tokens": 8}})
    dist.init_process_group("gloo", store=dist.FileStore(str(place / "gloo"), ranks), rank=rank, world_size=ranks)
    host = HostGroup(dist.FileStore(str(place / "words"), ranks), rank, ranks, patience_seconds=PATIENCE.total_seconds())
    sizes = tensors(read_shape(place / "model"))
    plan = export_files(read_shape(place / "model"), TrainerLayout(), ranks, torch.bfloat16, config.sync.bucket_mebibytes << 20)
    checkpoints = Checkpoints(place / "checkpoints", rank=rank, world_size=ranks, host=host, digests={})
    tensor_files.hashlib = SimpleNamespace(sha256=Digest, file_digest=hashlib.file_digest)  # type: ignore[assignment]
    torch.manual_seed(rank)
    blocks = {dtype: torch.randn(BLOCK).to(dtype) for dtype in (torch.float32, torch.bfloat16)}

    def copied(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        found = torch.empty(shape, dtype=dtype)
        for part in found.view(-1).split(BLOCK):
            part.copy_(blocks[dtype][: len(part)])
        return found

    dist.barrier()
    started = time.perf_counter()
    own = {
        index: {name: copied(sizes[name], torch.bfloat16) for bucket in file.buckets for name in _names(bucket)}
        for index, file in enumerate(plan)
        if file.buckets[0].dp_rank == rank
    }
    state = {
        f"optimizer.{name}.{kind}": copied((size,), torch.float32)
        for name, size in share(sizes, rank, ranks).items()
        for kind in KINDS
    }
    num_bytes = WEIGHTS * sum(math.prod(size) for size in sizes.values())
    weights = Weights(tuple(file.names for file in plan), own, num_bytes)
    checkpoints.commit(1, Snapshot(state, torch.bfloat16, weights), config)
    waited = time.perf_counter() - started
    checkpoints.wait()
    dist.barrier()  # rank 0's word: it is named
    named = time.perf_counter() - started
    end.send({"pause_seconds": waited, "named_seconds": named, "digest_seconds": Digest.seconds})
    host.barrier()
    host.close()
    dist.destroy_process_group()


def _names(bucket: Any) -> list[str]:
    return [meta.name for meta in bucket.tensors]


def share(sizes: dict[str, tuple[int, ...]], rank: int, ranks: int) -> dict[str, int]:
    """Elements of each parameter whose state a rank holds: of all of them in a row, an even part."""
    total = sum(math.prod(size) for size in sizes.values())
    first, last = total * rank // ranks, total * (rank + 1) // ranks
    found, start = dict[str, int](), 0
    for name, size in sizes.items():
        end = start + math.prod(size)
        if (held := min(end, last) - max(start, first)) > 0:
            found[name] = held
        start = end
    return found


def llama(layers: int) -> dict[str, Any]:
    """The config.json of Llama 3.2 1B with so many layers; 12 make 993 million parameters."""
    return {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
        "eos_token_id": 128_001,
        "max_position_embeddings": 131_072,
    }


def free_bytes() -> int:
    """Memory that processes can still have."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def show(found: dict[str, Any]) -> dict[str, Any]:
    """A table of it."""
    print(f"\n{found['parameters'] / 1e6:,.0f} M parameters in bfloat16, {found['ranks']} data-parallel ranks")
    each = found["num_bytes"] / found["parameters"]
    print(f"  written                         {found['num_bytes'] / 1e9:8.2f} GB, {each:.2f} a parameter")
    print(f"  when every replica wrote all    {found['bytes_before'] / 1e9:8.2f} GB, by arithmetic, with a reference")
    print(f"  training waits                  {found['pause_seconds']:8.2f} s")
    print(f"  named after                     {found['named_seconds']:8.2f} s")
    print(f"  digests, of the slowest rank    {found['digest_seconds']:8.2f} s, beside the writing of the others")
    return found
