"""Accuracy: its standard error against a bootstrap, pass@k against every subset, its figures on an example worked out by
hand, and that two versions are judged on equal luck.
"""

import math
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.commands.common import evaluation_note
from engine.config.load import RunConfig
from engine.core.arrays import TokenIds
from engine.core.types import Score
from engine.evaluation import accuracy
from engine.evaluation.accuracy import evaluate, greedy_samples, length_normalized, mean_pass_at, pass_at_k, standard_error
from engine.evaluation.selection import scores
from engine.inference.pool import Pool
from engine.rewards.base import Reward
from tests import builders
from tests.rollouts import make_prompt
from tests.unit.inference.test_pool import FakeEngine, pool_at

PROMPTS = [make_prompt(f"p{i}", (i,), f"problem {i}", f"{i}", "", "") for i in range(5)]


def run_config(samples: int, max_problems: int | None = None, seed: int = 0) -> RunConfig:
    evaluation = {"samples": samples, "max_problems": max_problems, "temperature": 0.6, "top_p": 0.9}
    return builders.config(run={"steps": 1, "seed": seed}, sampling={"max_tokens": 7}, evaluation=evaluation)


class Judge(Reward):
    """Marks by (problem, sample), in the order that evaluation asks; remembers what it was asked."""

    def __init__(self, marks: list[list[Score]]) -> None:
        self.marks = [mark for row in marks for mark in row]
        self.asked: list[str] = []

    def score(self, answers):
        self.asked = [answer.prompt.id for answer in answers]
        return self.marks

    def close(self) -> None:
        """Nothing to close."""


RIGHT, WRONG, LATE, LONG = Score(1.0, "ok"), Score(0.0, "ok"), Score(0.0, "timeout"), Score(0.0, "too_long")


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_the_standard_error_is_that_of_a_bootstrap_over_problems(spread):
    """Problems of one difficulty and of many; treating the samples as independent would be far too sure of the latter."""
    draw = np.random.default_rng(0)
    difficulty = np.clip(draw.normal(0.5, spread, 400), 0, 1)
    correct = (draw.random((400, 8)) < difficulty[:, None]).astype(float)
    resampled = correct.mean(1)[draw.integers(0, 400, (4000, 400))].mean(1)
    found = standard_error(correct.tolist())
    assert found == pytest.approx(resampled.std(), rel=0.05)
    naive = correct.std() / math.sqrt(correct.size)
    assert found / naive == pytest.approx(1.0, abs=0.1) if spread == 0 else found / naive > 2


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=3), min_size=2, max_size=10), st.integers(2, 4))
def test_more_samples_of_the_same_outcome_prove_nothing_more(correct, times):
    assert standard_error([row * times for row in correct]) == pytest.approx(standard_error(correct), abs=1e-12)


def test_one_problem_has_no_spread_to_measure():
    """Zero would say that it is known for certain."""
    assert math.isnan(standard_error([[1.0, 0.0]]))
    assert math.isnan(standard_error([]))
    result = evaluate(run_config(samples=2, max_problems=1), PROMPTS, pool_at(0, FakeEngine()), Judge([[RIGHT, WRONG]]))
    summary = result.summary() | {"step": 0, "set": "sums"}
    assert (summary["mean"], summary["standard_error"]) == (0.5, None)
    assert "50.0% ± - (sums: 1 problems" in evaluation_note(summary)


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(case):
    n, correct, k = case
    subsets = list(combinations([True] * correct + [False] * (n - correct), k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_pass_at_k_grows_with_k_from_the_mean_to_whether_any_is_right(case):
    n, correct = case
    values = [pass_at_k(n, correct, k) for k in range(1, n + 1)]
    assert values[0] == correct / n
    assert values == sorted(values)
    assert values[-1] == float(correct > 0)


def test_pass_at_k_is_exact_where_a_difference_of_floats_is_not():
    assert pass_at_k(10**6, 1, 1) == 1e-6
    assert pass_at_k(50, 1, 32) == 32 / 50


@given(st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n), min_size=1)))
def test_pass_at_is_reported_for_powers_of_two_and_starts_at_the_accuracy(correct):
    n = len(correct[0])
    found = mean_pass_at(correct)
    assert list(found) == [str(k) for k in (1, 2, 4, 8) if k <= n]
    assert found["1"] == pytest.approx(np.mean(correct), abs=1e-12)


def test_problems_that_do_not_fit_an_engine_count_as_wrong():
    """Of three asked problems with means 1, 1/2 and 0, and one that is too long; a bound on the number may leave it out."""
    marks = [[RIGHT, RIGHT], [RIGHT, LATE], [WRONG, WRONG]]

    def found(**options):
        return evaluate(run_config(samples=2, **options), PROMPTS[:3], pool_at(0, FakeEngine()), Judge(marks), num_too_long=1)

    result = found()
    assert (result.num_problems, result.num_too_long, result.mean) == (4, 1, pytest.approx(1.5 / 4))
    assert result.pass_at == {"1": pytest.approx(1.5 / 4), "2": pytest.approx(2 / 4)}
    assert len(result.records) == 6
    assert result.standard_error == pytest.approx(np.std([1, 0.5, 0, 0], ddof=1) / 2)
    assert result.seed_spread == pytest.approx(abs(2 / 4 - 1 / 4) / 2)
    bounded = found(max_problems=3)
    assert (bounded.num_problems, bounded.mean) == (3, pytest.approx(0.5))


def test_figures_worked_out_by_hand():
    """3 problems, 2 seeds: right/right, right/late, wrong/wrong. Seeds 2/3 and 1/3; problems 1, 1/2, 0."""
    engine = FakeEngine(version=6)
    judge = Judge([[RIGHT, RIGHT], [RIGHT, LATE], [WRONG, WRONG]])
    pool = pool_at(6, engine)
    result = evaluate(run_config(samples=2, max_problems=3), PROMPTS, pool, judge)
    assert judge.asked == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert result.summary() == {
        "version": 6,
        "measure": "accuracy",
        "mean": pytest.approx(0.5),
        "standard_error": pytest.approx(0.5 / math.sqrt(3)),
        "seed_spread": pytest.approx(math.sqrt(2 * (1 / 6) ** 2 / 1 / 2)),
        "length_normalized_reward": None,
        "num_problems": 3,
        "num_too_long": 0,
        "num_seeds": 2,
        "pass_at": {"1": pytest.approx(0.5), "2": pytest.approx(2 / 3)},
        "completion_tokens_mean": 1.0,
        "truncated": 0.0,
        "reward_timeouts": 1,
        "reward_too_long": 0,
        "reward_failures": 0,
    }
    assert [(r["prompt_id"], r["seed_index"], r["reward"], r["status"]) for r in result.records] == [
        ("p0", 0, 1.0, "ok"),
        ("p0", 1, 1.0, "ok"),
        ("p1", 0, 1.0, "ok"),
        ("p1", 1, 0.0, "timeout"),
        ("p2", 0, 0.0, "ok"),
        ("p2", 1, 0.0, "ok"),
    ]
    assert result.records[3] == {
        "prompt_id": "p1",
        "problem": "problem 1",
        "answer": "1",
        "seed_index": 1,
        "seed": int(str(result.records[3]["text"])),  # what this engine says
        "reward": 0.0,
        "status": "timeout",
        "num_tokens": 1,
        "finish_reason": "stop",
        "text": str(result.records[3]["seed"]),
    }
    (asked, _) = next(arguments for method, arguments in engine.calls if method == "submit")
    assert {(r.temperature, r.top_p, r.max_tokens) for r in asked} == {(0.6, 0.9, 7)}


GRADED = [replace(prompt, reward="model", verifiable=False) for prompt in PROMPTS]


def test_a_graded_set_worked_out_by_hand():
    """3 problems, 2 seeds: rewards 2 and -4, then 1 and one that could not be judged, then none that could be. A fake
    completion has one token; the seed model's had 4 on average."""
    late = Score(0.0, "timeout")
    judge = Judge([[Score(2.0, "ok"), Score(-4.0, "ok")], [Score(1.0, "ok"), late], [late, late]])
    result = evaluate(run_config(samples=2, max_problems=3), GRADED, pool_at(6, FakeEngine()), judge, seed_tokens=4.0)
    assert result.measure == "reward"
    assert result.mean == pytest.approx((-1 + 1) / 2)
    assert result.standard_error == pytest.approx(standard_error([[2.0, -4.0], [1.0]])) == pytest.approx(1.0)
    assert result.seed_spread == pytest.approx(math.sqrt(2 * 2.75**2 / 2))  # seeds 1.5 and -4
    assert result.length_normalized_reward == pytest.approx(((2 * 4 - 4 / 4) / 2 + 1 * 4) / 2)
    assert [record["num_tokens"] for record in result.records] == [1] * 6
    judge.marks = judge.marks[:4]
    first = evaluate(run_config(samples=2, max_problems=2), GRADED, pool_at(0, FakeEngine()), judge, seed_tokens=None)
    assert first.length_normalized_reward == first.mean, "answers of the mean length count as they are"
    alone = evaluate(run_config(samples=2, max_problems=2), GRADED, pool_at(0, FakeEngine()), judge)
    assert (alone.mean, alone.summary()["length_normalized_reward"]) == (first.mean, None), "outside a run"


def test_nothing_judged_is_no_figure():
    judge = Judge([[Score(0.0, "died")]])
    result = evaluate(run_config(samples=1, max_problems=1), GRADED, pool_at(0, FakeEngine()), judge)
    assert (result.summary()["mean"], result.summary()["length_normalized_reward"]) == (None, None)
    assert (result.summary()["standard_error"], result.summary()["seed_spread"]) == (None, None)


rewards = st.floats(-100, 100).filter(lambda reward: abs(reward) > 1e-3)
lengths = st.integers(1, 4096)


@given(rewards, lengths, lengths, st.floats(1, 4096))
def test_of_equal_rewards_the_longer_never_counts_more(reward, short, long, seed_tokens):
    """Whatever the sign; the sign itself stays, and so does the order of rewards of one length."""
    short, long = sorted((short, long))
    assert length_normalized(reward, short, seed_tokens) >= length_normalized(reward, long, seed_tokens)
    assert math.copysign(1, length_normalized(reward, long, seed_tokens)) == math.copysign(1, reward)
    assert length_normalized(reward + 1, long, seed_tokens) > length_normalized(reward, long, seed_tokens)
    assert length_normalized(reward, 7, 7.0) == reward


def row(step: int, name: str, measure: str, mean: float | None, normalized: float | None = None) -> dict[str, object]:
    return {"step": step, "set": name, "measure": measure, "mean": mean, "length_normalized_reward": normalized}


def test_the_score_of_a_step_is_the_mean_over_its_sets():
    """As in the paper's mixed runs: accuracy and (length-normalised) reward as they are."""
    rows = [
        *(row(0, "sums", "accuracy", 0.5), row(0, "chats", "reward", -2.0, -2.0)),
        *(row(2, "sums", "accuracy", 0.75), row(2, "chats", "reward", -1.0, -3.0)),
        *(row(4, "sums", "accuracy", 0.75), row(4, "chats", "reward", None, None)),
    ]
    assert scores(rows, "reward") == {0: -0.75, 2: -0.125}, "without a set's figure there is no score"
    assert scores(rows, "length_normalized_reward") == {0: -0.75, 2: -1.125}
    assert scores(rows, None) == {}


@pytest.mark.parametrize("requests_per_ticket", [1, 4, 7])
def test_a_large_evaluation_is_gathered_and_judged_in_parts_of_whole_problems(monkeypatch, requests_per_ticket):
    """What is asked of the engines in one call stays one call."""

    class Echo(Judge):
        def score(self, answers):
            parts.append([answer.prompt.id for answer in answers])
            return [RIGHT if int(answer.completion) % 2 else WRONG for answer in answers]

    def evaluated(size):
        monkeypatch.setattr("engine.evaluation.accuracy.REQUESTS_PER_TICKET", size)
        engine = FakeEngine()
        return evaluate(run_config(samples=3), PROMPTS, Pool([engine], 5.0), Echo([])), engine.methods

    parts: list[list[str]] = []
    whole, _ = evaluated(1000)
    assert [len(part) for part in parts] == [15]
    parts.clear()
    result, methods = evaluated(requests_per_ticket)
    assert result == whole
    assert methods.count("submit") == 1
    assert all(len(part) % 3 == 0 and len(part) <= max(3, requests_per_ticket) for part in parts)


def test_one_seed_has_no_spread_over_seeds():
    result = evaluate(run_config(samples=1), PROMPTS, Pool([FakeEngine()], 5.0), Judge([[RIGHT]] * 5))
    assert (result.mean, result.summary()["seed_spread"], result.num_problems) == (1.0, None, 5)


def test_seeds_depend_on_the_run_but_not_on_the_version_nor_on_the_other_problems():
    def seeds(version: int, run_seed: int = 0, max_problems: int | None = None) -> list[int]:
        pool = pool_at(version, FakeEngine(), FakeEngine())
        config = run_config(3, max_problems, run_seed)
        judge = Judge([[RIGHT] * 3] * (max_problems or 5))
        return [int(str(record["text"])) for record in evaluate(config, PROMPTS, pool, judge).records]

    first = seeds(0)
    assert len(set(first)) == 15
    assert seeds(8) == first
    assert seeds(0, max_problems=2) == first[:6]
    assert not set(seeds(0, run_seed=1)) & set(first)


def test_greedy_samples_tell_what_was_asked_and_said():
    engine = FakeEngine()
    prompt = replace(PROMPTS[3], token_ids=TokenIds.of([4, 5]))
    (sample,) = greedy_samples(run_config(samples=2), [prompt], Pool([engine], 5.0))
    (asked,) = engine.calls[0][1][0]
    assert (asked.temperature, asked.top_p, asked.max_tokens) == (0.0, 1.0, 7)
    assert sample == {
        "version": 0,
        "problem": "problem 3",
        "answer": "3",
        "text": str(asked.seed),
        "prompt_ids": [4, 5],
        "token_ids": [asked.seed % 2**31],
    }


@pytest.mark.parametrize(("problems", "n", "engines"), [(1, 1, 1), (20, 2, 1), (500, 3, 2), (300, 16, 3), (700, 7, 4)])
def test_parts_change_neither_the_engine_of_a_request_nor_its_place(monkeypatch, problems, n, engines):
    """So that an evaluation that tells how far it has come gives the bits of one that does not."""
    monkeypatch.setattr(accuracy, "REQUESTS_PER_TICKET", 1000)

    def dealt(tickets: list[Any]) -> list[list[int]]:
        return [[request for ticket in tickets for request in ticket[engine::engines]] for engine in range(engines)]

    requests: Any = list(range(problems * n))
    whole = accuracy.tickets(requests, n, engines, in_parts=False)
    parts = accuracy.tickets(requests, n, engines, in_parts=True)
    assert [request for part in parts for request in part] == requests
    assert dealt(parts) == dealt(whole)
    assert all(len(part) % n == 0 for part in parts)
    assert len(whole) <= len(parts) <= accuracy.PARTS + 2 * len(whole)
