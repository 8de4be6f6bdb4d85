"""A run that loses a process goes on by itself: one loses a real engine while it samples, starts again and ends with the bits
of an undisturbed one. Nightly: the same run when it loses a trainer rank too, and one that loses its engine once too often."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.config.load import RunConfig
from tests.e2e.test_commands import (
    SEMI_ONLINE,
    Make,
    command,
    final,
    rollouts,
    rows,
    semion,
    sent_alike,
    untimed,
    written,
)

PATIENCE_SECONDS = 600  # a start is a quarter of a minute, on a busy machine several minutes
pytestmark = pytest.mark.timeout(1800)


class Watched:
    """`semion train` under way, and the processes it has started; left, it is ended."""

    def __init__(self, file: str, log: Path) -> None:
        self._log, self._asked = log, 0.0
        self._family: list[psutil.Process] = []
        self.run = subprocess.Popen(command("train", file), stdout=log.open("wb"), stderr=subprocess.STDOUT)

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *raised: object) -> None:
        if self.run.poll() is None:
            self.run.send_signal(signal.SIGINT)
            self.run.wait(timeout=60)

    def until(self, condition: Callable[[], Any]) -> Any:
        """What the condition becomes; fails with what the run said when it ends before, or takes too long."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (found := condition()):
            assert self.run.poll() is None and time.monotonic() < deadline, self.said()[-4000:]
            time.sleep(0.002)
        return found

    def at(self, task: str) -> psutil.Process | None:
        """A process at this method, by the title that Ray gives it. Who there is, is asked every five seconds: it takes
        long, in which a step may pass."""
        if time.monotonic() > self._asked + 5.0:
            self._family = psutil.Process(self.run.pid).children(recursive=True)
            self._asked = time.monotonic()
        return next((process for process in self._family if title(process).startswith(f"ray::{task}")), None)

    def sampling(self) -> psutil.Process | None:
        """An engine stopped in the middle of sampling; one that was stopped after it is let go."""
        engine = self.at("engine 0: collect")
        if engine is not None:
            engine.send_signal(signal.SIGSTOP)
            if title(engine).startswith("ray::engine 0: collect"):
                return engine
            engine.send_signal(signal.SIGCONT)
        return None

    def ends(self) -> int:
        return self.run.wait(timeout=PATIENCE_SECONDS)

    def said(self) -> str:
        return self._log.read_text()


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def lose_engine_after_step_2(watched: Watched, config: RunConfig) -> None:
    """Kills engine 0 while it samples for a step after the second, with the checkpoint of two steps on disk. The engine is
    stopped first and the checkpoint, written beside the loop, awaited then: on a slow disk a run could be over before."""
    watched.until(lambda: (config.run_directory / "metrics.jsonl").read_text().count("\n") >= 2)
    engine = watched.until(watched.sampling)
    watched.until((config.run_directory / "checkpoints" / "LATEST").exists)
    engine.kill()


def restarts(config: RunConfig) -> list[dict[str, Any]]:
    return rows(config, "restarts.jsonl") if (config.run_directory / "restarts.jsonl").exists() else []


def plain(restart: dict[str, Any]) -> dict[str, Any]:
    """A restart of a summary as restarts.jsonl has it."""
    return {name: value for name, value in restart.items() if name != "took"}


def check_times(took: dict[str, float]) -> None:
    """That each part of a restart which reached a step took its time, and that all of them are the whole."""
    assert min(took[name] for name in ("end", "start", "weights", "state", "engines", "step")) > 0, took
    assert sum(took[name] for name in took if name not in ("notice", "all")) == pytest.approx(took["all"]), took


def test_a_run_that_loses_an_engine_starts_again_and_ends_as_if_nothing_had_happened(
    semi_online: tuple[RunConfig, str], run_config: Make, tmp_path: Path
) -> None:
    whole, _ = semi_online
    config = run_config(*SEMI_ONLINE, "run.restarts=9", directory="restarted_once")
    with Watched(written(config, tmp_path), tmp_path / "log") as watched:
        watched.until(lambda: watched.at("engine 0: collect"))  # the first evaluation; the engine is known from now on
        lose_engine_after_step_2(watched, config)
        assert watched.ends() == 0, watched.said()[-4000:]
    lost = restarts(config)
    # On a very busy machine Ray may not start within its own deadline: then that is one more, on record as such.
    (first,) = [row for row in lost if "Ray did not start" not in row["text"]]
    assert (first["step"], first["restart"], first["error"]) == (2, 1, "EngineLostError")
    assert "the run goes on from the checkpoint of 2 steps, restart 1 of 9" in watched.said()
    assert rollouts(config) == rollouts(whole)
    assert sent_alike(rows(config, "metrics.jsonl")) == sent_alike(rows(whole, "metrics.jsonl"))
    assert final(config) == final(whole)
    ours, theirs = (json.loads((c.run_directory / "summary.json").read_text()) for c in (config, whole))
    assert ([plain(row) for row in ours["restarts"]], theirs["restarts"]) == (lost, [])
    check_times(ours["restarts"][-1]["took"])
    assert ours["evaluations"] == theirs["evaluations"]
    proof = semion("report", str(config.run_directory), "--output", str(tmp_path / "report.html"))
    assert f"proven from 144 rollouts of 4 steps; {len(lost)} restart" in proof
    assert "the process of engine" in (tmp_path / "report.html").read_text()


@pytest.mark.nightly
def test_a_run_that_loses_an_engine_and_then_a_rank_ends_as_if_nothing_had_happened(
    semi_online: tuple[RunConfig, str], run_config: Make, tmp_path: Path
) -> None:
    whole, _ = semi_online
    config = run_config(*SEMI_ONLINE, "run.restarts=9", directory="restarted")
    with Watched(written(config, tmp_path), tmp_path / "log") as watched:
        watched.until(lambda: watched.at("engine 0: collect"))  # the first evaluation; the engine is known from now on
        lose_engine_after_step_2(watched, config)
        watched.until(lambda: restarts(config))
        watched.until(lambda: watched.at("engine 0: collect"))  # the loop runs again
        watched.until(lambda: watched.at("trainer rank 0: train")).kill()
        assert watched.ends() == 0, watched.said()[-4000:]

    lost = restarts(config)
    assert [row["restart"] for row in lost] == list(range(1, len(lost) + 1))
    assert {row["step"] for row in lost} == {2}
    # On a very busy machine Ray may not start within its own deadline: then that is one more, on record as such.
    engine, rank = [row for row in lost if "Ray did not start" not in row["text"]]
    assert engine["error"] == "EngineLostError" and rank["error"] == "ProcessLostError"
    assert "the run goes on from the checkpoint of 2 steps, restart 1 of 9" in watched.said()
    assert rollouts(config) == rollouts(whole)
    assert untimed(rows(config, "metrics.jsonl")) == untimed(rows(whole, "metrics.jsonl"))
    assert final(config) == final(whole)
    ours, theirs = (json.loads((c.run_directory / "summary.json").read_text()) for c in (config, whole))
    assert ([plain(row) for row in ours["restarts"]], theirs["restarts"]) == (lost, [])
    check_times(ours["restarts"][-1]["took"])
    assert ours["evaluations"] == theirs["evaluations"]
    proof = semion("report", str(config.run_directory), "--output", str(tmp_path / "report.html"))
    assert f"proven from 144 rollouts of 4 steps; {len(lost)} restarts" in proof
    assert "the process of engine" in (tmp_path / "report.html").read_text()


@pytest.mark.nightly
def test_a_run_that_keeps_losing_its_engine_ends_with_its_name_and_code(run_config: Make, tmp_path: Path) -> None:
    config = run_config("run.steps=500", "sync.sync_interval=never", "run.restarts=1", directory="killed")  # no sync to die in
    with Watched(written(config, tmp_path), tmp_path / "log") as watched:
        watched.until(watched.sampling).kill()
        watched.until(lambda: restarts(config))
        watched.until(watched.sampling).kill()
        assert watched.ends() == 5, watched.said()[-4000:]
    said = watched.said()
    assert "the run starts over, for there is no checkpoint yet, restart 1 of 1" in said
    last = said[said.rindex("semion: ") :]
    assert "the process of engine 0 ended" in last and "started again once without reaching a new checkpoint" in last
    assert [(row["step"], row["restart"]) for row in restarts(config)] == [(0, 1)]
