"""What a checkpoint costs: bytes on disk, seconds for which training waits, and seconds until it is named, of a model over
data-parallel ranks with the distributed optimizer. The peer, in the same processes and in turn, is what Semion did before:
every rank writes all that it holds and rank 0 the model once more, then rank 0 hashes every file while the others wait.

    .venv/bin/python -m tools.bench_checkpoint [--millions 50] [--ranks 2] [--repeats 3]
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tools.bench_sync import write_model

SPAWN = multiprocessing.get_context("spawn")
TIMEOUT = timedelta(minutes=30)
LENGTH = 32  # tokens of the one batch that gives the optimizer its state


def of_now(policy: Any, folder: Path, config: Any, step: int, barrier: Callable[[], None]) -> tuple[float, float]:
    """(seconds that training waits, seconds in all) of the product's checkpoint."""
    from engine.models.export_plan import export_files
    from engine.models.sharding import tensors
    from engine.run.model_folder import Weights
    from engine.run.saving import Checkpoints, Snapshot

    parallel = policy.parallel
    checkpoints = Checkpoints(folder, rank=parallel.rank, world_size=parallel.world_size, host=parallel.host, digests={})
    plan = export_files(policy.shape, policy.layout, parallel.dp_size, policy.dtype, config.sync.bucket_mebibytes << 20)
    barrier()
    started = time.perf_counter()
    names = tuple(file.names for file in plan)
    num_bytes = sum(4 * _elements(shape) for shape in tensors(policy.shape).values())
    weights = Weights(names, policy.files(plan), num_bytes)
    checkpoints.commit(step, Snapshot(policy.state.copy(weights=False), policy.dtype, weights), config)
    waited = time.perf_counter() - started
    checkpoints.wait()
    barrier()
    return waited, time.perf_counter() - started


def as_before(policy: Any, folder: Path, config: Any, step: int, barrier: Callable[[], None]) -> tuple[float, float]:
    """The same of the peer; training waits all the time."""
    from safetensors.torch import save_file

    from engine.core.files import sync
    from engine.models.export_plan import export_plan
    from engine.models.hf import write_hf_checkpoint

    parallel, final = policy.parallel, folder / f"step_{step:08d}"
    barrier()
    started = time.perf_counter()
    if parallel.rank == 0:
        final.mkdir(parents=True)
    barrier()
    file = final / f"rank_{parallel.rank:04d}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in policy.state.copy().items()}, file)
    sync(file)
    plan = export_plan(policy.shape, policy.layout, policy.dtype, config.sync.bucket_mebibytes << 20)
    stream = _to_first_rank(policy, plan)
    if parallel.rank == 0:
        write_hf_checkpoint(final / "policy", stream, config.model.path)
    else:
        for _ in stream:
            pass
    barrier()
    if parallel.rank == 0:
        for path in final.rglob("*.safetensors"):
            with path.open("rb") as opened:
                hashlib.file_digest(opened, "sha256")
    barrier()
    seconds = time.perf_counter() - started
    return seconds, seconds


def _to_first_rank(policy: Any, plan: Any) -> Iterator[tuple[str, Any]]:
    """Every full tensor in plan order on rank 0, from the first rank of its stage; nothing elsewhere. Collective."""
    import torch
    import torch.distributed as dist

    here = policy.parallel
    for bucket in plan:
        found, leader = policy.gathering.bucket(bucket, policy.parameters), bucket.stage * here.dp_size * here.tp_size
        for index, meta in enumerate(bucket.tensors):
            if here.rank == leader == 0:
                yield meta.name, found[index][1]
            elif here.rank == leader:
                dist.send(found[index][1].contiguous(), 0)
            elif here.rank == 0:
                received = torch.empty(meta.shape, dtype=policy.dtype, device=here.device)
                dist.recv(received, leader)
                yield meta.name, received


def _elements(shape: tuple[int, ...]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found


def rank_process(end: Connection, rank: int, ranks: int, folder: Path, repeats: int) -> None:
    """One trainer rank: a step, so that there are moments, and then the checkpoints in turn."""
    import torch
    import torch.distributed as dist

    from engine.algorithms.nll import NllLoss
    from engine.config.load import RunConfig
    from engine.core.arrays import TokenIds
    from engine.core.types import Sequence
    from engine.megatron.packing import make_batch
    from engine.megatron.parallel_state import open_parallel_state
    from engine.megatron.policy import Policy
    from engine.models.config_file import read_shape
    from engine.models.sharding import trainer_layout

    torch.set_num_threads(1)
    config = RunConfig.model_validate(
        {
            "run": {"directory": str(folder / "run"), "steps": 4},
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "data": {"train": "unused", "max_prompt_tokens": 1},
            "sampling": {"max_tokens": LENGTH},
            "trainer": {
                "data_parallel": ranks,
                "distributed_optimizer": True,
                "microbatch_tokens": 2 * LENGTH,
                "fuse_gradient_accumulation": False,
            },
        }
    )
    store = dist.FileStore(str(folder / "store"), ranks)
    parallel = open_parallel_state(config.trainer, rank=rank, world_size=ranks, store=store, timeout=TIMEOUT)
    axes = trainer_layout(config.trainer)
    policy = Policy(config, parallel, NllLoss(), config.model.path, read_shape(config.model.path), axes)
    made = [Sequence(TokenIds.of([3]), TokenIds.of(range(4, 4 + LENGTH - 1))) for _ in range(ranks)]
    policy.train_step(make_batch(made, step=0, num_prompts=ranks, trainer=config.trainer, dp_rank=parallel.dp_rank))
    found: dict[str, list[tuple[float, float, int]]] = {"as before": [], "now": []}
    for _ in range(repeats):
        for name, case in (("as before", as_before), ("now", of_now)):
            place = folder / "checkpoints"
            waited, seconds = case(policy, place, config, 1, dist.barrier)
            num_bytes = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
            found[name].append((waited, seconds, num_bytes))
            dist.barrier()
            if rank == 0:
                shutil.rmtree(place)
            dist.barrier()
    parallel.close()
    end.send(found)


def main() -> None:
    """Prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=50, choices=[1, 50, 300])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", options.millions)
        ends = []
        for rank in range(options.ranks):
            end, theirs = SPAWN.Pipe()
            SPAWN.Process(target=rank_process, args=(theirs, rank, options.ranks, folder, options.repeats), daemon=True).start()
            ends.append(end)
        found, *_ = [end.recv() for end in ends]
    print(f"{options.millions} M parameters in float32, {options.ranks} data-parallel ranks, medians of {options.repeats}")
    for case, rows in found.items():
        waited, seconds, num_bytes = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{case:>10}: {num_bytes / 1e6:8.1f} MB, training waits {waited:6.2f} s, named after {seconds:6.2f} s")


if __name__ == "__main__":
    main()
