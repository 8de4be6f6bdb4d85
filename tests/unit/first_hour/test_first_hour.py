"""Every case of the first hour (case.py), by group, and the table of them in docs/results.md."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import engine
from engine import cli
from engine.run.processes import Cluster
from tests.unit.benchmarks.chat_server import ChatServer
from tests.unit.first_hour.case import Case
from tests.unit.first_hour.judge import REPLIES
from tests.unit.first_hour.world import make_world

GROUPS = {  # as docs/results.md calls them
    "options": "options and the file that holds them",
    "model_folder": "the model's folder",
    "data": "data",
    "reward_function": "reward functions",
    "places": "places to write to",
    "ends": "ends: signals, pipes, closed streams",
    "environment": "environment",
    "judge": "the judge's endpoint",
    "lines": "command lines of every command",
}
SLOW = ("reward_function", "ends", "data", "model_folder", "places")  # groups of many seconds in all
LONGEST = 700  # characters of a sentence that a person reads
REPOSITORY = Path(engine.__file__).parents[1]
OF_OURS = re.compile(rf'File "{re.escape(str(REPOSITORY / "engine"))}|File "[^"]*site-packages')


def cases_of(group: str) -> list[Case]:
    """The cases of a group."""
    found: list[Case] = import_module(f"tests.unit.first_hour.{group}").CASES
    return found


def parameters() -> Iterator[Any]:
    """Every case with its group."""
    for group in GROUPS:
        for case in cases_of(group):
            is_slow = group in SLOW or not case.in_process
            yield pytest.param(group, case, id=f"{group}: {case.name}", marks=[pytest.mark.slow] if is_slow else [])


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A folder with which nothing is wrong, to be copied."""
    folder = tmp_path_factory.mktemp("first_hour") / "world"
    make_world(folder, tiny_tokenizer)
    return folder


@pytest.fixture(scope="session")
def judge() -> Iterator[tuple[str, Callable[[str], None]]]:
    """(The address of an endpoint, what sets its replies by the name of a case.)"""
    said = [REPLIES["a judge that answers"]]

    def set_reply(name: str) -> None:
        said[0] = REPLIES.get(name, said[0])

    with ChatServer(lambda request, number: said[0]) as server:
        yield server.url, set_reply


def files_in(folder: Path) -> set[str]:
    """Everything below a folder but what Python keeps of modules."""
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if "__pycache__" not in file.parts}


def processes_in(folder: Path) -> list[str]:
    """Command lines of the processes that work in a folder, but of this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int(process.name) != os.getpid() and Path(os.readlink(process / "cwd")) == folder:
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def in_shell(case: Case, folder: Path) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a line of bash in which `semion` is a process of its own."""
    (folder / ".bin").mkdir()
    (folder / ".bin" / "semion").write_text(f'#!/bin/sh\nexec {sys.executable} -m engine "$@"\n')
    (folder / ".bin" / "semion").chmod(0o755)
    environment = os.environ | {"PATH": f"{folder / '.bin'}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        ["bash", "-c", case.line], cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    shutil.rmtree(folder / ".bin")
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("group", "case"), parameters())
def test_a_case_is_fine(
    group: str,
    case: Case,
    world: Path,
    judge: tuple[str, Callable[[str], None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "case"
    shutil.copytree(world, folder, symlinks=True)
    monkeypatch.chdir(folder)
    case.made(folder)
    before = files_in(folder)
    if case.in_process:
        started: list[object] = []
        monkeypatch.setattr(Cluster, "__init__", lambda self, *_, **__: started.append(self))
        monkeypatch.setenv("COLUMNS", "120")
        for name, value in case.environment.items():
            monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
        judge[1](case.name)
        try:
            code: object = cli.main([argument.replace("{url}", judge[0]) for argument in case.arguments])
        except SystemExit as left:  # of the parser
            code = left.code
        captured = capsys.readouterr()
        out, err = captured.out, captured.err
        assert not started, "nothing is started for a run that cannot be"
    else:
        code, out, err = in_shell(case, folder)
    assert code == case.code, err[-2000:]
    said = err if code and not (out and group in ("judge",)) else out + err
    assert [part for part in case.says if part not in said] == [], said
    assert not OF_OURS.search(err), err
    sentences = [line for line in err.splitlines() if line.startswith("semion: ")]
    if case.is_usage:
        assert err.startswith("usage: semion") and not out
    elif code and case.in_process:
        assert len(sentences) == case.sentences, err
        assert all(len(sentence) <= LONGEST for sentence in sentences), sentences
        if group != "reward_function":  # where what the function printed and raised stands beside
            assert len(err.splitlines()) == len(sentences), err
    else:
        assert len(sentences) == case.sentences, err
    assert files_in(folder) - before == set(case.leaves), "nothing is left behind"
    assert before - files_in(folder) == set(), "and nothing taken away"
    deadline = time.monotonic() + 5
    while (running := processes_in(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running


def test_there_is_no_case_twice_and_there_are_enough() -> None:
    every = [(group, case) for group in GROUPS for case in cases_of(group)]
    names = [f"{group}: {case.name}" for group, case in every]
    assert len(set(names)) == len(names) >= 220
    lines = [(case.line, case.made, tuple(case.environment.items())) for group, case in every if group != "judge"]
    assert len({(line, id(made), env) for line, made, env in lines}) == len(lines)


def test_the_table_in_the_docs_has_these_numbers() -> None:
    text = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| ([^|]+?) \| (\d+) \| all \|$", text, re.MULTILINE))
    numbers = {title: str(len(cases_of(group))) for group, title in GROUPS.items()}
    numbers["together"] = str(sum(map(int, numbers.values())))
    assert told == numbers
