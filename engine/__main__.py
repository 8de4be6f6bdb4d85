"""The `semion` command and `python -m engine`. It only sees to it that a Ctrl-C while Python loads the command, or after it has
ended, is no traceback."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Runs the command; its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the process, which has nothing to clean up
    from engine.cli import main as run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return run()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
