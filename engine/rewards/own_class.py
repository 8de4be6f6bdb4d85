"""A reward class of the user's own, which judges in the process that opens it: its `score` runs in a thread of its own with a
deadline, and what it returns is checked, so that one that hangs or forgets an answer ends the run by its name. Functions of the
user's are function.py's, in processes that can be killed.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from engine.core.errors import ConfigError, NumericsError, SemionError, WatchdogError
from engine.core.registry import called
from engine.core.types import Score
from engine.rewards.base import Answer, Reward

OPTION = "data.reward"


def require_class(kind: type[Reward], name: str) -> None:
    """ConfigError for a user's class that cannot judge."""
    if kind.score is Reward.score:
        raise ConfigError(f"{OPTION} = {name!r} must have a method score(self, answers); found none: write it")


class OwnReward(Reward):
    """A user's reward behind a deadline. Whatever it raises is a NumericsError that names it, file and line."""

    def __init__(self, name: str, reward: Reward, timeout_seconds: float) -> None:
        """`name`: as data.reward names its class. `timeout_seconds`: of one call of its `score`."""
        self._name, self._reward, self._timeout = name, reward, timeout_seconds
        self._tasks: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Any, SemionError | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._serve, name=f"reward {name}", daemon=True
        )  # one that hangs holds up no exit
        self._is_late = False
        self._thread.start()

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        """One score an answer, in order. WatchdogError when they take longer than rewards.timeout_seconds."""
        assert not self._is_late, "a reward that is late is not asked again"
        self._tasks.put(partial(self._reward.score, answers))
        found, error = self._wait(len(answers))
        if error is not None:
            raise error
        if not isinstance(found, (list, tuple)) or len(found) != len(answers) or not all(map(_is_score, found)):
            what = f"{len(found)} values" if isinstance(found, (list, tuple)) else repr(found)
            raise NumericsError(
                f"{OPTION} = {self._name!r} must return one Score with a finite value for each of {len(answers)} answers, in "
                f"order; found {what}{_first_bad(found)}: mend its score"
            )
        return list(found)

    def close(self) -> None:
        """Closes the user's reward, unless it is still at work; a second call does nothing."""
        if self._thread.is_alive() and not self._is_late:
            self._tasks.put(None)
            self._is_late = True
            called(self._name, OPTION, self._reward.close)

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                self._done.put((called(self._name, OPTION, task), None))
            except SemionError as error:
                self._done.put((None, error))
            except SystemExit as leaving:
                said = f"{OPTION} = {self._name!r} must not end its process; found {leaving!r}: raise an exception instead"
                self._done.put((None, NumericsError(said)))

    def _wait(self, count: int) -> tuple[Any, SemionError | None]:
        try:
            return self._done.get(timeout=self._timeout)
        except queue.Empty as empty:
            self._is_late = True
            raise WatchdogError(
                f"{OPTION} = {self._name!r} must score {count} answers within rewards.timeout_seconds = {self._timeout:g}; "
                f"found it still at work: raise it, or mend the reward"
            ) from empty


def _is_score(found: object) -> bool:
    return isinstance(found, Score) and math.isfinite(found.value)


def _first_bad(found: Any) -> str:
    bad = [value for value in found if not _is_score(value)] if isinstance(found, (list, tuple)) else []
    return f", one of them {bad[0]!r:.80}" if bad else ""
