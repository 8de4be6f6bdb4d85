"""What trainer ranks tell each other: rank 0's word is everybody's, whether one process or several."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.run import agreement
from engine.run.agreement import Agreement
from engine.run.signals import stop_request
from tests.builders import config


def of(folder: Path, rank: int, world_size: int) -> Agreement:
    ranks: Any = SimpleNamespace(rank=rank, world_size=world_size, device="cpu")
    return Agreement(config(folder), ranks)


@pytest.mark.parametrize("reason", [None, "step 3: entropy collapsed to 0.01"])
@pytest.mark.parametrize("asked", [False, True])
def test_every_rank_hears_what_the_run_is_stopped_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reason: str | None, asked: bool
) -> None:
    if asked:
        stop_request(config(tmp_path)).touch()
    said: list[bytes] = []

    def broadcast(word: bytes, device: object) -> bytes:
        said.append(word)
        return word

    monkeypatch.setattr(agreement, "broadcast_bytes", broadcast)
    first = of(tmp_path, 0, 2)
    assert (first.reason(reason), first.stop_asked()) == (reason, asked)
    monkeypatch.setattr(agreement, "broadcast_bytes", lambda word, device: said.pop(0))
    other = of(tmp_path / "elsewhere", 1, 2)
    assert (other.reason(None), other.stop_asked()) == (reason, asked)
    alone = of(tmp_path, 0, 1)
    assert (alone.reason(reason), alone.stop_asked(), said) == (reason, asked, []), "nobody is told"
