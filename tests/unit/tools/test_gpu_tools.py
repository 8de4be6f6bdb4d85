"""The GPU measurements' twins on a CPU at tiny size: that each runs, writes figures as it goes, and counts right. What they
measure on a GPU is unverified.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import bench_ceilings, bench_layers, fp8_curve

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="twins on a CPU; tools/gpu_check is for GPUs")


def figures(tmp_path: Path, module: str, *arguments: str) -> Any:
    """What a tool wrote to --json; it must end with 0."""
    path = tmp_path / "figures.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"tools.{module}", *arguments, "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return json.loads(path.read_text("utf-8"))


def test_ceilings():
    copy, product = (measure("cpu", 64, 2) for measure in (bench_ceilings.copy_ceiling, bench_ceilings.product_ceiling))
    assert copy["TB/s"] > 0
    assert product["TFLOP/s"] == pytest.approx(2 * 64**3 / (product["ms"] / 1e3) / 1e12)


def test_layers_and_optimizers_name_what_they_ran_and_what_is_not_installed(tmp_path):
    arguments = ("--tiny", "--layers", "2", "--tokens", "64", "--length", "32", "--repeats", "1", "--ceiling", "0.5")
    rows = {row["measured"]: row for row in figures(tmp_path, "bench_layers", *arguments)}
    assert rows["bf16 local"]["by"] == "megatron ColumnParallelLinear"
    assert rows["bf16 local"]["MFU"] == pytest.approx(rows["bf16 local"]["TFLOP/s"] / 0.5)
    assert rows["optimizer torch"]["by"] == "torch AdamW"
    assert rows["optimizer torch"]["parameters"] > 100_000
    assert rows["fp8 blockwise te"] == {"measured": "fp8 blockwise te", "not run": "transformer_engine is not installed"}
    assert rows["apex"] == {"measured": "apex", "not run": "amp_C is not installed"}
    assert len(rows) == len(bench_layers.VARIANTS) + len(bench_layers.OPTIMIZERS)


def test_an_8b_layer_has_the_parameters_and_operations_it_should():
    shape = bench_layers.llama_8b(1, tiny=False)
    layer = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336  # q, k, v, o; gate, up, down
    assert layer == 218_103_808
    attention = 3 * (2 * 2 * 4096 * 2048) / 2  # a token's: two products, forward and twice backward, the causal half
    assert bench_layers.flops(shape, 1, 2048) == 6 * (layer + 1024 * 4096) + attention


def test_a_candidate_is_judged_beside_chance():
    flat = [1.0] * 8
    curves = {"bf16": flat, "bf16, second seed": [1.2] * 8, "near": [3.0] * 6 + [1.1, 0.9], "far": [1.0] * 6 + [1.0, 2.0]}
    rows = {row["curve"]: row for row in fp8_curve.compare(curves, "bf16", fp8_curve.distance(flat, [1.2] * 8))}
    assert "distance" not in rows["bf16"]
    assert rows["near"]["distance"] == pytest.approx(0.1)  # signs do not cancel
    assert rows["near"]["of_noise"] == pytest.approx(0.5)
    assert rows["far"]["of_noise"] == pytest.approx(2.5)


def test_bf16_trains_as_fp32_does(tmp_path):
    found = figures(tmp_path, "fp8_curve", "--tiny", "--steps", "6")
    assert set(found["curves"]) == {"fp32", "fp32, second seed", "bf16"}
    assert all(len(losses) == 6 for losses in found["curves"].values())
    first, last = found["curves"]["fp32"][0], found["curves"]["fp32"][-1]
    assert last < first < 6.6  # the log of the vocabulary's size is 6.24
    assert found["curves"]["bf16"] != found["curves"]["fp32"]
    assert found["figures"][-1]["of_noise"] < 1
