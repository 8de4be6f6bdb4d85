"""Lays training sequences into packed rows and deals them to data-parallel ranks, always the same way for the same
sequences. It computes no loss and asks no process group.

Shape legend: T tokens of a packed row, B sequences of it (a padding segment counts as one), P pairs of it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from engine.config import Trainer
from engine.errors import ConfigError
from engine.types import IGNORED, Batch, Microbatch, Sequence

PADDING_TOKEN = 0


def make_batches(sequences: list[Sequence], *, step: int, num_prompts: int, trainer: Trainer) -> list[Batch]:
    """One step's batch for every data-parallel rank, in rank order: equal counts, equally many microbatches.

    `num_prompts` counts all prompts of the step, skipped ones included. ConfigError when a sequence, or the two of a
    pair, exceeds trainer.microbatch_tokens.
    """
    multiple = trainer.tensor_parallel if trainer.sequence_parallel else 1
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
            num_pairs=sum(sequence.pair >= 0 and sequence.chosen for sequence in sequences),
            num_target_tokens=sum(len(sequence.completion_ids) for sequence in sequences),
        )
        for row in rows
    ]


def split_over_ranks(sequences: list[Sequence], num_ranks: int) -> list[list[Sequence]]:
    """Deals sequences to ranks, the two of a pair to one rank, the largest unit to the least loaded rank first.

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
    """Rows of at most `microbatch_tokens`, first fit in the given order, a pair's two sequences in one row.

    Every row's length is a multiple of `multiple`; what is missing is a padding segment whose targets are IGNORED.
    """
    room = microbatch_tokens - microbatch_tokens % multiple
    rows: list[list[Sequence]] = []
    used: list[int] = []
    for unit in _units(sequences):
        size = _num_tokens(unit)
        if size > room:
            raise ConfigError(
                f"trainer.microbatch_tokens must hold a sequence, or both of a pair; found {room} < {size}: raise it "
                f"to {-(-size // multiple) * multiple}, or shorten data.max_prompt_tokens or sampling.max_tokens"
            )
        row = next((i for i, taken in enumerate(used) if taken + size <= room), len(rows))
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row] += unit
        used[row] += size
    return [_fill(row, multiple) for row in rows]


def empty_microbatch(multiple: int) -> Microbatch:
    """A row of nothing but padding, for a rank with nothing left to do; it adds 0 to every loss."""
    return _fill([], multiple)


def _num_tokens(unit: Iterable[Sequence]) -> int:
    return sum(sequence.num_tokens for sequence in unit)


def _units(sequences: list[Sequence]) -> list[list[Sequence]]:
    """What must stay together: single sequences, and pairs at the place of their first sequence."""
    units: list[list[Sequence]] = []
    pairs: dict[int, list[Sequence]] = {}
    for sequence in sequences:
        assert sequence.prompt_ids and sequence.completion_ids, "a sequence needs a prompt and a completion"
        if sequence.pair in pairs:
            pairs[sequence.pair].append(sequence)
            continue
        units.append([sequence])
        if sequence.pair >= 0:
            pairs[sequence.pair] = units[-1]
    for index, unit in pairs.items():
        assert sorted(s.chosen for s in unit) == [False, True], f"pair {index} needs one chosen and one rejected"
    return units


def _fill(sequences: list[Sequence], multiple: int) -> Microbatch:
    length = _num_tokens(sequences)
    padding = -length % multiple if sequences else multiple
    token_ids = torch.full((length + padding,), PADDING_TOKEN, dtype=torch.int64)
    targets = torch.full((length + padding,), IGNORED, dtype=torch.int64)
    position_ids = torch.zeros(length + padding, dtype=torch.int64)
    rollout_log_probs = torch.zeros(length + padding)
    bounds = [0]
    members: dict[int, dict[bool, int]] = {}
    for index, sequence in enumerate(sequences):
        start, end = bounds[-1], bounds[-1] + sequence.num_tokens
        first = start + len(sequence.prompt_ids) - 1  # the last prompt token predicts the first of the completion
        token_ids[start:end] = torch.tensor(sequence.prompt_ids + sequence.completion_ids)
        targets[first : end - 1] = torch.tensor(sequence.completion_ids)
        position_ids[start:end] = torch.arange(end - start)
        if sequence.rollout_log_probs:
            rollout_log_probs[first : end - 1] = torch.tensor(sequence.rollout_log_probs)
        if sequence.pair >= 0:
            members.setdefault(sequence.pair, {})[sequence.chosen] = index
        bounds.append(end)
    if padding:
        position_ids[length:] = torch.arange(padding)
        bounds.append(length + padding)
    advantages = [sequence.advantage for sequence in sequences] + [0.0] * bool(padding)
    return Microbatch(
        token_ids=token_ids,
        targets=targets,
        position_ids=position_ids,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        advantages=torch.tensor(advantages),
        rollout_log_probs=rollout_log_probs,
        pairs=torch.tensor([[pair[True], pair[False]] for pair in members.values()], dtype=torch.int64).view(-1, 2),
    )
