"""What a device can do at all, for other figures to be measured against: copying memory, and products in bf16. Medians of event
times over random data in several buffers larger than the second-level cache. Never run on a GPU so far.

    python -m tools.bench_ceilings [--device cuda] [--size 8192] [--repeats 20] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BUFFERS = 3


def median_seconds(work: Callable[[int], object], device: str, repeats: int) -> float:
    """Median seconds of work(i) on the device, after a warm-up: between two events on a GPU, by the clock on a CPU."""
    seconds = []
    for i in range(repeats + 3):
        if device == "cpu":
            started = time.perf_counter()
            work(i)
            seconds.append(time.perf_counter() - started)
            continue
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        work(i)
        after.record()
        after.synchronize()
        seconds.append(before.elapsed_time(after) / 1e3)
    return statistics.median(seconds[3:])


def copy_ceiling(device: str, size: int, repeats: int) -> dict[str, Any]:
    """Bytes read and written a second by a copy of size x size x 8 bytes."""
    sources = [torch.randn(size, size, 2, device=device) for _ in range(BUFFERS)]
    target = torch.empty_like(sources[0])
    seconds = median_seconds(lambda i: target.copy_(sources[i % BUFFERS]), device, repeats)
    moved = 2 * target.nbytes
    return {"ceiling": "copy", "of": f"{target.nbytes / 2**20:.3g} MiB", "ms": 1e3 * seconds, "TB/s": moved / seconds / 1e12}


def product_ceiling(device: str, size: int, repeats: int) -> dict[str, Any]:
    """Floating-point operations a second of a bf16 product [size x size] x [size x size]."""
    left = [torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(BUFFERS)]
    right = torch.randn(size, size, device=device).to(torch.bfloat16)
    result = torch.empty_like(right)
    seconds = median_seconds(lambda i: torch.mm(left[i % BUFFERS], right, out=result), device, repeats)
    return {"ceiling": "bf16 product", "of": f"{size}^3", "ms": 1e3 * seconds, "TFLOP/s": 2 * size**3 / seconds / 1e12}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file too")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for measure in (copy_ceiling, product_ceiling):
        rows.append(measure(options.device, options.size, options.repeats))
        print(rows[-1], flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
