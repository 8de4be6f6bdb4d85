"""A process of a run that cannot write ends the run at once, whoever tells it: the operating system or a library's text."""

from __future__ import annotations

import errno

import pytest
import ray
from safetensors import SafetensorError

from engine.core.arrays import LogProbs
from engine.core.errors import NumericsError, StorageError, WatchdogError
from engine.inference.vllm_engine import require_finite
from engine.run.handles import typed_error


def of_ray(cause: Exception) -> ray.exceptions.RayTaskError:
    return ray.exceptions.RayTaskError("train", "traceback", cause)


@pytest.mark.parametrize(
    "cause",
    [
        OSError(errno.ENOSPC, "No space left on device", "rollouts.jsonl"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        PermissionError(errno.EACCES, "Permission denied"),
    ],
)
def test_what_cannot_be_written_does_not_pass(cause: Exception) -> None:
    error = typed_error(of_ray(cause), "trainer rank 0")
    assert isinstance(error, StorageError) and not error.may_pass and error.exit_code == 4
    assert "trainer rank 0 could not write" in str(error)


def test_other_failures_of_the_system_may_pass() -> None:
    error = typed_error(of_ray(ConnectionResetError(errno.ECONNRESET, "reset")), "engine 0")
    assert isinstance(error, WatchdogError) and error.may_pass


def test_log_probs_that_are_not_finite_name_the_weights() -> None:
    require_finite(LogProbs.of([-1.0, 0.0]), 0, 3)
    with pytest.raises(NumericsError, match=r"engine 1's log-probs must be finite; found nan: model.path holds weights"):
        require_finite(LogProbs.of([-1.0, float("nan")]), 1, 0)
    with pytest.raises(NumericsError, match="the policy after 3 steps"):
        require_finite(LogProbs.of([float("-inf")]), 0, 3)
