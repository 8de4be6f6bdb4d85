"""A model whose generation config never heard of the token with which its chat template ends a turn, as Llama 3's first release
was, through real engines and a real run: it stops at both, people are told, and what is written names both.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config.load import RunConfig
from tests.e2e.test_commands import rollouts, rows, semion, written

pytestmark = pytest.mark.timeout(900)
BEGIN, END = 256, 259  # of the tests' tokenizer; only the second ends a turn


def test_a_run_stops_at_an_end_token_that_only_the_tokenizer_names(
    run_config: Callable[..., RunConfig], seed_model: Callable[[str], Path], tmp_path: Path
) -> None:
    seed = tmp_path / "seed"
    shutil.copytree(seed_model("plain"), seed)
    for name in ("generation_config.json", "config.json"):
        said = json.loads((seed / name).read_text())
        (seed / name).write_text(json.dumps(said | {"eos_token_id": BEGIN}))
    config = run_config(f"model.path={seed}", "run.steps=2", "sampling.truncated=leave_out", "evaluation.samples=1")
    semion("train", written(config, tmp_path))
    sampled = rollouts(config)
    assert any(row["finish_reason"] == "stop" and row["token_ids"][-1] == END for row in sampled)
    assert not any(END in row["token_ids"][:-1] for row in sampled)
    assert all(row["end_tokens_inside"] == 0 and row["updated"] == 1 for row in rows(config, "metrics.jsonl"))
    told = [row["text"] for row in rows(config, "warnings.jsonl")]
    assert any("names its end tokens in places that differ" in text for text in told), told
    policy = config.run_directory / "checkpoints" / "step_00000002" / "policy"
    assert set(json.loads((policy / "generation_config.json").read_text())["eos_token_id"]) == {BEGIN, END}
