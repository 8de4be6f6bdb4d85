"""tools/slurm/node.py with short programs in Ray's place: what it tries again, what it says, when the first node is open."""

from __future__ import annotations

import importlib.util
import socket
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).resolve().parents[3] / "tools" / "slurm" / "node.py"
SCRIPT = """
import pathlib, sys, time
tries = pathlib.Path(sys.argv[1])
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
if len(tries.read_text()) <= int(sys.argv[2]):
    sys.exit(1)
print("... Ray runtime started.", flush=True)
time.sleep(float(sys.argv[3]))
sys.exit(7)
"""


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("slurm_node", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("SLURMD_NODENAME", "127.0.0.7")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    return module


@pytest.fixture
def port() -> int:
    """Free, with the one that is opened when the first node is there."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.7", 0))
            found = one.getsockname()[1]
            try:
                other.bind(("127.0.0.7", found + 5000))
            except (OSError, OverflowError):
                continue
            return int(found)


def in_rays_place(node: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(node, "command", lambda *_: [sys.executable, "-c", SCRIPT, *map(str, arguments)])


def test_a_start_that_fails_is_tried_again_and_opens_the_port_once_ray_is_there(
    node: ModuleType, port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    in_rays_place(node, monkeypatch, tmp_path / "tries", 1, 3.0)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.7:{port}")
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(node.start(60.0)))
    thread.start()
    while not (tmp_path / "tries").exists() and thread.is_alive():
        assert not node.answers("127.0.0.7", port + node.READY_PORT_OFFSET), "open before Ray is"
    while thread.is_alive() and not node.answers("127.0.0.7", port + node.READY_PORT_OFFSET):
        time.sleep(0.05)
    assert (tmp_path / "tries").read_text() == "xx" and thread.is_alive()
    thread.join(timeout=60)
    assert said == ["Ray ended on 127.0.0.7 (127.0.0.7) with code 7"]
    assert "Ray did not start on 127.0.0.7 (127.0.0.7), attempt 1: it ended with code 1" in capfd.readouterr().err
    assert not node.answers("127.0.0.7", port + node.READY_PORT_OFFSET), "still open though Ray is gone"


def test_a_node_that_never_starts_is_named_with_the_deadline(
    node: ModuleType, port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    in_rays_place(node, monkeypatch, tmp_path / "tries", 1000, 0.0)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.7:{port}")
    said = node.start(2.0)
    assert said.startswith("Ray must start on 127.0.0.7 (127.0.0.7) within SEMION_START_SECONDS = 2; none did in ")


def test_another_node_waits_for_the_head_and_says_where_none_answers(
    node: ModuleType, port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    in_rays_place(node, monkeypatch, tmp_path / "tries", 0, 0.0)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.8:{port}")
    assert node.start(1.0).endswith(f"= 1; its head at 127.0.0.8:{port} gave no answer")
    assert not (tmp_path / "tries").exists()
    with socket.create_server(("127.0.0.8", port)):
        assert node.start(60.0) == "Ray ended on 127.0.0.7 (127.0.0.7) with code 7"
