"""What every judging process has in common, started by engine/rewards/pool/workers.py as `python -m engine.rewards.*_worker`.

Native code ignores Python's signals, so the only sure deadline is a process that can be killed. A worker imports what
judges once and stays clean: it forks children that judge under limits of memory (slots.py and child.py beside this file),
watches a child's CPU clock and the wall clock, kills a late child and forks the next. It starts no thread and imports neither
torch nor pydantic; it knows nothing of prompts, batches, the other workers, or how an answer is judged.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from engine.rewards.pool.child import ANSWERS, Judge, Terms
from engine.rewards.pool.frames import write_frame
from engine.rewards.pool.slots import Slots


class Loaded(NamedTuple):
    """What a worker has loaded: its judge, and what our side must know of it, as JSON can hold it."""

    judge: Judge
    facts: Any = None


def run(load: Callable[[list[str]], Loaded | str], *, silent: bool) -> None:
    """A worker's whole life: the longest judging in seconds of CPU time ("inf": none) and of wall-clock time, memory in MiB,
    answers at once and the judge's own arguments from the command line; speaks on standard input and output. `load` makes the
    judge, or says in a sentence why it cannot: that is sent instead of {"ready": facts}. With 0 answers at once it only says
    what it has loaded."""
    cpu_seconds, wall_seconds, memory_mebibytes, concurrency, *arguments = sys.argv[1:]
    terms = Terms(float(cpu_seconds), float(wall_seconds), int(memory_mebibytes) << 20, int(concurrency), silent)
    os.dup2(1, ANSWERS, inheritable=False)  # nothing else is open yet
    os.dup2(2, 1)  # what a library prints must not mix with our frames
    try:
        loaded = load(arguments)
        if isinstance(loaded, str):
            write_frame(ANSWERS, loaded)
            return
        slots = Slots(loaded.judge, 0, ANSWERS, terms) if terms.concurrency else None
        write_frame(ANSWERS, {"ready": loaded.facts})
        if slots is not None:
            slots.serve()
    except BrokenPipeError:
        sys.exit(0)  # nobody reads the answer; the children die with us
