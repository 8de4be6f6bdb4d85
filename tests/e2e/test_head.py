"""An engine whose output layer is in float32, against float64 of what that layer was given. What vLLM multiplies with is
vLLM's own layer or ours, as its version has it; both must be it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config.load import RunConfig
from tests.e2e.test_commands import Make, written

pytestmark = pytest.mark.timeout(600)
FLOAT32 = ["model.head=float32", "trainer.fused_lm_head=true"]


def probed(config: RunConfig, folder: Path) -> dict[str, Any]:
    script = Path(__file__).with_name("head_probe.py")
    command = [sys.executable, str(script), written(config, folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("quantization", ["none", pytest.param("fp8", marks=pytest.mark.nightly)])
def test_log_probs_are_those_of_a_product_in_float32(quantization: str, run_config: Make, tmp_path: Path) -> None:
    common = ["model.dtype=bfloat16", f"inference.quantization={quantization}", "sampling.temperature=2.0"]
    in_float32 = probed(run_config(*common, *FLOAT32), tmp_path)
    assert in_float32["tokens"] > 4 and in_float32["head"] == ["float32"]
    assert in_float32["far"]["exact"] < 2e-6, in_float32
    assert in_float32["far"]["bfloat16"] > 1e-3, "the reference tells them apart"
    if quantization == "none":
        as_the_model = probed(run_config(*common), tmp_path)
        assert as_the_model["head"] != ["float32"] and as_the_model["far"]["exact"] > 1e-3, as_the_model
