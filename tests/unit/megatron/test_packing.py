"""Rows: what a position predicts, who shares a row, what padding is; and the dealing to data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.options import Trainer
from engine.core.errors import ConfigError
from engine.core.types import IGNORED, Batch, Microbatch, Sequence
from engine.megatron import pipelined_rows
from engine.megatron.dealing import deal_step
from engine.megatron.outlines import outlines_of
from engine.megatron.packing import empty_microbatch, fill_batch, make_batch
from tests.rollouts import make_sequence

PAIR = [
    make_sequence((1, 2), (3, 4, 5), (-0.1, -0.2, -0.3), advantage=0.5, group=0, chosen=False),
    make_sequence((1, 2), (6,), (-0.4,), advantage=-0.5, group=0, chosen=True),
]


def pack(sequences: list[Sequence], microbatch_tokens: int, multiple: int, share: bool = True) -> tuple[Microbatch, ...]:
    """The rows of a single rank, whose lengths are a multiple of `multiple`."""
    tensor_parallel = {"tensor_parallel": multiple, "sequence_parallel": True} if multiple > 1 else {}
    options = {"microbatch_tokens": microbatch_tokens, "share_prompts": share, **tensor_parallel}
    trainer = Trainer.model_validate(options)
    return make_batch(sequences, step=0, num_prompts=1, trainer=trainer, dp_rank=0).microbatches


def make_batches(sequences: list[Sequence], *, step: int, num_prompts: int, trainer: Trainer) -> list[Batch]:
    """The batches of all data-parallel ranks."""
    ranks = range(trainer.data_parallel)
    return [make_batch(sequences, step=step, num_prompts=num_prompts, trainer=trainer, dp_rank=rank) for rank in ranks]


@st.composite
def sequence_lists(draw: st.DrawFn) -> list[Sequence]:
    """Single sequences, and pairs whose two are not always neighbours, in any order; few prompts, and completions that are all
    different."""
    made: list[Sequence] = []
    next_token = iter(range(100, 100_000))
    prompts = [tuple(range(10 * i, 10 * i + draw(st.integers(1, 5)))) for i in range(4)]

    def add(pair: int, chosen: bool, prompt: tuple[int, ...]) -> None:
        completion = tuple(next(next_token) for _ in range(draw(st.integers(1, 7))))
        made.append(make_sequence(prompt, completion, tuple(-float(t) for t in completion), 0.0, pair, chosen))

    for pair in range(draw(st.integers(0, 6))):
        prompt = draw(st.sampled_from(prompts))
        for chosen in (True, False) if draw(st.booleans()) else (False, True):
            add(pair, chosen, prompt)
    for _ in range(draw(st.integers(0, 6))):
        add(-1, False, draw(st.sampled_from(prompts)))
    return draw(st.permutations(made))


def read(row: Microbatch) -> list[tuple[tuple[int, ...], tuple[int, ...]] | None]:
    """(prompt, completion) of every segment, as layers see it, None for a segment that is no sequence. What a sample's tokens
    stand at, attend to and predict is checked on the way."""
    found: list[tuple[tuple[int, ...], tuple[int, ...]] | None] = []
    segments = [slice(start, end) for start, end in pairwise(row.cu_seqlens.tolist())]
    assert row.target_positions.tolist() == [t for t, target in enumerate(row.targets.tolist()) if target != IGNORED] or [0]
    for segment, parent in zip(segments, row.parents.tolist(), strict=True):
        before = segments[parent] if parent >= 0 else slice(0, 0)
        tokens = row.token_ids[before].tolist() + row.token_ids[segment].tolist()
        assert row.position_ids[before].tolist() + row.position_ids[segment].tolist() == list(range(len(tokens)))
        targets = row.targets[before].tolist() + row.targets[segment].tolist()
        first = next((i for i, target in enumerate(targets) if target != IGNORED), None)
        if first is None:
            found.append(None)
            continue
        completion = [target for target in targets if target != IGNORED]
        assert targets[first : first + len(completion)] == completion
        assert [*tokens, completion[-1]][first + 1 :][: len(completion)] == completion
        found.append((tuple(tokens[: first + 1]), tuple(completion)))
    return found


def contents(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(prompt, completion) of every sequence of a rank."""
    return [one for row in batch.microbatches for one in read(row) if one is not None]


def test_worked_example() -> None:
    """A pair in one row of a multiple of 4: the last prompt token predicts the first completion token; padding last."""
    (row,) = pack(PAIR, 16, 4, share=False)
    assert row.token_ids.tolist()[:8] == [1, 2, 3, 4, 5, 1, 2, 6]
    assert row.targets.tolist() == [IGNORED, 3, 4, 5, IGNORED, IGNORED, 6, IGNORED]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert row.cu_seqlens.tolist() == [0, 5, 8]
    assert row.advantages.tolist() == [0.5, -0.5]
    assert row.pairs.tolist() == [[1, 0]]
    torch.testing.assert_close(row.rollout_log_probs, torch.tensor([0, -0.1, -0.2, -0.3, 0, 0, -0.4, 0]))
    (padded,) = pack(PAIR, 16, 3, share=False)
    assert padded.cu_seqlens.tolist() == [0, 5, 8, 9]
    assert padded.targets[8].item() == IGNORED
    assert padded.advantages.tolist() == [0.5, -0.5, 0.0]


def test_worked_example_of_a_shared_prompt() -> None:
    """The same pair, and a sequence with a prompt of its own: the prompt once without its last token, then each sample from
    that token on, without its last; a sequence alone is whole."""
    (row,) = pack([*PAIR, make_sequence((7, 8), (9,), (-0.5,))], 16, 3)
    assert row.cu_seqlens.tolist() == [0, 1, 4, 5, 8, 9]
    assert row.token_ids.tolist() == [1, 2, 3, 4, 2, 7, 8, 9, 0]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 1, 0, 1, 2, 0]
    assert row.targets.tolist() == [IGNORED, 3, 4, 5, 6, IGNORED, 9, IGNORED, IGNORED]
    assert row.parents.tolist() == [-1, 0, 0, -1, -1]
    assert row.target_positions.tolist() == [1, 2, 3, 4, 6]
    assert row.advantages.tolist() == [0.0, 0.5, -0.5, 0.0, 0.0]
    assert row.groups.tolist() == [-1, 0, 0, -1, -1]
    assert row.places.tolist() == [-1, 0, 1, 2, -1]
    assert row.pairs.tolist() == [[2, 1]]
    torch.testing.assert_close(row.rollout_log_probs, torch.tensor([0, -0.1, -0.2, -0.3, -0.4, 0, -0.5, 0, 0]))
    batch = make_batch([*PAIR, make_sequence((7, 8), (9,), ())], step=0, num_prompts=2, trainer=Trainer(), dp_rank=0)
    assert (batch.num_sequence_tokens, batch.num_saved_tokens) == (11, 3)


@given(
    sequence_lists(),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from((1, 128)),
)
@settings(max_examples=100, deadline=None)
def test_every_sequence_lands_once(
    sequences: list[Sequence], dp_size: int, pp_size: int, virtual: bool, sequence_parallel: bool, share: bool, row_cost: int
) -> None:
    """Over all ranks: nothing lost or doubled, pairs in one row, limits kept, equal numbers of rows, deterministic; a prompt
    stands at most once in a row. A pipeline has many rows where they cost little, else few."""
    tp_size = 2 if sequence_parallel else 1
    trainer = Trainer(
        tensor_parallel=tp_size,
        pipeline_parallel=pp_size,
        virtual_pipeline=2 if virtual and pp_size > 1 else 1,
        data_parallel=dp_size,
        sequence_parallel=sequence_parallel,
        microbatch_tokens=25,
        share_prompts=share,
    )
    with patch.object(pipelined_rows, "ROW_COST_TOKENS", row_cost):
        batches = make_batches(sequences, step=3, num_prompts=9, trainer=trainer)
        again = make_batches(sequences, step=3, num_prompts=9, trainer=trainer)
    expected = sorted((tuple(s.prompt_ids), tuple(s.completion_ids)) for s in sequences)
    assert sorted(one for batch in batches for one in contents(batch)) == expected
    assert len({len(batch.microbatches) for batch in batches}) == 1
    assert trainer.virtual_pipeline == 1 or len(batches[0].microbatches) % pp_size == 0
    num_pairs, num_tokens = 0, 0
    by_completion = {tuple(s.completion_ids): s for s in sequences}
    for row in (row for batch in batches for row in batch.microbatches):
        assert 0 < row.token_ids.numel() <= 25
        assert row.token_ids.numel() % tp_size == 0
        assert row.advantages.numel() == row.parents.numel() == row.cu_seqlens.numel() - 1
        segments = read(row)
        known = [by_completion[one[1]] if one else None for one in segments]
        assert row.groups.tolist() == [s.group if s else -1 for s in known]
        assert row.places.tolist() == [sequences.index(s) if s else -1 for s in known]
        for both in row.pairs.tolist():
            chosen, rejected = (known[index] for index in both)
            assert chosen and rejected and chosen.group == rejected.group >= 0
            assert chosen.chosen and not rejected.chosen
            num_pairs += 1
        prompts = [one[0] for one in segments if one and len(one[0]) > 1]
        parents = [parent for parent in row.parents.tolist() if parent >= 0]
        shared = [prompt for prompt in set(prompts) if prompts.count(prompt) > 1]
        assert len(set(parents)) == (len(shared) if share else 0)
        assert len(parents) == (sum(map(prompts.count, shared)) if share else 0)
        last = row.cu_seqlens[-2:].diff().item() if segments[-1] is None and parents.count(len(segments) - 1) == 0 else 0
        num_tokens += row.token_ids.numel() - int(last)
    assert num_pairs == batches[0].num_groups == sum(s.chosen for s in sequences)
    assert batches[0].num_target_tokens == sum(len(s.completion_ids) for s in sequences)
    assert batches[0].num_sequence_tokens == sum(s.num_tokens for s in sequences)
    assert batches[0].num_sequence_tokens - batches[0].num_saved_tokens == num_tokens
    assert [contents(batch) for batch in again] == [contents(batch) for batch in batches]


def test_a_pipeline_has_more_rows_as_long_as_they_cost_less_than_it_idles() -> None:
    """Four stages and 80 sequences of 400 tokens, of which 8 rows of 4,096 are enough. Of m equal rows the work is
    (m + 3) (32,000 / m + 128): 47 k of 8, 39.7 k of 20, 39.4 k of 27, 40 k of 40. 27 of three are one too many."""
    sequences = [make_sequence((i, i), (1,) * 398, ()) for i in range(80)]
    one, four = (
        make_batch(sequences, step=0, num_prompts=80, trainer=Trainer(pipeline_parallel=p, microbatch_tokens=4096), dp_rank=0)
        for p in (1, 4)
    )
    assert [row.token_ids.numel() for row in one.microbatches] == [4000] * 8
    assert [row.token_ids.numel() for row in four.microbatches] == [800, *[1200] * 26]


def test_a_chunked_pipeline_has_rows_in_groups_of_its_stages() -> None:
    """With two chunks 20 rows of four take (20 + 3 / 2) (1,600 + 128) = 37.15 k; 24 rows of which the first four, through which
    the pipeline fills, are of three take 32,000 + 24 128 + 3 / 2 (1,200 + 128) = 37.06 k; 28 more again."""
    sequences = [make_sequence((i, i), (1,) * 398, ()) for i in range(80)]
    trainer = Trainer(pipeline_parallel=4, virtual_pipeline=2, microbatch_tokens=4096)
    batch = make_batch(sequences, step=0, num_prompts=80, trainer=trainer, dp_rank=0)
    assert [row.token_ids.numel() for row in batch.microbatches] == [*[1200] * 4, *[1600] * 8, *[1200] * 12]


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
    sequences = [make_sequence((i,), tuple(range(count)), ()) for i, count in enumerate((300, 40, 260, 7, 511))]
    (plain,) = make_batches(sequences, step=0, num_prompts=5, trainer=Trainer(microbatch_tokens=512))
    trainer = Trainer.model_validate({"microbatch_tokens": 512, **options})
    (padded,) = make_batches(sequences, step=0, num_prompts=5, trainer=trainer)
    lengths = [row.token_ids.numel() for row in padded.microbatches]
    assert all(0 < length <= 512 and length % multiple == 0 for length in lengths)
    assert {length % multiple for length in [row.token_ids.numel() for row in plain.microbatches]} != {0}
    assert sorted(contents(padded)) == sorted(contents(plain))
    assert empty_microbatch(trainer.row_multiple).token_ids.numel() == multiple


def test_a_rank_asks_for_its_own_sequences_only() -> None:
    """Each sequence is asked for by one of two ranks; the counts are the whole step's on both."""
    sequences = [*PAIR, *(make_sequence((i,), tuple(range(2 + i)), ()) for i in range(5))]
    trainer = Trainer(data_parallel=2, microbatch_tokens=12)
    asked: list[list[int]] = [[], []]

    def sequence_for(rank: int) -> Callable[[int], Sequence]:
        def sequence(place: int) -> Sequence:
            asked[rank].append(place)
            return sequences[place]

        return sequence

    shares = deal_step(outlines_of(sequences), step=0, num_prompts=6, trainer=trainer)
    batches = [fill_batch(share, sequence_for(rank), trainer) for rank, share in enumerate(shares)]
    assert sorted(asked[0] + asked[1]) == list(range(7))
    assert all(asked)
    assert {(batch.num_target_tokens, batch.num_groups, len(batch.microbatches)) for batch in batches} == {(24, 1, 2)}


def test_rewards_and_named_values_stand_beside_their_sequence() -> None:
    """And 0 for padding; an empty row has no names."""
    named = [replace(s, reward=float(i + 1), values={"quality": i / 2}) for i, s in enumerate(PAIR)]
    (row,) = pack(named, 16, 3, share=False)
    assert row.rewards.tolist() == [1.0, 2.0, 0.0]
    assert {name: values.tolist() for name, values in row.values.items()} == {"quality": [0.0, 0.5, 0.0]}
    assert empty_microbatch(4).values == {}


def test_the_rows_of_a_rank_share_no_memory_but_their_block() -> None:
    """Rows of odd lengths, one after another in one block of memory: what is written to a column changes no other."""
    sequences = [make_sequence((i, i), tuple(range(3 + 2 * i)), tuple(-0.5 for _ in range(3 + 2 * i))) for i in range(5)]
    rows = pack(sequences, 13, 1)
    columns = [
        column
        for row in rows
        for column in (row.token_ids, row.targets, row.position_ids, row.target_positions, row.rollout_log_probs)
    ]
    bounds = sorted((column.data_ptr(), column.data_ptr() + column.numel() * column.element_size()) for column in columns)
    assert len(rows) > 2 and all(end <= start for (_, end), (start, _) in pairwise(bounds))


def test_empty_row_adds_nothing() -> None:
    """Padding only: no target, no pair, a length that sequence parallel can cut."""
    row = empty_microbatch(4)
    assert row.token_ids.numel() == 4
    assert set(row.targets.tolist()) == {IGNORED}
    assert row.pairs.shape == (0, 2)
    assert row.cu_seqlens.tolist() == [0, 4]


def test_a_pair_larger_than_a_row_is_split_and_marked() -> None:
    """8 tokens together do not fit 7: a row each, no pair in either, both marked with their group; what is not scored first has
    another row, though it would fit the second."""
    rows = pack([*PAIR, make_sequence((8,), (9,), ())], 7, 2, share=False)
    assert [row.pairs.numel() for row in rows] == [0, 0, 0]
    assert [row.split.tolist() for row in rows] == [[True, False], [True, False], [False]]
    assert [row.groups.tolist() for row in rows] == [[0, -1], [0, -1], [-1]]
    assert [row.places.tolist() for row in rows] == [[0, -1], [1, -1], [2]]
    assert [row.chosen.tolist() for row in rows] == [[False, False], [True, False], [False]]


def test_a_sequence_larger_than_a_row_is_refused() -> None:
    """5 tokens do not fit 4: the option, the rule and the value to use."""
    with pytest.raises(ConfigError, match=r"trainer\.microbatch_tokens must hold .* found 4 < 5: raise it to 5"):
        pack(PAIR, 4, 1)
