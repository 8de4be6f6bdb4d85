"""What a regime is: on which steps the generator takes the policy's weights, and everything that follows from it (PAPER: "The
idea in one number"). Arithmetic on step numbers, which count from 0; it moves nothing and waits for nothing. All follows from
the steps with a sync. One regime decides on them as the run goes on (pilot.py): of it the syncs up to the next one are known.

A regime of your own is a class that extends `Schedule` and says `sync_due`; the rest follows. `sync.semantics` names it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal


@dataclass(frozen=True)
class Schedule(ABC):
    """The regime of a run: one weight version for each step, that of the last sync at or before it, or of an earlier one.

    `sync_interval` is s: 1 is online, k semi-online, "never" offline (one sync, at step 0).
    `offline_chunk`: steps generated together when s is "never", where no sync bounds the interval.
    `lookahead` is L: the rollouts between two syncs come from the sync L syncs before, and are sampled L intervals ahead; so
    engines sample interval k + L while the trainer trains interval k. A step's answers are then L s to (L + 1) s - 1 steps old.
    `updates_in_flight`: a sync waits only for the interval that is trained next. Engines pause what they have begun for later
    ones and go on with it from the new weights, so that an answer may have tokens of several versions (`versions`).
    """

    sync_interval: int | Literal["never"]
    reference: int | Literal["never", "follow"]
    num_steps: int
    offline_chunk: int
    lookahead: int = 0
    updates_in_flight: bool = False

    @abstractmethod
    def sync_due(self, step: int) -> bool:
        """Whether the generator takes the policy's weights before generating for `step`. True at step 0."""

    @property
    def regime(self) -> str:
        """The regime in a few words, for reports."""
        return f"{type(self).__name__} with s = {self.sync_interval}{self.ahead}"

    def counted(self, step: int) -> int:
        """The number of `step` by which intervals count; syncs, checkpoints, evaluations and a reference of its own interval
        are counted alike."""
        return step

    def falls_due(self, every: int, step: int) -> bool:
        """Whether what is due every so many steps is due before `step`."""
        return self.counted(step) % every == 0

    @property
    def never_syncs(self) -> bool:
        """Whether the run is offline: all rollouts are the seed model's."""
        return self.sync_interval == "never"

    def version(self, step: int) -> int:
        """The weight version that samples the rollouts of `step`: that of the last sync, k * s, or with a lookahead of the sync
        so many before it; 0 where there is none, as in an offline run. With updates in flight the oldest of `versions`."""
        return self.versions(step)[0]

    def versions(self, step: int) -> tuple[int, ...]:
        """The weight versions that may have sampled tokens of the rollouts of `step`, rising. One, or with updates in flight
        those of all syncs from the one that its rollouts were asked for after, to the last before they must be complete."""
        last = bisect_right(self._syncs, step) - 1
        first = max(0, last - self.lookahead)
        return self._syncs[first : max(first + 1, last)] if self.updates_in_flight else (self._syncs[first],)

    def staleness(self, step: int) -> int:
        """Optimizer steps between the weights that sampled a rollout and those that train on it; with updates in flight the
        most that a token of it may have."""
        return step - self.version(step)

    def reference_due(self, step: int) -> bool:
        """Whether the reference is copied from the policy before `step`. At step 0 both are the seed model."""
        if self.reference == "never" or step == 0:
            return False
        return self.sync_due(step) if self.reference == "follow" else self.falls_due(self.reference, step)

    def reference_version(self, step: int) -> int:
        """The weight version that the reference is while `step` trains; 0 is the seed model's. One that follows is what the
        engines took at the last sync: with a lookahead not what sampled the step's rollouts, which `version` says."""
        return next((before for before in range(step, 0, -1) if self.reference_due(before)), 0)

    def opens(self, step: int) -> range:
        """The steps whose prompts are submitted for generation just before `step`; empty where none are.

        The whole interval at a sync, or with a lookahead the interval so many later (before step 0 all up to that one);
        offline, a chunk of the endless interval at a time.
        """
        place = bisect_left(self._openings, step)
        if self._openings[place : place + 1] != (step,):
            return range(0)
        return range(self._opening(place + self.lookahead) if place else 0, self._opening(place + self.lookahead + 1))

    def in_flight(self, step: int) -> range:
        """The steps submitted earlier that have not been trained on before `step`: their rollouts may be under way."""
        return range(0) if step == 0 else range(step, self._opening(bisect_left(self._openings, step) + self.lookahead))

    def completes(self, step: int) -> range:
        """The steps of `in_flight(step)` whose rollouts engines complete before they take newer weights: all of them, or with
        updates in flight those of the interval that is trained next, and of the current one."""
        if step == 0 or not self.updates_in_flight:
            return self.in_flight(step)
        return range(step, self._opening(bisect_left(self._openings, step) + 1))

    def samples(self, step: int) -> range:
        """The steps whose rollouts engines complete once prompts have been submitted before `step`: all that were, or with
        updates in flight those of the interval after the one that begins here; empty where no interval begins."""
        place = bisect_left(self._openings, step)
        if not self.updates_in_flight or self._openings[place : place + 1] != (step,):
            return self.opens(step)
        return range(self._opening(place + 1) if place else 0, self._opening(place + 2))

    def resumable(self, step: int) -> bool:
        """Whether a run that ended after `step` steps can be continued bit for bit: the weights are those that engines sample
        from next, and no rollouts are under way but those of `in_flight`, which can be completed, or paused, and kept."""
        return self._openings[bisect_left(self._openings, step) :][:1] == (step,)

    def last_resumable(self, step: int) -> int:
        """The last number of steps, at most `step`, after which the run can be continued."""
        return self._openings[bisect_right(self._openings, step) - 1]

    def checkpoint_due(self, every: int, step: int) -> bool:
        """Whether a checkpoint of every so many steps is due after `step` steps: where the run can be continued, as soon as
        an interval is over."""
        if step == 0 or not self.resumable(step):
            return False
        before = self._openings[bisect_left(self._openings, step) - 1]
        return self.counted(step) // every > self.counted(before) // every

    @property
    def reopens(self) -> bool:
        """Whether prompts are submitted without a sync, to the seed's weights, after step 0: offline, chunk by chunk."""
        return any(not self.sync_due(step) for step in self._openings)

    @property
    def ahead(self) -> str:
        """The lookahead in a few words, for `regime`; empty without."""
        updated = " with weights updated in flight" if self.updates_in_flight else ""
        return "" if not self.lookahead else f", sampled {self.lookahead} interval{'s' * (self.lookahead > 1)} ahead{updated}"

    @property
    def planned(self) -> Schedule:
        """What a forecast takes for this regime: itself, or where it decides as a run goes on one that is known beforehand."""
        return self

    @property
    def other(self) -> Schedule:
        """What a regime is that differs from this one in numbers alone."""
        return self

    @property
    def measures(self) -> str | None:
        """The metric by which the regime decides on further syncs while the run goes on; None where it is arithmetic alone."""
        return None

    def observe(self, step: int, value: float | None) -> int:
        """Takes the metric that it `measures` of a step, told of every step in order once it is trained; the length of the
        interval that the step is of. Only of a regime that measures."""
        raise AssertionError(f"{self.regime} measures nothing")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of a regime that measures, as JSON holds it; empty where there is nothing to keep."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what a checkpoint kept. Only of a regime that measures."""
        raise AssertionError(f"{self.regime} measures nothing")

    def broken_rules(self, checkpoint_every: int | Literal["end"]) -> list[str]:
        """What cannot be asked of this regime beside these options: key, rule, value found and fix, a sentence each."""
        return []

    def contradictions(self) -> list[str]:
        """Where a regime is not one that the loop can follow, a phrase each; for those from outside."""
        found = [] if self._syncs[:1] == (0,) else ["no weight sync before step 0"]
        if self.never_syncs and len(self._syncs) > 1:
            found.append(f"never_syncs, and a weight sync before step {self._syncs[1]}")
        num_opened = 0
        for step in range(self.num_steps if not found else 0):
            here = self.opens(step)
            if (here and here.start != num_opened) or (not here and step >= num_opened):
                return [f"prompts of {here} submitted before step {step}, where those of step {num_opened} come next"]
            num_opened = max(num_opened, here.stop)
            if here and not self.sync_due(step) and self.version(step) != 0:
                return [f"prompts submitted before step {step} without a weight sync, to weights that are not the seed's"]
            served = self._syncs[bisect_right(self._syncs, step) - 1]
            if any(self.version(later) != served for later in here):
                return [f"prompts of {here} submitted together before step {step}, which serves version {served}, for another"]
        return found

    @cached_property
    def _syncs(self) -> tuple[int, ...]:
        """The steps of the run with a sync."""
        return tuple(step for step in range(max(1, self.num_steps)) if self.sync_due(step))

    @cached_property
    def _openings(self) -> tuple[int, ...]:
        """The steps before which prompts are submitted."""
        if not self.never_syncs:
            return self._syncs
        return tuple(step for step in range(max(1, self.num_steps)) if step == 0 or self.falls_due(self.offline_chunk, step))

    def _opening(self, place: int) -> int:
        """The step of an opening by its place, or the end of the run."""
        return self._openings[place] if place < len(self._openings) else self.num_steps
