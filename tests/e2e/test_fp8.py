"""Runs whose engines have FP8 weights: they tell how far rounding takes sampler and trainer apart, and go on after a stop with
every bit; engines in turn with the trainer sleep and wake with them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.e2e.test_commands import PATIENCE_SECONDS, Make, final, rollouts, rows, semion, sent_alike, started, until, written

pytestmark = [pytest.mark.timeout(1800), pytest.mark.nightly]

FP8 = [
    *("model.dtype=bfloat16", "inference.quantization=fp8", "trainer.tensor_parallel=2", "checkpoint.every=2"),
    *("algorithm.loss=grpo", "algorithm.kl_weight=0.05", "algorithm.correction=truncate", "algorithm.correction_high=2.0"),
    "sync.sync_interval=2",
]


def test_a_run_with_fp8_engines_tells_its_gap_and_goes_on_after_a_stop_with_every_bit(run_config: Make, tmp_path: Path) -> None:
    whole, plain = run_config(*FP8, directory="whole"), run_config(*FP8, "inference.quantization=none", directory="plain")
    for config in (whole, plain):
        semion("train", written(config, tmp_path))
    fp8, bfloat16 = ([row["log_prob_gap_mean"] for row in rows(one, "metrics.jsonl")][::2] for one in (whole, plain))
    assert max(bfloat16) < min(fp8) <= max(fp8) < 0.1, "rounded more, and still the policy, while it is what sampled"
    config = run_config(*FP8, directory="stopped")
    file, log = written(config, tmp_path), tmp_path / "log"
    with started(file, log) as run:
        until(lambda: "starting 2 trainer ranks" in log.read_text(), run, log)
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=PATIENCE_SECONDS) == 75, log.read_text()[-2000:]
    semion("train", file, "--resume", "auto")
    assert rollouts(config) == rollouts(whole) != rollouts(plain)
    assert sent_alike(rows(config, "metrics.jsonl")) == sent_alike(rows(whole, "metrics.jsonl"))
    assert final(config) == final(whole)


def test_engines_that_sleep_with_fp8_weights_change_no_bit(run_config: Make, tmp_path: Path) -> None:
    apart = run_config(*FP8, directory="apart")
    colocated = run_config(*FP8, "inference.placement=colocated", directory="colocated")
    for config in (apart, colocated):
        semion("train", written(config, tmp_path))
    assert rollouts(colocated) == rollouts(apart)
    assert final(colocated) == final(apart)
