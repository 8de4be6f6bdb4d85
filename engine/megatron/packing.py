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
from engine.megatron.dealing import Share, deal_step
from engine.megatron.outlines import Costs, Outline, outlines_of

PADDING_TOKEN = 0


def make_batch(
    sequences: Many[Sequence],
    *,
    step: int,
    num_prompts: int,
    trainer: Trainer,
    dp_rank: int,
    attention: float = 0.0,
    cuts_groups: bool = False,
) -> Batch:
    """One step's batch for a data-parallel rank that has all sequences of it; see `deal_step`."""
    shares = deal_step(
        outlines_of(sequences),
        step=step,
        num_prompts=num_prompts,
        trainer=trainer,
        attention=attention,
        cuts_groups=cuts_groups,
    )
    return fill_batch(shares[dp_rank], sequences.__getitem__, trainer)


def fill_batch(share: Share, sequence: Callable[[int], Sequence], trainer: Trainer) -> Batch:
    """The batch of the data-parallel rank whose share it is. `sequence` gives the sequence at a place of the step, and is asked
    for those of the share only."""
    costs, multiple = Costs(trainer.shares_prompts), trainer.row_multiple
    tokens = [_row_tokens(costs.num_tokens(row), multiple) for row in share.rows]
    rising = np.arange(max(tokens, default=0))
    memory = _Memory(sum(_Memory.of_row(count, _num_targets(row)) for count, row in zip(tokens, share.rows, strict=True)))
    own = [_fill(row, [sequence(one.place) for one in row], multiple, share.split, costs, memory, rising) for row in share.rows]
    return Batch(
        step=share.step,
        microbatches=tuple(own),
        num_prompts=share.num_prompts,
        num_groups=share.num_groups,
        num_target_tokens=share.num_target_tokens,
        num_sequence_tokens=share.num_sequence_tokens,
        num_saved_tokens=share.num_saved_tokens,
        num_spread_groups=share.num_spread_groups,
        num_spread_rows=share.num_spread_rows,
    )


def empty_microbatch(multiple: int) -> Microbatch:
    """A row of nothing but padding, for a rank with nothing left to do; it adds 0 to every loss."""
    return _fill([], [], multiple, (), Costs(False), _Memory(_Memory.of_row(multiple, 0)), np.arange(multiple))


def _row_tokens(num_tokens: int, multiple: int) -> int:
    """The length of a row with so many tokens, padding included; a row without any is nothing but padding."""
    return num_tokens + -num_tokens % multiple if num_tokens else multiple


def _num_targets(row: Many[Outline]) -> int:
    return sum(one.num_completion for one in row)


class _Memory:
    """Memory for the columns of a rank's rows, in one piece, so that the system maps it in large pages: what a step's rows are
    written to is new every step, and page by page that takes longer than the writing."""

    def __init__(self, count: int) -> None:
        """`count`: numbers of 8 bytes."""
        self._numbers, self._place = np.empty(count, np.int64), 0

    def take(self, count: int) -> np.ndarray:
        """The next [count] int64, of any value."""
        start, self._place = self._place, self._place + count
        assert self._place <= self._numbers.size, (self._place, self._numbers.size)
        return self._numbers[start : self._place]

    def take_float32(self, count: int) -> np.ndarray:
        """The next [count] float32, of any value."""
        return self.take(-(-count // 2)).view(np.float32)[:count]

    @staticmethod
    def of_row(num_tokens: int, num_targets: int) -> int:
        """What a row's columns need."""
        return 3 * num_tokens + max(1, num_targets) + -(-num_tokens // 2)


class _Segments:
    """The columns of a row as its segments are put down, one after another. A position that is not said to have a target has
    none, and a rollout log-prob of 0."""

    def __init__(self, num_tokens: int, num_targets: int, memory: _Memory, rising: np.ndarray) -> None:
        """`rising`: 0, 1, 2 and so on, at least as many as the row has tokens."""
        self._rising, self._num_targets = rising, 0
        self.token_ids, self.targets, self.position_ids = (memory.take(num_tokens) for _ in range(3))
        self.target_positions = memory.take(max(1, num_targets))  # of a row without one: position 0
        self.rollout_log_probs = memory.take_float32(num_tokens)
        self.target_positions[0] = 0
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
        begin = end = self.bounds[-1]
        for part in token_ids:
            self.token_ids[end : end + part.size] = part
            end += part.size
        self.position_ids[begin:end] = self._rising[start : start + end - begin]
        first += begin
        last = first + targets.size
        self.targets[begin:first] = IGNORED
        self.targets[first:last] = targets
        self.targets[last:end] = IGNORED
        self.rollout_log_probs[begin:first] = 0.0
        self.rollout_log_probs[first : first + log_probs.size] = log_probs
        self.rollout_log_probs[first + log_probs.size : end] = 0.0
        known, self._num_targets = self._num_targets, self._num_targets + targets.size
        self.target_positions[known : self._num_targets] = self._rising[first:last]
        self.bounds.append(end)
        self.parents.append(parent)
        self.of.append(of)


def _fill(
    outlines: Many[Outline],
    sequences: Many[Sequence],
    multiple: int,
    split: Collection[int],
    costs: Costs,
    memory: _Memory,
    rising: np.ndarray,
) -> Microbatch:
    """A row with these sequences, whose columns are taken from `memory`; `rising`: see _Segments."""
    num_tokens, num_targets = costs.num_tokens(outlines), _num_targets(outlines)
    length = _row_tokens(num_tokens, multiple)
    segments = _Segments(length, num_targets, memory, rising)
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
    if length > num_tokens:
        segments.add(np.full(length - num_tokens, PADDING_TOKEN, np.int32))
    groups = [-1 if i is None else sequences[i].group for i in segments.of]
    chosen = [i is not None and sequences[i].chosen for i in segments.of]
    names = sequences[0].values.keys() if sequences else ()
    assert all(sequence.values.keys() == names for sequence in sequences), "sequences of one step have the same values"
    pairs, pair_weights = all_pairs([-1 if group in split else group for group in groups], chosen)

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor([0.0 if i is None else values[i] for i in segments.of], dtype=torch.float32)

    return Microbatch(
        token_ids=torch.from_numpy(segments.token_ids),
        targets=torch.from_numpy(segments.targets),
        target_positions=torch.from_numpy(segments.target_positions),
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
