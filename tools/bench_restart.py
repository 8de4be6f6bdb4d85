"""What a restart costs a run of some age: the cut of a rollout ledger at the byte that the checkpoint names, against parsing
and writing it anew, as the engine did before (written out here as the peer). Prints a table, and JSON on request.

    python tools/bench_restart.py --mebibytes 10 100 1024 --json FILE
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from engine.core.jsonl import JsonlLedger, line_of, parsed, read_lines

TOKENS = 1000  # of a rollout; with its log-probs and text a row has some 30 kB
ROWS_A_STEP = 64
LOST_STEPS = 2  # since the checkpoint


def main() -> None:
    """Measures at each size and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, nargs="+", default=[10, 100, 1024], help="sizes of the ledger")
    parser.add_argument("--folder", help="where to write it, on the disk that is to be measured (default: a temporary folder)")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    rows = []
    for mebibytes in options.mebibytes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows.append(measured(Path(folder) / "rollouts.jsonl", mebibytes))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("MiB | steps | cut at a byte | found from the end and cut | parsed and written anew (s, s of CPU) | ratio of CPU")
    for row in rows:
        ways = ("cut", "find_and_cut", "rewrite")
        seconds = [f"{row[f'{way}_seconds']:.4f}, {row[f'{way}_cpu_seconds']:.4f}" for way in ways]
        print(" | ".join([f"{row['mebibytes']:.0f}", str(row["steps"]), *seconds, f"{row['ratio']:.0f}"]))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def measured(path: Path, mebibytes: int) -> dict[str, Any]:
    """One size: the same cut three ways, the file filled up again between them."""
    log_probs = [-1 / (3 + i) for i in range(TOKENS)]
    row = {"text": "x" * 3000, "token_ids": list(range(30_000, 30_000 + TOKENS)), "log_probs": log_probs}
    size = len(line_of({"step": 0} | row))
    steps = max(LOST_STEPS + 1, (mebibytes << 20) // (size * ROWS_A_STEP))
    with path.open("w", encoding="utf-8") as file:
        for step in range(steps):
            file.write(line_of({"step": step} | row) * ROWS_A_STEP)
        file.flush()
        os.fsync(file.fileno())  # a run's ledger is on disk but for its last rows
    saved = steps - LOST_STEPS
    found: dict[str, Any] = {"mebibytes": path.stat().st_size / 2**20, "steps": steps}
    offset = JsonlLedger(path).find(saved)
    with path.open("rb") as ledger_file:
        ledger_file.seek(offset)
        lost = ledger_file.read()

    def cut() -> None:
        ledger = JsonlLedger(path)
        assert ledger.splits(offset, saved)
        ledger.cut(offset)
        ledger.close()

    def find_and_cut() -> None:
        ledger = JsonlLedger(path)
        ledger.cut(ledger.find(saved))
        ledger.close()

    for name, way in (("cut", cut), ("find_and_cut", find_and_cut), ("rewrite", lambda: rewrite(path, saved))):
        started, busy = time.perf_counter(), time.process_time()
        way()
        found[f"{name}_seconds"] = time.perf_counter() - started
        found[f"{name}_cpu_seconds"] = time.process_time() - busy  # what a busy machine leaves alone
        assert path.stat().st_size == offset, name
        with path.open("ab") as again:
            again.write(lost)
            again.flush()
            os.fsync(again.fileno())
    return found | {"ratio": found["rewrite_cpu_seconds"] / found["cut_cpu_seconds"]}


def rewrite(path: Path, step: int) -> None:
    """The peer: every row parsed, those before `step` written to a new file, which replaces the old."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        rows = (parsed(line.where, line.data) for line in read_lines(path))
        file.writelines(line_of(row) for row in rows if row["step"] < step)
    os.replace(part, path)


if __name__ == "__main__":
    main()
