"""What megatron's schedules call around each of their parts, made into phases of a profile: megatron says where a forward
begins and a backward ends, and nothing is patched. It measures no time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from engine.observe.profiling.phases import Phase, phase

_EXCHANGES = (
    *("forward-recv", "backward-recv", "forward-send", "backward-send"),
    *("forward-send-backward-recv", "backward-send-forward-recv", "forward-send-forward-recv"),
    *("backward-send-backward-recv", "forward-backward-send-forward-backward-recv"),
)
# megatron's name of a timer -> phase; the others are not phases of ours
PHASES = {
    "forward-compute": Phase.FORWARD,
    "backward-compute": Phase.BACKWARD,
    **dict.fromkeys(_EXCHANGES, Phase.PIPELINE),
    "all-grads-sync": Phase.REDUCE,
    "non-tensor-parallel-grads-all-reduce": Phase.REDUCE,
    "embedding-grads-all-reduce": Phase.REDUCE,
}


class Timer:
    """One of megatron's timers; it runs once at a time."""

    def __init__(self, which: Phase | None) -> None:
        self._which = which
        self._range: AbstractContextManager[None] | None = None

    def start(self, barrier: bool = False) -> None:
        """Enters the phase. Without megatron's barrier, which would change what is measured."""
        if self._which is not None:
            self._range = phase(self._which)
            self._range.__enter__()

    def stop(self, barrier: bool = False) -> None:
        """Leaves it."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None


class Timers:
    """The `timers` of a megatron configuration."""

    def __init__(self) -> None:
        self._timers = {name: Timer(which) for name, which in PHASES.items()}
        self._other = Timer(None)

    def __call__(self, name: str, log_level: int | None = None) -> Timer:
        """The timer of that name."""
        return self._timers.get(name, self._other)
