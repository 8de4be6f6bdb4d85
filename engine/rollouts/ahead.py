"""Rollouts that were sampled and judged ahead of the steps that train on them (sync.lookahead), as a checkpoint keeps them:
rows of a ledger, of which the first one of a step also says what sampling it took; beside them what engines have paused
(paused.py). It samples nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config.load import RunConfig
from engine.core.errors import DataError
from engine.core.jsonl import JsonlLedger, parsed, read_lines
from engine.core.types import RolloutGroup
from engine.data.mixture import Mixture
from engine.inference.pool import Usage
from engine.rollouts.ledger import RolloutLedger, ledger_rows
from engine.rollouts.paused import Pending, pending, require_temperature, write_paused

AHEAD = "ahead.jsonl"  # its name in a checkpoint
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
        """Writes the files into the folder of a checkpoint, where there is anything to keep."""
        write_paused(folder, self.paused, self.temperature)
        if not self.steps:
            return
        ledger = JsonlLedger(folder / AHEAD)
        try:
            for step in sorted(self.steps):
                ledger.append(self._rows(step))
            ledger.sync()
        finally:
            ledger.close()

    def _rows(self, step: int) -> Iterator[dict[str, Any]]:
        groups, usage = self.steps[step]
        told: dict[str, Any] = {_USAGE: {"num_tokens": usage.num_tokens, "busy_seconds": usage.busy_seconds}}
        for group in groups:
            for row in ledger_rows(group):
                yield row | told
                told = {}


def read_ahead(path: Path, prompts: Mixture, config: RunConfig) -> Ahead:
    """What `write` wrote, with the prompts that it was sampled for. DataError where it is not of what this run asks for: other
    prompts, other seeds, or log-probs of another temperature."""
    ledger, usages = RolloutLedger(path), dict[int, Usage]()
    for line in read_lines(path):
        row = parsed(line.where, line.data)
        if _USAGE in row:
            usages[row["step"]] = Usage(**row[_USAGE])
    found = {}
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
        found[step] = groups, usages[step]
    return Ahead(found)
