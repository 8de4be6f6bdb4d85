"""The GPU measurements' twins on a CPU at tiny size: that each runs, writes figures as it goes, and counts right. What they
measure on a GPU is unverified.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.forecast.calibration import read_calibration
from tests.builders import SMALL
from tools import bench_ceilings, bench_layers, bench_sync_gpu, fp8_curve, gpu_calibration

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
    assert rows["optimizer torch"]["by"] == "engine TorchAdam"
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


@pytest.mark.slow
def test_a_process_maps_anothers_memory_and_the_probe_says_what_a_spinning_one_leaves(tmp_path):
    memory, spinning = figures(tmp_path, "gpu_probe", "--seconds", "0.2", "--size", "128")
    assert memory == {"probe": "another process maps this one's memory", "bytes": 128 * 128, "equal": True}
    assert 0 < spinning["share"] == pytest.approx(spinning["TFLOP/s"] / spinning["TFLOP/s alone"])


@pytest.mark.slow
def test_whole_steps_of_the_trainer_and_their_calibration(tmp_path):
    arguments = ("--tiny", "--rows", "1", "2", "--repeats", "1", "--only")
    variants = ("te", "te, fused accumulation", "local", "local, fused lm head", "local, fused accumulation")
    first, second, *rows = figures(tmp_path, "bench_steps_gpu", *arguments, *variants)
    assert first == {"variant": "te", "not run": "transformer_engine is not installed"}
    assert second == {"variant": "te, fused accumulation", "not run": "transformer_engine is not installed"}
    assert [(row["variant"], row["rows"]) for row in rows] == [
        ("local", 1),
        ("local", 2),
        ("local, fused lm head", 1),
        ("local, fused lm head", 2),
        ("local, fused accumulation", 1),
        ("local, fused accumulation", 2),
    ]
    assert rows[0]["loss"] == pytest.approx(rows[2]["loss"], rel=1e-6)
    assert rows[0]["loss"] == pytest.approx(rows[4]["loss"], rel=1e-6)
    assert rows[1]["grad_norm"] == pytest.approx(rows[3]["grad_norm"], rel=1e-4)
    assert rows[1]["grad_norm"] == pytest.approx(rows[5]["grad_norm"], rel=1e-4)
    assert rows[1]["tokens"] == 480 and rows[1]["TFLOP/s"] * 1e12 == pytest.approx(
        rows[1]["flops"] * 4 / 3 / (rows[1]["score_seconds"] + rows[1]["train_seconds"])
    )


@pytest.mark.nightly  # a minute, most of it vLLM's start
@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_generation_has_what_the_planner_wants(tmp_path, quantization):
    asked = ["--tiny", "--at", "2", "4", "--tokens", "8", "--quantization", quantization]
    start, equal, *decoded = figures(tmp_path, "bench_generation", *asked)
    runs = {name: start[name] for name in ("model_runner", "attention", "scheduling")}
    assert runs == {"model_runner": "cpu_model_runner", "attention": "CPU_ATTN", "scheduling": "synchronous"}, start
    assert start["what"] == "start" and start["seconds"] > 0 and start["vllm"] and start["torch"]
    assert start["seconds"] > 0 and equal == {"what": "equal seeds", "requests": 4, "equal_tokens": True}
    assert [(row["at_once"], row["iterations"], row["prompts"]) for row in decoded] == [(2, 8, 24), (4, 8, 48)]
    assert decoded[1]["context"] == 4 * (12 * 8 + 8 * 7 // 2)


@pytest.mark.nightly  # half a minute, most of it vLLM's start
def test_a_sync_beside_a_copy_and_a_reload(tmp_path):
    (row,) = figures(tmp_path, "bench_sync_gpu", "--millions", "1", "--repeats", "1")
    assert row["parameters"] > 200_000 and min(row["sync ms"], row["copy ms"], row["reload ms"]) > 0
    assert row["sync over copy"] == pytest.approx(row["sync ms"] / row["copy ms"])
    assert row["sync ms of 8B"] == pytest.approx(row["sync ms"] * 8_030_261_248 * 2 / (4 * row["parameters"]))


@pytest.mark.parametrize("failure", [None, EOFError(), TimeoutError("the engine gave no answer")])
def test_a_sync_is_told_before_a_reload_that_may_end_the_engine(tmp_path, monkeypatch, failure):
    told: list[dict[str, Any]] = []
    ended: list[bool] = []

    class Engine:
        def call(self, method, *arguments):
            self.method = method
            return self

        def result(self, seconds):
            if self.method == "reload" and failure is not None:
                assert [sorted(row) for row in told] == [sorted(told[0])] and "sync ms" in told[0], "written by then"
                raise failure

    process = SimpleNamespace(start=lambda: None, kill=lambda: ended.append(True))
    pipe = SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(bench_sync_gpu, "SPAWN", SimpleNamespace(Pipe=lambda: (pipe, pipe), Process=lambda **_: process))
    monkeypatch.setattr(bench_sync_gpu, "Handle", lambda _: Engine())
    publisher = SimpleNamespace(publish=lambda version: None)
    monkeypatch.setattr(bench_sync_gpu, "open_rank", lambda *_: (publisher, SMALL))
    bench_sync_gpu.measure(tmp_path, "float32", "cpu", 1, told.append)
    assert ended and len(told) == 2 and told[1].items() >= told[0].items()
    added = told[1].keys() - told[0].keys()
    assert added == ({"reload ms"} if failure is None else {"reload"})
    if failure is not None:
        assert told[1]["reload"].startswith(f"left out: {type(failure).__name__}")


def test_figures_of_the_sections_become_constants(tmp_path):
    """Figures as an H200 might have them, by arithmetic: an iteration of 20 ms at 64 and 26 ms at 256 requests."""
    decoded = [
        {"what": "decode", "seconds": 2.0, "iterations": 100, "tokens": 6400, "context": 0, "prompts": 0},
        {"what": "decode", "seconds": 2.6, "iterations": 100, "tokens": 25600, "context": 0, "prompts": 0},
    ]
    turns = [{"what": "turn", "sleep_seconds": 9.0, "wake_weights_seconds": 9.0, "wake_kv_cache_seconds": 9.0}]
    turns += [{"what": "turn", "sleep_seconds": 0.5, "wake_weights_seconds": 0.2, "wake_kv_cache_seconds": 0.1}]
    steps = [
        {"variant": "te", "tokens": 8192 * rows, "train_seconds": 0.1 + rows * 0.5, "flops": rows * 2e14} for rows in (1, 4)
    ]
    sections: dict[str, list[dict[str, Any]]] = {
        "ceilings": [
            {"ceiling": "copy", "of": "1 GiB", "TB/s": 4.2},
            {"ceiling": "bf16 product", "of": "8192^3", "TFLOP/s": 800.0},
        ],
        "generation": [*decoded, *turns],
        "steps": [{"variant": "te, fp8 current", "refused": "no"}, *steps],
        "sync": [{"sync ms": 30.0, "copy ms": 10.0}],
    }
    found = {name: one.value for name, one in gpu_calibration.constants_of(sections).items()}
    assert found["memory_gigabytes_per_second"] == 4200 and found["sleep_seconds"] == pytest.approx(0.8)
    assert found["sync_seconds"] == pytest.approx(0.02)
    # 16 GB of weights are read in 5.1 ms; 256 requests are bound by the products, 12.0 ms, 64 by the reading
    assert 0.01 < found["iteration_seconds"] < 0.0149 and 0 <= found["request_iteration_seconds"] < 3e-5
    assert found["train_peak_share"] == pytest.approx(2e14 / 0.5 / 800e12)
    assert (found["step_seconds"], found["layer_row_seconds"]) == (pytest.approx(0.1), 0.0)
    report = {"about": {"GPUs": "a card"}, "sections": [{"name": name, "figures": rows} for name, rows in sections.items()]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    figures(tmp_path, "gpu_calibration", str(tmp_path / "report.json"), "--output", str(tmp_path / "calibration.json"))
    read = read_calibration(tmp_path / "calibration.json")
    assert read.machine == "a card" and {name: one.value for name, one in read.constants.items()} == found


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
