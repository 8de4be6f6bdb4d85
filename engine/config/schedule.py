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
    `semantics`: "fairseq2" is the schedule of the paper's public code, which counts steps from 1: syncs at 0, s - 1, 2s - 1
    and so on, so that the first interval is a step short. Equal to "paper" where s is 1 or "never".
    """

    sync_interval: int | Literal["never"]
    reference: int | Literal["never", "follow"]
    num_steps: int
    offline_chunk: int
    semantics: Literal["paper", "fairseq2"] = "paper"

    @property
    def shift(self) -> int:
        """By how many steps everything that is due after a number of steps comes early: 1 in fairseq2's count, else 0."""
        return int(self.semantics == "fairseq2" and self.sync_interval not in (1, "never"))

    def divides(self, every: int, step: int) -> bool:
        """Whether what is due every so many steps is due before `step`; syncs, checkpoints, evaluations and a reference of
        its own interval are counted alike, so that multiples of s fall on syncs."""
        return (step + self.shift) % every == 0

    def sync_due(self, step: int) -> bool:
        """Whether the generator takes the policy's weights before generating for `step`."""
        return step == 0 or (self.sync_interval != "never" and self.divides(self.sync_interval, step))

    def version(self, step: int) -> int:
        """The weight version that samples the rollouts of `step`: that of the last sync, k * s, or 0 offline."""
        return 0 if self.sync_interval == "never" else max(0, step - (step + self.shift) % self.sync_interval)

    def staleness(self, step: int) -> int:
        """Optimizer steps between the weights that sampled a rollout and those that train on it: t - k * s."""
        return step - self.version(step)

    def reference_due(self, step: int) -> bool:
        """Whether the reference is copied from the policy before `step`. At step 0 both are the seed model."""
        if self.reference == "never" or step == 0:
            return False
        return self.sync_due(step) if self.reference == "follow" else self.divides(self.reference, step)

    def opens(self, step: int) -> range:
        """The steps whose prompts are submitted for generation just before `step`; empty where none are.

        The whole interval at a sync; offline, a chunk of the endless interval at a time.
        """
        if step != 0 and not self.divides(self.width, step):
            return range(0)
        return range(step, self._next_opening(step + 1))

    def in_flight(self, step: int) -> range:
        """The steps submitted earlier that have not been trained on before `step`: their rollouts may be under way."""
        return range(0) if step == 0 else range(step, self._next_opening(step))

    def _next_opening(self, step: int) -> int:
        """The first step from `step` (not 0) on before which prompts are submitted, or the end of the run."""
        return min(step + -(step + self.shift) % self.width, self.num_steps)

    @property
    def width(self) -> int:
        """Steps whose rollouts are submitted together: the interval, or offline a chunk of it."""
        return self.offline_chunk if self.sync_interval == "never" else self.sync_interval
