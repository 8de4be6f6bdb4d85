"""After every sync, live vLLM engines give the log-probs that the trainer gives: real ranks, real engines, real gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config.load import RunConfig, dump_config

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).with_name("sync_probe.py")
SYNCS = 20

# name: (variant of the seed model, overrides). Grouped queries are in every one (4 heads, 2 key-value heads).
LAYOUTS = {
    "tp2, a vocabulary that 2 does not divide, several buckets": (
        "odd_vocab",
        ["trainer.tensor_parallel=2", "trainer.sequence_parallel=true", "sync.bucket_mebibytes=1"],
    ),
    "pp2, tied embeddings, two engines": ("tied", ["trainer.pipeline_parallel=2", "inference.engines=2"]),
    "dp2, distributed optimizer": ("plain", ["trainer.data_parallel=2", "trainer.distributed_optimizer=true"]),
    "tp2 and pp2 to an engine of tp2": (
        "odd_vocab",
        ["trainer.tensor_parallel=2", "trainer.pipeline_parallel=2", "inference.tensor_parallel=2"],
    ),
    "an engine that repacks its weights": ("plain", ["inference.packed_weights=true"]),
}

ONE_MESSAGE = ("dp2, distributed optimizer", "an engine that repacks its weights")  # one cell, one engine, a small model


def probe(config: RunConfig, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """What the script saw at each sync."""
    file = folder / "probe.toml"
    file.write_text(dump_config(config))
    command, environment = [sys.executable, str(PROBE), str(file), *arguments], os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    results = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, run.stderr[-3000:]
    syncs: list[dict[str, Any]] = json.loads(results[0].removeprefix("RESULT "))
    return syncs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_engines_give_the_trainers_log_probs_after_every_sync(
    layout: str, run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    variant, overrides = LAYOUTS[layout]
    syncs = probe(run_config(*overrides, variant=variant), tmp_path, str(SYNCS))
    assert [sync["version"] for sync in syncs] == list(range(1, SYNCS + 1))
    assert max(sync["gap"] for sync in syncs) < 1e-4
    assert {sync["attempts"] for sync in syncs} == {1}
    assert all((sync["messages"] > 1) is (layout not in ONE_MESSAGE) for sync in syncs)
    assert syncs[-1]["loss"] < syncs[0]["loss"] - 0.1, "the weights must change between syncs for the test to mean anything"


def test_transformer_engines_layers_serve_engines_as_megatrons_do(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Their names in the layout table, to a real engine: bfloat16 on both sides, so log-probs agree to its places."""
    layers = ["trainer.layers=transformer_engine", "model.dtype=bfloat16", "trainer.tensor_parallel=2"]
    syncs = probe(run_config(*layers), tmp_path, "3")
    assert [sync["attempts"] for sync in syncs] == [1, 1, 1]
    assert max(sync["gap"] for sync in syncs) < 0.25
    assert syncs[-1]["loss"] < syncs[0]["loss"] - 0.1


@pytest.mark.parametrize(
    ("what", "overrides"),
    [
        ("engine", ["trainer.tensor_parallel=2", "inference.engines=2"]),
        ("worker", ["inference.tensor_parallel=2"]),
    ],
)
def test_a_killed_engine_is_replaced_and_serves_the_next_version(
    what: str, overrides: list[str], run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """A real engine's process, or one worker of a tensor-parallel one."""
    syncs = probe(run_config(*overrides), tmp_path, "3", "2", what)
    assert [sync["attempts"] for sync in syncs] == [1, 2, 1]
    assert max(sync["gap"] for sync in syncs) < 1e-4
