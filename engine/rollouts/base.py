"""What a step of training is given, and what a source of steps must be able to do. It samples nothing itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from engine.core.types import Sequence

HEARTBEAT_SECONDS = 20.0  # how often who waits for a step is told that it is still being waited for
Waiting = Callable[[], object]


def nothing() -> None:
    """Nobody is told."""


@dataclass(frozen=True, slots=True)
class StepData:
    """Everything one optimizer step trains on, before it is dealt to ranks."""

    sequences: list[Sequence]
    num_prompts: int
    metrics: dict[str, float]


class StepSource(Protocol):
    """Where steps come from: rollouts sampled now, or what is on disk (replay.py)."""

    def open(self, steps: range, until: int | None = None) -> None:
        """Lets `steps` be made ready; engines complete what comes before step `until`, all where that is not said."""
        ...

    def finish(self, step: int, waiting: Waiting = nothing) -> None:
        """Waits until no engine works for `step`, whose rollouts may still be judged."""
        ...

    def drain(self, step: int, waiting: Waiting = nothing) -> None:
        """Waits until nothing that `step` needs is under way; `next` still hands it out."""
        ...

    def early(self, step: int, waiting: Waiting = nothing) -> StepData | None:
        """With sync.streaming: the next part of `step` that is complete before the others, without metrics; waits for it. None
        where all that is left is what `next` hands out."""
        ...

    def next(self, step: int, waiting: Waiting = nothing) -> StepData:
        """What `step` trains on, less what `early` has handed out, with the metrics of the whole step; waits for it, and calls
        `waiting` every HEARTBEAT_SECONDS meanwhile."""
        ...

    def close(self) -> None:
        """Gives back threads and files."""
        ...
