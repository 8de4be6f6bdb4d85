"""Words between trainer ranks over a store: everybody hears rank 0, rank 0 hears everybody, waits last as long as the others
live and no longer, and what has been heard leaves the store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from engine.bridge import host_group
from engine.bridge.host_group import TURNS_KEPT, HostGroup
from engine.bridge.transports.rendezvous import join_store, listen, serve_store
from engine.core.errors import WatchdogError

HOST, RANKS = "127.0.0.1", 3


@contextmanager
def group(patience_seconds: float = 30.0) -> Iterator[tuple[list[HostGroup], dist.TCPStore]]:
    """Three ranks in this process, each with a connection of its own."""
    server, port = listen(HOST)
    stores = [serve_store(server, HOST, RANKS, 30.0), *(join_store(HOST, port, RANKS, 30.0) for _ in range(RANKS - 1))]
    with ExitStack() as opened:
        ranks = [HostGroup(store, rank, RANKS, patience_seconds=patience_seconds) for rank, store in enumerate(stores)]
        for rank in reversed(ranks):
            opened.callback(rank.close)
        yield ranks, stores[0]


def together(ranks: list[HostGroup], act: Callable[[HostGroup], Any]) -> list[Any]:
    """What each rank's call comes to, all at once; an error is a result too."""
    results: list[Any] = [None] * len(ranks)

    def run(place: int) -> None:
        try:
            results[place] = act(ranks[place])
        except WatchdogError as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_everybody_hears_rank_0_and_rank_0_everybody() -> None:
    with group() as (ranks, _):
        assert together(ranks, lambda rank: rank.broadcast(b"word" if rank.rank == 0 else b"mine")) == [b"word"] * 3
        assert together(ranks, lambda rank: rank.gather(bytes([rank.rank]))) == [[b"\0", b"\1", b"\2"], None, None]
        judged = together(ranks, lambda rank: rank.agreed(bytes([rank.rank]), b"".join))
        assert judged == [b"\0\1\2"] * 3
        assert together(ranks, lambda rank: rank.broadcast(b"")) == [b""] * 3
    alone = HostGroup(None, 0, 1, patience_seconds=1.0)
    alone.barrier()
    assert (alone.broadcast(b"x"), alone.gather(b"y"), alone.agreed(b"z", b"".join)) == (b"x", [b"y"], b"z")
    alone.close()


def test_words_in_their_order_and_none_stay_for_ever() -> None:
    """Rank 0 is far ahead of the others, as it may be after a broadcast, and at most so many words are kept."""
    with group() as (ranks, store):

        def talk(rank: HostGroup) -> list[bytes]:
            return [rank.broadcast(str(number).encode()) for number in range(3 * TURNS_KEPT)]

        expected = [str(number).encode() for number in range(3 * TURNS_KEPT)]
        assert together(ranks, talk) == [expected] * 3
        assert store.num_keys() < 2 * TURNS_KEPT


def test_a_wait_lasts_longer_than_the_patience_while_rank_0_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    with group(patience_seconds=0.4) as (ranks, _):

        def wait(rank: HostGroup) -> bytes:
            if rank.rank == 0:
                time.sleep(1.5)  # works for itself
            return rank.broadcast(b"over")

        assert together(ranks, wait) == [b"over"] * 3

        def late(rank: HostGroup) -> Any:
            if rank.rank == 2:
                time.sleep(1.5)  # and so does another
            return rank.gather(b"here")

        assert together(ranks, late)[0] == [b"here"] * 3


def test_a_rank_without_a_sign_of_life_is_named() -> None:
    with group(patience_seconds=0.4) as (ranks, _):
        together(ranks, lambda rank: rank.barrier())
        ranks[1].close()  # as if stopped
        error, _ = together([ranks[0], ranks[2]], lambda rank: rank.gather(b""))
        assert "trainer rank 1 must give a sign of life while rank 0 waits for it; found none for 0.4 s" in str(error)


def test_who_must_not_wait_longer_says_how_long_it_waited() -> None:
    with group() as (ranks, _):
        started = time.monotonic()
        error, none = together(ranks[:2], lambda rank: rank.gather(b"", 0.3))
        assert (none, time.monotonic() - started < 5) == (None, True)
        assert "trainer rank 0 waited 0.3 s for the others' word" in str(error)


SERVER = """
import sys, time
from engine.bridge.host_group import HostGroup
from engine.bridge.transports.rendezvous import listen, serve_store
server, port = listen("127.0.0.1")
group = HostGroup(serve_store(server, "127.0.0.1", 2, 30.0), 0, 2, patience_seconds=30.0)
print(port, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("kill", "words"), [(signal.SIGSTOP, "must give a sign of life"), (signal.SIGKILL, "rank 0 is gone")])
def test_a_stopped_or_killed_rank_0_is_noticed(kill: signal.Signals, words: str) -> None:
    """Stopped, its connection stays open and answers nothing: only the patience tells."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[3]
    )
    try:
        assert process.stdout is not None
        rank = HostGroup(join_store(HOST, int(process.stdout.readline()), 2, 30.0), 1, 2, patience_seconds=2.0)
        threading.Timer(0.5, os.kill, (process.pid, kill)).start()
        started = time.monotonic()
        with pytest.raises(WatchdogError, match=words):
            rank.broadcast(b"")
        assert time.monotonic() - started < 15
    finally:
        process.kill()
        process.wait()


def test_looks_are_fewer_the_longer_a_wait_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs rank 0's process something: about 50 a second, whatever is waited for, and not thousands."""
    looks = 0
    real = host_group._Task

    def counted(attempt: Any) -> Any:
        def look(store: dist.Store) -> bytes | None:
            nonlocal looks
            looks += 1
            answer: bytes | None = attempt(store)
            return answer

        return real(look)

    with group() as (ranks, _):
        monkeypatch.setattr(host_group, "_Task", counted)

        def wait(rank: HostGroup) -> bytes:
            if rank.rank == 0:
                time.sleep(2.0)
            return rank.broadcast(b"")

        together(ranks[:2], wait)
    assert looks < 400
