"""Whether anything that shares one GPU can work there at all: a process maps another's memory by the product's own functions
(CUDA IPC), and what a process that spins on the device, as a kernel of NCCL does while it waits, leaves to another's products.
Never run on a GPU so far; on a CPU it is its own twin, over shared memory.

    python -m tools.gpu_probe [--seconds 2] [--size 4096] [--json PATH]

It ends with 1 where the memory does not hold what was written: then nothing colocated can be tried.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from engine.bridge.transports.ipc import handle, opened

WAIT_SECONDS = 60.0  # for the peer, whose start imports torch
SPAWN = multiprocessing.get_context("spawn")


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def peer(pipe: Connection, device: str) -> None:
    """Adds up a block of the other process's memory, then spins for as many seconds as it is told."""
    torch.set_num_threads(1)
    found = opened(json.loads(pipe.recv()))
    pipe.send(int(found.to(torch.int64).sum()))
    synchronize(device)
    end = time.monotonic() + pipe.recv()
    pipe.send("spinning")
    while time.monotonic() < end:
        if device != "cpu":
            torch.cuda._sleep(200_000_000)
            torch.cuda.synchronize()


def told(pipe: Connection, what: str) -> Any:
    """The peer's next word; TimeoutError names it."""
    if not pipe.poll(WAIT_SECONDS):
        raise TimeoutError(f"the other process must say {what} within {WAIT_SECONDS:.0f} s; found nothing")
    return pipe.recv()


def teraflops(device: str, size: int, seconds: float) -> float:
    """Of bf16 products for so long (of float32 ones on a CPU)."""
    left = torch.randn(size, size, device=device).to(torch.float32 if device == "cpu" else torch.bfloat16)
    result = torch.empty_like(left)
    torch.mm(left, left, out=result)
    synchronize(device)
    count, started = 0, time.monotonic()
    while time.monotonic() - started < seconds:
        for _ in range(20):
            torch.mm(left, left, out=result)
        synchronize(device)
        count += 20
    return 2 * size**3 * count / (time.monotonic() - started) / 1e12


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of products, alone and beside a process that spins")
    parser.add_argument("--size", type=int, default=4096, help="of the square matrices")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file too")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def row(**figures: Any) -> None:
        rows.append(figures)
        print(figures, flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=peer, args=(theirs, device), daemon=True)
    process.start()
    theirs.close()
    try:
        block = torch.randint(0, 256, (options.size**2,), dtype=torch.uint8, device=device)
        synchronize(device)
        ours.send(json.dumps(handle(block.untyped_storage())))
        same = told(ours, "what it read") == int(block.to(torch.int64).sum())
        row(probe="another process maps this one's memory", bytes=block.numel(), equal=same)
        alone = teraflops(device, options.size, options.seconds)
        ours.send(options.seconds + 2.0)
        told(ours, "that it spins")
        beside = teraflops(device, options.size, options.seconds)
        row(
            probe="products beside a process that spins", **{"TFLOP/s alone": alone, "TFLOP/s": beside, "share": beside / alone}
        )
    finally:
        process.kill()
    return int(not same)


if __name__ == "__main__":
    raise SystemExit(main())
