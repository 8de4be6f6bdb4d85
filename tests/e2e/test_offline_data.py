"""Offline training from disk, end to end: a run that replays another's ledger ends with the same weights, bit for bit, without
an engine; and a preference file is trained on as it is. Batches of two sources on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config.load import RunConfig
from engine.data.rows import problem_id
from tests.e2e.conftest import FURTHER
from tests.e2e.test_commands import TIMES, final, rollouts, rows, semion, written

pytestmark = pytest.mark.timeout(1800)

Make = Callable[..., RunConfig]
OF_ENGINES = ("generation_tokens", "sync_mebibytes", *TIMES)


def learned(config: RunConfig) -> list[dict[str, Any]]:
    """The metrics without times and without what only engines have."""
    metrics = rows(config, "metrics.jsonl")
    return [{name: row[name] for name in row if not any(part in name for part in OF_ENGINES)} for row in metrics]


def test_a_ledger_replayed_without_engines_trains_the_same_weights(
    offline: RunConfig, make_offline: Make, tmp_path: Path
) -> None:
    ledger = rollouts(offline)
    assert len(ledger) == offline.run.steps * (4 + 2 + 2) * offline.algorithm.samples_per_prompt
    further = {problem_id(f"{a}+{a}") for a in FURTHER}
    of_further = [row["step"] for row in ledger if row["prompt_id"] in further]
    assert of_further == [step for step in range(4) for _ in range(2 * 6)], "exactly its prompts in every batch"
    replay = f"data.replay={offline.run_directory / 'rollouts'}"
    profile = ["profile.tool=torch", "profile.first_step=1"]  # of the trainer: there is no engine to profile
    again = make_offline(tmp_path, replay, *profile, directory="replayed")
    again = again.model_copy(update={"data": again.data.model_copy(update={"held_out": None})})
    printed = semion("train", written(again, tmp_path))
    assert "and 0 engines" in printed
    assert "data.replay: rollouts of 4 steps" in " ".join(printed.split())
    assert learned(again) == learned(offline)
    assert final(again) == final(offline)
    assert [file.name for file in (again.run_directory / "profile").iterdir()] == ["rank-0.json"]
    assert rollouts(again) == [] == rows(again, "evaluations.jsonl")


def test_a_preference_file_is_trained_on_with_evaluations(run_config: Make, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    records = [{"prompt": f"{a}+{b}", "chosen": f"${a + b}$", "rejected": "$9$"} for a in range(4) for b in range(4)]
    pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ["sync.sync_interval=never", f"data.train={pairs}", f"data.replay={pairs}", "trainer.data_parallel=2"]
    config = run_config(*options, directory="pairs")
    printed = semion("train", written(config, tmp_path))
    assert "data.replay: 16 pairs" in " ".join(printed.split())
    metrics = rows(config, "metrics.jsonl")
    assert all("log_prob_gap_mean" not in row and "staleness" not in row for row in metrics)
    assert metrics[-1]["margin_mean"] > metrics[0]["margin_mean"] == 0
    assert [row["step"] for row in rows(config, "evaluations.jsonl")] == [0, 4]
