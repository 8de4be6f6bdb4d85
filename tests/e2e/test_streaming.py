"""Gradients of a step's first groups while engines sample the rest (sync.streaming): the run is the one without but for the
rounding of sums, is proven online, and whatever is delayed, and wherever it is cut, every bit is what it is undisturbed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.e2e.test_commands import PATIENCE_SECONDS, Make, rollouts, rows, semion, started, tensors, until, untimed, written
from tests.e2e.test_golden_check import agreed
from tests.e2e.test_in_flight import DELAYS, kill

pytestmark = pytest.mark.timeout(1800)
ALGORITHMS = {
    "grpo": ["algorithm.loss=grpo", "algorithm.kl_weight=0.05", "algorithm.reduction=tokens", "sync.reference=2"],
    "dpo": ["algorithm.loss=dpo", "algorithm.reduction=pairs", "algorithm.nll_weight=0.2", "sync.reference=follow"],
}
SHAPE = {"num_tokens", "shared_token_share"}  # of rows, which are cut otherwise
OWN = {"num_waves", "streamed_share"}


def options(algorithm: str, *more: str) -> list[str]:
    engines = ["inference.engines=2", "inference.max_concurrent=24", "sampling.max_tokens=24"]
    prompts = 16 if algorithm == "dpo" else 8  # a wave of pairs has at least two prompts for each rank, and leaves as many
    return [*ALGORITHMS[algorithm], *engines, "trainer.data_parallel=2", f"data.prompts_per_step={prompts}", *more]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_that_streams_is_the_run_that_does_not(run_config: Make, tmp_path: Path, algorithm: str) -> None:
    """Two steps: the same rollouts, every metric within 2e-5, and the weights at the end within a hundredth of a learning rate,
    for AdamW makes steps of the last bits of small gradients. Losses and gradient norms are those recomputed in float64."""
    more = ["run.steps=2", "checkpoint.every=1", "checkpoint.keep=9"]
    whole, other = (
        run_config(*options(algorithm, *more, f"sync.streaming={streams}"), directory=streams) for streams in ("false", "true")
    )
    for config in (whole, other):
        semion("train", written(config, tmp_path))
    ledger, streamed = rollouts(whole), rollouts(other)
    waves = [row.pop("wave") for row in streamed]
    assert [plain(row) for row in streamed] == [plain(row) for row in ledger]
    told = untimed(rows(other, "metrics.jsonl"))
    for wanted, found in zip(untimed(rows(whole, "metrics.jsonl")), told, strict=True):
        assert found.keys() - wanted.keys() == OWN
        for name in wanted.keys() - SHAPE - {"sync_mebibytes"}:
            assert found[name] == pytest.approx(wanted[name], rel=2e-5, abs=2e-5, nan_ok=True), name
    assert max(row["num_waves"] for row in told) > 1 and max(row["streamed_share"] for row in told) > 0.2
    for step, row in enumerate(told):
        of_step = [wave for wave, line in zip(waves, ledger, strict=True) if line["step"] == step]
        assert len(set(of_step)) >= row["num_waves"], "a wave without a signal is trained with the rest"
        assert all(len(set(of_step[i : i + 6])) == 1 for i in range(0, len(of_step), 6)), "no group is cut"
    agreed(other, 0, 1)
    proof = semion("report", str(other.run_directory), "--output", str(tmp_path / "report.html"))
    assert f"s = 1 (online): staleness 0..0, proven from {len(ledger)} rollouts of 2 steps" in proof
    weights = [
        load_file(file)
        for config in (whole, other)
        for file in sorted((config.run_directory / "checkpoints/step_00000002/policy").glob("*.safetensors"))
    ]
    assert len(weights) == 2
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) <= 2e-5


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A rollout without what the weights' rounding may change."""
    return {name: value for name, value in row.items() if name != "log_probs"}


def test_a_delayed_and_killed_run_that_streams_is_bit_for_bit_the_undisturbed_one(
    run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["run.steps=4", "checkpoint.every=1", "checkpoint.keep=9", "sync.streaming=true"]
    whole, other = (run_config(*options("grpo", *more), directory=name) for name in ("whole", "delayed"))
    semion("train", written(whole, tmp_path))
    told = rows(whole, "metrics.jsonl")
    assert max(row["num_waves"] for row in told) > 1
    monkeypatch.setenv("SEMION_TEST_DELAY", "0.5")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(DELAYS), *filter(None, [os.environ.get("PYTHONPATH")])]))
    file, log = written(other, tmp_path), tmp_path / "log"
    with started(file, log) as run:
        saved = other.run_directory / "checkpoints" / "LATEST"
        until(lambda: saved.exists() and (other.run_directory / "metrics.jsonl").read_text().count("\n") > 1, run, log)
        kill(run)
    with started(file, log, "--resume", "auto") as run:
        assert run.wait(PATIENCE_SECONDS) == 0, log.read_text()[-4000:]
    assert rollouts(other) == rollouts(whole)
    assert untimed(rows(other, "metrics.jsonl")) == untimed(told)
    assert tensors(other) == tensors(whole)
