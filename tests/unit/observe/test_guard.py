"""The guard: what collapses is told once and again after it has recovered, ordinary noise never, and a run that resumes at
any step finds what the uninterrupted one finds.
"""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import options
from engine.core.jsonl import read_rows
from engine.observe.guard import WINDOW, Finding, Guard
from engine.observe.writing import MetricsWriter

Row = dict[str, Any]


def row(step: int, entropy: float = 1.0, length: float = 100.0, reward: float = 0.5) -> Row:
    return {"step": step, "rollout_entropy": entropy, "completion_tokens_mean": length, "reward_mean": reward}


def found(rows: list[Row], **changes: Any) -> list[Finding]:
    guard = Guard(options.Guard(**changes))
    return [finding for r in rows for finding in guard.observe(r)]


def places(rows: list[Row], **changes: Any) -> list[tuple[int, str]]:
    return [(finding.step, finding.what) for finding in found(rows, **changes)]


def test_what_a_run_has_no_metric_for_is_not_missed():
    """Replayed pairs have neither rewards nor entropy; a reward that is null was no number."""
    pairs = [{"step": step, "completion_tokens_mean": 9.0} for step in range(20)]
    assert found(pairs) == []
    assert places([r | {"reward_mean": None} for r in pairs]) == [(5, "reward")]


def test_a_collapse_of_entropy_is_told_once_with_what_it_went_from_and_to():
    """Entropy 2.0 for 8 steps, then 0.1: the fifth step at 0.1 is the first whose last five have a mean below 0.1 * 2.0."""
    rows = [row(step, entropy=2.0 if step < 8 else 0.1) for step in range(40)]
    (finding,) = found(rows)
    assert (finding.step, finding.what) == (12, "entropy")
    assert "rollout_entropy went from 2 (the run's first 5 steps) to 0.1 (the last 5)" in finding.text
    assert "guard.entropy_share = 0.1" in finding.text
    assert places(rows, entropy_share=0.5) == [(10, "entropy")], "(2 * 2 + 3 * 0.1) / 5 is the first below 0.5 * 2"
    assert places(rows, entropy_share=0.05) == []


def test_a_collapse_of_length_has_a_share_of_its_own():
    rows = [row(step, length=100.0 if step < 10 else 25.0) for step in range(30)]
    (finding,) = found(rows)
    assert (finding.step, finding.what) == (14, "length")
    assert "guard.length_share = 0.3" in finding.text
    assert places(rows, length_share=0.25) == [], "not below it"


def test_it_is_told_again_only_after_a_recovery():
    """Just above the bound (0.1) is no recovery; well above it is."""
    entropies = [1.0] * 5 + [0.05] * 10 + [0.12] * 10 + [0.05] * 10 + [0.5] * 10 + [0.05] * 10
    assert places([row(step, entropy=e) for step, e in enumerate(entropies)]) == [(9, "entropy"), (49, "entropy")]


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf, None])
def test_rewards_that_are_no_numbers(reward):
    rows = [row(step) | {"reward_mean": reward if 6 <= step < 12 else 0.5} for step in range(30)]
    (finding,) = found(rows)
    assert (finding.step, finding.what) == (10, "reward"), "five steps in a row, so that a step without a verdict is none"
    assert "no finite number" in finding.text
    assert places([row(step) | {"reward_mean": None} for step in range(10)]) == [(5, "reward")], "from the start on too"


@pytest.mark.parametrize(
    ("first", "last", "told_at"),
    [(0.5, 99.0, []), (0.5, 501.0, [10]), (0.5, -501.0, [11]), (20.0, 1999.0, []), (20.0, 2001.0, [14])],
)
def test_rewards_that_explode_to_either_side(first, last, told_at):
    """Beyond 100 times the largest of the first five steps, which counts as 1 at least."""
    rows = [row(step, reward=first if step < 10 else last) for step in range(20)]
    assert places(rows) == [(step, "reward") for step in told_at]


@given(st.lists(st.tuples(st.floats(0.5, 2), st.floats(50, 200), st.floats(-3, 3)), max_size=40))
def test_ordinary_noise_is_no_finding(values):
    assert places([row(step, *value) for step, value in enumerate(values)]) == []


@given(st.integers(0, 30), st.lists(st.sampled_from([0.05, 0.12, 1.0, math.nan]), min_size=30, max_size=30))
def test_a_resumed_guard_goes_on_as_if_nothing_had_happened(tmp_path_factory, resumed_at, entropies):
    """What it is fed then is what metrics.jsonl holds, where NaN is null."""
    rows = [row(step, entropy=e) for step, e in enumerate(entropies)]
    whole = [finding for finding in found(rows) if finding.step >= resumed_at]
    folder = tmp_path_factory.mktemp("run")
    with MetricsWriter(folder) as writer:
        for r in rows[:resumed_at]:
            writer.write(r)
    guard = Guard(options.Guard())
    for r in read_rows(folder / "metrics.jsonl"):
        guard.observe(r)
    assert [finding for r in rows[resumed_at:] for finding in guard.observe(r)] == whole


def test_a_run_shorter_than_the_window_is_not_judged():
    assert places([row(step, entropy=1.0 if step == 0 else 0.0) for step in range(WINDOW)]) == []


def shares(step: int, truncated: float = 0.0, unjudged: float = 0.0, skipped: float = 0.0) -> Row:
    return row(step) | {"truncated": truncated, "unjudged_share": unjudged, "skipped_share": skipped}


@pytest.mark.parametrize(("what", "option"), [("truncated", "truncated_share"), ("unjudged", "unjudged_share")])
def test_a_share_of_useless_rollouts_is_told_once_until_it_has_recovered(what, option):
    """Over five steps, the first of a run among them."""
    values = [0.5] * 6 + [0.39] * 10 + [0.6] * 6 + [0.1] * 5 + [0.5] * 5
    rows = [shares(step, **{what: value}) for step, value in enumerate(values)]
    assert places(rows, **{option: 0.4}) == [(4, what), (30, what)], "0.39 is under the limit, and no recovery"
    assert places(rows, **{option: 0.7}) == []
    assert f"guard.{option} = 0.4" in found(rows, **{option: 0.4})[0].text


def test_steps_without_a_signal_are_told():
    rows = [shares(step, skipped=1.0 if step < 7 or step > 12 else 0.9) for step in range(20)]
    assert places(rows) == [(4, "signal"), (17, "signal")]


def test_a_run_that_judges_nothing_is_hopeless_from_the_first_step_and_later_after_three():
    assert [(f.step, f.what, f.fatal) for f in found([shares(0, unjudged=1.0)])] == [(0, "unjudged", True)]
    outage = [shares(step, unjudged=1.0 if step in (3, 4, 8, 9, 10) else 0.0) for step in range(12)]
    assert [(f.step, f.fatal) for f in found(outage, unjudged_share=1.0)] == [(10, True)]
    assert "of 3 steps in a row" in found(outage, unjudged_share=1.0)[0].text


@pytest.mark.parametrize("resumed_at", range(0, 14))
def test_what_is_counted_over_steps_is_kept_by_a_checkpoint(resumed_at):
    rows = [shares(step, truncated=0.7, unjudged=1.0 if 4 < step < 9 else 0.0, skipped=1.0) for step in range(14)]
    whole = [finding for finding in found(rows) if finding.step >= resumed_at]
    before, after = Guard(options.Guard()), Guard(options.Guard())
    for r in rows[:resumed_at]:
        before.observe(r)
    after.restore(json.loads(json.dumps(before.state())))
    assert [finding for r in rows[resumed_at:] for finding in after.observe(r)] == whole
    other = Guard(options.Guard(truncated_share=0.9))
    other.restore(before.state())
    told = set(before.state()["told"]) - {"truncated"}
    assert set(other.state()["told"]) == told, "what another limit told is not what this one would have"
