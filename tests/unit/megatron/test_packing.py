"""Rows: what a position predicts, who shares a row, what padding is; and the dealing to data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.options import Trainer
from engine.core.errors import ConfigError
from engine.core.types import IGNORED, Batch, Microbatch, Sequence
from engine.megatron.packing import (
    empty_microbatch,
    lay_out_batch,
    make_batch,
    outlines_of,
    split_over_ranks,
)

PAIR = [
    Sequence((1, 2), (3, 4, 5), (-0.1, -0.2, -0.3), advantage=0.5, group=0, chosen=False),
    Sequence((1, 2), (6,), (-0.4,), advantage=-0.5, group=0, chosen=True),
]


def pack(sequences: list[Sequence], microbatch_tokens: int, multiple: int) -> tuple[Microbatch, ...]:
    """The rows of a single rank, whose lengths are a multiple of `multiple`."""
    tensor_parallel = {"tensor_parallel": multiple, "sequence_parallel": True} if multiple > 1 else {}
    trainer = Trainer.model_validate({"microbatch_tokens": microbatch_tokens, **tensor_parallel})
    return make_batch(sequences, step=0, num_prompts=1, trainer=trainer, dp_rank=0).microbatches


def make_batches(sequences: list[Sequence], *, step: int, num_prompts: int, trainer: Trainer) -> list[Batch]:
    """The batches of all data-parallel ranks."""
    ranks = range(trainer.data_parallel)
    return [make_batch(sequences, step=step, num_prompts=num_prompts, trainer=trainer, dp_rank=rank) for rank in ranks]


@st.composite
def sequence_lists(draw: st.DrawFn) -> list[Sequence]:
    """Single sequences and pairs in any order, the two of a pair not always neighbours; all tokens distinct."""
    made: list[Sequence] = []
    next_token = iter(range(1, 100_000))

    def add(pair: int, chosen: bool) -> None:
        prompt = tuple(next(next_token) for _ in range(draw(st.integers(1, 5))))
        completion = tuple(next(next_token) for _ in range(draw(st.integers(1, 7))))
        made.append(Sequence(prompt, completion, tuple(-float(t) for t in completion), 0.0, pair, chosen))

    for pair in range(draw(st.integers(0, 6))):
        for chosen in (True, False) if draw(st.booleans()) else (False, True):
            add(pair, chosen)
    for _ in range(draw(st.integers(0, 6))):
        add(-1, False)
    return draw(st.permutations(made))


def contents(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(tokens, targets) of every segment that has a target."""
    found = []
    for row in batch.microbatches:
        bounds = row.cu_seqlens.tolist()
        for start, end in pairwise(bounds):
            targets = tuple(row.targets[start:end].tolist())
            if set(targets) != {IGNORED}:
                found.append((tuple(row.token_ids[start:end].tolist()), targets))
    return found


def test_worked_example() -> None:
    """A pair in one row of a multiple of 4: the last prompt token predicts the first completion token; padding last."""
    (row,) = pack(PAIR, 16, 4)
    assert row.token_ids.tolist()[:8] == [1, 2, 3, 4, 5, 1, 2, 6]
    assert row.targets.tolist() == [IGNORED, 3, 4, 5, IGNORED, IGNORED, 6, IGNORED]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert row.cu_seqlens.tolist() == [0, 5, 8]
    assert row.advantages.tolist() == [0.5, -0.5]
    assert row.pairs.tolist() == [[1, 0]]
    torch.testing.assert_close(row.rollout_log_probs, torch.tensor([0, -0.1, -0.2, -0.3, 0, 0, -0.4, 0]))
    (padded,) = pack(PAIR, 16, 3)
    assert padded.cu_seqlens.tolist() == [0, 5, 8, 9]
    assert padded.targets[8].item() == IGNORED
    assert padded.advantages.tolist() == [0.5, -0.5, 0.0]


@given(sequence_lists(), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_every_sequence_lands_once(
    sequences: list[Sequence], dp_size: int, pp_size: int, virtual: bool, sequence_parallel: bool
) -> None:
    """Over all ranks: nothing lost or doubled, pairs in one row, limits kept, equal numbers of rows, deterministic."""
    tp_size = 2 if sequence_parallel else 1
    trainer = Trainer(
        tensor_parallel=tp_size,
        pipeline_parallel=pp_size,
        virtual_pipeline=2 if virtual and pp_size > 1 else 1,
        data_parallel=dp_size,
        sequence_parallel=sequence_parallel,
        microbatch_tokens=25,
    )
    batches = make_batches(sequences, step=3, num_prompts=9, trainer=trainer)
    expected = sorted(
        (s.prompt_ids + s.completion_ids, (IGNORED,) * (len(s.prompt_ids) - 1) + s.completion_ids + (IGNORED,))
        for s in sequences
    )
    assert sorted(segment for batch in batches for segment in contents(batch)) == expected
    assert len({len(batch.microbatches) for batch in batches}) == 1
    assert trainer.virtual_pipeline == 1 or len(batches[0].microbatches) % pp_size == 0
    num_pairs = 0
    by_first_token = {(s.prompt_ids + s.completion_ids)[0]: s for s in sequences}
    for row in (row for batch in batches for row in batch.microbatches):
        assert 0 < row.token_ids.numel() <= 25
        assert row.token_ids.numel() % tp_size == 0
        assert row.advantages.numel() == row.cu_seqlens.numel() - 1
        for both in row.pairs.tolist():
            chosen, rejected = (by_first_token[int(row.token_ids[row.cu_seqlens[index]])] for index in both)
            assert chosen.group == rejected.group >= 0
            assert chosen.chosen
            assert not rejected.chosen
            num_pairs += 1
    assert num_pairs == batches[0].num_groups == sum(s.chosen for s in sequences)
    assert batches[0].num_target_tokens == sum(len(s.completion_ids) for s in sequences)
    again = make_batches(sequences, step=3, num_prompts=9, trainer=trainer)
    assert [contents(batch) for batch in again] == [contents(batch) for batch in batches]


SEQUENCE_PARALLEL = {"tensor_parallel": 2, "sequence_parallel": True}
ROWS = [  # trainer options, what every row's length is a multiple of; rows of 512 tokens at most
    ({"fp8": "delayed"}, 16),
    ({"fp8": "current", **SEQUENCE_PARALLEL}, 32),
    ({"fp8": "blockwise"}, 128),
    ({"overlap_tensor_parallel": True, **SEQUENCE_PARALLEL}, 512),
    ({"overlap_tensor_parallel": True, "fp8": "delayed", **SEQUENCE_PARALLEL}, 512),
]


@pytest.mark.parametrize(("options", "multiple"), ROWS)
def test_fp8_and_overlap_pad_every_row_and_nothing_else(options: dict[str, Any], multiple: int) -> None:
    """Rows of whole blocks, or all of one length, also the empty ones; what is trained on is the same."""
    sequences = [Sequence((1,), tuple(range(count)), ()) for count in (300, 40, 260, 7, 511)]
    (plain,) = make_batches(sequences, step=0, num_prompts=5, trainer=Trainer(microbatch_tokens=512))
    trainer = Trainer.model_validate({"microbatch_tokens": 512, **options})
    (padded,) = make_batches(sequences, step=0, num_prompts=5, trainer=trainer)
    lengths = [row.token_ids.numel() for row in padded.microbatches]
    assert all(0 < length <= 512 and length % multiple == 0 for length in lengths)
    assert {length % multiple for length in [row.token_ids.numel() for row in plain.microbatches]} != {0}
    assert sorted(contents(padded)) == sorted(contents(plain))
    assert empty_microbatch(trainer.row_multiple).token_ids.numel() == multiple


def test_ranks_are_balanced_and_ties_go_to_the_lower() -> None:
    """Largest first: 5, 4, 3, 2 tokens deal as 5 + 2 and 4 + 3, each rank in the given order."""
    sizes = (2, 4, 3, 5)
    sequences = [Sequence((1,), tuple(range(size - 1)), ()) for size in sizes]
    dealt = [[sequence.num_tokens for sequence in part] for part in split_over_ranks(outlines_of(sequences), 2)]
    assert dealt == [[2, 5], [4, 3]]
    assert split_over_ranks([], 2) == [[], []]


def test_a_rank_asks_for_its_own_sequences_only() -> None:
    """Each sequence is asked for by one of two ranks; the counts are the whole step's on both."""
    sequences = [*PAIR, *(Sequence((1,), tuple(range(2 + i)), ()) for i in range(5))]
    trainer = Trainer(data_parallel=2, microbatch_tokens=16)
    asked: list[list[int]] = [[], []]

    def sequence_for(rank: int) -> Callable[[int], Sequence]:
        def sequence(place: int) -> Sequence:
            asked[rank].append(place)
            return sequences[place]

        return sequence

    batches = [
        lay_out_batch(outlines_of(sequences), sequence_for(rank), step=0, num_prompts=6, trainer=trainer, dp_rank=rank)
        for rank in range(2)
    ]
    assert sorted(asked[0] + asked[1]) == list(range(7))
    assert all(asked)
    assert {(batch.num_target_tokens, batch.num_groups, len(batch.microbatches)) for batch in batches} == {(24, 1, 2)}


def test_rewards_and_named_values_stand_beside_their_sequence() -> None:
    """And 0 for padding; an empty row has no names."""
    named = [replace(s, reward=float(i + 1), values={"quality": i / 2}) for i, s in enumerate(PAIR)]
    (row,) = pack(named, 16, 3)
    assert row.rewards.tolist() == [1.0, 2.0, 0.0]
    assert {name: values.tolist() for name, values in row.values.items()} == {"quality": [0.0, 0.5, 0.0]}
    assert empty_microbatch(4).values == {}


def test_empty_row_adds_nothing() -> None:
    """Padding only: no target, no pair, a length that sequence parallel can cut."""
    row = empty_microbatch(4)
    assert row.token_ids.numel() == 4
    assert set(row.targets.tolist()) == {IGNORED}
    assert row.pairs.shape == (0, 2)
    assert row.cu_seqlens.tolist() == [0, 4]


def test_a_pair_larger_than_a_row_is_split_and_marked() -> None:
    """8 tokens together do not fit 7: a row each, no pair in either, both marked with their group."""
    rows = pack([*PAIR, Sequence((8,), (9,), ())], 7, 2)
    assert [row.pairs.numel() for row in rows] == [0, 0]
    assert [row.split.tolist() for row in rows] == [[True, False], [True, False, False]]
    assert [row.groups.tolist() for row in rows] == [[0, -1], [0, -1, -1]]
    assert [row.places.tolist() for row in rows] == [[0, -1], [1, 2, -1]]
    assert [row.chosen.tolist() for row in rows] == [[False, False], [True, False, False]]


def test_a_sequence_larger_than_a_row_is_refused() -> None:
    """5 tokens do not fit 4: the option, the rule and the value to use."""
    with pytest.raises(ConfigError, match=r"trainer\.microbatch_tokens must hold .* found 4 < 5: raise it to 5"):
        pack(PAIR, 4, 1)
