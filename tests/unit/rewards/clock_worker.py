"""A judge whose requests say how it spends its time: computing, in native code that never comes back, or asleep. Started as a
worker by test_clock.py.
"""

from __future__ import annotations

import time

from engine.rewards.pool.worker import Loaded, run


def judge(kind: str, seconds: float) -> tuple[float, str]:
    """1 after `seconds` of CPU time ("burn") or of the wall clock ("sleep"); "native" never returns to Python."""
    if kind == "sleep":
        time.sleep(seconds)
    elif kind == "native":
        sum(range(10**15))
    else:
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass
    return 1.0, "ok"


def load(_: list[str]) -> Loaded:
    """The judge."""
    return Loaded(judge)


if __name__ == "__main__":
    run(load, silent=True)
