"""Which nodes of a Ray cluster a run takes, with a cluster that only says what it is told to."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from engine.config.load import RunConfig
from engine.core.errors import ConfigError, MissingNodeError
from engine.run import nodes
from engine.run.nodes import HEAD, await_nodes
from tests.builders import config

LOST = ray.exceptions.TaskUnschedulableError("the node does not exist any more")


class FakeCluster:
    """Nodes by their addresses: what each answers whenever it is asked, and whether Ray counts it as alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[Any]]) -> None:
        self.answers, self.asked, self.dead = answers, list[str](), set[str]()
        monkeypatch.setattr(nodes, "look_at", self.ask)
        monkeypatch.setattr(ray, "nodes", self.nodes)
        monkeypatch.setattr(ray, "get", self.get)

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "NodeID": f"id of {address}",
                "NodeManagerAddress": address,
                "Alive": address not in self.dead,
                "Resources": {HEAD: 1.0} if place == 0 else {},
            }
            for place, address in enumerate(self.answers)
        ]

    def ask(self, node: dict[str, Any]) -> str:
        self.asked.append(node["NodeManagerAddress"])
        return self.asked[-1]

    def get(self, address: str, timeout: float) -> Any:
        answers = self.answers[address]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer is LOST:
            self.dead.add(address)
        if isinstance(answer, Exception):
            raise answer
        return answer


LATE, HERE = ray.exceptions.GetTimeoutError("not yet"), ("eth0", (), 1 << 40)


def layout(nodes: int, timeout_seconds: float, on_lost_node: str = "shrink") -> RunConfig:
    return config(
        cluster={"nodes": nodes},
        trainer={"timeout_seconds": timeout_seconds},
        run={"on_lost_node": on_lost_node},
        checkpoint={"other_layout": "allow"},
    )


def taken(timeout_seconds: float = 30.0, on_lost_node: str = "wait") -> list[str]:
    return [node.address for node in await_nodes(layout(2, timeout_seconds, on_lost_node))]


def test_the_head_and_then_the_first_by_address_are_taken_and_no_spare_is_asked(monkeypatch):
    cluster = FakeCluster(monkeypatch, {"10.0.0.9": [HERE], "10.0.0.10": [HERE], "10.0.0.2": [LATE, HERE]})
    assert taken() == ["10.0.0.9", "10.0.0.2"] == cluster.asked


def test_a_node_that_ray_still_counts_and_that_does_not_answer_is_passed_over_once_it_is_known_to_be_gone(monkeypatch):
    cluster = FakeCluster(monkeypatch, {"10.0.0.1": [HERE], "10.0.0.2": [LATE, LOST], "10.0.0.3": [HERE]})
    assert taken() == ["10.0.0.1", "10.0.0.3"] and cluster.asked == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]


def test_without_a_spare_a_run_waits_for_its_nodes_or_says_at_once_how_many_are_left(monkeypatch):
    answers = {"10.0.0.1": [HERE], "10.0.0.2": [LOST]}
    FakeCluster(monkeypatch, answers)
    with pytest.raises(
        MissingNodeError, match=r"1 answered within trainer\.timeout_seconds = 1, gone are: 10\.0\.0\.2"
    ) as caught:
        taken(0.6)
    assert caught.value.nodes_left == 1
    FakeCluster(monkeypatch, answers)
    with pytest.raises(MissingNodeError, match=r"1 answered within"):
        taken(0.6, "shrink")  # without a checkpoint fewer nodes are of no use
    monkeypatch.setattr("engine.run.checkpoint.latest", lambda folder: folder)
    with pytest.raises(MissingNodeError, match=r"1 answered at once, gone are: 10\.0\.0\.2") as caught:
        taken(on_lost_node="shrink")
    assert caught.value.nodes_left == 1


def test_a_node_that_ray_counts_and_that_stays_silent_is_left_out_by_name_for_a_spare(monkeypatch, capsys):
    """Two of them, one after the other; the second spare is not asked."""
    monkeypatch.setattr(nodes, "SILENT_SECONDS", 0.2)
    silent = {"10.0.0.1": [HERE], "10.0.0.2": [LATE], "10.0.0.3": [LATE], "10.0.0.4": [HERE], "10.0.0.5": [HERE]}
    cluster = FakeCluster(monkeypatch, silent)
    assert taken() == ["10.0.0.1", "10.0.0.4"] and cluster.asked == list(silent)[:4]
    assert "left out, for no process started there within 0 s: 10.0.0.2 10.0.0.3" in capsys.readouterr().err


def test_a_silent_node_that_answers_before_a_spare_does_is_taken(monkeypatch, capsys):
    monkeypatch.setattr(nodes, "SILENT_SECONDS", 0.2)
    FakeCluster(monkeypatch, {"10.0.0.1": [HERE], "10.0.0.2": [LATE, LATE, HERE], "10.0.0.3": [LATE, LATE, LATE, HERE]})
    assert taken() == ["10.0.0.1", "10.0.0.2"] and capsys.readouterr().err == ""


def test_a_node_whose_process_dies_again_and_again_is_silent_too(monkeypatch):
    """Ray counts it all the while; each time it is asked anew, but is given no more time."""
    monkeypatch.setattr(nodes, "SILENT_SECONDS", 0.7)
    died = ray.exceptions.WorkerCrashedError()
    cluster = FakeCluster(monkeypatch, {"10.0.0.1": [HERE], "10.0.0.2": [died], "10.0.0.3": [HERE]})
    assert taken() == ["10.0.0.1", "10.0.0.3"] and cluster.asked.count("10.0.0.2") >= 2


def test_without_a_spare_a_silent_node_is_named_and_a_run_that_may_shrink_goes_on_with_all_the_others(monkeypatch):
    """Half of a short trainer.timeout_seconds is waited. A spare that answered counts: nothing gets smaller than it need be."""
    answers = {"10.0.0.1": [HERE], "10.0.0.2": [LATE]}
    cluster = FakeCluster(monkeypatch, answers)
    with pytest.raises(MissingNodeError, match=r"1 answered within .*; there, but silent for 0 s: 10\.0\.0\.2") as caught:
        taken(0.9)
    assert caught.value.nodes_left == 1
    monkeypatch.setattr("engine.run.checkpoint.latest", lambda folder: folder)
    with pytest.raises(MissingNodeError, match=r"1 answered at once, gone are: none; .*: 10\.0\.0\.2"):
        taken(4.0, "shrink")
    cluster = FakeCluster(monkeypatch, answers | {"10.0.0.3": [LOST], "10.0.0.4": [HERE]})
    made = layout(nodes=4, timeout_seconds=4.0)
    with pytest.raises(MissingNodeError, match=r"2 answered at once, gone are: 10\.0\.0\.3; .*: 10\.0\.0\.2") as caught:
        await_nodes(made)
    assert caught.value.nodes_left == 2 and "10.0.0.4" in cluster.asked


def test_a_run_that_may_shrink_waits_for_nodes_that_have_not_come_yet(monkeypatch):
    FakeCluster(monkeypatch, {"10.0.0.1": [LATE, HERE]})
    with pytest.raises(MissingNodeError, match=r"1 answered within trainer\.timeout_seconds = 1, gone are: none"):
        taken(0.9, "shrink")


def test_silence_of_one_says_nothing_of_a_node_that_has_not_come_yet(monkeypatch):
    """Nor do all that are slow at the same moment make a run smaller at once: half of the time is theirs."""
    monkeypatch.setattr(nodes, "SILENT_SECONDS", 0.1)
    monkeypatch.setattr("engine.run.checkpoint.latest", lambda folder: folder)
    FakeCluster(monkeypatch, {"10.0.0.1": [HERE], "10.0.0.2": [HERE], "10.0.0.3": [LATE]})
    with pytest.raises(MissingNodeError, match=r"2 answered within trainer\.timeout_seconds = 2"):
        await_nodes(layout(nodes=4, timeout_seconds=2.0))
    FakeCluster(monkeypatch, {"10.0.0.1": [HERE], "10.0.0.2": [LATE, LATE, LATE, HERE]})
    assert taken(6.0, "shrink") == ["10.0.0.1", "10.0.0.2"]


def test_the_head_is_waited_for(monkeypatch, capsys):
    """Its GPUs are the run's, and the command runs there."""
    monkeypatch.setattr(nodes, "SILENT_SECONDS", 0.1)
    FakeCluster(monkeypatch, {"10.0.0.1": [LATE, LATE, LATE, HERE], "10.0.0.2": [HERE], "10.0.0.3": [HERE]})
    assert taken() == ["10.0.0.1", "10.0.0.2"] and capsys.readouterr().err == ""


def test_what_a_node_finds_wrong_with_itself_is_told(monkeypatch):
    wrong = ray.exceptions.RayTaskError("look", "", ConfigError("found no interface"))
    FakeCluster(monkeypatch, {"10.0.0.1": [HERE], "10.0.0.2": [wrong]})
    with pytest.raises(ConfigError, match="found no interface"):
        taken()
