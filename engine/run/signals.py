"""The events of a run, the two files by which the command and rank 0 tell each other that a run lives or shall end, and what a
signal does while processes are ended."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.config.load import RunConfig

Event = dict[str, Any]
SAYING = "what a signal is answered with"  # the name of the thread that prints it
ENDING = "semion: ending the processes, which takes seconds"


def sign_of_life(config: RunConfig) -> Path:
    """The file that rank 0 touches when it has waited for something, between two of its events."""
    return config.run_directory / "alive"


def stop_request(config: RunConfig) -> Path:
    """The file by which the command asks rank 0 to save and end; rank 0 is on the command's machine."""
    return config.run_directory / "stop"


def say(text: str) -> None:
    """Prints a line from within a signal's handler, in a thread of its own: the signal may have come while this one printed."""
    threading.Thread(
        name=SAYING, target=print, args=(text + "\n",), kwargs={"file": sys.stderr, "end": "", "flush": True}
    ).start()


@contextmanager
def undisturbed() -> Iterator[None]:
    """While entered in the main thread, no Ctrl-C or SIGTERM interrupts the block, which ends processes within a bounded time:
    half of that would leave some behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: say(ENDING)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
