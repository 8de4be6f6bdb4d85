"""Lays training sequences into the packed rows of a data-parallel rank. Which sequence stands where follows from lengths,
groups and prompts alone (dealing.py), so a rank packs only its own rows. It computes no loss and asks no process group.

A row is a list of segments. A sequence is one, prompt and completion; samples that share a row and a prompt have one for the
prompt without its last token, and one each that begins with that token and goes on with their completion, without its last:

    tokens     q q q q | q a a a | q b b | q c c c c | r r r d d
    segment    prompt    sample    sample  sample      a sequence that shares with nobody
    positions  0 1 2 3 | 4 5 6 7 | 4 5 6 | 4 5 6 7 8 | 0 1 2 3 4
    targets    . . . . | a a a a | b b b | c c c c c | . . d d .
    parents    -1      | 0       | 0     | 0         | -1

A sample attends to itself and to the segment that its parent is. What a prompt's segment and padding have of everything that
belongs to a sequence (advantage, group, place) is that of no sequence.

Shape legend: T tokens of a packed row, B segments of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from collections.abc import Sequence as Many

import numpy as np
import torch

from engine.algorithms.pairs import all_pairs
from engine.config.options import Trainer
from engine.core.arrays import NO_LOG_PROBS, NO_TOKENS
from engine.core.types import IGNORED, Batch, Microbatch, Sequence
from engine.megatron.dealing import Costs, Outline, Share, deal_step, outlines_of

PADDING_TOKEN = 0


def make_batch(
    sequences: Many[Sequence], *, step: int, num_prompts: int, trainer: Trainer, dp_rank: int, attention: float = 0.0
) -> Batch:
    """One step's batch for a data-parallel rank that has all sequences of it; see `deal_step`."""
    outlines = outlines_of(sequences)
    share = deal_step(outlines, step=step, num_prompts=num_prompts, trainer=trainer, attention=attention)[dp_rank]
    return fill_batch(share, sequences.__getitem__, trainer)


def fill_batch(share: Share, sequence: Callable[[int], Sequence], trainer: Trainer) -> Batch:
    """The batch of the data-parallel rank whose share it is. `sequence` gives the sequence at a place of the step, and is asked
    for those of the share only."""
    costs, multiple = Costs(trainer.shares_prompts), trainer.row_multiple
    own = [
        _fill(row, [sequence(one.place) for one in row], multiple, share.split, costs) if row else empty_microbatch(multiple)
        for row in share.rows
    ]
    return Batch(
        step=share.step,
        microbatches=tuple(own),
        num_prompts=share.num_prompts,
        num_groups=share.num_groups,
        num_target_tokens=share.num_target_tokens,
        num_sequence_tokens=share.num_sequence_tokens,
        num_saved_tokens=share.num_saved_tokens,
    )


def empty_microbatch(multiple: int) -> Microbatch:
    """A row of nothing but padding, for a rank with nothing left to do; it adds 0 to every loss."""
    return _fill([], [], multiple, (), Costs(False))


class _Segments:
    """The segments of a row as they are put down, one after another: parts of its columns, which `np.concatenate` joins."""

    def __init__(self, most: int) -> None:
        """`most`: tokens of the row, which no position of it exceeds."""
        self._ignored, self._zeros, self._rising = np.full(most, IGNORED), np.zeros(most, np.float32), np.arange(most)
        self.token_ids: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.rollout_log_probs: list[np.ndarray] = []
        self.position_ids: list[np.ndarray] = []
        self.bounds = [0]
        self.parents: list[int] = []
        self.of: list[int | None] = []  # which of the row's sequences each is; None for what is no sequence

    def add(
        self,
        *token_ids: np.ndarray,
        of: int | None = None,
        targets: np.ndarray = NO_TOKENS.array,
        log_probs: np.ndarray = NO_LOG_PROBS.array,
        first: int = 0,
        start: int = 0,
        parent: int = -1,
    ) -> None:
        """A segment whose tokens, which come in parts, stand at positions from `start` on, and predict `targets` from its
        `first` token on; rollout log-probs of the targets where there are any."""
        count = sum(part.size for part in token_ids)
        self.token_ids += token_ids
        self.targets += (self._ignored[:first], targets, self._ignored[: count - first - targets.size])
        self.rollout_log_probs += (self._zeros[:first], log_probs, self._zeros[: count - first - log_probs.size])
        self.position_ids.append(self._rising[start : start + count])
        self.bounds.append(self.bounds[-1] + count)
        self.parents.append(parent)
        self.of.append(of)

    @staticmethod
    def column(parts: list[np.ndarray]) -> torch.Tensor:
        """A column [T] int64 of its parts."""
        return torch.from_numpy(np.concatenate(parts, dtype=np.int64))


def _fill(
    outlines: Many[Outline], sequences: Many[Sequence], multiple: int, split: Collection[int], costs: Costs
) -> Microbatch:
    num_tokens = costs.num_tokens(outlines)
    padding = -num_tokens % multiple if sequences else multiple
    segments = _Segments(num_tokens + padding)
    place_in_row = {outline.place: i for i, outline in enumerate(outlines)}
    for members in costs.by_prompt(outlines):
        indices = [place_in_row[outline.place] for outline in members]
        prompt, parent = sequences[indices[0]].prompt_ids.array, -1
        if len(indices) > 1 and prompt.size > 1:
            parent = len(segments.parents)
            segments.add(prompt[:-1])
        for i in indices:
            completion = sequences[i].completion_ids.array
            alone = len(indices) == 1  # and whole; the last token of its prompt predicts the first of its completion
            segments.add(
                *((prompt, completion) if alone else (prompt[-1:], completion[:-1])),
                of=i,
                targets=completion,
                log_probs=sequences[i].rollout_log_probs.array,
                first=prompt.size - 1 if alone else 0,
                start=0 if alone else prompt.size - 1,
                parent=parent,
            )
    assert segments.bounds[-1] == num_tokens, (segments.bounds, num_tokens)
    if padding:
        segments.add(np.full(padding, PADDING_TOKEN, np.int32))
    groups = [-1 if i is None else sequences[i].group for i in segments.of]
    chosen = [i is not None and sequences[i].chosen for i in segments.of]
    names = sequences[0].values.keys() if sequences else ()
    assert all(sequence.values.keys() == names for sequence in sequences), "sequences of one step have the same values"
    pairs, pair_weights = all_pairs([-1 if group in split else group for group in groups], chosen)
    targets = segments.column(segments.targets)
    target_positions = torch.from_numpy(np.flatnonzero(targets.numpy() != IGNORED))

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor([0.0 if i is None else values[i] for i in segments.of], dtype=torch.float32)

    return Microbatch(
        token_ids=segments.column(segments.token_ids),
        targets=targets,
        target_positions=target_positions if sequences else torch.zeros(1, dtype=torch.int64),
        position_ids=segments.column(segments.position_ids),
        cu_seqlens=torch.tensor(segments.bounds, dtype=torch.int32),
        parents=torch.tensor(segments.parents, dtype=torch.int64),
        advantages=column([sequence.advantage for sequence in sequences]),
        rewards=column([sequence.reward for sequence in sequences]),
        values={name: column([sequence.values[name] for sequence in sequences]) for name in names},
        rollout_log_probs=torch.from_numpy(np.concatenate(segments.rollout_log_probs)),
        pairs=pairs,
        pair_weights=pair_weights,
        groups=torch.tensor(groups, dtype=torch.int64),
        places=torch.tensor([-1 if i is None else outlines[i].place for i in segments.of], dtype=torch.int64),
        split=torch.tensor([group in split for group in groups], dtype=torch.bool),
        chosen=torch.tensor(chosen, dtype=torch.bool),
    )
