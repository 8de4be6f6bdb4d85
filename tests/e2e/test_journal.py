"""What a trainer rank says in its last moment reaches the command, through real processes of Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config.load import RunConfig, dump_config
from engine.observe.journal import read_warnings

pytestmark = pytest.mark.timeout(600)


def test_the_warning_of_a_rank_that_dies_right_after_is_shown_and_its_error_names_its_log(
    run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = run_config("trainer.tensor_parallel=2")
    file = tmp_path / "run.toml"
    file.write_text(dump_config(config))
    probe = [sys.executable, str(Path(__file__).with_name("journal_probe.py")), str(file)]
    run = subprocess.run(probe, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    result = json.loads(run.stdout.split("RESULT ")[1])
    warned = {"kind": "warning", "where": "trainer rank 1", "text": "rank 1 is about to go", "count": 1}
    assert [event for event in result["events"] if event["kind"] == "warning"] == [warned]
    log = config.run_directory / "logs" / "trainer_rank_1.log"
    assert result["error"].startswith("the process of trainer rank 1 ended: ")
    assert result["error"].endswith(f"; its log is {log}")
    assert "its last words" in log.read_text() and "about to go" in log.read_text()
    assert [row["text"] for row in read_warnings(config.run_directory / "warnings.jsonl")] == ["rank 1 is about to go"]
    assert {path.name for path in log.parent.iterdir()} == {"trainer_rank_0.log", "trainer_rank_1.log"}
