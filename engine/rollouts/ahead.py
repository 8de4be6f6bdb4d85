"""Rollouts that were sampled and judged ahead of the steps that train on them (sync.lookahead), as a checkpoint keeps them: a
folder of segments, as a run's own rollouts are, in which the first row of a step also says what sampling it took; beside it
what engines have paused (paused.py). It samples nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config.load import RunConfig
from engine.core.errors import DataError, brief
from engine.core.segment_writer import SegmentWriter
from engine.core.types import RolloutGroup
from engine.data.mixture import Mixture
from engine.inference.pool import Usage
from engine.rollouts.ledger import COLUMNS, RolloutLedger, columns_of, rollout_rows
from engine.rollouts.paused import Pending, pending, require_temperature, write_paused

AHEAD = "ahead"  # its name in a checkpoint; older versions wrote a file of rows, ahead.jsonl, which is still read
_USAGE = "usage"


@dataclass(frozen=True, slots=True)
class Ahead:
    """What stands ready for some steps, and what is paused of further ones, by step."""

    steps: Mapping[int, tuple[list[RolloutGroup], Usage]]
    paused: Mapping[int, Pending] = field(default_factory=dict)
    temperature: float = 1.0  # of the log-probs of what is paused

    @property
    def kept(self) -> range:
        """All those steps, which follow one another."""
        known = self.steps.keys() | self.paused.keys()
        return range(min(known), max(known) + 1) if known else range(0)

    @property
    def first_paused(self) -> int | None:
        """The first step of which something is paused; all later ones of `kept` are such steps. None without one."""
        return min(self.paused, default=None)

    def write(self, folder: Path) -> None:
        """Writes its folders into that of a checkpoint, where there is anything to keep, and waits until they are on disk.
        StorageError where the disk has no room."""
        write_paused(folder, self.paused, self.temperature)
        if not self.steps:
            return
        segments = SegmentWriter(folder / AHEAD, COLUMNS)
        try:
            for step in sorted(self.steps):
                completions = (rollout.completion for group in self.steps[step][0] for rollout in group.rollouts)
                segments.append(step, self._rows(step), columns_of(completions))
            segments.sync()
        finally:
            segments.close()

    def _rows(self, step: int) -> Iterator[dict[str, Any]]:
        groups, usage = self.steps[step]
        told: dict[str, Any] = {_USAGE: {"num_tokens": usage.num_tokens, "busy_seconds": usage.busy_seconds}}
        for group in groups:
            for row in rollout_rows(group):
                yield row | told
                told = {}


def read_ahead(path: Path, prompts: Mixture, config: RunConfig) -> Ahead:
    """What `write` wrote, with the prompts that it was sampled for. DataError where it is not whole, or not of what this run
    asks for: other prompts, other seeds, or log-probs of another temperature."""
    ledger, found = RolloutLedger(path), {}
    for step in ledger.steps:
        samples = pending(step, prompts, config)
        by_id = {prompt.id: prompt for prompt in samples.prompts}
        groups = ledger.groups(step, by_id, len(samples.prompts), config.algorithm.samples_per_prompt)
        there = [rollout.completion for group in groups for rollout in group.rollouts]
        require_temperature(path, step, {one.temperature for one in there}, config)
        seeds = [(request.prompt_id, request.sample_index, request.seed) for request in samples.asked]
        for own, wanted in zip([(one.prompt_id, one.sample_index, one.seed) for one in there], seeds, strict=True):
            if own != wanted:
                raise DataError(
                    f"{path}, step {step}: must hold the samples that this run asks for, in their order; found sample {own[1]} "
                    f"of prompt {own[0]!r} with seed {own[2]} where sample {wanted[1]} of {wanted[0]!r} with seed {wanted[2]} "
                    f"is asked for: set run.seed, data and algorithm as they were when it was written"
                )
        found[step] = groups, _usage(ledger, step)
    return Ahead(found)


def _usage(ledger: RolloutLedger, step: int) -> Usage:
    """What sampling a step took."""
    where, row = ledger.values(step)[0]
    try:
        return Usage(**row[_USAGE])
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{where}: `{_USAGE}` must be there, as the first row of a step in a checkpoint has it; found {brief(row)}: use "
            f"another checkpoint"
        ) from error
