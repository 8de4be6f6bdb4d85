"""When a weight sync is due, which weight version a step trains on, and how far ahead to generate. Pure arithmetic on
step numbers (PAPER: "The idea in one number"); it moves nothing and waits for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class SyncSchedule:
    """The regime of a run. Steps count from 0; a sync is due before generating for step t when t % s == 0.

    `sync_interval` is s: 1 is online, k semi-online, "never" offline (one sync, at step 0).
    `offline_chunk`: steps generated together when s is "never", where no sync bounds the interval.
    """

    sync_interval: int | Literal["never"]
    reference: int | Literal["never", "follow"]
    num_steps: int
    offline_chunk: int

    def sync_due(self, step: int) -> bool:
        """Whether the generator takes the policy's weights before generating for `step`."""
        return step == 0 if self.sync_interval == "never" else step % self.sync_interval == 0

    def version(self, step: int) -> int:
        """The weight version that samples the rollouts of `step`: k * s, or 0 offline."""
        return 0 if self.sync_interval == "never" else step - step % self.sync_interval

    def staleness(self, step: int) -> int:
        """Optimizer steps between the weights that sampled a rollout and those that train on it: t - k * s."""
        return step - self.version(step)

    def reference_due(self, step: int) -> bool:
        """Whether the reference is copied from the policy before `step`. At step 0 both are the seed model."""
        if self.reference == "never" or step == 0:
            return False
        return self.sync_due(step) if self.reference == "follow" else step % self.reference == 0

    def opens(self, step: int) -> range:
        """The steps whose prompts are submitted for generation just before `step`; empty where none are.

        The whole interval at a sync; offline, a chunk of the endless interval at a time.
        """
        return range(step, min(step + self.width, self.num_steps)) if step % self.width == 0 else range(0)

    @property
    def width(self) -> int:
        """Steps whose rollouts are submitted together: the interval, or offline a chunk of it."""
        return self.offline_chunk if self.sync_interval == "never" else self.sync_interval
