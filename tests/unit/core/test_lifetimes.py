"""A process that ends with the one that started it."""

from __future__ import annotations

import subprocess
import sys

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


def test_a_stopped_child_ends_with_its_killed_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD.format("")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert parent.stdout.readline() == "tied\n"
    child.suspend()
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs([child], timeout=30)[1]


def test_a_child_whose_parent_has_ended_before_does_not_begin():
    child = subprocess.run([sys.executable, "-c", CHILD.format(1)], capture_output=True, timeout=60)
    assert (child.returncode, child.stdout) == (1, b"")
