"""The trainer ranks as processes: words from rank 0 to the others and back, over a key-value store in rank 0's process. Whoever
waits here waits on the host and holds no GPU; tensors travel over the trainer's own groups, where nobody waits for anything
outside. Every rank has one connection, to rank 0.

A wait has no deadline of its own: it lasts as long as those it waits for live. A rank knows that rank 0 lives by the store's
answers, which come from its process whatever that is busy with; rank 0 knows it of a rank by a number in the store that a
thread of the rank raises every BEAT_SECONDS. What rank 0 waits for meanwhile (an engine, a reward) has its own deadline.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.core.errors import WatchdogError

if TYPE_CHECKING:
    import torch.distributed as dist

BEAT_SECONDS = 5.0  # between two signs of life
FIRST_PAUSE, LONGEST_PAUSE = 0.0005, 0.02  # seconds between two looks for a word, the longest for up to 64 ranks
WAITED_SHARE = 0.02  # a look comes late by no more than this share of the time waited before
TURNS_KEPT = 64  # words that stay in the store although all may have heard them

Attempt = Callable[["dist.Store"], bytes | None]  # None: not yet


@dataclass
class _Task:
    """Something asked of the thread that speaks with the store."""

    attempt: Attempt
    done: threading.Event = field(default_factory=threading.Event)
    given_up: bool = False
    answer: bytes = b""
    error: Exception | None = None


class HostGroup:
    """One trainer rank's end. Every method but `close` is collective over the trainer ranks, in one order."""

    def __init__(self, store: dist.Store | None, rank: int, world_size: int, *, patience_seconds: float) -> None:
        """`store`: served by rank 0's process, best over a connection of its own; not needed by one rank alone.
        `patience_seconds`: how long a rank may give no sign of life."""
        assert store is not None or world_size == 1, world_size
        self.rank, self.world_size = rank, world_size
        self._patience = patience_seconds
        self._beat_seconds = min(BEAT_SECONDS, patience_seconds / 4)
        self._longest_pause = LONGEST_PAUSE * max(1.0, world_size / 64)
        self._turn, self._kept = 0, list[str]()
        self._heard = time.monotonic()
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if store is not None and world_size > 1:
            self._thread = threading.Thread(target=self._serve, args=(store,), name="signs of life", daemon=True)
            self._thread.start()

    def broadcast(self, word: bytes) -> bytes:
        """Rank 0's word, on every rank; returns on rank 0 at once. `word` is rank 0's."""
        if self.world_size == 1:
            return word
        if len(self._kept) >= TURNS_KEPT:
            self.gather(b"")  # so that what all have heard can go
        return self._broadcast(word, None)

    def gather(self, word: bytes, seconds: float | None = None) -> list[bytes] | None:
        """Every rank's word in their order, on rank 0, which waits for them; None elsewhere, at once. WatchdogError on rank 0
        where one does not come within `seconds`."""
        if self.world_size == 1:
            return [word]
        self._turn += 1
        keys = [f"{self._turn} {rank}" for rank in range(self.world_size)]
        stale, self._kept = self._kept, []
        if self.rank != 0:
            self._ask(_set(keys[self.rank], word))
            return None
        others = keys[1:]
        self._ask(self._when_there(dict(zip(range(1, self.world_size), others, strict=True))), seconds)
        found = self._ask_all(others)
        self._ask(_delete([*stale, *others]))  # whoever has spoken in this turn has heard all before
        return [word, *found]

    def agreed(self, word: bytes, judge: Callable[[list[bytes]], bytes], seconds: float | None = None) -> bytes:
        """What rank 0's `judge` makes of every rank's word, on every rank. WatchdogError where one does not come within
        `seconds`."""
        words = self.gather(word, seconds)
        return self._broadcast(judge(words), seconds) if words is not None else self._broadcast(b"", seconds)

    def barrier(self) -> None:
        """Waits for all ranks, as long as they live."""
        self.agreed(b"", lambda _: b"")

    def close(self) -> None:
        """Ends the thread. Not collective."""
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join(self._beat_seconds)
        self._thread = None

    def _broadcast(self, word: bytes, seconds: float | None) -> bytes:
        if self.world_size == 1:
            return word
        self._turn += 1
        key = str(self._turn)
        self._kept.append(key)
        if self.rank == 0:
            self._ask(_set(key, word))
            return word
        return self._ask(lambda store: store.get(key) if store.check([key]) else None, seconds)

    def _ask(self, attempt: Attempt, seconds: float | None = None) -> bytes:
        """Has the thread try until there is an answer. WatchdogError where rank 0's process gives no sign of life any more, or
        there is none within `seconds`."""
        assert self._thread is not None, "closed"
        task = _Task(attempt)
        self._heard = began = time.monotonic()
        self._tasks.put(task)
        longest = min(1.0, self._beat_seconds, *([seconds] if seconds is not None else []))
        while not task.done.wait(longest):
            now = time.monotonic()
            if now - self._heard > self._patience:
                task.given_up = True
                raise WatchdogError(
                    f"trainer rank 0 must give a sign of life while trainer rank {self.rank} waits for it; found none for "
                    f"{self._patience:g} s: look for a stopped process or a broken network"
                )
            if seconds is not None and now - began > seconds:
                task.given_up = True
                raise WatchdogError(
                    f"trainer rank {self.rank} waited {seconds:.3g} s for the others' word: one is late or gone"
                )
        if task.error is not None:
            if isinstance(task.error, WatchdogError):
                raise task.error
            raise WatchdogError(f"trainer rank 0 is gone, or cannot be reached any more: {task.error}") from task.error
        return task.answer

    def _ask_all(self, keys: Sequence[str]) -> list[bytes]:
        """The words under these keys, which are there."""
        found: list[bytes] = []

        def attempt(store: Any) -> bytes:
            found[:] = store.multi_get(list(keys)) if store.has_extended_api() else [store.get(key) for key in keys]
            return b""

        self._ask(attempt)
        return found

    def _when_there(self, keys: dict[int, str]) -> Attempt:
        """Done when every rank's key is there; an error where one of the ranks that are late has no sign of life."""
        lives = dict.fromkeys(keys, (0, time.monotonic()))
        looked = time.monotonic()

        def attempt(store: dist.Store) -> bytes | None:
            nonlocal looked
            if store.check(list(keys.values())):
                return b""
            if time.monotonic() - looked > self._beat_seconds:
                looked = time.monotonic()
                for rank in [rank for rank, key in keys.items() if not store.check([key])]:
                    number, since = int(store.add(_life(rank), 0)), lives[rank][1]
                    lives[rank] = number, since if number == lives[rank][0] else looked
                    if looked - lives[rank][1] > self._patience:
                        raise WatchdogError(
                            f"trainer rank {rank} must give a sign of life while rank 0 waits for it; found none for "
                            f"{self._patience:g} s: look for a stopped process"
                        )
            return None

        return attempt

    def _serve(self, store: dist.Store) -> None:
        """The thread: signs of life, and in between what is asked."""
        beaten = 0.0

        def beat() -> None:
            nonlocal beaten
            if time.monotonic() - beaten > self._beat_seconds:
                store.add(_life(self.rank), 1)
                beaten = time.monotonic()

        while True:
            task: _Task | None = None
            try:
                beat()
                task = self._tasks.get(timeout=self._beat_seconds)
                if task is None:
                    return
                self._try(task, store, beat)
            except queue.Empty:
                continue
            except (RuntimeError, WatchdogError) as error:  # the store's, whose process may be gone
                if task is None:
                    task = self._tasks.get()  # told to whoever asks next
                if task is None:
                    return
                task.error = error
                task.done.set()

    def _try(self, task: _Task, store: dist.Store, beat: Callable[[], None]) -> None:
        began = time.monotonic()
        while not task.given_up:
            answer = task.attempt(store)
            self._heard = time.monotonic()
            if answer is not None:
                task.answer = answer
                task.done.set()
                return
            beat()
            time.sleep(min(self._longest_pause, max(FIRST_PAUSE, WAITED_SHARE * (self._heard - began))))


def _life(rank: int) -> str:
    return f"life {rank}"


def _set(key: str, word: bytes) -> Attempt:
    def attempt(store: Any) -> bytes:  # torch's stubs know texts alone
        store.set(key, word)
        return b""

    return attempt


def _delete(keys: Sequence[str]) -> Attempt:
    def attempt(store: dist.Store) -> bytes:
        for key in keys:
            store.delete_key(key)
        return b""

    return attempt
