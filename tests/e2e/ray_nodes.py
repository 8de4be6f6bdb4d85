"""Ray nodes on addresses of this machine, each with a daemon and files of its own, as tests of several nodes need them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from engine.run.nodes import RAY_ENVIRONMENT
from tools.slurm.node import STARTED, command


@contextlib.contextmanager
def ray_nodes(
    addresses: Sequence[str], port: int, folder: Path, monkeypatch: pytest.MonkeyPatch, **variables: str
) -> Iterator[dict[str, psutil.Process]]:
    """Their keepers by address, the first one the head; RAY_ADDRESS, a token and `variables` are set for them and for who joins
    them. `folder` has what they say."""
    monkeypatch.setenv("RAY_ADDRESS", f"{addresses[0]}:{port}")
    monkeypatch.setenv("SLURM_JOB_ID", f"{port}-{os.getpid()}")
    for name, value in (RAY_ENVIRONMENT | {"RAY_AUTH_TOKEN": "a" * 64} | variables).items():
        monkeypatch.setenv(name, value)
    started: dict[str, psutil.Process] = {}
    try:
        for address in addresses:
            log = folder / address
            arguments = command(address, port, is_head=address == addresses[0])
            with log.open("wb") as said:
                started[address] = psutil.Popen(arguments, stdout=said, stderr=subprocess.STDOUT)
            deadline = time.monotonic() + 120
            while STARTED not in log.read_text():
                assert time.monotonic() < deadline and started[address].is_running(), log.read_text()
                time.sleep(0.1)
        yield started
    finally:
        for keeper in reversed(started.values()):
            for process in [*keeper.children(recursive=True), keeper]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            keeper.wait()
