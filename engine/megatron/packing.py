"""Lays training sequences into packed rows and deals them to data-parallel ranks, always the same way for the same
sequences. It computes no loss and asks no process group.

Shape legend: T tokens of a packed row, B sequences of it (a padding segment counts as one).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch

from engine.algorithms.pairs import all_pairs
from engine.config.options import Trainer
from engine.core.errors import ConfigError
from engine.core.types import IGNORED, Batch, Microbatch, Sequence

PADDING_TOKEN = 0


def make_batches(sequences: list[Sequence], *, step: int, num_prompts: int, trainer: Trainer) -> list[Batch]:
    """One step's batch for every data-parallel rank, in rank order: equal counts, equally many microbatches.

    `num_prompts` counts all prompts of the step, skipped ones included. ConfigError when a sequence exceeds
    trainer.microbatch_tokens.
    """
    multiple = trainer.row_multiple
    parts = split_over_ranks(sequences, trainer.data_parallel)
    rows = [pack(part, trainer.microbatch_tokens, multiple) for part in parts]
    group = trainer.pipeline_parallel if trainer.virtual_pipeline > 1 else 1  # virtual stages take rows in groups
    count = -(-max(1, *map(len, rows)) // group) * group
    for row in rows:
        row += [empty_microbatch(multiple) for _ in range(count - len(row))]
    return [
        Batch(
            step=step,
            microbatches=tuple(row),
            num_prompts=num_prompts,
            num_groups=len({sequence.group for sequence in sequences} - {-1}),
            num_target_tokens=sum(len(sequence.completion_ids) for sequence in sequences),
        )
        for row in rows
    ]


def split_over_ranks(sequences: list[Sequence], num_ranks: int) -> list[list[Sequence]]:
    """Deals sequences to ranks, all of a group to one rank, the largest unit to the least loaded rank first.

    Every rank's sequences keep the given order; ties go to the lower rank.
    """
    units = _units(sequences)
    largest_first = sorted(range(len(units)), key=lambda i: (-_num_tokens(units[i]), i))
    chosen: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for i in largest_first:
        rank = load.index(min(load))
        chosen[rank].append(i)
        load[rank] += _num_tokens(units[i])
    return [[sequence for i in sorted(indices) for sequence in units[i]] for indices in chosen]


def pack(sequences: list[Sequence], microbatch_tokens: int, multiple: int) -> list[Microbatch]:
    """Rows of at most `microbatch_tokens`, first fit in the given order, a group's sequences in one row where they fit.
    The sequences of a group that is larger than a row are laid out one by one and marked in `spread_groups`.

    Every row's length is a multiple of `multiple`; what is missing is a padding segment whose targets are IGNORED.
    """
    room = microbatch_tokens - microbatch_tokens % multiple
    rows: list[list[Sequence]] = []
    used: list[int] = []
    units = _units(sequences)
    spread = {unit[0].group for unit in units if _num_tokens(unit) > room} - {-1}
    parts = [[[one] for one in unit] if unit[0].group in spread else [unit] for unit in units]
    for unit in chain.from_iterable(parts):
        size = _num_tokens(unit)
        if size > room:
            raise ConfigError(
                f"trainer.microbatch_tokens must hold a sequence; found {room} < {size}: raise it "
                f"to {-(-size // multiple) * multiple}, or shorten data.max_prompt_tokens or sampling.max_tokens"
            )
        row = next((i for i, taken in enumerate(used) if taken + size <= room), len(rows))
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row] += unit
        used[row] += size
    return [_fill(row, multiple, spread) for row in rows]


def empty_microbatch(multiple: int) -> Microbatch:
    """A row of nothing but padding, for a rank with nothing left to do; it adds 0 to every loss."""
    return _fill([], multiple, set())


def _num_tokens(unit: Iterable[Sequence]) -> int:
    return sum(sequence.num_tokens for sequence in unit)


def _units(sequences: list[Sequence]) -> list[list[Sequence]]:
    """What belongs together: single sequences, and groups at the place of their first sequence."""
    units: list[list[Sequence]] = []
    groups: dict[int, list[Sequence]] = {}
    for sequence in sequences:
        assert sequence.prompt_ids and sequence.completion_ids, "a sequence needs a prompt and a completion"
        if sequence.group in groups:
            groups[sequence.group].append(sequence)
            continue
        units.append([sequence])
        if sequence.group >= 0:
            groups[sequence.group] = units[-1]
    for index, unit in groups.items():
        assert {s.chosen for s in unit} == {False, True}, f"group {index} needs a chosen and a rejected sequence"
    return units


def _fill(sequences: list[Sequence], multiple: int, spread: set[int]) -> Microbatch:
    length = _num_tokens(sequences)
    padding = -length % multiple if sequences else multiple
    token_ids = torch.full((length + padding,), PADDING_TOKEN, dtype=torch.int64)
    targets = torch.full((length + padding,), IGNORED, dtype=torch.int64)
    position_ids = torch.zeros(length + padding, dtype=torch.int64)
    rollout_log_probs = torch.zeros(length + padding)
    bounds = [0]
    for sequence in sequences:
        start, end = bounds[-1], bounds[-1] + sequence.num_tokens
        first = start + len(sequence.prompt_ids) - 1  # the last prompt token predicts the first of the completion
        token_ids[start:end] = torch.tensor(sequence.prompt_ids + sequence.completion_ids)
        targets[first : end - 1] = torch.tensor(sequence.completion_ids)
        position_ids[start:end] = torch.arange(end - start)
        if sequence.rollout_log_probs:
            rollout_log_probs[first : end - 1] = torch.tensor(sequence.rollout_log_probs)
        bounds.append(end)
    if padding:
        position_ids[length:] = torch.arange(padding)
        bounds.append(length + padding)
    none = [0] * bool(padding)  # what the padding segment has of everything
    groups = [sequence.group for sequence in sequences] + [-1 for _ in none]
    chosen = torch.tensor([sequence.chosen for sequence in sequences] + none, dtype=torch.bool)
    spread_groups = torch.tensor([group if group in spread else -1 for group in groups], dtype=torch.int64)
    pairs, pair_weights = all_pairs([-1 if group in spread else group for group in groups], chosen.tolist())
    return Microbatch(
        token_ids=token_ids,
        targets=targets,
        position_ids=position_ids,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        advantages=torch.tensor([sequence.advantage for sequence in sequences] + none, dtype=torch.float32),
        rollout_log_probs=rollout_log_probs,
        pairs=pairs,
        pair_weights=pair_weights,
        spread_groups=spread_groups,
        chosen=chosen,
    )
