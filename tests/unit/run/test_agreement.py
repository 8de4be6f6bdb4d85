"""What trainer ranks tell each other: rank 0's word is everybody's, whether one process or several, and over the host alone."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.run.agreement import Agreement
from engine.run.signals import sign_of_life, stop_request
from tests.builders import config


class Wire:
    """A host group whose words are kept, to be heard by another."""

    def __init__(self) -> None:
        self.said: list[bytes] = []

    def of(self, rank: int) -> Any:
        return SimpleNamespace(broadcast=self.say if rank == 0 else self.heard)

    def say(self, word: bytes) -> bytes:
        self.said.append(word)
        return word

    def heard(self, _: bytes) -> bytes:
        return self.said.pop(0)


def of(folder: Path, rank: int, wire: Wire) -> Agreement:
    ranks: Any = SimpleNamespace(rank=rank, host=wire.of(rank))
    return Agreement(config(folder), ranks)


@pytest.mark.parametrize("reason", [None, "step 3: entropy collapsed to 0.01"])
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("resumable", [False, True])
def test_every_rank_hears_what_the_run_is_stopped_for(tmp_path: Path, reason: str | None, asked: bool, resumable: bool) -> None:
    if asked:
        stop_request(config(tmp_path)).touch()
    wire = Wire()
    expected = reason, asked and resumable
    assert of(tmp_path, 0, wire).early_end(reason, resumable=resumable) == expected
    other = of(tmp_path / "elsewhere", 1, wire)
    assert other.early_end("what another rank thinks is not asked", resumable=resumable) == expected
    assert wire.said == []


def test_a_number_is_rank_0s_whatever_another_rank_has(tmp_path: Path) -> None:
    wire = Wire()
    for value in (0.1 + 0.2, 5e-324, math.nan):
        said = of(tmp_path, 0, wire).number(value)
        heard = of(tmp_path, 1, wire).number(7.0)
        assert repr(said) == repr(heard) == repr(value)


def test_who_listens_hears_that_rank_0_is_done_and_the_command_that_it_lives(tmp_path: Path) -> None:
    wire = Wire()
    first, other = of(tmp_path, 0, wire), of(tmp_path, 1, wire)
    first.heartbeat()
    assert sign_of_life(config(tmp_path)).exists() and wire.said == [], "nobody has to hear it to go on waiting"
    first.done()
    other.listen()
    assert wire.said == []
