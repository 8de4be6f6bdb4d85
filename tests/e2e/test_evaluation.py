"""Evaluation end to end with the tiny model and real vLLM engines: suites of public problems in one start, with records that
give the figures back; answers to open-ended questions, which a judge behind real HTTP then compares.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import cli
from engine.config.load import RunConfig
from engine.evaluation.accuracy import mean_pass_at
from tests.e2e.test_commands import semion, written
from tests.shared_data import SHARED_DATA
from tests.unit.benchmarks.chat_server import ChatServer, completion

pytestmark = pytest.mark.timeout(600)

NUM_ROWS, NUM_SEEDS = 5, 8
SIZES = [
    *("inference.max_model_tokens=512", "data.max_prompt_tokens=480", "trainer.microbatch_tokens=512"),
    f"evaluation.samples={NUM_SEEDS}",
]
Results = tuple[Path, dict[str, Any], list[str]]


@pytest.fixture(scope="module")
def evaluated(configure: Callable[..., RunConfig], sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """(folder of the records, figures by suite, the command) of rows of MATH-500 and AMC23, of GSM8K, and of the sums, some
    of which the model can do; on one start of the engine, with the paper's template."""
    if not SHARED_DATA.is_dir():
        pytest.skip("public data are not beside the repository")
    folder = tmp_path_factory.mktemp("suites")
    for name in ("math500", "amc23", "gsm8k_test"):
        lines = (SHARED_DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        short = [line for line in lines if len(line) < 500][:NUM_ROWS]
        (folder / f"{name}.jsonl").write_text("\n".join([*short, max(lines, key=len)]), encoding="utf-8")
    config = configure(folder, *SIZES)
    files = [str(folder / f"{name}.jsonl") for name in ("math500", "amc23", "gsm8k_test")] + [str(sums / "train.jsonl")]
    command = ["eval", written(config, folder), "--suite", *files, "--output", str(folder / "out")]
    semion(*command, "--json", str(folder / "figures.json"))
    return folder / "out", json.loads((folder / "figures.json").read_text())["suites"], command


def records_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.records.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["math500", "amc23", "gsm8k_test"])
def test_public_suites_leave_a_record_of_every_problem_and_sample(evaluated: Results, name: str) -> None:
    folder, figures, command = evaluated
    rows = [json.loads(line) for line in (Path(command[3]).parent / f"{name}.jsonl").read_text().splitlines()][:NUM_ROWS]
    records = records_of(folder, name)
    assert json.loads((folder / f"{name}.json").read_text()) == figures[name]
    counts = [figures[name][key] for key in ("num_problems", "num_seeds", "num_too_long")]
    assert counts == [NUM_ROWS + 1, NUM_SEEDS, 1], "the longest is too long for the engine, and counts as wrong"
    assert [r["problem"] for r in records[::NUM_SEEDS]] == [row.get("problem", row.get("question")) for row in rows]
    golds = [str(row["answer"]).rpartition("#### ")[2].removesuffix(".0") for row in rows]
    assert [r["answer"] for r in records[::NUM_SEEDS]] == golds
    assert [r["seed_index"] for r in records] == list(range(NUM_SEEDS)) * NUM_ROWS
    assert len({r["seed"] for r in records}) == len(records)
    assert {r["status"] for r in records} == {"ok"}
    assert all(0 < r["num_tokens"] <= 8 and (r["num_tokens"] == 8 or r["finish_reason"] == "stop") for r in records)
    assert sum(r["num_tokens"] for r in records) / len(records) == pytest.approx(figures[name]["completion_tokens_mean"])
    assert sum(r["finish_reason"] == "length" for r in records) / len(records) == figures[name]["truncated"]
    assert figures[name]["settings"]["temperature"] == 0.6


def test_the_figures_and_their_standard_error_come_back_from_the_records(evaluated: Results) -> None:
    """The sums, of which the model gets some right; the standard error against a bootstrap over problems."""
    folder, suites, _ = evaluated
    figures, records = suites["train"], records_of(folder, "train")
    correct = np.array([float(r["reward"] > 0) for r in records]).reshape(-1, NUM_SEEDS)
    problems = len(correct)
    assert 0.1 < correct.mean() < 0.99, "the tiny model can do some"
    assert figures["mean"] == pytest.approx(correct.mean())
    assert figures["pass_at"] == mean_pass_at(correct.tolist())
    assert figures["pass_at"]["8"] == correct.max(1).mean()
    draws = np.random.default_rng(0).integers(0, problems, (20_000, problems))
    resampled = correct.mean(1)[draws].mean(1).std()
    assert figures["standard_error"] * math.sqrt(1 - 1 / problems) == pytest.approx(resampled, rel=0.03)
    assert figures["seed_spread"] == pytest.approx(correct.mean(0).std(ddof=1) / math.sqrt(NUM_SEEDS))


def test_a_finished_suite_is_not_run_again(evaluated: Results, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, figures, command = evaluated
    monkeypatch.setattr("engine.run.processes.Cluster.__enter__", lambda self: pytest.fail("an engine would have started"))
    assert cli.main([*command, "--json", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text())["suites"] == figures
    with pytest.raises(pytest.fail.Exception, match="would have started"):
        cli.main([*command[:2], "run.seed=6", *command[2:]])


def test_open_ended_answers_are_sampled_and_judged(
    run_config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Arena-Hard's form; the same answers under two names are a tie for a judge that looks at nothing else."""
    questions = [{"uid": f"u{i}", "category": "c", "cluster": "d", "prompt": f"{i}+1"} for i in range(3)]
    (tmp_path / "question.jsonl").write_text("\n".join(map(json.dumps, questions)))
    out, config = tmp_path / "tiny.jsonl", written(run_config(), tmp_path)
    asked = ["--questions", str(tmp_path / "question.jsonl")]
    semion("generate", config, *asked, "--format", "arena_hard", "--output", str(out), "--name", "tiny")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["question_id"], row["model_id"]) for row in rows] == [("u0", "tiny"), ("u1", "tiny"), ("u2", "tiny")]
    assert all(0 < row["choices"][0]["turns"][0]["token_len"] <= 8 for row in rows)
    baseline = tmp_path / "baseline.jsonl"
    baseline.write_text("\n".join(json.dumps(row | {"model_id": "other"}) for row in rows))
    with ChatServer(lambda body, number: completion("The same. [[A=B]]")) as server:
        judged = ["judge", str(out), "--against", str(baseline), *asked, "--endpoint", server.url, "--model", "j"]
        assert cli.main([*judged, "--output", str(tmp_path / "replies.jsonl")]) == 0
        assert len(server.asked) == 3, "where the answers are equal, both orders are one request"
    assert "50.0% ± 0.0%" in capsys.readouterr().out
