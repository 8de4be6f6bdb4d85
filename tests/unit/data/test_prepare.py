"""What `semion prepare` keeps and why it drops the rest: each rule on texts of our own, the splits as functions of problem and
seed, evaluation files kept out, the manifest, and a folder that is whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import cli
from engine.core.errors import ConfigError, DataError, StorageError
from engine.data import filters
from engine.data.filters import is_multiple_choice, is_proof, normalized
from engine.data.prepare import Sizes, prepare
from engine.data.rows import load_rows
from tests.shared_data import SHARED_DATA, needs_shared_data


@pytest.mark.parametrize(
    ("problem", "answer"),
    [
        ("Prove that $n^2 + n$ is even.", "n"),
        ("Let $n > 1$. (a) Find $n$. (b) Prove it is the only one.", "3"),
        ("Prove or disprove: every such set is finite.", ""),
        ("If $a > b$, show that $2a > 2b$.", "2a"),
        ("Find the sum of the series and show, for all n, that it is bounded.", "1"),
        ("Show that there is no such number.", ""),
        ("(1) Verify that $f$ is odd.", "odd"),
        ("Explain why the triangle is right-angled.", "x"),
        ("Give a short proof of the inequality.", "1"),
        ("Is the sum of two odd numbers even?", r"\text{Proof.}"),
        ("Is the sum of two odd numbers even?", r"\text{Q.E.D}"),
        ("Is it so?", r"\blacksquare"),
    ],
)
def test_proofs_are_seen(problem, answer):
    assert is_proof(problem, answer)


@pytest.mark.parametrize(
    "problem",
    [
        "Records show that 30% of 200 guests are late. How many are on time?",
        "A survey shows that 4 of 5 dentists agree. What share is that?",
        "It is proved in class that $x > 2$. Find the least integer $x$.",
        "The proof of a coin is tested 5 times. How often does it land heads?",
        "Find all $n$ such that $n + 1$ is prime.",
        "A waterproof tent holds 4 people. How many tents do 12 people need?",
    ],
)
def test_statements_are_no_proofs(problem):
    assert not is_proof(problem, r"\frac{1}{2}")


OPTIONS = r"What is $1 + 1$? $\textbf{(A)}\ 1\qquad\textbf{(B)}\ 2\qquad\textbf{(C)}\ 3\qquad\textbf{(D)}\ 4$"


@pytest.mark.parametrize(
    ("problem", "answer"),
    [
        (OPTIONS, "2"),
        (r"What is $1 + 1$? $\mathrm{(A) \ } 1 \qquad \mathrm{(B) \ } 2 \qquad \mathrm{(C) \ } 3$", "2"),
        ("What is 1 + 1? (A) one (B) two (C) three", "2"),
        ("The sum is ( )\nA. $1$ B. $2$ C. $3$ D. $4$", "2"),
        ("The sum is:\nA: 1\nB: 2\nC: 3\nD: 4", "2"),
        ("Choose: A) increasing B) decreasing C) constant", "x"),
        ("The value of the sum is （　　） A．1 B．2 C．3 D．4", "2"),
        ("Which of the following is even?", "2"),
        ("What is the correct option for the sum?", "2"),
        ("What is 1 + 1?", "B"),
        ("What is 1 + 1?", r"\text{(C)}"),
        ("What is 1 + 1?", r"\textbf{D}."),
        ("Which hold?", "A, B, D"),
        ("Which hold?", r"\mathrm{A},\mathrm{C}"),
    ],
)
def test_multiple_choice_is_seen(problem, answer):
    assert is_multiple_choice(problem, answer)


@pytest.mark.parametrize(
    ("problem", "answer"),
    [
        ("If $P(A) = 0.2$, $P(B) = 0.3$ and $P(C) = 0.5$, find $P(A \\cup B)$.", "0.5"),
        ("Let $n(A) = 3$, $n(B) = 4$, $n(C) = 5$. Find $n(A \\cup B \\cup C)$.", "12"),
        ("In triangle $ABC$, $\\sin(A) = 1$. What are $\\sin(B)$ and $\\sin(C)$?", "x"),
        ("A line passes through A. Another meets it in B. Both miss C. How many points?", "1"),
        ("(a) Find $x$. (b) Find $y$. (c) Find $x + y$.", "3"),
        ("What is the length of $AB$?", "AB"),
        ("What is $1 + 1$?", "2"),
        ("There are 12 multiple-choice questions; 4 are wrong. How many are right?", "8"),
        ("Solve for $x$: $Ax = B$.", r"\frac{B}{A}"),
    ],
)
def test_other_problems_are_no_multiple_choice(problem, answer):
    assert not is_multiple_choice(problem, answer)


@needs_shared_data("math500.jsonl")
def test_on_problems_that_people_checked_the_rules_hardly_err():
    """MATH-500 and GSM8K hold no proofs; three problems of the first do offer options."""
    for name, field, choices in (("math500", "problem", 3), ("gsm8k_train", "question", 0)):
        rows = [json.loads(line) for line in (SHARED_DATA / f"{name}.jsonl").read_text("utf-8").splitlines()]
        answers = [str(row["answer"]).rsplit("#### ", 1)[-1] for row in rows]
        assert not [row for row, answer in zip(rows, answers, strict=True) if is_proof(row[field], answer)]
        found = [row for row, answer in zip(rows, answers, strict=True) if is_multiple_choice(row[field], answer)]
        assert len(found) == choices


def numina(problem: str, answer: str = "4", **fields: Any) -> dict[str, Any]:
    return {"problem": problem, "solution": f"So \\boxed{{{answer}}}.", "source": "cn_k12", "messages": []} | fields


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (numina(" "), "empty"),
        *((numina("p", source=source), "synthetic") for source in ("orca_math", "synthetic_amc", "synthetic_math")),
        (numina("p", synthetic=True), "synthetic"),
        (numina("Prove that p."), "proof"),
        (numina("p", answer="proof", question_type="math-word-problem"), "proof"),
        (numina("p", question_type="proof"), "proof"),
        (numina(OPTIONS), "multiple_choice"),
        (numina("p", question_type="MCQ"), "multiple_choice"),
        (numina("p", solution="So 4."), "no_answer"),
        (numina("p", solution=r"So \boxed{4"), "no_answer"),
        (numina("p", solution=r"So \boxed{ }"), "no_answer"),
        (numina("p", answer="notfound") | {"answer": "notfound"}, "no_answer"),
    ],
)
def test_each_reason_of_numinamath(record, reason):
    assert filters.numinamath().judge("row 1", record) == reason


@pytest.mark.parametrize("source", ["aops_forum", "amc_aime", "cn_k12", "gsm8k", "math", "olympiads"])
def test_the_other_sources_of_numinamath_are_kept_with_their_answers(source):
    kept = filters.numinamath().judge("row 1", numina("2 + 2?", source=source))
    digest = hashlib.sha256(b"2 + 2?").hexdigest()[:16]
    assert kept == {"id": digest, "problem": "2 + 2?", "answer": "4", "solution": r"So \boxed{4}.", "source": source}
    own = filters.numinamath().judge("row 1", numina("2 + 2?") | {"answer": "four"})
    assert isinstance(own, dict) and own["answer"] == "four"


def chat(text: str | None, **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "Hello."}]
    return {"conversation": turns, "language": "English", "toxic": False, "redacted": False, "model": "m"} | fields


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (chat(None), "empty"),
        (chat("  "), "empty"),
        ({"conversation": []}, "empty"),
        (chat("Hi", toxic=True), "toxic"),
        (chat("Hi", redacted=True), "redacted"),
        (chat("Hi", conversation=[{"role": "user", "content": "Hi", "toxic": True}]), "toxic"),
        (chat("Hallo", language="German"), "other_language"),
    ],
)
def test_each_reason_of_wildchat(record, reason):
    assert filters.wildchat(["english"]).judge("row 1", record) == reason


def test_wildchat_keeps_first_turns_of_all_languages_unless_told():
    """A later toxic turn does not touch the first, whose own flag says that it is clean."""
    kept = filters.wildchat().judge("row 1", chat("Hallo", language="German"))
    assert isinstance(kept, dict) and (kept["problem"], kept["source"], kept["language"]) == ("Hallo", "wildchat", "German")
    clean = [{"role": "user", "content": "Hi", "toxic": False}]
    assert isinstance(filters.wildchat().judge("row 1", chat("Hi", conversation=clean, toxic=True)), dict)


def test_what_does_not_change_a_problem_does_not_hide_it():
    same = ["Find  $x$ if $\\dfrac{1}{x} = 2$.", "find x if\n\\frac{1}{x}=2.", r"Find \(x\) if \[\frac{1}{x} \; = 2\]."]
    assert len(set(map(normalized, same))) == 1
    assert normalized("Find $x + 1$") != normalized("Find $x - 1$")


# -- whole folders


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_folder_holds_the_parts_and_says_what_became_of_every_row(tmp_path):
    rows = [numina(f"{n} + {n}?", str(2 * n)) for n in range(30)]
    rows[3]["source"] = "orca_math"
    jsonl = write(tmp_path / "a.jsonl", [*rows[:20], numina("Prove that 1 + 1 = 2.", source="olympiads"), numina("0+0 ?")])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[20:]), tmp_path / "b.parquet")
    exclude = write(tmp_path / "eval.jsonl", [{"question": "$7+7$ ?"}, {"prompt": "other"}])
    sources, out = [jsonl, str(tmp_path / "b.parquet")], tmp_path / "out"
    manifest = prepare(filters.numinamath(), sources, out, Sizes(validation=5, test=4, seed=1), [exclude])
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert manifest["counts"] == {"read": 32, "kept": 28, "synthetic": 1, "proof": 1, "duplicate": 1, "excluded": 1}
    assert manifest["by_source"]["olympiads"] == {"read": 1, "kept": 0, "proof": 1}
    assert sum(part["kept"] for part in manifest["by_source"].values()) == 28
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "test.jsonl", "train.jsonl", "validation.jsonl"]
    parts = {name: read(out / f"{name}.jsonl") for name in ("train", "validation", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 19, "validation": 5, "test": 4}
    problems = [row["problem"] for part in parts.values() for row in part]
    assert sorted(problems) == sorted(f"{n} + {n}?" for n in range(30) if n not in (3, 7))
    places = [[int(row["problem"].split()[0]) for row in part] for part in parts.values()]
    assert all(part == sorted(part) for part in places), "rows keep their order"
    for name, file in manifest["files"].items():
        data = (out / name).read_bytes()
        assert file == {"rows": data.count(b"\n"), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["sources"][jsonl] == hashlib.sha256(Path(jsonl).read_bytes()).hexdigest()
    assert len(load_rows(out / "train.jsonl")) == 19, "what is written can be trained on"
    assert not list(tmp_path.glob(".*")), "nothing is left of the making"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "7 + 7?"}, {"role": "assistant", "content": "14"}]},
        {"prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "7 + 7?"}]},
        {"conversations": [{"from": "human", "value": "7 + 7?"}, {"from": "gpt", "value": "14"}]},
        {"conversation": [{"role": "user", "content": "7 + 7?"}, {"role": "assistant", "content": "14"}]},
        {"instruction": "7 + 7?", "output": "14"},
        {"input": "7 + 7?", "output": "14"},
    ],
)
def test_problems_to_keep_out_may_have_any_form_of_training_data(tmp_path, row):
    source = write(tmp_path / "a.jsonl", [numina(f"{n} + {n}?", str(2 * n)) for n in range(9)])
    exclude = write(tmp_path / "eval.jsonl", [row])
    manifest = prepare(filters.numinamath(), [source], tmp_path / "out", Sizes(0, 0), [exclude])
    assert manifest["counts"] == {"read": 9, "kept": 8, "excluded": 1}


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", [numina(f"{n} + {n}?", str(2 * n)) for n in range(9)])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("engine.data.prepare.line_of", full)
    with pytest.raises(StorageError, match=r"cannot be written: .*free at "):
        prepare(filters.numinamath(), [source], tmp_path / "out", Sizes(0, 0))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@settings(max_examples=15, deadline=None)
@given(st.permutations(list(range(24))), st.integers(0, 3), st.integers(0, 8), st.integers(0, 8), st.integers(0, 8))
def test_parts_are_exact_disjoint_and_follow_the_problem_not_its_place(tmp_path_factory, order, seed, validation, test, train):
    folder = tmp_path_factory.mktemp("parts")
    sizes = Sizes(validation, test, train, seed)

    def made(name: str, numbers: list[int]) -> list[set[str]]:
        source = write(folder / f"{name}.jsonl", [numina(f"{n} + 1?") for n in numbers])
        prepare(filters.numinamath(), [source], folder / name, sizes)
        return [{row["problem"] for row in read(folder / name / f"{part}.jsonl")} for part in ("train", "validation", "test")]

    parts = made("shuffled", order)
    assert [len(part) for part in parts] == [train, validation, test]
    assert len(set.union(*parts)) == train + validation + test
    assert made("sorted", sorted(order)) == parts


def test_another_seed_makes_other_splits(tmp_path):
    source = write(tmp_path / "a.jsonl", [numina(f"{n} + 1?") for n in range(40)])
    found = []
    for seed in (0, 1):
        prepare(filters.numinamath(), [source], tmp_path / str(seed), Sizes(10, 0, None, seed))
        found.append([row["problem"] for row in read(tmp_path / str(seed) / "validation.jsonl")])
    assert found[0] != found[1]
    assert [int(problem.split()[0]) for problem in found[0]] == PINNED, "a change here changes everybody's splits"


PINNED = [2, 5, 8, 11, 18, 26, 28, 30, 32, 38]


def test_a_folder_is_whole_or_not_there(tmp_path):
    bad = write(tmp_path / "bad.jsonl", [numina("1 + 1?"), numina("2 + 2?", source={"x": 1})])
    good = write(tmp_path / "good.jsonl", [numina("1 + 1?"), numina("2 + 2?")])
    with pytest.raises(DataError, match="line 2: `source` must be a text"):
        prepare(filters.numinamath(), [bad], tmp_path / "out", Sizes(1, 0))
    with pytest.raises(DataError, match="--validation 1, --test 1 and the training rows need 3 rows; found 2"):
        prepare(filters.numinamath(), [good], tmp_path / "out", Sizes(1, 1))
    with pytest.raises(DataError, match=r"must have one of problem, question, .*; found \{'text': 'p'\}"):
        prepare(filters.numinamath(), [good], tmp_path / "out", Sizes(1, 0), [write(tmp_path / "e.jsonl", [{"text": "p"}])])
    assert not (tmp_path / "out").exists()
    prepare(filters.numinamath(), [good], tmp_path / "out", Sizes(1, 0))
    with pytest.raises(ConfigError, match="out must be new or an empty folder"):
        prepare(filters.numinamath(), [good], tmp_path / "out", Sizes(1, 0))


def test_the_command_has_the_papers_sizes_and_prints_what_became_of_the_rows(tmp_path, capsys):
    numbers = write(tmp_path / "a.jsonl", [numina(f"{n} + 1?") for n in range(3965)])
    assert cli.main(["prepare", "numinamath", numbers, str(tmp_path / "math"), "--train", "3"]) == 0
    assert [len(read(tmp_path / "math" / f"{part}.jsonl")) for part in ("train", "validation", "test")] == [3, 1980, 1980]
    printed = capsys.readouterr().out
    assert "3,965" in printed and "validation.jsonl" in printed
    talk = [write(tmp_path / f"{name}.jsonl", [chat(f"{name} {n}") for n in range(300)]) for name in ("b", "c")]
    more = ["--json", str(tmp_path / "figures.json"), "--language", "English"]
    assert cli.main(["prepare", "wildchat", *talk, str(tmp_path / "chat"), *more]) == 0
    assert [len(read(tmp_path / "chat" / f"{part}.jsonl")) for part in ("train", "validation", "test")] == [130, 470, 0]
    assert json.loads((tmp_path / "figures.json").read_text())["counts"] == {"read": 600, "kept": 600}
    assert [row.answer for row in load_rows(tmp_path / "chat" / "train.jsonl", needs_answer=False)] == [""] * 130


def test_mistakes_of_the_command_line_are_told(tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", [numina("1 + 1?")])
    assert cli.main(["prepare", "numinamath", source, str(tmp_path / "out"), "--language", "English"]) == 2
    assert "--language is WildChat's; found 'English' with numinamath" in capsys.readouterr().err
    assert cli.main(["prepare", "numinamath", str(tmp_path / "gone.jsonl"), str(tmp_path / "out")]) == 3
    assert "gone.jsonl: a data file must exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["prepare", "numinamath", source, str(tmp_path / "out"), "--test", "-1"])
