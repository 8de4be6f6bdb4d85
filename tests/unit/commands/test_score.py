"""`semion score` in process, with real workers: figures, the rows that disagree, the files it writes, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from engine import cli
from engine.rewards.math.reward import VERIFIER_VERSION

ROWS: list[dict[str, Any]] = [
    {"answer": "57", "completion": r"so \boxed{57}", "expected": 1, "id": "kept"},
    {"answer": 57, "completion": r"[/red] \boxed{58} \x1b[31m", "expected": True},
    {"answer": "391", "completion": r"\boxed{17\cdot 23}", "expected": 0, "problem": "Compute $17 \\cdot 23$."},
    {"answer": "", "completion": "5"},
]
USER = "def length(problem, answer, completion):\n    return len(completion) / 2\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return path


def run(*arguments: object) -> int:
    return cli.main(["score", *map(str, arguments)])


@pytest.mark.slow
def test_the_figures_the_table_and_the_rows(file: Path, tmp_path: Path, capsys: Any) -> None:
    output, figures = tmp_path / "scored.jsonl", tmp_path / "figures.json"
    assert run(file, "--reward", "math", "--deadline-seconds", "30", "--output", output, "--json", figures) == 0
    scored = [json.loads(line) for line in output.read_text().splitlines()]
    scores, statuses = [1.0, 0.0, 1.0, 0.0], ["ok", "ok", "ok", "unparsable"]
    assert scored == [
        row | {"score": score, "status": status} for row, score, status in zip(ROWS, scores, statuses, strict=True)
    ]
    found = json.loads(figures.read_text())
    assert found["rows"] == 4 and found["statuses"] == {"ok": 3, "unparsable": 1} and found["reward"] == "math"
    assert found["mean"] == pytest.approx(2 / 3) and found["agreement"] == pytest.approx(1 / 3) and found["expecting"] == 3
    assert [row["row"] for row in found["disagreeing"]] == [2, 3]
    assert found["versions"]["verifier"] == VERIFIER_VERSION and found["versions"]["math-verify"]
    shown = capsys.readouterr().out
    assert "0.6667" in shown and "33.33% of 3" in shown and "[/red]" in shown and "\x1b" not in shown


@pytest.mark.slow
def test_parquet_and_the_switch(tmp_path: Path, capsys: Any) -> None:
    path, figures = tmp_path / "rows.parquet", tmp_path / "figures.json"
    table = {"answer": ["391", "391"], "completion": [r"\boxed{17\cdot 23}", r"\boxed{391}"], "expected": [0, 1]}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    assert run(path, "--reward", "math", "--unevaluated", "refuse", "--deadline-seconds", "30", "--json", figures) == 0
    assert json.loads(figures.read_text())["agreement"] == 1.0
    assert "disagree" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_row_without_a_verdict_neither_agrees_nor_disagrees(file: Path, tmp_path: Path, capsys: Any) -> None:
    """Its score is 0 like a wrong answer's."""
    figures = tmp_path / "figures.json"
    rows: list[dict[str, Any]] = [{"answer": "", "completion": "5", "expected": expected} for expected in (0, 1)]
    file.write_text("\n".join(map(json.dumps, [*rows, {"answer": "5", "completion": "5", "expected": 1}])))
    assert run(file, "--reward", "math", "--deadline-seconds", "30", "--json", figures) == 0
    found = json.loads(figures.read_text())
    assert (found["expecting"], found["unjudged"], found["agreement"], found["disagreeing"]) == (3, 2, 1.0, [])
    assert "100.00% of 1, 2 unjudged" in capsys.readouterr().out
    file.write_text(json.dumps(rows[0]))
    assert run(file, "--reward", "math", "--deadline-seconds", "30", "--json", figures) == 3, "nothing was judged"
    assert json.loads(figures.read_text())["agreement"] is None
    assert "none of 1 judged" in capsys.readouterr().out


def test_a_users_function(file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(USER)
    output = tmp_path / "scored.jsonl"
    assert run(file, "--reward", "function", "--function", f"{tmp_path}/mine.py:length", "--output", output) == 0
    scores = [json.loads(line)["score"] for line in output.read_text().splitlines()]
    assert scores == [len(row["completion"]) / 2 for row in ROWS]


def test_a_users_own_by_its_place_sees_rows_and_groups_and_its_error_is_shown(tmp_path: Path) -> None:
    """Rows of one problem are a group; parts and errors stand beside the scores."""
    (tmp_path / "own.py").write_text(
        "def share(group, row, num_tokens):\n"
        "    return [{'share': 1 / len(group), 'tokens': float(n)} for n in num_tokens] if row['k'] else 1 / 0\n"
    )
    rows = [("p", "a", 1), ("q", "b", 0), ("p", "c", 1)]
    file, output = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    keys = ("problem", "completion", "k")
    file.write_text("".join(json.dumps(dict(zip(keys, row, strict=True), num_tokens=3)) + "\n" for row in rows))
    assert run(file, "--reward", f"{tmp_path}/own.py:share", "--concurrency", 2, "--output", output) == 0
    first, second, third = (json.loads(line) for line in output.read_text().splitlines())
    assert first["score"] == third["score"] == 3.5 and first["parts"] == {"share": 0.5, "tokens": 3.0}
    assert second["status"] == "invalid" and "ZeroDivisionError" in second["error"]


@pytest.mark.parametrize(
    ("code", "arguments", "text", "parts"),
    [
        (2, ("--reward", "function"), None, ("--function", "found none")),
        (2, ("--reward", "maths"), None, ("--reward must be one of", "'maths'", "path/to/file.py:name")),
        (2, ("--reward", "function", "--function", "nowhere.py:f"), None, ("rewards.function", "nowhere.py")),
        (2, ("--reward", "model"), None, ("--reward-model", "found none")),
        (2, ("--reward", "math", "--workers", "0"), None, ("--workers", "found 0")),
        (2, ("--reward", "math", "--output", "{file}"), None, ("--output", "also FILE")),
        (2, ("--reward", "math", "--reward-model", "m"), None, ("--reward-model is of --reward model", "--reward math")),
        (2, ("--reward", "math", "--function", "f.py:f"), None, ("--function is of --reward function", "--reward math")),
        (2, ("--reward", "function", "--max-tokens", "9"), None, ("--max-tokens is of --reward model",)),
        (2, ("--reward", "function", "--unevaluated", "accept"), None, ("--unevaluated is of --reward math",)),
        (2, ("--reward", "model", "--workers", "2"), None, ("--workers is of --reward function or math",)),
        (3, ("--reward", "math"), "", ("at least one row",)),
        (3, ("--reward", "math"), "3", ("line 1", "JSON object")),
        (3, ("--reward", "math"), '{"answer": "5"}', ("line 1", "`completion`")),
        (3, ("--reward", "math"), '{"answer": [5], "completion": "5"}', ("line 1", "`answer`")),
        (3, ("--reward", "math"), '{"completion": "5", "expected": "yes"}', ("line 1", "`expected`", "'yes'")),
        (3, ("--reward", "math"), '{"completion": "\\ud800"}', ("line 1", "`completion`", "half a pair")),
    ],
)
def test_a_mistake_is_one_sentence(
    file: Path, capsys: Any, code: int, arguments: tuple[str, ...], text: str | None, parts: tuple[str, ...]
) -> None:
    if text is not None:
        file.write_text(text)
    assert run(file, *(argument.format(file=file) for argument in arguments)) == code
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("semion: ")
    assert all(part in said.err for part in parts), said.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--output", "{tmp}"), "--output must name a file; found a folder"),
        (("--json", "{tmp}/rows.jsonl/x.json"), "--json must be a file that can be written; found a file at"),
        (("--output", "{tmp}/same", "--json", "{tmp}/same"), "must be a file of its own; found"),
        (("--json", ""), "--json must name a file; found an empty name"),
    ],
)
def test_places_to_write_to_are_looked_at_before_anything_is_judged(file, tmp_path, capsys, monkeypatch, flags, said) -> None:
    monkeypatch.setattr("engine.commands.scoring.score_file", lambda *_, **__: pytest.fail("judged"))
    assert run(file, "--reward", "math", *(flag.format(tmp=tmp_path) for flag in flags)) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_is_missing_is_made(file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    row = {"answer": "1", "completion": "1", "score": 1.0, "status": "ok"}
    figures = {"file": "f", "reward": "math", "rows": 1, "mean": 1.0, "statuses": {"ok": 1}, "agreement": None, "expecting": 0}
    monkeypatch.setattr("engine.commands.scoring.score_file", lambda *_, **__: (figures | {"disagreeing": []}, [row]))
    output = tmp_path / "not" / "yet" / "scored.jsonl"
    assert run(file, "--reward", "math", "--output", output) == 0
    assert json.loads(output.read_text()) == row


@pytest.mark.parametrize(
    ("column", "value"), [("num_tokens", -1), ("num_tokens", "7"), ("num_tokens", True), ("finish_reason", "eos")]
)
def test_odd_columns_of_a_row_are_named(tmp_path: Path, capsys: Any, column: str, value: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"answer": "1", "completion": "1", column: value}))
    assert run(path, "--reward", "math") == 3
    assert f"rows.jsonl, line 1: `{column}` must be" in capsys.readouterr().err


def test_rows_of_which_none_could_be_judged_are_no_success(file: Path, tmp_path: Path, capsys: Any) -> None:
    """The rows are written for whoever looks into them, and the first error is told."""
    (tmp_path / "broken.py").write_text("def fails(problem, answer, completion):\n    raise RuntimeError('boom')\n")
    out = tmp_path / "scored.jsonl"
    assert run(file, "--reward", "function", "--function", f"{tmp_path}/broken.py:fails", "--output", out) == 3
    told = capsys.readouterr()
    assert "at least one row must be judged; found" in told.err and "RuntimeError: boom" in told.err
    assert "none judged" in told.out and {json.loads(line)["status"] for line in out.read_text().splitlines()} == {"invalid"}
