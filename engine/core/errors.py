"""The errors a user can act on, one class per exit code. Each message names the option or file, the rule, the value
found and the fix; the command line prints it in one line without a traceback. Internal invariants are asserts, not these.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class SemionError(Exception):
    """Base of all user-facing errors. `exit_code`: what the command line ends with. `may_pass`: the cause lies outside, so a
    restart of the same run may succeed. `seen_unix`: of what ended an attempt at a run, the time of day when the command had
    it, before it ended what was left."""

    exit_code = 1
    may_pass = False
    seen_unix: float | None = None
    echo = False  # of a failed weight sync: most likely the consequence of a failure elsewhere

    @property
    def faults(self) -> tuple[SemionError, ...]:
        """Every mistake that this error tells: itself, or those that `combined` put together."""
        return getattr(self, "_faults", (self,))


def combined(errors: Sequence[SemionError]) -> SemionError:
    """Several mistakes, found at once, as one error: of the first one's class, so that the exit code is the first one's, with
    one line for each. A single error is returned as it is."""
    faults = tuple(fault for error in errors for fault in error.faults)
    if len(faults) == 1:
        return faults[0]
    error = type(faults[0])("\n".join(map(str, faults)))
    error._faults = faults  # type: ignore[attr-defined]
    return error


def unique(errors: Iterable[SemionError]) -> list[SemionError]:
    """The mistakes without those that say again what an earlier one says."""
    found: dict[str, SemionError] = {}
    for error in errors:
        found.setdefault(str(error), error)
    return list(found.values())


class ConfigError(SemionError):
    """An option is unknown, of the wrong type, or impossible beside another."""

    exit_code = 2


class DataError(SemionError):
    """A data file or a row of it cannot be used; the message names file and line."""

    exit_code = 3


class CheckpointError(SemionError):
    """A checkpoint is missing, torn, altered, or of another layout; the message names the file."""

    exit_code = 4


class StorageError(SemionError):
    """A file cannot be written: the disk is full, a quota is used up, or the folder is not to be written. None of that passes
    by itself; the message names the folder, and the bytes that are needed and free."""

    exit_code = 4


class InferenceError(SemionError):
    """An inference engine failed or was late."""

    exit_code = 5
    may_pass = True


class EngineLostError(InferenceError):
    """An engine's process is gone, or what it holds cannot be mended: only starting it anew helps."""


class EngineStartError(EngineLostError):
    """An engine could not be made: what it was asked for is wrong here, and would be again."""

    may_pass = False


class RequestError(InferenceError):
    """One request to an endpoint failed for good; others may succeed."""


class WeightSyncError(SemionError):
    """A weight sync did not reach every engine bit for bit; the message names engine and tensor."""

    exit_code = 6
    may_pass = True


class UndeliveredError(WeightSyncError):
    """A message of a weight sync was not delivered, or a member of it did not come: what everybody sees when one fails."""

    echo = True


class NumericsError(SemionError):
    """A loss, gradient or reward is not finite, or the guard stopped the run for a collapse."""

    exit_code = 7


class WatchdogError(SemionError):
    """A named wait passed its deadline, or a process died without saying why."""

    exit_code = 8
    may_pass = True


class ProcessLostError(WatchdogError):
    """A process of the run ended without saying why."""


class MissingNodeError(WatchdogError):
    """A node that the run needs has not come, or not come back, within its deadline. `nodes_left`: how many are there, where
    some answer."""

    nodes_left: int | None = None
    may_pass = False


class UnexpectedError(WatchdogError):
    """A process raised what is a mistake in the code, which would come again. 70 is EX_SOFTWARE."""

    exit_code = 70
    may_pass = False


class PreemptedError(SemionError):
    """The run was asked to end before its last step, and --resume auto continues it bit for bit. 75 is EX_TEMPFAIL."""

    exit_code = 75


# What the interpreter raises at a mistake in the code; devices, networks and libraries raise other things.
MISTAKES = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, TypeError, ValueError)


def telling(error: SemionError) -> int:
    """Priority when several processes fail at once, 3 the highest: a typed error (3), a dead process (2), a bug (1), and what
    is often the consequence of another failure, such as a broken connection (0)."""
    if not isinstance(error, WatchdogError):
        return 3
    return 2 if isinstance(error, ProcessLostError) else int(isinstance(error, UnexpectedError))


def brief(value: object) -> str:
    """A value as an error sentence can hold it."""
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
