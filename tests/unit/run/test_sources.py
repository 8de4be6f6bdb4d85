"""How trainer ranks wait for a step: on the host, until rank 0 says that it is over."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.rollouts import source as rollouts
from engine.run import sources
from engine.run.agreement import Agreement
from engine.run.signals import sign_of_life
from engine.run.sources import DealtSource
from tests.builders import config


@pytest.mark.parametrize("method", ["drain", "next"])
def test_ranks_wait_for_the_word_that_rank_0_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str) -> None:
    said: list[bytes] = []
    monkeypatch.setattr(sources, "scatter_batch", lambda *_: SimpleNamespace(num_target_tokens=3))

    class Slow:
        def drain(self, step: int, waiting: Any) -> None:
            waiting()
            assert said == [], "they are told once, when it is over"

        def next(self, step: int, waiting: Any) -> Any:
            self.drain(step, waiting)
            return SimpleNamespace(sequences=[], num_prompts=1, metrics={})

    def say(word: bytes) -> bytes:
        said.append(word)
        return word

    made = config(tmp_path)
    parallel: Any = SimpleNamespace(world_size=2, rank=0, device="cpu", host=SimpleNamespace(broadcast=say))
    first: Any = DealtSource(made, parallel, Slow(), Agreement(made, parallel))  # type: ignore[arg-type]
    first.drain(range(1)) if method == "drain" else first.next(0)
    assert len(said) == 1
    assert sign_of_life(made).exists(), "the watching command sees that it waits"
    parallel = SimpleNamespace(world_size=2, rank=1, device="cpu", host=SimpleNamespace(broadcast=lambda _: said.pop()))
    other: Any = DealtSource(made, parallel, None, Agreement(made, parallel))
    other.drain(range(1)) if method == "drain" else other.next(0)
    assert said == [], "heard to the end"


def test_who_waits_for_rollouts_is_told_every_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "HEARTBEAT_SECONDS", 0.01)
    future: Any = rollouts.Future()
    told: list[None] = []

    def waiting() -> None:
        told.append(None)
        if len(told) == 4:
            future.set_result("done")

    assert rollouts._awaited(future, waiting) == "done"
    assert len(told) == 4
