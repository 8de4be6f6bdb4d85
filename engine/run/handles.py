"""What is held of a process that runs elsewhere as a Ray actor: its calls under way, its restart, and what Ray says of its
errors and its end as one of our typed errors. It decides neither what runs there nor where.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.core.errors import (
    MISTAKES,
    EngineLostError,
    EngineStartError,
    ProcessLostError,
    SemionError,
    StorageError,
    UnexpectedError,
    WatchdogError,
)
from engine.core.files import UNWRITABLE, unwritable
from engine.observe.journal import Journal


class RayFuture:
    """A method of an engine, or of a node's judges, under way in its process."""

    def __init__(self, reference: Any, name: str, log: Path | None = None) -> None:
        self._reference, self._name, self._log = reference, name, log

    def result(self, timeout_seconds: float) -> Any:
        """The value, or the error that the engine raised; TimeoutError when late, EngineLostError when it died, or what it
        answered is gone with its machine."""
        import ray

        try:
            return ray.get(self._reference, timeout=timeout_seconds)
        except ray.exceptions.GetTimeoutError as error:
            raise TimeoutError(self._name) from error
        except ray.exceptions.RayTaskError as error:
            raise typed_error(error, self._name, self._log) from error
        except ray.exceptions.RayActorError as error:
            kind = EngineStartError if error.actor_init_failed else EngineLostError
            raise kind(f"the process of {self._name} ended: {last_line(error)}{_see(self._log)}") from error
        except ray.exceptions.RayError as error:  # such as ObjectLostError, of a machine that goes down with what it holds
            why = f"{type(error).__name__}: {last_line(error)}"
            raise EngineLostError(f"the answer of {self._name} cannot be had ({why}){_see(self._log)}") from error

    def on_done(self, told: Callable[[], object]) -> None:
        """Has `told` called, in a thread of Ray's, once there is a value or an error."""
        self._reference.future().add_done_callback(lambda _: told())


class RayEngine:
    """An engine, of the policy or of the reward model, or a node's judges, in a Ray actor; errors call it as its journal does,
    say on which of several nodes it runs, and name its log."""

    def __init__(self, journal: Journal, start: Callable[[], Any], node: int | None = None) -> None:
        """`node`: where it runs, as errors say it; None where that needs no word."""
        self.name = journal.process if node is None else f"{journal.process} on node {node}"
        self._log, self._start = journal.log, start
        self._actor = start()

    def restart(self) -> None:
        """Ends the actor, wherever it may hang, and starts another."""
        self.stop()
        self._actor = self._start()

    def stop(self) -> None:
        """Ends the actor."""
        import ray

        ray.kill(self._actor)

    def call(self, method: str, *arguments: Any) -> RayFuture:
        """Starts a method; calls of one caller run in order, but where the process runs several at once."""
        called = self._actor.call.options(name=f"{self.name}: {method}").remote(method, *arguments)
        return RayFuture(called, self.name, self._log)


def typed_error(error: Any, name: str, log: Path | None = None) -> SemionError:
    """A Ray error as what happened in the process `name`: our typed error itself, or a WatchdogError that tells it and says
    where to look: in its `log`, or where it has none with --verbose."""
    import ray

    if isinstance(error, ray.exceptions.RayTaskError):
        if isinstance(error.cause, SemionError):
            return error.cause
        why = " ".join(str(error.cause).split()) or "no message"
        if (code := unwritable(error.cause)) is not None:
            return StorageError(f"{name} could not write: {UNWRITABLE[code][0]}: {why}; {log or '--verbose'} shows where")
        kind = UnexpectedError if isinstance(error.cause, MISTAKES) else WatchdogError
        return kind(f"{name} failed with {type(error.cause).__name__}: {why}; {log or '--verbose'} shows where")
    if isinstance(error, ray.exceptions.GetTimeoutError):
        shows = log or "what --verbose shows"
        return WatchdogError(f"{name} did not start within trainer.timeout_seconds: raise it, or look at {shows}")
    return ProcessLostError(f"the process of {name} ended: {last_line(error)}{_see(log)}")


def _see(log: Path | None) -> str:
    return f"; its log is {log}" if log is not None else ""


def last_line(error: Exception) -> str:
    """What Ray knows of a death: of an error in a constructor its message, else the signal or exit."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("engine.core.errors.InferenceError: ") if lines else type(error).__name__
