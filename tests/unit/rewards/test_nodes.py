"""Judging processes on several nodes: that no score depends on who judges, what becomes of a node that is lost, silent or
unlike the others, and that a deadline is the same everywhere. The nodes' pools are real, in threads of this process in place of
Ray's; tests/e2e/test_judges_of_nodes.py has them in processes of Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from typing import Any

import pytest

from engine.config.load import RunConfig
from engine.core.errors import ConfigError, EngineLostError, NumericsError, SemionError, WatchdogError
from engine.core.types import Score
from engine.rewards.arrivals import Arrivals
from engine.rewards.base import Answer
from engine.rewards.pool import nodes
from engine.rewards.registry import (
    Judges,
    RoutedReward,
    fitted_to,
    identities,
    judged_together,
    open_rewards,
    pool_identities,
    pools,
)
from engine.rewards.serving import NodeJudges
from tests.builders import config as run_config
from tests.rollouts import make_prompt
from tests.unit.rewards.test_rewards import processes, wait_until

JUDGE = '''
import os, time
from pathlib import Path
from threading import current_thread
from engine.core.types import Score
from engine.rewards.base import Reward, reward
from engine.rewards.math.reward import MathReward

def mark(problem, completion):
    """Leaves the number of the process that judges; `problem` is the folder."""
    Path(problem, f"{completion}-{os.getppid()}").touch()
    if completion.startswith("held"):
        while not Path(problem, "free").exists():
            time.sleep(0.005)
    if completion.startswith("hang"):
        time.sleep(60)
    if completion.startswith("raise"):
        raise KeyError(completion)
    return {"length": float(len(completion))}

def rank(problem, group):
    return [float(group.index(text)) for text in group]

class Mine(Reward):
    """Says which node judged which group: each opens one of its own."""
    per_group = True
    opened = []

    def __init__(self):
        self.number = len(self.opened)
        self.opened.append(self)

    @classmethod
    def open(cls, config, name, engines):
        assert not engines
        return cls()

    def score(self, answers):
        folder, texts = answers[0].prompt.problem, [answer.completion for answer in answers]
        Path(folder, f"{texts[0]}-{self.number}").touch()
        while texts[0].startswith("held") and not Path(folder, "free").exists():
            time.sleep(0.005)
        if texts[0].startswith("raise"):
            raise KeyError(texts[0])
        return [Score(float(len(text)), "ok", (("place", float(place)),)) for place, text in enumerate(texts)]

    def close(self):
        if folder := os.environ.get("CLOSED"):
            Path(folder, f"closed-{self.number}").touch()
            if Path(folder, "fail").exists():
                raise KeyError("closing")
            while Path(folder, "hold").exists() and current_thread().name.startswith("node"):
                time.sleep(0.005)

class Alone(Mine):
    """What Mine says of itself says nothing of what extends it."""

class Ours(MathReward):
    per_group = True
'''


class Call:
    """A call under way in a thread, until that is done or the node dies."""

    def __init__(self) -> None:
        self.outcome: Future[Any] = Future()
        self._lock = Lock()

    def result(self, timeout_seconds: float) -> Any:
        return self.outcome.result(timeout_seconds)

    def on_done(self, told: Callable[[], object]) -> None:
        self.outcome.add_done_callback(lambda _: told())

    def end(self, value: Any, error: BaseException | None) -> None:
        with self._lock:
            if self.outcome.done():
                return
            if error is None:
                self.outcome.set_result(value)
            else:
                self.outcome.set_exception(error)


class Node:
    """A node's process, in threads."""

    def __init__(self, name: str, config: RunConfig) -> None:
        self.name, self.judges = name, NodeJudges(config, 0)
        self.is_dead = self.is_silent = False
        self.num_given = 0
        self._threads = ThreadPoolExecutor(8, "node")
        self._calls: list[Call] = []

    def call(self, method: str, *arguments: Any) -> Call:
        self._calls.append(call := Call())
        if method == "give":
            self.num_given += len(arguments[-1])
        if self.is_dead:
            self.stop()
        elif not (self.is_silent and method == "take"):
            self._threads.submit(self._run, call, method, arguments)
        return call

    def stop(self) -> None:
        self.is_dead = True
        for call in self._calls:
            call.end(None, EngineLostError(f"the process of {self.name} ended: killed"))

    def close(self) -> None:
        self.judges.close()
        self._threads.shutdown()

    def _run(self, call: Call, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            call.end(getattr(self.judges, method)(*arguments), None)
        except SemionError as error:
            call.end(None, error)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("own") / "judge.py"
    file.write_text(JUDGE)
    return file


@contextmanager
def opened(reward: str, num_nodes: int = 2, **rewards: Any) -> Iterator[tuple[RoutedReward, list[Node]]]:
    """A reward with one worker here and one on each other node."""
    config = run_config(data={"reward": reward}, rewards={"workers": 1} | rewards)
    found = [Node(f"judges of node {number + 1}", config) for number in range(num_nodes)]
    try:
        with open_rewards(config, Judges(nodes=found)) as routed:
            yield routed, found
    finally:
        for node in found:
            node.close()


def asked(folder: Path, texts: list[str], reward: str, group_size: int = 1) -> list[Answer]:
    folder.mkdir(exist_ok=True)
    return [
        Answer(make_prompt(f"p{i // group_size}", (1,), str(folder), "7", "", "", reward=reward), text, group=i // group_size)
        for i, text in enumerate(texts)
    ]


def judged(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_scores_are_those_of_one_node_and_every_node_judges(judge: Path, tmp_path: Path) -> None:
    name = f"{judge}:mark"
    texts = [f"{'raise' if i % 7 == 3 else 'x' * (i % 5)}{i}" for i in range(60)]
    with opened(name, 0, weights={"length": 0.5}) as (routed, _):
        alone = routed.score(asked(tmp_path / "alone", texts, name))
    with opened(name, weights={"length": 0.5}) as (routed, found):
        for turn in range(2):  # and a second judging, whose numbers begin anew
            folder = tmp_path / f"shared{turn}"
            assert routed.score(asked(folder, texts, name)) == alone
            assert len({one.rpartition("-")[2] for one in judged(folder)}) == 3, "the workers of all three"
        assert all(node.num_given for node in found)
    assert {score.status for score in alone} == {"ok", "invalid"} and alone[0] == Score(0.5, "ok", (("length", 1.0),))


def test_math_and_groups_are_judged_elsewhere_alike(judge: Path, tmp_path: Path) -> None:
    golds = ["7", r"\frac{14}{2}", "8", "no answer"]
    with opened("math", 1) as (routed, (node,)):
        scores = routed.score(asked(tmp_path, [rf"\boxed{{{golds[i % 4]}}}" + " " * i for i in range(16)], "math"))
        assert [score.value for score in scores] == [1.0, 1.0, 0.0, 0.0] * 4 and node.num_given
    with opened(f"{judge}:rank", 1) as (routed, (node,)):
        scores = routed.score(asked(tmp_path, [f"{i}" for i in range(24)], f"{judge}:rank", group_size=3))
        assert [score.value for score in scores] == [0.0, 1.0, 2.0] * 8 and node.num_given


def test_what_a_lost_node_had_is_judged_by_the_others(judge: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name, texts = f"{judge}:mark", [f"held{i}" for i in range(12)]
    with opened(name, deadline_seconds=60.0) as (routed, (first, second)), ThreadPoolExecutor(1) as thread:
        scores = thread.submit(routed.score, asked(tmp_path, texts, name))
        assert wait_until(lambda: len(judged(tmp_path)) == 3), "each node's worker has one"
        first.stop()
        assert wait_until(lambda: "judges of node 1 ended" in caplog.text)
        (tmp_path / "free").touch()
        assert [score.value for score in scores.result(30)] == [float(len(text)) for text in texts], "none is a death"
        before = first.num_given, second.num_given
        assert {score.status for score in routed.score(asked(tmp_path, texts, name))} == {"ok"}
        assert first.num_given == before[0] and second.num_given > before[1]
    assert caplog.text.count("it judges nothing more until the run is started again") == 1


def test_a_node_that_gives_no_sign_of_life_is_lost(
    judge: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{judge}:mark"
    with opened(name, 1) as (routed, (node,)):
        monkeypatch.setattr(nodes, "TAKE_SECONDS", 0.2)
        monkeypatch.setattr(nodes, "SILENT_SECONDS", 0.2)
        node.is_silent = True
        assert [score.value for score in routed.score(asked(tmp_path, ["a", "bb", "ccc"], name))] == [1.0, 2.0, 3.0]
        assert node.num_given and node.is_dead, "it is ended, so that it takes no cores"
    assert "judges of node 1 gave no sign of life" in caplog.text


def test_a_class_that_says_per_group_judges_on_every_node_with_the_scores_of_one(judge: Path, tmp_path: Path) -> None:
    name, texts = f"{judge}:Mine", ["x" * (i % 5) + str(i) for i in range(60)]
    with opened(name, 0) as (routed, _):
        alone = routed.score(asked(tmp_path / "alone", texts, name, group_size=3))
    with opened(name) as (routed, found):
        for turn in range(2):
            folder = tmp_path / f"shared{turn}"
            assert routed.score(asked(folder, texts, name, group_size=3)) == alone
        assert all(node.num_given for node in found)
        assert len(judged(folder)) == 20, "each group in one call"
        assert len({one.rpartition("-")[2] for one in judged(folder)}) == 3, "the classes of all three"
        with pytest.raises(NumericsError, match=rf"{name}' failed with KeyError: 'raise.*\(.*judge\.py, line \d+\): mend it"):
            routed.score(asked(tmp_path / "raise", ["raise"] * 12, name))
    assert [score.value for score in alone] == [float(len(text)) for text in texts]
    for name in (f"{judge}:Alone", f"{judge}:Mine"):
        config = run_config(data={"reward": name})
        assert (name in pools(config)) == name.endswith("Mine")
        assert judged_together(config) == ("group" if name.endswith("Mine") else "step")


def test_a_class_is_closed_on_every_node(judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is still asked for a group, when its call has ended."""
    monkeypatch.setenv("CLOSED", str(tmp_path))
    name = f"{judge}:Mine"
    with opened(name) as (routed, _):
        routed.score(asked(tmp_path / "all", ["a", "b", "c"], name))
        assert not {one for one in judged(tmp_path) if one.startswith("closed")}
        routed.close()
        assert len({one for one in judged(tmp_path) if one.startswith("closed")}) == 3
    (tmp_path / "fail").touch()
    with pytest.raises(NumericsError, match=r"failed with KeyError: 'closing'"), opened(name, 1) as (_, (node,)):
        pass
    assert not node.judges._pools


def test_a_node_that_does_not_close_in_time_or_is_lost_is_a_warning(
    judge: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOSED", str(tmp_path))
    monkeypatch.setattr(nodes, "CLOSE_SECONDS", 0.3)
    (tmp_path / "hold").touch()
    try:
        with opened(f"{judge}:Mine") as (routed, (first, _)):
            first.stop()
            routed.close()
            (tmp_path / "hold").unlink()
    finally:
        (tmp_path / "hold").unlink(missing_ok=True)
    assert "the process of judges of node 1 ended: killed: it has closed none of its rewards" in caplog.text
    assert "judges of node 2 did not close its rewards within CLOSE_SECONDS = 0.3" in caplog.text


def test_a_group_whose_node_is_lost_is_judged_by_the_others(
    judge: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, texts = f"{judge}:Mine", [f"held{i}" for i in range(12)]
    with opened(name) as (routed, (first, _)), ThreadPoolExecutor(1) as thread:
        scores = thread.submit(routed.score, asked(tmp_path, texts, name))
        assert wait_until(lambda: len(judged(tmp_path)) == 3), "each node has one"
        first.stop()
        assert wait_until(lambda: "judges of node 1 ended" in caplog.text)
        (tmp_path / "free").touch()
        assert [score.value for score in scores.result(30)] == [float(len(text)) for text in texts]


def test_an_error_of_a_class_names_its_node(judge: Path, tmp_path: Path) -> None:
    name = f"{judge}:Mine"
    with opened(name, 1) as (routed, (node,)), ThreadPoolExecutor(1) as thread:
        scores = thread.submit(routed.score, asked(tmp_path, ["held", "raise"], name))  # the first here, the second there
        with pytest.raises(NumericsError, match=rf"^judges of node 1: data\.reward = '{name}' failed with KeyError"):
            scores.result(30)
        (tmp_path / "free").touch()
        assert node.num_given == 1


def test_nodes_compare_the_file_of_a_class_and_what_it_extends(judge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, ours = (pool_identities(run_config(data={"reward": f"{judge}:{name}"})) for name in ("Mine", "Ours"))
    assert set(mine) == {f"data.reward {judge}:Mine", "the version of Python"}
    of_math = set(pool_identities(run_config(data={"reward": "math"}))) - {"the version of the verifier"}  # it has another name
    assert set(ours) == {f"data.reward {judge}:Ours"} | of_math and "the version of sympy" in of_math
    monkeypatch.setattr("engine.rewards.serving.pool_identities", lambda *_: dict.fromkeys(mine, "another"))
    with pytest.raises(ConfigError, match=r"must be the same on every node.* and another at judges of node 1"):  # noqa: SIM117
        with opened(f"{judge}:Mine", 1):
            pass


def test_what_judges_in_workers_shares_the_cores(judge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's class takes a share of them where it has workers, which it may start itself."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(12))
    for names, workers in (
        (["math"], 12),
        (["math", f"{judge}:Mine"], 12),
        (["math", f"{judge}:Ours"], 6),
        (["math", f"{judge}:Ours", f"{judge}:mark"], 4),
    ):
        assert fitted_to(run_config(data={"reward": names}), 0).rewards.workers == workers


def test_the_deadline_of_an_answer_is_the_same_everywhere(judge: Path, tmp_path: Path) -> None:
    name = f"{judge}:mark"
    with opened(name, deadline_seconds=0.5) as (routed, _):
        scores = routed.score(asked(tmp_path, ["hang1", "hang2", "hang3", "a", "bb", "ccc"], name))
        assert [(score.value, score.status) for score in scores[:3]] == [(0.0, "timeout")] * 3
        assert [score.value for score in scores[3:]] == [1.0, 2.0, 3.0]
        assert len({one.rpartition("-")[2] for one in judged(tmp_path) if one.startswith("hang")}) == 3, "one on each node"


def test_a_judging_that_is_given_up_leaves_nothing_to_the_next(judge: Path, tmp_path: Path) -> None:
    name = f"{judge}:mark"
    arriving = Arrivals[Answer]()
    with opened(name, 1) as (routed, (node,)), ThreadPoolExecutor(1) as thread:
        scores = thread.submit(routed.score_as_they_arrive, arriving)
        arriving.put(dict(enumerate(asked(tmp_path / "first", ["hang1", "hang2", "a", "b"], name))))
        assert wait_until(lambda: node.num_given > 0)
        arriving.abandon()
        with pytest.raises(CancelledError):
            scores.result(20)
        found = routed.score(asked(tmp_path / "second", ["x", "yy", "zzz", "vvvv"], name))
        assert [score.value for score in found] == [1.0, 2.0, 3.0, 4.0]


def test_a_node_with_another_file_or_none_is_named(judge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{judge}:mark"
    before = set(processes())
    monkeypatch.setattr("engine.rewards.serving.pool_identities", lambda *_: {f"data.reward {name}": "another"})
    with (
        pytest.raises(ConfigError, match=r"^data\.reward .* must be the same on every node.*and another at judges of node 1"),
        opened(name),
    ):
        pass
    assert wait_until(lambda: set(processes()) == before)

    def refuses(*_: object) -> None:
        raise ConfigError("no such file there")

    monkeypatch.setattr("engine.rewards.serving.pools", refuses)
    with pytest.raises(ConfigError, match=r"^judges of node 1: no such file there"), opened(name):
        pass


def test_a_node_with_other_versions_of_what_judges_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of packages too, which no checkpoint compares: a run may go on with others, but nodes must agree."""
    config = run_config(data={"reward": "math"})
    assert "the version of sympy" in pool_identities(config) and "the version of sympy" not in identities(config)
    there = pool_identities(config) | {"the version of sympy": "0.7"}
    monkeypatch.setattr("engine.rewards.serving.pool_identities", lambda *_: there)
    said = r"the version of sympy must be the same on every node.* found 1\.\d+.* here and 0\.7 at judges of node 1"
    with pytest.raises(ConfigError, match=said), opened("math", 1):
        pass


def test_a_node_that_answers_and_judges_nothing_is_lost(
    judge: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{judge}:mark"

    def nothing(name: str, judging: int) -> dict[int, Any]:
        Event().wait(0.05)
        return {}

    with opened(name, 1) as (routed, (node,)):
        monkeypatch.setattr(nodes, "SILENT_SECONDS", 0.1)
        monkeypatch.setattr("engine.rewards.pool.workers.stuck_seconds", lambda *_: 0.3)
        node.judges.take = nothing  # type: ignore[method-assign]
        assert [score.value for score in routed.score(asked(tmp_path, ["a", "bb", "ccc"], name))] == [1.0, 2.0, 3.0]
        assert node.num_given and node.is_dead
    assert "judges of node 1 judged nothing of what it had for 0 s" in caplog.text


def test_each_outcome_of_a_node_gives_it_time_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 s and SILENT_SECONDS: two answers given at 0, one judged at 150, so that the other is due at 310."""
    now, calls = [0.0], list[Call]()
    monkeypatch.setattr(nodes.time, "monotonic", lambda: now[0])

    class Handle:
        name = "judges of node 1"

        def call(self, method: str, *arguments: Any) -> Call:
            calls.append(call := Call())
            if method == "give":
                call.end(None, None)
            return call

        def stop(self) -> None:
            """Ends nothing."""

    def answered(at: float, found: dict[int, Any]) -> tuple[dict[int, Any], Sequence[int]]:
        now[0] = at
        calls[-1].end(found, None)
        return pool.heard()

    pool = nodes.NodePool(Handle(), "math", 2)
    pool.begin(lambda: None, 100.0)
    pool.give({0: ("a",), 1: ("b",)})
    assert answered(70.0, {}) == ({}, ()) and answered(150.0, {0: (1.0, "ok", "")})[0].keys() == {0}
    assert answered(220.0, {}) == ({}, ()) and answered(290.0, {}) == ({}, ()) and pool.late_at == 310.0
    assert answered(310.0, {}) == ({}, [1]) and pool.is_lost and pool.late_at is None


def test_a_node_that_does_not_start_is_late(judge: Path) -> None:
    config = run_config(data={"reward": f"{judge}:mark"}, rewards={"workers": 1}, trainer={"timeout_seconds": 0.1})
    node = Node("judges of node 1", config)
    up = Event()
    node.judges.open = lambda sources: up.wait(60)  # type: ignore[assignment,method-assign,return-value]
    with pytest.raises(WatchdogError, match=r"judges of node 1 did not start within trainer\.timeout_seconds = 0\.1"):
        open_rewards(config, Judges(nodes=[node]))
    up.set()
    node.close()


def test_a_pool_says_what_it_has_for_a_moment_and_when_half_is_judged(judge: Path, tmp_path: Path) -> None:
    """So that a message carries many outcomes, and none waits for long."""
    served = NodeJudges(run_config(data={"reward": f"{judge}:mark"}, rewards={"workers": 1, "deadline_seconds": 60.0}), 0)
    assert served.open(None).slots == {f"{judge}:mark": 1}
    name, requests = f"{judge}:mark", {i: (str(tmp_path), text) for i, text in enumerate(["a", "held", "b"])}
    try:
        served.give(name, 1, requests)
        assert served.take(name, 1).keys() == {0}
        (tmp_path / "free").touch()
        found: dict[int, Any] = {}
        while len(found) < 2:
            found |= served.take(name, 1)
        assert found == {1: ({"length": 4.0}, "ok", ""), 2: ({"length": 1.0}, "ok", "")}
        served.give(name, 0, {9: (str(tmp_path), "late")})
        assert served.take(name, 0) == {}, "of an earlier judging nothing is wanted"
        assert "late" not in {one.partition("-")[0] for one in judged(tmp_path)}
    finally:
        served.close()
