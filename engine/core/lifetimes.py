"""How long a process lives: no longer than the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process as soon as its parent ends, whatever ends that, and even where this one is stopped or
    waits for something that will not come. `parent`: the parent's process number where it may have ended before this call; this
    process then ends here."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
