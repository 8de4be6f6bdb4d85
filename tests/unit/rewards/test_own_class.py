"""A reward class of the user's: its deadline, and what it may return."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from engine.core.errors import ConfigError, NumericsError, WatchdogError
from engine.core.types import Score
from engine.rewards.base import Answer, Reward
from engine.rewards.own_class import OwnReward, require_class
from engine.rewards.registry import judged_together, open_rewards, pool_identities, pools
from tests.builders import config as run_config
from tests.rollouts import make_prompt

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
        (lambda answers: [1.0, 2.0], r"found 2 values, one of them 1\.0: mend"),
        (lambda answers: [Score(float("nan"), "ok")] * 2, "with a finite value .* one of them Score"),
        (lambda answers: dict[str, int]()["gone"], r"failed with KeyError: 'gone' \(.*test_own_class\.py, line \d+\): mend it"),
    ],
)
def test_what_breaks_its_promise_is_told_by_name(found, said):
    with pytest.raises(NumericsError, match=rf"^data\.reward = 'mine\.py:Mine' .*{said}"):
        opened(Mine(found)).score(ANSWERS)


def test_one_that_hangs_ends_the_run_and_is_not_closed():
    release = threading.Event()
    mine = Mine(lambda answers: release.wait(20))
    reward = opened(mine, seconds=0.05)
    started = time.monotonic()
    with pytest.raises(WatchdogError, match=r"'mine\.py:Mine' must score 2 answers within rewards\.timeout_seconds = 0\.05"):
        reward.score(ANSWERS)
    assert time.monotonic() - started < 10
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


def test_a_class_without_score_is_refused_before():
    with pytest.raises(ConfigError, match=r"data\.reward = 'a\.py:Empty' must have a method score\(self, answers\)"):
        require_class(type("Empty", (Reward,), {}), "a.py:Empty")
