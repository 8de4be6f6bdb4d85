"""The training loop's way to the inference engines: the bridge where there are engines, and nothing where there are none."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.bridge.sender import Publisher
from engine.megatron.parallel_state import ParallelState
from engine.run.metrics import SYNC_ATTEMPTS, SYNC_MEBIBYTES, SYNC_SECONDS


class PoolPublisher:
    """The bridge's publisher, saying what a sync cost in the loop's words."""

    def __init__(self, publisher: Publisher, parallel: ParallelState, make_room: Callable[[], None]) -> None:
        """`make_room`: gives back what the trainer does not need while engines on its devices sample."""
        self._publisher, self._parallel, self._make_room = publisher, parallel, make_room
        self.serves: int | None = 0  # engines load the seed model

    def publish(self, version: int) -> dict[str, float]:
        """Sends the policy's weights as `version` to every engine; returns when all have verified them."""
        if self.serves is None:  # they slept, on the trainer's devices
            self._make_room()
        if self.serves is None and self._parallel.device.type == "cuda":
            torch.cuda.empty_cache()  # what the trainer's allocator keeps, the engines need to wake
        report = self._publisher.publish(version)
        self.serves = version
        repeated = {SYNC_ATTEMPTS.name: float(report.attempts)} if report.attempts > 1 else {}
        return {SYNC_SECONDS.name: report.seconds, SYNC_MEBIBYTES.name: report.num_bytes / 2**20} | repeated

    def sleep(self) -> None:
        """Lets the engines sleep until the next `publish`; nothing where they do already."""
        if self.serves is not None:
            self._publisher.sleep()
            self.serves = None


class NoEngines:
    """A publisher for a run that samples nothing."""

    serves: int | None = 0

    def publish(self, version: int) -> dict[str, float]:
        """Nobody is there."""
        return {}

    def sleep(self) -> None:
        """Nobody is there."""
