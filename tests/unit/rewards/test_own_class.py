"""A reward class of the user's: its deadline, and what it may return."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from engine.core.errors import ConfigError, NumericsError, WatchdogError
from engine.core.types import Score
from engine.rewards.arrivals import Arrivals
from engine.rewards.base import Answer, Reward
from engine.rewards.math.reward import MathReward
from engine.rewards.own_class import OwnReward, require_class, says_per_group, spreads
from engine.rewards.registry import judged_together, open_rewards, pool_identities, pools
from tests.builders import config as run_config
from tests.rollouts import make_prompt
from tests.unit.rewards.test_rewards import wait_until

ANSWERS = [Answer(make_prompt("p", (1,), "1+1", "2", "", ""), text) for text in ("2", "3")]


class Mine(Reward):
    def __init__(self, found: Callable[[Sequence[Answer]], Any]) -> None:
        self.found, self.closed = found, 0
        self.threads: set[int] = set()

    def score(self, answers: Sequence[Answer]) -> Any:
        self.threads.add(threading.get_ident())
        return self.found(answers)

    def close(self) -> None:
        self.closed += 1


def opened(mine: Mine, seconds: float = 20.0) -> OwnReward:
    return OwnReward("mine.py:Mine", mine, seconds)


def test_it_judges_in_one_thread_of_its_own_and_is_closed_once():
    mine = Mine(lambda answers: [Score(float(len(answer.completion)), "ok") for answer in answers])
    reward = opened(mine)
    assert [score.value for _ in range(3) for score in reward.score(ANSWERS)] == [1.0] * 6
    assert len(mine.threads) == 1 and threading.get_ident() not in mine.threads
    reward.close()
    reward.close()
    assert mine.closed == 1


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (lambda answers: [Score(1.0, "ok")], "for each of 2 answers, in order; found 1 values: mend its score"),
        (lambda answers: None, "found None: mend"),
        (lambda answers: [1.0, 2.0], r"found 2 values, one of them 1\.0, which is no Score: mend"),
        (lambda answers: [Score("1", "ok")] * 2, "one of them Score.*, whose value must be finite: mend"),  # type: ignore[arg-type]
        (lambda answers: [Score(1.0, "wrong")] * 2, "whose status must be one of 'ok', .*: mend"),  # type: ignore[arg-type]
        (lambda answers: [Score(1.0, "ok", {"a": 1.0})] * 2, "whose parts must be a tuple of"),  # type: ignore[arg-type]
        (lambda answers: [Score(1.0, "ok", (("a", float("inf")),))] * 2, "whose parts must be a tuple of .name, finite number"),
        (lambda answers: [Score(torch.tensor([1.0, 2.0]), "ok")] * 2, "one of them Score.*, whose value must be finite: mend"),  # type: ignore[arg-type]
        (lambda answers: [Score(10**400, "ok")] * 2, "whose value must be finite: mend"),
        (lambda answers: [Score(10**5000, "ok")] * 2, "one of them <Score instance .*, whose value must be finite: mend"),
        (lambda answers: [Score(1.0, "ok", (("a", torch.ones(2)),))] * 2, "whose parts must be a tuple of"),  # type: ignore[arg-type]
        (lambda answers: [Score(1.0, np.array(["ok", "ok"]))] * 2, "whose status must be one of"),  # type: ignore[arg-type]
        (lambda answers: [Score(1.0, "ok", right="yes")] * 2, "whose right must be True, False or None: mend"),  # type: ignore[arg-type]
        (lambda answers: [Score(1.0, "ok", right=torch.ones(2))] * 2, "whose right must be True, False or None: mend"),  # type: ignore[arg-type]
        (lambda answers: [Score(0.0, "invalid", problem=KeyError("a"))] * 2, "whose problem must be a str: mend"),  # type: ignore[arg-type]
        (lambda answers: [Score(float("nan"), "ok")] * 2, "with a finite value .* one of them Score"),
        (lambda answers: dict[str, int]()["gone"], r"failed with KeyError: 'gone' \(.*test_own_class\.py, line \d+\): mend it"),
    ],
)
def test_what_breaks_its_promise_is_told_by_name(found, said):
    with pytest.raises(NumericsError, match=rf"^data\.reward = 'mine\.py:Mine' .*{said}"):
        opened(Mine(found)).score(ANSWERS)


def test_values_of_other_libraries_become_pythons():
    """Which records and other nodes can hold."""
    parts = ((np.str_("a"), torch.tensor(2.0)),)
    given = Score(np.float32(0.5), np.str_("ok"), parts, np.bool_(True), np.str_("why"))  # type: ignore[arg-type]
    for score in opened(Mine(lambda answers: [given] * 2)).score(ANSWERS):
        (name, number), *_ = score.parts
        kinds = [type(each) for each in (score.value, score.status, score.parts, name, number, score.right, score.problem)]
        assert kinds == [float, str, tuple, str, float, bool, str]
        assert json.dumps([score.value, score.status, score.parts, score.right]) == '[0.5, "ok", [["a", 2.0]], true]'
    none, one = opened(Mine(lambda answers: [Score(1.0, "ok"), Score(1, "ok", right=torch.tensor(False))])).score(ANSWERS)  # type: ignore[arg-type]
    assert none.right is None and one.right is False and type(one.value) is float


def test_one_that_hangs_ends_the_run_and_is_not_closed():
    release = threading.Event()
    mine = Mine(lambda answers: release.wait(20))
    reward = opened(mine, seconds=0.05)
    started = time.monotonic()
    with pytest.raises(WatchdogError, match=r"'mine\.py:Mine' must score 2 answers within rewards\.timeout_seconds = 0\.05"):
        reward.score(ANSWERS)
    assert time.monotonic() - started < 10
    with pytest.raises(WatchdogError, match="found it still at work"):
        reward.score(ANSWERS)
    reward.close()
    assert mine.closed == 0
    release.set()


def test_one_that_leaves_its_thread_is_told():
    def leave(answers):
        raise SystemExit(3)

    with pytest.raises(NumericsError, match=r"must not end its process; found SystemExit\(3\)"):
        opened(Mine(leave)).score(ANSWERS)


def test_one_that_extends_a_reward_of_ours_is_asked_itself(tmp_path):
    """Its own score decides, behind the deadline and the check of what it returns, in this process alone."""
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\n"
        "from engine.rewards.math.reward import MathReward\n"
        "class Doubled(MathReward):\n"
        "    def score(self, answers):\n"
        "        found = [replace(score, value=2 * score.value) for score in super().score(answers)]\n"
        "        return found[:3]\n"
    )
    name = f"{tmp_path}/mine.py:Doubled"
    config = run_config(data={"reward": name}, rewards={"workers": 1})
    own = [replace(answer, prompt=replace(answer.prompt, reward=name)) for answer in ANSWERS]
    assert pools(config) == {} == pool_identities(config) and judged_together(config) == "step"
    with open_rewards(config) as reward:
        assert [score.value for score in reward.score(own)] == [2.0, 0.0]
        with pytest.raises(NumericsError, match=r"mine\.py:Doubled' must return .* each of 4 answers.* found 3 values"):
            reward.score(own * 2)


def in_groups(count: int, size: int = 2) -> list[Answer]:
    return [replace(ANSWERS[0], completion="x" * i, group=i // size, group_size=size) for i in range(count * size)]


def test_one_that_judges_group_by_group_is_asked_for_each_when_it_is_complete():
    """In the order of its places, whatever came first, while others are still sampled."""
    asked: list[list[int]] = []

    def found(answers):
        asked.append([len(answer.completion) for answer in answers])
        return [Score(float(len(answer.completion)), "ok") for answer in answers]

    reward, arriving, items = OwnReward("mine.py:Mine", Mine(found), 20.0, spreads=True), Arrivals[Answer](), in_groups(3)
    assert reward.begins_early and not opened(Mine(found)).begins_early
    with ThreadPoolExecutor(1) as thread:
        scores = thread.submit(reward.score_as_they_arrive, arriving)
        with arriving:
            arriving.put({5: items[5], 0: items[0], 4: items[4]})
            assert wait_until(lambda: asked == [[4, 5]]) and not scores.done()
            arriving.put({place: items[place] for place in (3, 2, 1)})
        assert [score.value for score in scores.result(20)] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert sorted(asked) == [[0, 1], [2, 3], [4, 5]]
    assert reward.score([]) == []
    reward.close()


def test_a_judging_that_is_given_up_ends_before_the_next_and_leaves_it_nothing():
    release, begun = threading.Event(), threading.Event()

    def found(answers):
        begun.set()
        release.wait(20)
        return [Score(float(len(answer.completion)), "ok") for answer in answers]

    reward, arriving = OwnReward("mine.py:Mine", Mine(found), 20.0, spreads=True), Arrivals[Answer]()
    with ThreadPoolExecutor(1) as thread:
        scores = thread.submit(reward.score_as_they_arrive, arriving)
        arriving.put(dict(enumerate(in_groups(1))))
        assert begun.wait(10)
        arriving.abandon()
        with pytest.raises(CancelledError):
            scores.result(20)
        again = thread.submit(reward.score, in_groups(2)[2:])
        release.set()
        assert [score.value for score in again.result(20)] == [2.0, 3.0]
    reward.close()


@pytest.mark.parametrize("spreads", [False, True])
def test_one_of_a_group_that_hangs_is_told_with_its_answers(spreads):
    release = threading.Event()
    reward = OwnReward("mine.py:Mine", Mine(lambda answers: release.wait(20)), 0.05, spreads=spreads)
    with pytest.raises(WatchdogError, match=rf"must score {2 if spreads else 4} answers within .* found it still at work"):
        reward.score(in_groups(2))
    release.set()


def test_per_group_counts_where_the_class_itself_says_it():
    apart = type("Apart", (MathReward,), {"score": lambda self, answers: [], "per_group": True})
    assert MathReward.per_group and not says_per_group(type("Mine", (MathReward,), {}))
    assert says_per_group(apart) and not says_per_group(type("Again", (apart,), {"score": lambda self, answers: []}))
    assert spreads(apart) and not spreads(type("Asks", (apart,), {"per_group": True, "uses_engine": True}))
    with pytest.raises(ConfigError, match=r"'a\.py:Odd' must say per_group = True or False; found 'yes': set it"):
        require_class(type("Odd", (apart,), {"per_group": "yes"}), "a.py:Odd")


def test_a_class_without_score_is_refused_before():
    with pytest.raises(ConfigError, match=r"data\.reward = 'a\.py:Empty' must have a method score\(self, answers\)"):
        require_class(type("Empty", (Reward,), {}), "a.py:Empty")
