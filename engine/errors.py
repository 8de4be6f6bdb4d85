"""The errors a user can act on, one class per exit code. Each message names the option or file, the rule, the value
found and the fix; the command line prints it in one line without a traceback. Internal invariants are asserts, not these.
"""


class SemionError(Exception):
    """Base of every error that is somebody's to mend; `exit_code` is what the command line leaves with."""

    exit_code = 1


class ConfigError(SemionError):
    """An option is unknown, of the wrong type, or impossible beside another."""

    exit_code = 2


class DataError(SemionError):
    """A data file or a row of it cannot be used; the message names file and line."""

    exit_code = 3


class CheckpointError(SemionError):
    """A checkpoint is missing, torn, altered, or of another layout; the message names the file."""

    exit_code = 4


class InferenceError(SemionError):
    """An inference engine failed or was late."""

    exit_code = 5


class EngineLostError(InferenceError):
    """An engine's process is gone, or what it holds cannot be mended: only starting it anew helps."""


class RequestError(InferenceError):
    """One request to an endpoint failed for good; others may succeed."""


class WeightSyncError(SemionError):
    """A weight sync did not reach every engine bit for bit; the message names engine and tensor."""

    exit_code = 6


class NumericsError(SemionError):
    """A loss, gradient or reward is not finite, or the guard stopped the run for a collapse."""

    exit_code = 7


class WatchdogError(SemionError):
    """A named wait passed its deadline, or a process died without saying why."""

    exit_code = 8


class PreemptedError(SemionError):
    """The run was asked to end before its last step, and --resume auto continues it bit for bit. 75 is EX_TEMPFAIL."""

    exit_code = 75
