"""What signals do to a command that trains: a Ctrl-C is never lost, what ends processes is not interrupted, and nothing of a
run's Ray stays on the disk."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import pytest

from engine.api.training import interruptible, preemptible
from engine.run.nodes import remove_leftovers
from engine.run.signals import ENDING, SAYING, stop_request, undisturbed
from tests import builders


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_ends_processes_is_not_interrupted(number, capfd):
    before, steps = signal.getsignal(number), []
    with undisturbed():
        os.kill(os.getpid(), number)
        steps.append("ended")
        os.kill(os.getpid(), number)
    assert steps == ["ended"] and signal.getsignal(number) == before
    await_words()
    assert capfd.readouterr().err.splitlines() == [ENDING, ENDING]


def await_words() -> None:
    """A handler prints in a thread of its own."""
    for thread in threading.enumerate():
        if thread.name == SAYING:
            thread.join(5.0)


def test_another_thread_takes_no_signals():
    found = []

    def work() -> None:
        with undisturbed(), interruptible() as stop:
            found.append(stop.at_once)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False] and signal.getsignal(signal.SIGINT) == before


def test_an_interrupt_that_a_library_loses_ends_the_command_all_the_same(tmp_path):
    with interruptible() as stop:
        stop.check()
        with suppress(KeyboardInterrupt):  # as a library does that imports something
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stop.check()
    with preemptible(builders.config(tmp_path)) as stop:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stop.check()


def test_a_second_ctrl_c_before_the_first_step_is_as_the_first(tmp_path):
    """There is nothing to go on from: no word of it."""

    def interrupted_twice() -> None:
        with preemptible(builders.config(tmp_path)):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()


def test_a_run_that_is_over_is_not_asked_to_stop(tmp_path, capfd):
    config = builders.config(tmp_path)
    with preemptible(config) as stop:
        stop.worth_saving = stop.over = True
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert not stop_request(config).exists()
    await_words()
    assert capfd.readouterr().err.splitlines() == [ENDING] * 3


def test_the_folder_of_a_runs_ray_goes_and_others_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    folder = tmp_path / "ray"
    mine = folder / f"session_2026-01-01_{os.getpid()}"
    others, old = folder / "session_2026-01-01_1", folder / f"session_2025-01-01_{os.getpid()}"
    for session in (mine, others, old):
        (session / "logs").mkdir(parents=True)
    os.utime(old, (1.0, 1.0))
    (folder / "session_latest").symlink_to(mine)
    remove_leftovers(mine.stat().st_mtime)
    assert sorted(path.name for path in folder.iterdir()) == sorted([others.name, old.name])
    (folder / "session_latest").symlink_to(others)
    remove_leftovers(0.0)
    assert sorted(path.name for path in folder.iterdir()) == sorted([others.name, "session_latest"])


CLOSED = """
import sys
from engine.commands.training import reader
console = reader()
console.print("first")
sys.stdin.read()  # until the other end is closed
try:
    console.print("second")
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_an_output_that_nobody_reads_is_a_ctrl_c():
    run = subprocess.Popen(
        [sys.executable, "-c", CLOSED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None and run.stdin is not None and run.stderr is not None
    assert run.stdout.readline() == "first\n"
    run.stdout.close()
    run.stdin.close()
    said = run.stderr.read()
    assert run.wait(60) == 130, said
    assert said.startswith("semion: nobody reads the output any more") and "BrokenPipe" not in said
