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

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch

from engine.algorithms.pairs import all_pairs
from engine.config.options import Trainer
from engine.core.types import IGNORED, Batch, Microbatch, Sequence
from engine.megatron.dealing import Costs, Outline, outlines_of, pack_rows, split_groups, split_over_ranks

PADDING_TOKEN = 0


def make_batch(
    sequences: Many[Sequence], *, step: int, num_prompts: int, trainer: Trainer, dp_rank: int, attention: float = 0.0
) -> Batch:
    """One step's batch for a data-parallel rank; see `lay_out_batch`."""
    return lay_out_batch(
        outlines_of(sequences),
        sequences.__getitem__,
        step=step,
        num_prompts=num_prompts,
        trainer=trainer,
        dp_rank=dp_rank,
        attention=attention,
    )


def lay_out_batch(
    outlines: Many[Outline],
    sequence: Callable[[int], Sequence],
    *,
    step: int,
    num_prompts: int,
    trainer: Trainer,
    dp_rank: int,
    attention: float = 0.0,
) -> Batch:
    """The batch of one data-parallel rank: all ranks have equal counts and equally many microbatches. `sequence` gives the
    sequence at a place of the step, and is asked for this rank's only. `attention`: see Costs.

    `num_prompts` counts all prompts of the step, skipped ones included. ConfigError when a sequence exceeds
    trainer.microbatch_tokens.
    """
    costs, multiple = Costs(trainer.shares_prompts, attention), trainer.row_multiple
    parts = split_over_ranks(outlines, trainer.data_parallel, costs)
    rows = pack_rows(parts, trainer, costs)
    split = split_groups(parts[dp_rank], trainer, costs)
    own = [
        _fill(row, [sequence(one.place) for one in row], multiple, split, costs) if row else empty_microbatch(multiple)
        for row in rows[dp_rank]
    ]
    num_tokens = sum(outline.num_tokens for outline in outlines)
    return Batch(
        step=step,
        microbatches=tuple(own),
        num_prompts=num_prompts,
        num_groups=len({outline.group for outline in outlines} - {-1}),
        num_target_tokens=sum(outline.num_completion for outline in outlines),
        num_sequence_tokens=num_tokens,
        num_saved_tokens=num_tokens - sum(costs.num_tokens(row) for of_rank in rows for row in of_rank),
    )


def empty_microbatch(multiple: int) -> Microbatch:
    """A row of nothing but padding, for a rank with nothing left to do; it adds 0 to every loss."""
    return _fill([], [], multiple, set(), Costs(False))


@dataclass
class _Segments:
    """The segments of a row as they are written, one after another."""

    token_ids: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    rollout_log_probs: list[float] = field(default_factory=list)
    bounds: list[int] = field(default_factory=lambda: [0])
    parents: list[int] = field(default_factory=list)
    of: list[int | None] = field(default_factory=list)  # which of the row's sequences each is; None for what is no sequence

    def add(
        self,
        token_ids: Many[int],
        *,
        of: int | None = None,
        targets: Many[int] = (),
        log_probs: Many[float] = (),
        first: int = 0,
        start: int = 0,
        parent: int = -1,
    ) -> None:
        """A segment whose tokens stand at positions from `start` on, and predict `targets` from its `first` token on; rollout
        log-probs of the targets where there are any."""
        count = len(token_ids)
        self.token_ids += token_ids
        self.targets += [*[IGNORED] * first, *targets, *[IGNORED] * (count - first - len(targets))]
        self.rollout_log_probs += [*[0.0] * first, *log_probs, *[0.0] * (count - first - len(log_probs))]
        self.position_ids += range(start, start + count)
        self.bounds.append(self.bounds[-1] + count)
        self.parents.append(parent)
        self.of.append(of)


def _fill(outlines: Many[Outline], sequences: Many[Sequence], multiple: int, split: set[int], costs: Costs) -> Microbatch:
    segments = _Segments()
    place_in_row = {outline.place: i for i, outline in enumerate(outlines)}
    for members in costs.by_prompt(outlines):
        indices = [place_in_row[outline.place] for outline in members]
        prompt, parent = sequences[indices[0]].prompt_ids, -1
        if len(indices) > 1 and len(prompt) > 1:
            parent = len(segments.parents)
            segments.add(prompt[:-1])
        for i in indices:
            one = sequences[i]
            alone = len(indices) == 1  # and whole; the last token of its prompt predicts the first of its completion
            segments.add(
                one.prompt_ids + one.completion_ids if alone else (prompt[-1], *one.completion_ids[:-1]),
                of=i,
                targets=one.completion_ids,
                log_probs=one.rollout_log_probs,
                first=len(prompt) - 1 if alone else 0,
                start=0 if alone else len(prompt) - 1,
                parent=parent,
            )
    if padding := -segments.bounds[-1] % multiple if sequences else multiple:
        segments.add([PADDING_TOKEN] * padding)
    groups = [-1 if i is None else sequences[i].group for i in segments.of]
    chosen = [i is not None and sequences[i].chosen for i in segments.of]
    names = sequences[0].values.keys() if sequences else ()
    assert all(sequence.values.keys() == names for sequence in sequences), "sequences of one step have the same values"
    pairs, pair_weights = all_pairs([-1 if group in split else group for group in groups], chosen)
    targets = torch.tensor(segments.targets, dtype=torch.int64)
    target_positions = (targets != IGNORED).nonzero().squeeze(1)

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor([0.0 if i is None else values[i] for i in segments.of], dtype=torch.float32)

    return Microbatch(
        token_ids=torch.tensor(segments.token_ids, dtype=torch.int64),
        targets=targets,
        target_positions=target_positions if sequences else torch.zeros(1, dtype=torch.int64),
        position_ids=torch.tensor(segments.position_ids, dtype=torch.int64),
        cu_seqlens=torch.tensor(segments.bounds, dtype=torch.int32),
        parents=torch.tensor(segments.parents, dtype=torch.int64),
        advantages=column([sequence.advantage for sequence in sequences]),
        rewards=column([sequence.reward for sequence in sequences]),
        values={name: column([sequence.values[name] for sequence in sequences]) for name in names},
        rollout_log_probs=torch.tensor(segments.rollout_log_probs, dtype=torch.float32),
        pairs=pairs,
        pair_weights=pair_weights,
        groups=torch.tensor(groups, dtype=torch.int64),
        places=torch.tensor([-1 if i is None else outlines[i].place for i in segments.of], dtype=torch.int64),
        split=torch.tensor([group in split for group in groups], dtype=torch.bool),
        chosen=torch.tensor(chosen, dtype=torch.bool),
    )
