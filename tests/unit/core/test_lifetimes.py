"""A process that ends with the one that started it."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

CHILD = """
import time
from engine.core.lifetimes import die_with_parent
die_with_parent({})
print("tied", flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", sys.argv[1]]).pid, flush=True)
time.sleep(600)
"""


def ended(process: psutil.Process) -> bool:
    """Whoever has taken it over need not have asked how."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_stopped_child_ends_with_its_killed_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD.format("")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert parent.stdout.readline() == "tied\n"
    child.suspend()
    parent.kill()
    parent.wait()
    until = time.monotonic() + 30
    while not ended(child):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_child_whose_parent_has_ended_before_does_not_begin():
    gone = subprocess.Popen(["true"])
    gone.wait()
    child = subprocess.run([sys.executable, "-c", CHILD.format(gone.pid)], capture_output=True, timeout=60)
    assert (child.returncode, child.stdout) == (1, b"")
