"""Rank 0's wait for the other ranks' parts of a checkpoint, on a clock of its own: what a look costs, and when it gives up."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.core.errors import CheckpointError, WatchdogError
from engine.run import rank_parts
from engine.run.rank_parts import PARTS, await_parts

RANKS = 200
PATIENCE = 1200.0  # seconds


class Looks:
    """A clock that each pause moves on; after each look `then` is called with its number. Counts what was read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, then: Callable[[int], None]) -> None:
        self.now, self.count, self.sizes = 1000.0, 0, 0
        self.read: list[str] = []
        self._then, word, size = then, rank_parts._word, rank_parts._size

        def read(path: Path) -> dict[str, Any]:
            self.read.append(path.name)
            return word(path)

        def measure(folder: Path) -> int:
            self.sizes += 1
            return size(folder)

        monkeypatch.setattr(rank_parts, "_word", read)
        monkeypatch.setattr(rank_parts, "_size", measure)
        monkeypatch.setattr(rank_parts, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep))

    def _sleep(self, seconds: float) -> None:
        self.now, self.count = self.now + seconds, self.count + 1
        self._then(self.count)


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    (tmp_path / PARTS).mkdir()
    return tmp_path


def say(staging: Path, rank: int, **word: Any) -> None:
    part = staging / PARTS / f"rank_{rank:04d}.json.part"
    part.write_text(json.dumps(word))
    os.replace(part, str(part).removesuffix(".part"))


def test_a_word_is_read_once_and_sizes_are_asked_for_seldom(staging, monkeypatch):
    """However many looks the last rank takes; the words come in the order of the ranks, whoever was first."""

    def then(count: int) -> None:
        if count < RANKS:
            say(staging, RANKS - count, files={"of": RANKS - count})
        if count == 300:
            say(staging, 0, files={"of": 0})

    looks = Looks(monkeypatch, then)
    words = await_parts(staging, RANKS, PATIENCE)
    assert [word["files"]["of"] for word in words] == list(range(RANKS))
    assert looks.count == 300 and sorted(looks.read) == sorted({f"rank_{rank:04d}.json" for rank in range(RANKS)})
    assert looks.sizes <= 1 + (looks.now - 1000) / 5, "one at the start, and one in ten pauses of half a second"


def test_more_ranks_are_looked_at_less_often(staging, monkeypatch):
    def then(count: int) -> None:
        if count == 50:
            for rank in range(4096):
                say(staging, rank, files={})

    looks = Looks(monkeypatch, then)
    assert len(await_parts(staging, 4096, PATIENCE)) == 4096
    assert (looks.now - 1000) / 50 > 3, "seconds between two looks"


@pytest.mark.parametrize("patience", [2.0, 600.0])
def test_what_grows_is_waited_for_and_what_does_not_is_not(staging, monkeypatch, patience):
    """A file that grows for five times the patience holds it up; then rank 0 gives up after the patience, not before, and at
    most a quarter later."""
    grown, file = [0.0], staging / "rank_0002.safetensors"

    def then(count: int) -> None:
        if looks.now < 1000 + 5 * patience:
            grown[0] = looks.now
            file.write_bytes(bytes(count))

    looks = Looks(monkeypatch, then)
    say(staging, 0, files={})
    say(staging, 1, files={})
    with pytest.raises(WatchdogError, match=rf"trainer rank 2 must .* found nothing new for {patience:g} s"):
        await_parts(staging, 4, patience)
    assert patience <= looks.now - grown[0] <= 1.25 * patience + 0.5 + 0.5


def test_a_rank_that_takes_its_word_back_is_heard(staging, monkeypatch):
    """As one does whose disk fails when the word already has its name."""

    def then(count: int) -> None:
        if count == 3:
            say(staging, 1, error="the disk is gone", storage=False)

    looks = Looks(monkeypatch, then)
    say(staging, 1, files={})
    with pytest.raises(CheckpointError, match="the disk is gone"):
        await_parts(staging, 2, PATIENCE)
    assert looks.count == 3
