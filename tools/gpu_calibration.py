"""Works out the planner's constants from a report of tools/gpu_check, and writes them as a calibration file, which `semion plan
--calibration FILE` takes: from the ceilings the peak and the memory's speed, from the generation an iteration's cost and the
turns, from whole steps the trainer's share of the peak, from the sync what it costs beside its bytes. It measures nothing.

    python -m tools.gpu_calibration REPORT.json --output FILE [--json PATH]

A section that is not there, or has no figures, leaves its constants out. It ends with 1 where nothing could be worked out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config.load import RunConfig
from engine.forecast.calibration import Calibration, Measured, write_calibration
from engine.forecast.constants import Constants
from engine.forecast.measuring import Decoded, decoding_constants
from engine.forecast.speed import speed_of
from engine.models.config_file import read_shape

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "configs" / "models" / "llama-3.1-8b"
VARIANT = "te"  # of the steps, whose constants a plan is made with
Rows = Mapping[str, list[dict[str, Any]]]


def constants_of(sections: Rows) -> dict[str, Measured]:
    """What the figures of a report's sections say, by the name of the constant."""
    found = dict[str, Measured]()
    for row in sections.get("ceilings", []):
        if "TFLOP/s" in row:
            found["peak_teraflops"] = Measured(value=row["TFLOP/s"], how=f"a bf16 product of {row['of']}")
        if "TB/s" in row:
            found["memory_gigabytes_per_second"] = Measured(value=1e3 * row["TB/s"], how=f"a copy of {row['of']}")
    base = Constants(**{name: one.value for name, one in found.items()})
    return (
        found | _sampling(sections.get("generation", []), base) | _training(sections.get("steps", []), base) | _sync(sections)
    )


def _sampling(rows: list[dict[str, Any]], base: Constants) -> dict[str, Measured]:
    decoded = [
        Decoded(row["seconds"], row["iterations"], row["tokens"], row["context"], row["prompts"])
        for row in rows
        if row.get("what") == "decode"
    ]
    found = dict[str, Measured]()
    if len(decoded) > 1:
        tree = {"run": {"directory": "unused", "steps": 1}, "model": {"path": str(MODEL)}, "data": {"train": "unused"}}
        config = RunConfig.model_validate(tree | {"model": {"path": str(MODEL), "dtype": "bfloat16"}})
        found |= decoding_constants(decoded, speed_of(read_shape(MODEL), config, base), base)
    turns = [row for row in rows if row.get("what") == "turn"]
    if turns:
        last = turns[-1]  # the first one also makes what later ones find
        seconds = last["sleep_seconds"] + last["wake_weights_seconds"] + last["wake_kv_cache_seconds"]
        found["sleep_seconds"] = Measured(value=seconds, how="one engine of 8B's shape asleep and awake again")
    return found


def _training(rows: list[dict[str, Any]], base: Constants) -> dict[str, Measured]:
    ours = [row for row in rows if row.get("variant") == VARIANT and "train_seconds" in row]
    if len({row["flops"] for row in ours}) < 2:
        return {}
    line = statistics.linear_regression([row["flops"] for row in ours], [row["train_seconds"] for row in ours])
    lengths = " and ".join(str(row["tokens"]) for row in ours)
    how = f"whole steps of a quarter of 8B, of {lengths} tokens"
    found = {"step_seconds": Measured(value=max(0.0, line.intercept), how=how)}
    if line.slope > 0:  # all rows are of one length, so that what each costs beside its tokens is in this share
        share = 1 / (line.slope * base.peak_teraflops * 1e12)
        found["train_peak_share"] = Measured(value=min(1.0, share), how=how)
        found["layer_row_seconds"] = Measured(value=0.0, how="part of train_peak_share")
    return found


def _sync(sections: Rows) -> dict[str, Measured]:
    rows = [row for row in sections.get("sync", []) if "sync ms" in row and "copy ms" in row]
    if not rows:
        return {}
    seconds = max(0.0, rows[-1]["sync ms"] - rows[-1]["copy ms"]) / 1e3
    return {"sync_seconds": Measured(value=seconds, how="a sync over CUDA IPC less a copy of as many bytes")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the calibration file")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the constants to this file too")
    options = parser.parse_args()
    report = json.loads(options.report.read_text("utf-8"))
    found = constants_of({section["name"]: section["figures"] for section in report["sections"]})
    rows = [{"constant": name, "value": one.value, "how": one.how} for name, one in found.items()]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(row)
    if found:
        machine = str(report["about"].get("GPUs", "unknown"))
        write_calibration(options.output, Calibration(machine=machine, model=str(MODEL.name), constants=found))
    return int(not found)


if __name__ == "__main__":
    raise SystemExit(main())
