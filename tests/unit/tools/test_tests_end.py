"""A test that does not end: it fails the run, by name and with the stacks of its threads, soon after its time is over."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
ENDLESS = """
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

import tests.conftest

tests.conftest.MORE_SECONDS = 1.0


@pytest.mark.timeout(1)
def test_it_waits_for_a_thread_on_its_way_out_too():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(Event().wait).result()


@pytest.mark.timeout(1)
def test_it_takes_the_end_of_its_time_for_any_error():
    while True:
        try:
            Event().wait()
        except BaseException:
            pass
"""


@pytest.mark.parametrize(
    "name", ["test_it_waits_for_a_thread_on_its_way_out_too", "test_it_takes_the_end_of_its_time_for_any_error"]
)
def test_a_test_that_hears_nothing_ends_its_process(name: str, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\ntimeout = 300\n")
    (tmp_path / "test_endless.py").write_text(ENDLESS)
    plugins = ["-p", "tests.conftest", "--import-mode=importlib", "-c", str(tmp_path / "pytest.ini")]
    command = [sys.executable, "-m", "pytest", *plugins, f"{tmp_path}/test_endless.py::{name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "Timeout" in done.stderr and f"in {name}" in done.stderr
