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
from engine.core.arrays import NO_LOG_PROBS, NO_TOKENS, LogProbs, TokenIds
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
    """The segments of a row of so many tokens as they are written, one after another."""

    def __init__(self, num_tokens: int) -> None:
        self.token_ids = np.full(num_tokens, PADDING_TOKEN, np.int64)
        self.targets = np.full(num_tokens, IGNORED, np.int64)
        self.position_ids = np.zeros(num_tokens, np.int64)
        self.rollout_log_probs = np.zeros(num_tokens, np.float32)
        self.bounds = [0]
        self.parents: list[int] = []
        self.of: list[int | None] = []  # which of the row's sequences each is; None for what is no sequence

    def add(
        self,
        *token_ids: np.ndarray,
        of: int | None = None,
        targets: TokenIds = NO_TOKENS,
        log_probs: LogProbs = NO_LOG_PROBS,
        first: int = 0,
        start: int = 0,
        parent: int = -1,
    ) -> None:
        """A segment whose tokens, which come in parts, stand at positions from `start` on, and predict `targets` from its
        `first` token on; rollout log-probs of the targets where there are any."""
        begin = end = self.bounds[-1]
        for part in token_ids:
            self.token_ids[end : end + part.size] = part
            end += part.size
        self.position_ids[begin:end] = np.arange(start, start + end - begin)
        self.targets[begin + first : begin + first + len(targets)] = targets.array
        self.rollout_log_probs[begin + first : begin + first + len(log_probs)] = log_probs.array
        self.bounds.append(end)
        self.parents.append(parent)
        self.of.append(of)


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
            one = sequences[i]
            completion = one.completion_ids.array
            alone = len(indices) == 1  # and whole; the last token of its prompt predicts the first of its completion
            segments.add(
                *((prompt, completion) if alone else (prompt[-1:], completion[:-1])),
                of=i,
                targets=one.completion_ids,
                log_probs=one.rollout_log_probs,
                first=prompt.size - 1 if alone else 0,
                start=0 if alone else prompt.size - 1,
                parent=parent,
            )
    assert segments.bounds[-1] == num_tokens, (segments.bounds, num_tokens)
    if padding:
        segments.add(np.full(padding, PADDING_TOKEN))
    groups = [-1 if i is None else sequences[i].group for i in segments.of]
    chosen = [i is not None and sequences[i].chosen for i in segments.of]
    names = sequences[0].values.keys() if sequences else ()
    assert all(sequence.values.keys() == names for sequence in sequences), "sequences of one step have the same values"
    pairs, pair_weights = all_pairs([-1 if group in split else group for group in groups], chosen)
    targets = torch.from_numpy(segments.targets)
    target_positions = (targets != IGNORED).nonzero().squeeze(1)

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor([0.0 if i is None else values[i] for i in segments.of], dtype=torch.float32)

    return Microbatch(
        token_ids=torch.from_numpy(segments.token_ids),
        targets=targets,
        target_positions=target_positions if sequences else torch.zeros(1, dtype=torch.int64),
        position_ids=torch.from_numpy(segments.position_ids),
        cu_seqlens=torch.tensor(segments.bounds, dtype=torch.int32),
        parents=torch.tensor(segments.parents, dtype=torch.int64),
        advantages=column([sequence.advantage for sequence in sequences]),
        rewards=column([sequence.reward for sequence in sequences]),
        values={name: column([sequence.values[name] for sequence in sequences]) for name in names},
        rollout_log_probs=torch.from_numpy(segments.rollout_log_probs),
        pairs=pairs,
        pair_weights=pair_weights,
        groups=torch.tensor(groups, dtype=torch.int64),
        places=torch.tensor([-1 if i is None else outlines[i].place for i in segments.of], dtype=torch.int64),
        split=torch.tensor([group in split for group in groups], dtype=torch.bool),
        chosen=torch.tensor(chosen, dtype=torch.bool),
    )
