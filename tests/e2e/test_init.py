"""What `semion init` writes for a tiny model on CPUs is trained from, as it is but for its size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from engine.config.load import load_config
from tests.e2e.test_commands import rows, semion

SMALL = ("run.steps=2", "data.prompts_per_step=4", "algorithm.samples_per_prompt=4", "sampling.max_tokens=8")
ENDS = ("checkpoint.every=end", "checkpoint.best_by=", "evaluation.every=ends", "evaluation.max_problems=3")


def test_the_file_of_init_trains(seed_model: Callable[[str], Path], sums: Path, tmp_path: Path) -> None:
    file, run = tmp_path / "run.toml", tmp_path / "run"
    data = ("--train", str(sums / "train.jsonl"), "--held-out", str(sums / "held_out.jsonl"))
    where = ("--gpus", "0", "--sync-interval", "2", "--directory", str(run), "--output", str(file))
    printed = semion("init", "--model", str(seed_model("plain")), *data, *where)
    assert "one trainer rank and one engine on CPUs; KV cache" in printed
    said = semion("train", str(file), *SMALL, *ENDS)
    assert "requests of 512 tokens at full length" in said, "the run says what its KV cache holds"
    config = load_config(file, [*SMALL, *ENDS])
    assert [row["step"] for row in rows(config, "metrics.jsonl")] == [0, 1]
    assert {row["learning_rate"] for row in rows(config, "metrics.jsonl")} == {1e-6}
    summary = json.loads((run / "summary.json").read_text())
    assert [evaluation["step"] for evaluation in summary["evaluations"]] == [0, 2]
