"""A run that goes on after a loss: which errors count and how often, as arithmetic and over attempts that fail on purpose; what
is told, written down and summed up; and that whoever asks to stop meanwhile is heard."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from engine.api.events import typed
from engine.api.training import begins_again, preemptible
from engine.commands.training import show
from engine.config.load import RunConfig
from engine.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EngineLostError,
    InferenceError,
    MissingNodeError,
    NumericsError,
    PreemptedError,
    ProcessLostError,
    SemionError,
    UnexpectedError,
    WatchdogError,
    WeightSyncError,
    telling,
)
from engine.observe.summary import summarize
from engine.run.checkpoint import _content_digest
from engine.run.machine import await_head, descendants, end, runs
from engine.run.restarts import restarts_in_a_row, unbroken
from engine.run.signals import Event, stop_request
from tests import builders

PASSING = (InferenceError, EngineLostError, WeightSyncError, WatchdogError, ProcessLostError)
LASTING = (ConfigError, DataError, CheckpointError, NumericsError, PreemptedError, MissingNodeError, UnexpectedError)


@pytest.fixture
def config(tmp_path) -> RunConfig:
    made = builders.config(tmp_path / "run", run={"steps": 8, "restarts": 2})
    made.run_directory.mkdir()
    return made


@pytest.mark.parametrize("kind", PASSING)
def test_a_loss_counts_until_the_limit_and_anew_after_a_checkpoint(kind):
    lost = kind("lost")
    assert [restarts_in_a_row(lost, 4, 4, so_far, 3) for so_far in range(4)] == [1, 2, 3, None]
    assert restarts_in_a_row(lost, 4, 6, 3, 3) == 1
    assert restarts_in_a_row(lost, 0, 0, 0, 1) == 1, "a run without a checkpoint starts over"
    assert restarts_in_a_row(lost, 0, 6, 0, 0) is None, "0 switches it off"


@pytest.mark.parametrize("kind", LASTING)
def test_what_would_come_again_ends_the_run(kind):
    assert restarts_in_a_row(kind("wrong"), 0, 2, 0, 3) is None


def test_a_death_says_more_than_an_echo_and_less_than_a_typed_error():
    kinds: list[type[SemionError]] = [WatchdogError, UnexpectedError, ProcessLostError, WeightSyncError]
    ordered = [kind("") for kind in kinds]
    assert sorted(reversed(ordered), key=telling) == ordered


class Attempts:
    """Attempts at a run: each is (steps it does, steps of its last checkpoint or None, the error it ends with or None)."""

    def __init__(self, config: RunConfig, *plan: tuple[range, int | None, BaseException | None]) -> None:
        self._config, self._plan = config, list(plan)
        self.resumed: list[bool] = []
        self.nodes: list[int] = []

    def __call__(self, resume: bool, layout: RunConfig) -> Iterator[Event]:
        self.resumed.append(resume)
        self.nodes.append(layout.cluster.nodes)
        steps, checkpoint, error = self._plan.pop(0)
        kept = [json.dumps({"step": step}) + "\n" for step in range(steps.stop)]
        (self._config.run_directory / "metrics.jsonl").write_text("".join(kept))
        yield from ({"kind": "step", "step": step} for step in steps)
        if checkpoint is not None:
            folder = self._config.run_directory / "checkpoints" / f"step_{checkpoint:08d}"
            folder.mkdir(parents=True)
            manifest: dict[str, object] = {"step": checkpoint}
            (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": _content_digest(manifest)}))
            (folder.parent / "LATEST").write_text(folder.name)
        if error is not None:
            raise error
        yield {"kind": "done", "engine_versions": {}}


def test_a_run_goes_on_from_its_newest_checkpoint_and_says_and_records_what_was_lost(config, capsys):
    engine, rank = EngineLostError("the process of engine 1 ended"), ProcessLostError("the process of trainer rank 0 ended")
    attempts = Attempts(config, (range(1), None, rank), (range(5), 4, engine), (range(4, 8), 8, None))
    events = [typed(event) for event in unbroken(config, attempts, resume=False)]
    show(config, "train", events)
    summary = summarize(config.run_directory)
    assert attempts.resumed == [False, False, True]
    wanted = [(0, 1, 1, "ProcessLostError", str(rank)), (4, 1, 1, "EngineLostError", str(engine))]
    rows = [json.loads(line) for line in (config.run_directory / "restarts.jsonl").read_text().splitlines()]
    assert [tuple(row[key] for key in ("step", "lost_steps", "restart", "error", "text")) for row in rows] == wanted
    assert summary["restarts"] == rows and summary["steps"] == 8
    assert all(row["ending_seconds"] >= 0 and row["silent_seconds"] >= 0 for row in rows)
    printed = capsys.readouterr().out
    first, second = (line.partition("  ")[2] for line in printed.splitlines() if "  lost: " in line)
    assert first == f"lost: {rank}; the run starts over, for there is no checkpoint yet, restart 1 of 2"
    assert second == f"lost: {engine}; the run goes on from the checkpoint of 4 steps, restart 1 of 2"


def test_a_budget_that_is_used_up_ends_with_the_last_errors_own_code_and_says_how_often_it_was_tried(config):
    again = (range(2, 3), None, WeightSyncError("b"))
    lost = [(range(2), 2, EngineLostError("a")), again, (range(0), None, WatchdogError("c"))]
    with pytest.raises(WatchdogError, match="c; started again 2 times in a row without reaching a new checkpoint") as caught:
        list(unbroken(config, Attempts(config, *lost), resume=False))
    assert caught.value.exit_code == 8
    with pytest.raises(NumericsError, match=r"^collapsed$"):
        list(unbroken(config, Attempts(config, lost[2], (range(0), None, NumericsError("collapsed"))), resume=True))


def test_a_bug_and_an_interrupt_are_no_losses(config):
    for error in (UnexpectedError("trainer rank 0 failed with KeyError"), KeyboardInterrupt(), RuntimeError("of ours")):
        attempts = Attempts(config, (range(1), None, error))
        with pytest.raises(type(error)):
            list(unbroken(config, attempts, resume=False))
        assert attempts.resumed == [False]
    assert not (config.run_directory / "restarts.jsonl").exists()


def test_whoever_asked_to_stop_is_heard_when_a_process_is_lost(config):
    """Between two attempts it ends the run at once, to be continued; during one, rank 0 finds the request."""
    attempts = Attempts(config, (range(3), 2, EngineLostError("gone")))

    def asked_meanwhile() -> None:
        with preemptible(config):
            for event in unbroken(config, attempts, resume=False):
                if event["kind"] == "step" and event["step"] == 1:
                    os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(PreemptedError, match="lost: gone; --resume auto goes on from the checkpoint of 2 steps") as caught:
        asked_meanwhile()
    assert caught.value.exit_code == 75 and attempts.resumed == [False]


@pytest.mark.parametrize("error", [EngineLostError("gone"), MissingNodeError("a node is gone")])
def test_a_request_is_heard_also_where_nothing_would_be_tried_again(error, config):
    """It ends with 75, which is always put back into a queue, and not with the loss's own code."""
    plain = config.model_copy(update={"run": config.run.model_copy(update={"restarts": 0})})

    def asked_meanwhile() -> None:
        with preemptible(plain):
            for event in unbroken(plain, Attempts(plain, (range(3), 2, error)), resume=False):
                if event["kind"] == "step" and event["step"] == 1:
                    os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(PreemptedError, match="asked to stop, and lost: "):
        asked_meanwhile()


def test_steps_are_counted_once_where_an_attempt_did_none(config):
    """Its records are those that the attempt before left."""
    lost = [(range(3), 2, EngineLostError("a")), (range(0), None, WatchdogError("no Ray")), (range(2, 3), None, None)]
    list(unbroken(config, Attempts(config, *lost), resume=False))
    rows = [json.loads(line) for line in (config.run_directory / "restarts.jsonl").read_text().splitlines()]
    assert [row["lost_steps"] for row in rows] == [1, 0]


def test_the_restarts_of_a_run_that_never_took_a_step_are_not_the_next_ones(config):
    restarts = config.run_directory / "restarts.jsonl"
    restarts.parent.mkdir(parents=True, exist_ok=True)
    restarts.write_text('{"step": 0}\n')
    assert not begins_again(config, may_start_over=False)
    assert not restarts.exists()


def test_a_request_that_comes_with_the_restart_reaches_the_next_attempt(config):
    found: list[bool] = []

    def attempt(resume: bool, layout: RunConfig) -> Iterator[Event]:
        found.append(stop_request(config).exists())
        yield {"kind": "note", "text": ""}
        raise EngineLostError("gone") if len(found) == 1 else PreemptedError("asked to stop: saved")

    def asked_meanwhile() -> None:
        with preemptible(config):
            for event in unbroken(config, attempt, resume=False):
                if event["kind"] == "restart":
                    os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(PreemptedError, match=r"^asked to stop: saved$"):
        asked_meanwhile()
    assert found == [False, True]


def test_a_stopped_process_is_ended_and_nothing_else_is(tmp_path):
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    bystander = subprocess.Popen(sleep)
    before = descendants()
    stopped, quick = subprocess.Popen(sleep), subprocess.Popen([sys.executable, "-c", ""])
    stopped.send_signal(signal.SIGSTOP)
    started = descendants() - before
    assert psutil.Process(stopped.pid) in started
    end(started, grace_seconds=0.2)
    assert not runs(psutil.Process(stopped.pid))
    assert bystander.poll() is None
    for process in (bystander, stopped, quick):
        process.kill()
        process.wait()


def test_a_head_that_does_not_answer_is_named_within_its_deadline():
    await_head("auto", 0.0)  # Ray finds it by itself, or says that there is none
    with pytest.raises(MissingNodeError, match=r"RAY_ADDRESS = 127\.0\.0\.1:1; found .*refused for 0 s"):
        await_head("127.0.0.1:1", 0.3)


def test_a_restart_says_what_each_part_of_it_took(config):
    """The row of restarts.jsonl and that of the start which followed it have one time; a restart that is lost in turn before
    its first step has no start."""
    engine = {"process": "engine 0", "name": "weights", "about": "", "after_seconds": 1.0, "seconds": 90.0}

    def phase(name: str, after: float, seconds: float) -> dict[str, object]:
        return {"process": "trainer rank 0", "name": name, "about": "", "after_seconds": after, "seconds": seconds}

    phases = [phase("ray", 0, 2), phase("processes", 2.5, 4), engine, engine | {"name": "engine"}, phase("ranks", 6.5, 1)]
    phases += [phase("model", 7.5, 3), phase("weights", 8, 2), phase("resume", 10.5, 5), phase("engines", 16, 6)]
    phases += [phase("first step", 22, 8)]
    starts = [{"step": 0, "unix_seconds": 5.5, "seconds": 9.0, "phases": []}]
    starts += [{"step": 4, "unix_seconds": 100.25, "seconds": 30.0, "phases": phases}]
    lost = {"step": 4, "restart": 1, "text": "gone", "lost_steps": 0}
    rows = [lost | {"unix_seconds": 90.0}, lost | {"unix_seconds": 100.25, "silent_seconds": 12.0, "ending_seconds": 1.5}]
    for name, written in (("startup.jsonl", starts), ("restarts.jsonl", rows)):
        (config.run_directory / name).write_text("".join(json.dumps(row) + "\n" for row in written))
    first, second = summarize(config.run_directory)["restarts"]
    assert first == rows[0]
    took = {"notice": 12.0, "end": 1.5, "start": 7, "weights": 3, "state": 5, "engines": 6, "step": 8, "rest": 1.0, "all": 31.5}
    assert second == rows[1] | {"took": took}
    assert sum(took[name] for name in took if name not in ("notice", "all")) == took["all"]


def missing(left: int | None) -> MissingNodeError:
    error = MissingNodeError("a node is gone")
    error.nodes_left = left
    return error


def test_a_run_that_may_shrink_goes_on_with_the_nodes_left_and_asks_for_all_again(tmp_path, capsys):
    """Four nodes of a GPU, two replicas and two engines: one is lost, then another, and both come back."""
    tables: dict[str, dict[str, object]] = {
        "cluster": {"nodes": 4, "gpus_per_node": 1},
        "trainer": {"data_parallel": 2},
        "inference": {"engines": 2},
    }
    tables |= {"run": {"steps": 8, "restarts": 2, "on_lost_node": "shrink"}, "checkpoint": {"other_layout": "allow"}}
    config = builders.config(tmp_path / "run", **tables)
    config.run_directory.mkdir()
    lost = EngineLostError("the process of engine 1 ended")
    plan: list[tuple[range, int | None, SemionError | None]] = [
        (range(3), 2, lost),
        (range(0), None, missing(3)),
        (range(2, 4), None, lost),
    ]
    plan += [(range(0), None, missing(2)), (range(2, 5), 4, lost), (range(4, 8), 8, None)]
    attempts = Attempts(config, *plan)
    show(config, "train", [typed(event) for event in unbroken(config, attempts, resume=False)])
    assert attempts.nodes == [4, 4, 3, 4, 2, 4] and attempts.resumed == [False, *[True] * 5]
    rows = summarize(config.run_directory)["restarts"]
    sizes = [(row["restart"], row["layout"]["cluster.nodes"], row["layout"]["trainer.data_parallel"]) for row in rows]
    assert sizes == [(1, 4, 2), (1, 3, 2), (2, 4, 2), (2, 2, 1), (1, 4, 2)]
    said = capsys.readouterr().out
    assert "on fewer nodes (cluster.nodes = 2, trainer.data_parallel = 1, inference.engines = 1)" in said


@pytest.mark.parametrize(
    ("on_lost_node", "checkpoint", "left"), [("wait", 2, 1), ("shrink", None, 1), ("shrink", 2, 0), ("shrink", 2, None)]
)
def test_a_run_ends_where_it_may_not_shrink_has_no_checkpoint_or_no_layout_fits(tmp_path, on_lost_node, checkpoint, left):
    may = {"run": {"steps": 8, "restarts": 2, "on_lost_node": on_lost_node}, "checkpoint": {"other_layout": "allow"}}
    config = builders.config(tmp_path / "run", cluster={"nodes": 2, "gpus_per_node": 2}, **may)
    config.run_directory.mkdir()
    plan = (range(3), checkpoint, EngineLostError("gone")), (range(0), None, missing(left))
    with pytest.raises(MissingNodeError, match="a node is gone"):
        list(unbroken(config, Attempts(config, *plan), resume=False))
