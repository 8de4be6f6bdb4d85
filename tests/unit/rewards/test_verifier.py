"""The verifier's contract: every case of engine/rewards/math/cases.jsonl through real workers, what plain Math-Verify says of
the same cases, the gold answers of MATH-500 put in as answers, hostile answers by the hundred (by the ten thousand at night),
and properties of the text checks. That every gold answer equals itself is test_reflexive.py's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from math_verify import parse, verify

import engine.rewards.math
from engine.config.options import Rewards
from engine.core.boxed import boxes
from engine.core.types import Prompt, Score
from engine.rewards.base import Answer
from engine.rewards.math.answers import after_reasoning, asks_for_value, boxed_answer
from engine.rewards.math.compare import is_value
from engine.rewards.math.normal import normal, plain
from engine.rewards.math.reward import MAX_CHARACTERS, VERIFIER_VERSION, MathReward
from engine.rewards.math.worker import judge
from tests.rollouts import make_prompt
from tests.shared_data import SHARED_DATA, needs_shared_data
from tests.unit.rewards.hostile import hostile_answers

CASES: list[dict[str, Any]] = [
    json.loads(line)
    for line in Path(str(engine.rewards.math.__file__)).with_name("cases.jsonl").read_text("utf-8").splitlines()
]
VERSIONS = [str(version) for version in range(1, int(VERIFIER_VERSION) + 1)]
KINDS = {"must_be_1": {1}, "must_be_0": {0}, "choice": {1}, "known": {0, 1}}
RIGHT = Score(1.0, "ok")


def prompt(answer: str, problem: str = "") -> Prompt:
    return make_prompt("id", (1,), problem, answer, "", "")


@pytest.fixture(scope="module")
def accepting() -> Iterator[MathReward]:
    with MathReward(Rewards(deadline_seconds=30.0)) as reward:  # a verdict must not depend on a busy machine
        yield reward


@pytest.fixture(scope="module")
def refusing() -> Iterator[MathReward]:
    with MathReward(Rewards(deadline_seconds=30.0, unevaluated="refuse")) as reward:
        yield reward


def test_the_table_is_whole() -> None:
    assert len({case["id"] for case in CASES}) == len(CASES)
    for case in CASES:
        assert case["expected"] in KINDS[case["kind"]], case
        assert (case["kind"] == "choice") == ("expected_when_refusing" in case), case
        assert case["why"] and case["since"] in VERSIONS, case
    assert {case["kind"] for case in CASES} == set(KINDS)


def test_every_case_has_its_score(accepting: MathReward) -> None:
    scores = accepting.score([Answer(prompt(case["answer"], case.get("problem", "")), case["completion"]) for case in CASES])
    expected = [Score(float(case["expected"]), case.get("status", "ok")) for case in CASES]
    assert [case["id"] for case, *pair in zip(CASES, scores, expected, strict=True) if pair[0] != pair[1]] == []


def test_every_case_has_its_score_when_expressions_are_refused(refusing: MathReward) -> None:
    scores = refusing.score([Answer(prompt(case["answer"], case.get("problem", "")), case["completion"]) for case in CASES])
    values = [case.get("expected_when_refusing", case["expected"]) for case in CASES]
    assert [case["id"] for case, score, value in zip(CASES, scores, values, strict=True) if score.value != value] == []


def test_since_says_what_plain_math_verify_makes_of_a_case() -> None:
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    for case in CASES:
        gold, text = case["answer"], case["completion"][-MAX_CHARACTERS:]
        delimited = "\\boxed" in gold or "$" in gold.replace("\\$", "") or "\\(" in gold
        golds = parse(gold if delimited else rf"\boxed{{{gold}}}", parsing_timeout=None)
        value = float(verify(golds, parse(text, parsing_timeout=None), timeout_seconds=None))
        assert (value == case["expected"]) == (case["since"] == "1"), case


@needs_shared_data("math500.jsonl")
@pytest.mark.parametrize("kind", ["accepting", "refusing"])
def test_gold_answers_of_math_500_are_right_answers(kind: str, request: pytest.FixtureRequest) -> None:
    reward: MathReward = request.getfixturevalue(kind)
    rows = [json.loads(line) for line in (SHARED_DATA / "math500.jsonl").read_text("utf-8").splitlines()]
    says = "The final answer is $\\boxed{%s}$."
    items = [Answer(prompt(row["answer"], row["problem"]), says % row["answer"]) for row in rows]
    missed = [item.prompt.answer for item, score in zip(items, reward.score(items), strict=True) if score != RIGHT]
    assert len(rows) == 500 and not missed, missed


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=[pytest.mark.nightly, pytest.mark.timeout(3600)])])
def test_hostile_answers_neither_pass_nor_hang_nor_lose_a_worker(count: int) -> None:
    """At a fraction of the real deadline, so that hundreds can be killed; test_rewards.py has the real one."""
    items = [Answer(prompt(gold), text) for gold, text in hostile_answers(count, seed=count)]
    with MathReward(Rewards(deadline_seconds=0.01, memory_mebibytes=1024)) as reward:
        before = list(reward._workers)
        scores = reward.score(items)
        assert reward._workers == before
    assert {score.value for score in scores} == {0.0}
    assert {score.status for score in scores} <= {"ok", "timeout", "died"}
    assert sum(score.status == "timeout" for score in scores) > count / 20, "they must be hostile"


@settings(max_examples=200)
@given(st.text(alphabet="\\boxed{}fb 1,$</think>", max_size=80))
def test_boxes_are_what_counting_braces_finds(text: str) -> None:
    for box in boxes(text):
        assert text[box.start] == "\\" and text[box.inside - 1] == "{"
        depth, place = 1, box.inside
        while place < len(text) and depth:
            if text[place] == "\\":
                place += 1
            elif text[place] in "{}":
                depth += 1 if text[place] == "{" else -1
            place += 1
        assert (box.end is None) == (depth > 0)
        assert box.end is None or box.end == place - 1
    assert (boxed_answer(text) is None) == (not boxes(text))


@settings(max_examples=100)
@given(st.text(max_size=60), st.text(alphabet="0123456789x+{}", max_size=20))
def test_reasoning_before_an_answer_never_matters(thought: str, answer: str) -> None:
    assert after_reasoning(f"<think>{thought}</think>{answer}") == answer
    assert after_reasoning(f"{thought}</THINK>{answer}") == answer
    assert after_reasoning(f"{thought}<think>{answer}") == ""
    assert after_reasoning(answer) == answer


@settings(max_examples=60, deadline=None)
@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_ratios_are_equal_exactly_when_they_are(gold: Fraction, answer: Fraction) -> None:
    def latex(ratio: Fraction) -> str:
        return rf"\frac{{{ratio.numerator}}}{{{ratio.denominator}}}"

    assert judge(latex(gold), rf"\boxed{{{latex(answer)}}}", False) == (float(gold == answer), "ok")
    assert judge(latex(gold), rf"\boxed{{{latex(gold)}}}", True) == (1.0, "ok")


@settings(max_examples=60, deadline=None)
@given(st.integers(-(10**30), 10**30), st.sampled_from([-1, 1, 10**6]))
def test_whole_numbers_are_equal_exactly_when_they_are(number: int, off: int) -> None:
    assert judge(str(number), rf"\boxed{{{number}}}", True) == (1.0, "ok")
    assert judge(str(number), rf"\boxed{{{number + off}}}", False) == (0.0, "ok")


@settings(max_examples=200)
@given(st.text(max_size=60))
def test_plain_text_keeps_what_is_ascii_and_is_plain_at_once(text: str) -> None:
    assert plain(plain(text)) == plain(text)
    ascii_text = text.encode("ascii", "ignore").decode()
    assert plain(ascii_text) == ascii_text


@pytest.mark.parametrize(
    ("problem", "asks"),
    [
        ("Compute $17 \\cdot 23$.", True),
        ("", True),
        ("The number can be written in the form $\\frac{m}{n}$. Find $m+n$.", True),
        ("When 360 is written as a product of primes, how many factors are there?", True),
        ("Give your answer as a common fraction.", True),
        ("Express 360 as a product of primes.", False),
        ("Write $\\frac{1}{1024}$ as a power of 2.", False),
        ("What is the prime factorization of 360?", False),
        ("How many are there? You need not evaluate the factorial.", False),
    ],
)
def test_whether_a_problem_asks_for_a_value(problem: str, asks: bool) -> None:
    assert asks_for_value(problem) is asks


@pytest.mark.parametrize(
    "text",
    ["1", "-1.5", "1,234,567", ".5", "1/2", r"-\frac{1}{2}", r"3\frac{1}{2}", "3 1/2", r"0.\overline{3}", r"6\times 10^{23}"],
)
def test_numbers_are_values(text: str) -> None:
    assert is_value(normal(text), gold="0.5") and is_value(normal(rf"x = {text} \text{{ cm}}"), gold="0.5")
    assert not is_value(normal(f"1+{text}"), gold="0.5") and not is_value(normal(rf"\sqrt{{{text}}}"), gold="0.5")


@pytest.mark.parametrize(
    ("gold", "answer", "value"),
    [
        ("57", r"57\text{ cm}^2", 1.0),
        ("12_8", r"12_{\text{base 8}}", 1.0),
        ("57", r"57\text{ or 3}", 0.0),
        ("57", r"57 \mbox{ (not 3)}$.", 0.0),
        (r"57\text{ or 3}", "57", 0.0),
        ("52_8", "52_{9}", 0.0),
        ("52_8", "52_{8}", 1.0),
        ("52_8", "52", 1.0),
    ],
)
def test_words_and_bases_behind_a_number(gold: str, answer: str, value: float) -> None:
    assert judge(gold, rf"\boxed{{{answer}}}", False) == (value, "ok")
