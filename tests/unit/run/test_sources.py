"""How trainer ranks wait for a step: rank 0 says every while that it still waits, and the others listen until it is over."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.rollouts import source as rollouts
from engine.run import agreement, sources
from engine.run.agreement import Agreement
from engine.run.signals import sign_of_life
from engine.run.sources import BroadcastSource
from tests.builders import config


@pytest.mark.parametrize("method", ["drain", "next"])
def test_ranks_hear_that_rank_0_still_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str) -> None:
    said: list[bytes] = []

    def broadcast(word: bytes, device: object) -> bytes:
        said.append(word)
        return word

    monkeypatch.setattr(agreement, "broadcast_bytes", broadcast)
    monkeypatch.setattr(sources, "broadcast_batch", lambda *_: SimpleNamespace(num_target_tokens=3))

    class Slow:
        def drain(self, step: int, waiting: Any) -> None:
            waiting()
            waiting()

        def next(self, step: int, waiting: Any) -> Any:
            self.drain(step, waiting)
            return SimpleNamespace(sequences=[], num_prompts=1, metrics={})

    made = config(tmp_path)
    parallel: Any = SimpleNamespace(world_size=2, device="cpu")
    first: Any = BroadcastSource(made, parallel, Slow(), Agreement(made, parallel))  # type: ignore[arg-type]
    first.drain(range(1)) if method == "drain" else first.next(0)
    assert said == [b"more", b"more", b"over"]
    assert sign_of_life(made).exists(), "the watching command sees it too"
    words = iter(said)
    monkeypatch.setattr(agreement, "broadcast_bytes", lambda *_: next(words))
    other: Any = BroadcastSource(made, parallel, None, Agreement(made, parallel))
    other.drain(range(1)) if method == "drain" else other.next(0)
    assert next(words, None) is None, "heard to the end"


def test_who_waits_for_rollouts_is_told_every_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "HEARTBEAT_SECONDS", 0.01)
    future: Any = rollouts.Future()
    threading.Timer(0.2, future.set_result, ["done"]).start()
    told: list[None] = []
    assert rollouts._awaited(future, lambda: told.append(None)) == "done"
    assert len(told) > 3
