"""Lays training sequences into packed rows and deals them to data-parallel ranks, always the same way for the same
sequences. Which sequence stands where follows from lengths and groups alone, so a rank packs only its own rows. It computes no
loss and asks no process group.

Shape legend: T tokens of a packed row, B sequences of it (a padding segment counts as one).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import chain

import torch

from engine.algorithms.pairs import all_pairs
from engine.config.options import Trainer
from engine.core.errors import ConfigError
from engine.core.types import IGNORED, Batch, Microbatch, Sequence

PADDING_TOKEN = 0


@dataclass(frozen=True, slots=True)
class Outline:
    """What of a sequence decides where it is laid."""

    place: int  # in the step
    num_prompt: int
    num_completion: int
    group: int

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and completion together."""
        return self.num_prompt + self.num_completion


def outlines_of(sequences: Many[Sequence]) -> list[Outline]:
    """The outlines of sequences in hand."""
    return [Outline(i, len(s.prompt_ids), len(s.completion_ids), s.group) for i, s in enumerate(sequences)]


def make_batch(sequences: Many[Sequence], *, step: int, num_prompts: int, trainer: Trainer, dp_rank: int) -> Batch:
    """One step's batch for a data-parallel rank; see `lay_out_batch`."""
    return lay_out_batch(
        outlines_of(sequences), sequences.__getitem__, step=step, num_prompts=num_prompts, trainer=trainer, dp_rank=dp_rank
    )


def lay_out_batch(
    outlines: Many[Outline],
    sequence: Callable[[int], Sequence],
    *,
    step: int,
    num_prompts: int,
    trainer: Trainer,
    dp_rank: int,
) -> Batch:
    """The batch of one data-parallel rank: all ranks have equal counts and equally many microbatches. `sequence` gives the
    sequence at a place of the step, and is asked for this rank's only.

    `num_prompts` counts all prompts of the step, skipped ones included. ConfigError when a sequence exceeds
    trainer.microbatch_tokens.
    """
    multiple = trainer.row_multiple
    rows = lay_out_rows(outlines, trainer)[dp_rank]
    split = split_groups(list(chain.from_iterable(rows)), trainer.microbatch_tokens, multiple)
    own = [
        _fill(row, [sequence(outline.place) for outline in row], multiple, split) if row else empty_microbatch(multiple)
        for row in rows
    ]
    return Batch(
        step=step,
        microbatches=tuple(own),
        num_prompts=num_prompts,
        num_groups=len({outline.group for outline in outlines} - {-1}),
        num_target_tokens=sum(outline.num_completion for outline in outlines),
    )


def lay_out_rows(outlines: Many[Outline], trainer: Trainer) -> list[list[list[Outline]]]:
    """The rows of every data-parallel rank, equally many on each; a rank with nothing left to do has empty ones. ConfigError
    when a sequence exceeds trainer.microbatch_tokens."""
    parts = split_over_ranks(outlines, trainer.data_parallel)
    rows = [pack_rows(part, trainer.microbatch_tokens, trainer.row_multiple) for part in parts]
    together = trainer.pipeline_parallel if trainer.virtual_pipeline > 1 else 1  # virtual stages take rows in groups
    count = -(-max(1, *map(len, rows)) // together) * together
    return [own + [[] for _ in range(count - len(own))] for own in rows]


def split_over_ranks(outlines: Many[Outline], num_ranks: int) -> list[list[Outline]]:
    """Deals sequences to ranks, all of a group to one rank, the largest unit to the least loaded rank first.

    Every rank's sequences keep the given order; ties go to the lower rank.
    """
    units = _units(outlines)
    largest_first = sorted(range(len(units)), key=lambda i: (-_num_tokens(units[i]), i))
    chosen: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for i in largest_first:
        load, rank = heapq.heappop(loads)
        chosen[rank].append(i)
        heapq.heappush(loads, (load + _num_tokens(units[i]), rank))
    return [[outline for i in sorted(indices) for outline in units[i]] for indices in chosen]


def pack_rows(outlines: Many[Outline], microbatch_tokens: int, multiple: int) -> list[list[Outline]]:
    """Packed rows of at most `microbatch_tokens`, first fit in the given order, a group's sequences in one row where they fit.
    The sequences of a group that is larger than a row are laid out one by one. ConfigError for a sequence that is."""
    room = microbatch_tokens - microbatch_tokens % multiple
    rows: list[list[Outline]] = []
    used: list[int] = []
    split = split_groups(outlines, microbatch_tokens, multiple)
    parts = [[[one] for one in unit] if unit[0].group in split else [unit] for unit in _units(outlines)]
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
    return rows


def split_groups(outlines: Many[Outline], microbatch_tokens: int, multiple: int) -> set[int]:
    """The groups that are larger than a row, and so are split over several."""
    room = microbatch_tokens - microbatch_tokens % multiple
    return {unit[0].group for unit in _units(outlines) if _num_tokens(unit) > room} - {-1}


def empty_microbatch(multiple: int) -> Microbatch:
    """A row of nothing but padding, for a rank with nothing left to do; it adds 0 to every loss."""
    return _fill([], [], multiple, set())


def _num_tokens(unit: Iterable[Outline]) -> int:
    return sum(outline.num_tokens for outline in unit)


def _units(outlines: Many[Outline]) -> list[list[Outline]]:
    """What belongs together: single sequences, and groups at the place of their first sequence."""
    units: list[list[Outline]] = []
    groups: dict[int, list[Outline]] = {}
    for outline in outlines:
        assert outline.num_prompt and outline.num_completion, "a sequence needs a prompt and a completion"
        if outline.group in groups:
            groups[outline.group].append(outline)
            continue
        units.append([outline])
        if outline.group >= 0:
            groups[outline.group] = units[-1]
    return units


def _fill(outlines: Many[Outline], sequences: Many[Sequence], multiple: int, split: set[int]) -> Microbatch:
    length = _num_tokens(outlines)
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
    nowhere = [-1] * bool(padding)
    groups = [sequence.group for sequence in sequences] + nowhere
    chosen = torch.tensor([sequence.chosen for sequence in sequences] + none, dtype=torch.bool)
    names = sequences[0].values.keys() if sequences else ()
    assert all(sequence.values.keys() == names for sequence in sequences), "sequences of one step have the same values"
    pairs, pair_weights = all_pairs([-1 if group in split else group for group in groups], chosen.tolist())

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values + none, dtype=torch.float32)

    return Microbatch(
        token_ids=token_ids,
        targets=targets,
        position_ids=position_ids,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        advantages=column([sequence.advantage for sequence in sequences]),
        rewards=column([sequence.reward for sequence in sequences]),
        values={name: column([sequence.values[name] for sequence in sequences]) for name in names},
        rollout_log_probs=rollout_log_probs,
        pairs=pairs,
        pair_weights=pair_weights,
        groups=torch.tensor(groups, dtype=torch.int64),
        places=torch.tensor([outline.place for outline in outlines] + nowhere, dtype=torch.int64),
        split=torch.tensor([group in split for group in groups], dtype=torch.bool),
        chosen=chosen,
    )
