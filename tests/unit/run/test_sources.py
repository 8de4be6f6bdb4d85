"""How trainer ranks wait for a step: on the host, until rank 0 says that it is over."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.core.types import Sequence
from engine.rollouts import source as rollouts
from engine.rollouts.base import StepData
from engine.run import sources
from engine.run.agreement import Agreement
from engine.run.signals import sign_of_life
from engine.run.sources import DealtSource
from tests.builders import config
from tests.rollouts import make_sequence


@pytest.mark.parametrize("method", ["drain", "next"])
def test_ranks_wait_for_the_word_that_rank_0_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str) -> None:
    said: list[bytes] = []
    monkeypatch.setattr(sources, "scatter_batch", lambda *_, **__: SimpleNamespace(num_target_tokens=3))

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


def test_the_last_part_of_a_step_has_the_counts_of_the_whole(tmp_path: Path) -> None:
    """Three parts of sequences of 2 + 1, 2 + 3 and 2 + 2 tokens of five prompts, two of which are compared."""

    class Parts:
        def __init__(self) -> None:
            self.left = [(2, [part(1, 0)]), (1, [part(3, -1)]), (2, [part(2, 0)])]

        def early(self, step: int, waiting: Any) -> StepData | None:
            return self.next(step, waiting) if len(self.left) > 1 else None

        def next(self, step: int, waiting: Any) -> StepData:
            num_prompts, sequences = self.left.pop(0)
            return StepData(sequences, num_prompts, {"reward_mean": 1.0})

    def part(count: int, group: int) -> Sequence:
        return make_sequence((1, 2), (3,) * count, (-1.0,) * count, group=group)

    parallel: Any = SimpleNamespace(world_size=1, rank=0, device="cpu", host=SimpleNamespace(broadcast=lambda word: word))
    made = config(tmp_path, sync={"streaming": True})
    source = DealtSource(made, parallel, Parts(), Agreement(made, parallel))  # type: ignore[arg-type]
    early = [source.early(0), source.early(0)]
    assert source.early(0) is None and [batch.num_target_tokens for batch in early if batch is not None] == [1, 3]
    last, metrics = source.next(0)
    counts = last.num_prompts, last.num_groups, last.num_target_tokens, last.num_sequence_tokens
    assert counts == (5, 2, 6, 12) and metrics == {"reward_mean": 1.0, "target_tokens": 6.0}
    assert sum(int((row.targets >= 0).sum()) for row in last.microbatches) == 2, "its rows are its own"
