"""Answers that are judged while others are still sampled: that judging begins, that no score depends on when and in which order
answers arrive, and what becomes of a reward whose answers stop coming.
"""

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.config.options import Rewards
from engine.core.errors import WatchdogError
from engine.core.types import Score
from engine.rewards.arrivals import Arrivals
from engine.rewards.base import Answer, Reward
from engine.rewards.function import FunctionReward
from engine.rewards.registry import Recipe, RoutedReward
from tests.rollouts import make_prompt
from tests.unit.rewards.test_rewards import processes, wait_until

JUDGE = '''
import os, time
from pathlib import Path

def mark(problem, completion):
    """Leaves a file for each call; `problem` is the folder."""
    if completion == "die":
        os._exit(3)
    if completion == "raise":
        raise KeyError(completion)
    if completion == "late":
        time.sleep(60)
    number = len(list(Path(problem).glob(completion + "-*")))
    Path(problem, f"{completion}-{number}").touch()
    return float(len(completion))
'''


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FunctionReward]:
    file = tmp_path_factory.mktemp("own") / "judge.py"
    file.write_text(JUDGE)
    with FunctionReward(Rewards(workers=2, deadline_seconds=0.5), f"{file}:mark", "data.reward") as made:
        yield made


def asked(folder: Path, texts: Sequence[str], reward: str = "mark") -> dict[int, Answer]:
    prompt = make_prompt("p", (1,), str(folder), "", "", "", reward=reward)
    return {place: Answer(prompt, text) for place, text in enumerate(texts)}


def judged(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_judging_begins_while_answers_still_arrive(reward, tmp_path):
    """And equal answers are judged once, whether they arrive together or not."""
    answers = asked(tmp_path, ["a", "bb", "a", "ccc", "bb"])
    arriving = Arrivals[Answer]()
    with ThreadPoolExecutor(1) as thread:
        scores = thread.submit(reward.score_as_they_arrive, arriving)
        with arriving:
            arriving.put({place: answers[place] for place in (4, 2)})
            assert wait_until(lambda: judged(tmp_path) == {"a-0", "bb-0"}), "nothing but these two has arrived"
            assert not scores.done()
            arriving.put({place: answers[place] for place in (3, 0, 1)})
        assert [score.value for score in scores.result(20)] == [1.0, 2.0, 1.0, 3.0, 2.0]
    assert judged(tmp_path) == {"a-0", "bb-0", "ccc-0"}


@pytest.mark.parametrize("seed", range(4))
def test_scores_depend_neither_on_the_order_of_arrival_nor_on_what_arrives_together(reward, tmp_path, seed):
    texts = ["a", "raise", "bb", "die", "a", "late", "ccc", "raise", "dddd", "bb"]
    answers, draw = asked(tmp_path, texts), random.Random(seed)
    places = draw.sample(range(len(texts)), len(texts))
    arriving = Arrivals[Answer]()
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(reward.score_as_they_arrive, arriving)
        with arriving:
            while places:
                together = draw.randint(1, 4)
                arriving.put({place: answers[place] for place in places[:together]})
                places = places[together:]
                time.sleep(draw.random() / 20)
        scores = found.result(30)
    ways = {"raise": "invalid", "die": "died", "late": "timeout"}
    assert [(score.value, score.status) for score in scores] == [
        (0.0, ways[text]) if text in ways else (float(len(text)), "ok") for text in texts
    ]


def test_a_worker_that_dies_while_nothing_is_to_judge_costs_no_answer_a_try(reward, tmp_path):
    answers = asked(tmp_path, ["a", "bb"])
    arriving = Arrivals[Answer]()
    with ThreadPoolExecutor(1) as thread:
        scores = thread.submit(reward.score_as_they_arrive, arriving)
        with arriving:
            arriving.put({0: answers[0]})
            assert wait_until(lambda: "a-0" in judged(tmp_path))
            before = {process.pid for process in processes()}
            for process in processes():
                process.kill()
            assert wait_until(lambda: not before & {process.pid for process in processes()})
            arriving.put({1: answers[1]})
        assert [(score.value, score.status) for score in scores.result(60)] == [(1.0, "ok"), (2.0, "ok")]


def test_a_reward_whose_answers_stop_coming_says_so_and_judges_on(reward, tmp_path):
    arriving = Arrivals[Answer]()
    with ThreadPoolExecutor(1) as thread:
        scores = thread.submit(reward.score_as_they_arrive, arriving)
        arriving.put(asked(tmp_path, ["late"]))
        arriving.abandon()
        with pytest.raises(CancelledError):
            scores.result(20)
    arriving.put(asked(tmp_path, ["a"]))  # who gathers may not know it yet
    assert [score.value for score in reward.score(list(asked(tmp_path, ["a"]).values()))] == [1.0]


def test_what_is_judged_may_be_unwanted_after_all_is_there():
    arriving = Arrivals.of(["a", "b"])
    arriving.abandon()
    with pytest.raises(CancelledError):
        arriving.take()


def test_a_group_is_judged_when_it_is_complete(tmp_path):
    """Whatever arrives with it, and in whatever order: a function that asks for the group gets its texts by their places."""
    file = tmp_path / "judge.py"
    file.write_text(
        "from pathlib import Path\n"
        "def rank(problem, group):\n"
        "    Path(problem, '-'.join(group)).touch()\n"
        "    return [group.index(text) + len(group) / 10 for text in group]\n"
    )
    folder = tmp_path / "judged"
    folder.mkdir()
    prompts = [make_prompt(f"p{i}", (1,), str(folder), "", "", "", reward="rank") for i in range(3)]
    sizes = (2, 2, None)  # nobody counted the last one: it is complete at the end
    answers = {i: Answer(prompts[i // 2], text, group=i // 2, group_size=sizes[i // 2]) for i, text in enumerate("abcdef")}
    arriving = Arrivals[Answer]()
    with FunctionReward(Rewards(workers=1), f"{file}:rank", "data.reward") as made, ThreadPoolExecutor(1) as thread:
        scores = thread.submit(made.score_as_they_arrive, arriving)
        with arriving:
            arriving.put({place: answers[place] for place in (5, 3, 4, 1)})
            arriving.put({2: answers[2]})
            assert wait_until(lambda: judged(folder) == {"c-d"})
            arriving.put({0: answers[0]})
            assert wait_until(lambda: judged(folder) == {"c-d", "a-b"})
        assert [score.value for score in scores.result(20)] == [0.2, 1.2] * 3
    assert judged(folder) == {"c-d", "a-b", "e-f"}


class Whole(Reward):
    """Judges a step together: an answer's value is its place."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        self.calls.append([answer.completion for answer in answers])
        return [Score(float(place), "ok") for place in range(len(answers))]


class Single(Whole):
    """Judges one by one: an answer's value is its length."""

    begins_early = True

    def score_as_they_arrive(self, answers: Arrivals[Answer]) -> list[Score]:
        found: dict[int, Score] = {}
        while (new := answers.take()) is not None:
            self.calls.append([answer.completion for answer in new.values()])
            found |= {place: Score(float(len(answer.completion)), "ok") for place, answer in new.items()}
        return [found[place] for place in sorted(found)]


def test_what_judges_a_step_together_gets_it_whole_and_in_its_order_beside_what_judges_one_by_one(tmp_path):
    whole, single = Whole(), Single()
    recipe = Recipe(("single", "whole"), (1.0, 100.0), "sum", verifiable=False)
    routed = RoutedReward({"single": single, "whole": whole}, {"both": recipe})
    answers = asked(tmp_path, ["a", "bb", "ccc"], "both") | {3: asked(tmp_path, ["dddd"], "single")[0]}
    arriving = Arrivals[Answer]()
    with ThreadPoolExecutor(1) as thread:
        scores = thread.submit(routed.score_as_they_arrive, arriving)
        with arriving:
            arriving.put({2: answers[2]})
            assert wait_until(lambda: single.calls == [["ccc"]]) and not whole.calls
            arriving.put({3: answers[3]})
            assert wait_until(lambda: len(single.calls) == 2) and not whole.calls
            arriving.put({0: answers[0], 1: answers[1]})
        assert [score.value for score in scores.result(20)] == [1.0, 102.0, 203.0, 4.0]
    assert (whole.calls, single.calls[1:]) == ([["a", "bb", "ccc"]], [["dddd"], ["a", "bb"]])


class Lost(Single):
    """One whose processes do not start, whatever it is asked."""

    def score_as_they_arrive(self, answers: Arrivals[Answer]) -> list[Score]:
        raise WatchdogError("its workers do not start")


def test_what_a_reward_meets_while_others_judge_is_heard_of(tmp_path):
    """Also in a step that has no answer for it: later it would be asked again, as if nothing were wrong."""
    routed = RoutedReward({"single": Single(), "lost": Lost()})
    with pytest.raises(WatchdogError, match="its workers do not start"):
        routed.score(list(asked(tmp_path, ["a", "bb"], "single").values()))
    single = RoutedReward({"single": Single()})
    assert [score.value for score in single.score(list(asked(tmp_path, ["a", "bb"], "single").values()))] == [1.0, 2.0]
