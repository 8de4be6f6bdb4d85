"""A weight sync into a live vLLM engine on the same GPU, over CUDA IPC, beside a plain copy of as many bytes on that GPU, which
is what the memory allows, and vLLM's own reload from disk. An 8B model is a quarter of its layers here, and scaled by bytes.
Never run on a GPU so far; on a CPU it is its own twin, over shared memory.

    python -m tools.bench_sync_gpu [--millions 2800] [--repeats 7] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.inference.pool import Pool
from engine.models import sharding as layout
from tools.bench_sync import SPAWN, WIDTHS, Handle, compare, engine_process, open_rank, write_model

START_SECONDS = 180.0  # vLLM loads
BYTES_OF_8B = 2 * 8_030_261_248
COUNTED_SECONDS_OF_8B = 15.5e-3  # by count on an H200: its copy 7.5 ms, its digests 4.0 ms a side, from one memory
Told = dict[str, Any]


def synchronize(device: str) -> None:
    """Waits for everything the device was asked to do."""
    if device != "cpu":
        torch.cuda.synchronize()


def measure(folder: Path, dtype: str, device: str, repeats: int, told: Callable[[Told], None]) -> None:
    """One engine, one trainer rank. The figures are told as soon as they are there: the reload, in which vLLM may fail and its
    process with it, comes last and adds its own."""
    ours, theirs = SPAWN.Pipe()
    engine = SPAWN.Process(target=engine_process, args=(theirs, folder, dtype), daemon=True)
    engine.start()
    theirs.close()  # or an engine that cannot start would be waited for
    handle = Handle(ours)
    try:
        handle.call("cpu").result(START_SECONDS)  # it must find the GPU's memory free
        publisher, shape = open_rank(0, 1, folder, Pool([handle], START_SECONDS), "ipc", dtype, device)
        sizes = [torch.Size(size) for size in layout.tensors(shape).values()]
        num_elements = sum(size.numel() for size in sizes)
        source = torch.randn(num_elements, device=device).to(getattr(torch, dtype))
        target = torch.empty_like(source)
        versions = iter(range(1, 1000))

        def copy() -> None:
            target.copy_(source)
            synchronize(device)

        peers = {"semion": lambda: publisher.publish(next(versions)), "copy": copy}
        seconds = {name: wall for name, (wall, _) in compare(peers, repeats, time.process_time).items()}
        scale = BYTES_OF_8B / source.nbytes
        row: Told = {
            "parameters": num_elements,
            "dtype": dtype,
            "sync ms": 1e3 * seconds["semion"],
            "copy ms": 1e3 * seconds["copy"],
            "sync ms of 8B": 1e3 * scale * seconds["semion"],
            "copy ms of 8B": 1e3 * scale * seconds["copy"],
            "counted ms of 8B": 1e3 * COUNTED_SECONDS_OF_8B,
            "sync over copy": seconds["semion"] / seconds["copy"],
        }
        told(row)
        try:
            reload = {"reload": lambda: handle.call("reload", str(folder)).result(START_SECONDS)}
            ((wall, _),) = compare(reload, repeats, time.process_time).values()
            told(row | {"reload ms": 1e3 * wall})
        except (EOFError, OSError, TimeoutError) as error:  # the engine's process is gone, or does not answer
            told(row | {"reload": f"left out: {type(error).__name__} {error}".strip()})
    finally:
        engine.kill()
        if dist.is_initialized():
            dist.destroy_process_group()


def main() -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, choices=WIDTHS, default=2800 if on_gpu else 1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file too")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    dtype, device = ("bfloat16", "cuda:0") if on_gpu else ("float32", "cpu")
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), options.millions, dtype, device)
        if on_gpu:
            torch.cuda.empty_cache()

        def told(row: Told) -> None:
            print(json.dumps(row, indent=1), flush=True)
            if options.json:
                options.json.write_text(json.dumps([row], indent=1) + "\n", encoding="utf-8")

        measure(Path(name), dtype, device, options.repeats, told)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
