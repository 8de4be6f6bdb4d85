"""Seconds of an optimizer step: rows are those that the trainer makes, floating-point operations by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest

from engine.config.load import RunConfig
from engine.forecast import rows
from engine.forecast.constants import Constants
from engine.forecast.rows import rows_of_step
from engine.forecast.training import Training
from engine.megatron.outlines import Outline, outlines_of
from engine.megatron.packing import make_batch
from engine.models.headers import num_elements
from tests import builders
from tests.builders import SMALL
from tests.rollouts import make_sequence

FREE = {"train_peak_share": 1.0, "peak_teraflops": 1e-9} | dict.fromkeys(
    ("step_seconds", "layer_row_seconds", "hop_seconds", "sum_seconds"), 0.0
)


def outline(place: int, num_prompt: int, num_completion: int, group: int = -1) -> Outline:
    return outlines_of([make_sequence((place,) * num_prompt, (1,) * num_completion, (), group=group)])[0]


def training(trainer: dict[str, Any], constants: dict[str, float] | None = None, **tables: Any) -> Training:
    config = with_trainer(trainer, algorithm={"loss": "grpo", "kl_weight": 0.0}, **tables)
    return Training(builders.spec(config), Constants(**FREE | (constants or {})))


def with_trainer(trainer: dict[str, Any], **tables: Any) -> RunConfig:
    """A configuration whose rows may be shorter than the longest sequence that it allows."""
    config = builders.config(**tables)
    return config.model_copy(update={"trainer": config.trainer.model_copy(update=trainer)})


LAYOUTS: list[dict[str, Any]] = [
    {"data_parallel": 3, "microbatch_tokens": 64},
    {"data_parallel": 2, "pipeline_parallel": 2, "virtual_pipeline": 2, "microbatch_tokens": 64},
    {"data_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True, "microbatch_tokens": 65},
]


@pytest.mark.parametrize("trainer", LAYOUTS)
def test_rows_are_those_of_the_trainer(trainer):
    draw = random.Random(1)
    sequences = [
        make_sequence(
            (i,) * draw.randint(1, 9), (1,) * draw.randint(1, 40), (), group=i // 2 if i < 20 else -1, chosen=i % 2 == 0
        )
        for i in range(40)
    ]
    options = with_trainer(trainer).trainer
    for dp_rank, rank in enumerate(rows_of_step(outlines_of(sequences), options, 0.0, cuts_groups=True)):
        batch = make_batch(sequences, step=0, num_prompts=40, trainer=options, dp_rank=dp_rank, cuts_groups=True)
        assert [row.tokens for row in rank.rows] == [len(m.token_ids) for m in batch.microbatches]
        assert [row.is_empty for row in rank.rows] == [bool((m.places < 0).all()) for m in batch.microbatches]
        assert [row.tokens for row in rank.scored] == [len(m.token_ids) for m in batch.microbatches if m.split.any()]


def test_rows_that_are_laid_out_alike_are_laid_out_once(monkeypatch):
    """Two tensor-parallel ranks have the rows of one, padded; other ways to lay them out have others."""
    sequences = outlines_of([make_sequence((i,) * (1 + i % 7), (1,) * (1 + 3 * i % 20), (), group=i // 2) for i in range(30)])
    laid: list[Any] = []
    plain = rows._laid_out

    def counted(*asked: Any) -> Any:
        laid.append(asked)
        return plain(*asked)

    monkeypatch.setattr(rows, "_laid_out", counted)
    two = {"tensor_parallel": 2, "sequence_parallel": True, "microbatch_tokens": 64}
    asked: list[dict[str, Any]] = [{"data_parallel": 3, "microbatch_tokens": 64}, {"data_parallel": 3, **two}, *LAYOUTS]
    known = rows.Rows()
    for trainer in asked:
        options = with_trainer(trainer).trainer
        assert known.of_step(sequences, options, 0.0) == rows_of_step(sequences, options, 0.0)
    assert len(laid) == len(asked) + 3, "the first three are laid out alike: three apart, one together"


def test_operations_by_hand():
    """A sequence of 10 tokens, 6 of them targets, for which alone the output layer is computed: six for each parameter that
    multiplies, twelve for each pair of tokens and element of a head."""
    step = training({}).step([outlines_of([make_sequence((1,) * 4, (1,) * 6, ())])[0]])
    embedding = SMALL.vocab_size * SMALL.hidden
    flops: float = 6 * (num_elements(SMALL) - 2 * embedding) * 10 + 6 * embedding * 6
    flops += 12 * SMALL.num_layers * SMALL.num_heads * SMALL.head_dim * 100 / 2
    assert step.model_flops == pytest.approx(flops)
    assert step.seconds.compute == pytest.approx(flops / 1e3)
    assert step.seconds.total == pytest.approx(step.seconds.compute, rel=1e-3)  # the rest is AdamW


def test_the_fullest_rank_decides():
    """Three equal sequences on two ranks: two against one, so a third of the time is lost on the other."""
    sequences = [make_sequence((i, 0), (1,) * 8, ()) for i in range(3)]
    step = training({"data_parallel": 2}).step(outlines_of(sequences))
    assert step.imbalance == pytest.approx(2 / 1.5)
    # A rank with one row runs an empty row of one token beside nothing: rows are equally many only where one has several.
    assert step.seconds.imbalance / step.seconds.compute == pytest.approx(1 / 3, rel=0.01)


@pytest.mark.parametrize(
    ("options", "layer_bytes", "head_bytes"),
    [
        ({}, 12, 12),  # a gradient in float32 read, the sum read and written
        ({"gradient_dtype": "bfloat16"}, 8, 8),
        ({"fused_lm_head": True}, 12, 4),
        ({"fused_lm_head": True, "gradient_dtype": "bfloat16"}, 8, 0),
        ({"pipeline_parallel": 2}, 12, 12),
    ],
)
def test_a_fused_accumulation_spares_passes_over_gradients(options, layer_bytes, head_bytes):
    """By hand, for three rows: the seconds that it takes off forward and backward, of either stage where there are two."""
    constants = {"memory_gigabytes_per_second": 1e-6}
    sequences = [outline(place, 1, 40) for place in range(3)]
    plain, fused = (
        training({"microbatch_tokens": 41, "fuse_gradient_accumulation": fuse, **options}, constants).step(sequences).seconds
        for fuse in (False, True)
    )
    head = SMALL.vocab_size * SMALL.hidden
    moved = layer_bytes * (num_elements(SMALL) - 2 * head) + head_bytes * head
    assert plain.compute - fused.compute == pytest.approx(3 * moved / 1e3 / options.get("pipeline_parallel", 1))
    assert fused.pipeline >= -1e-9 and fused.total < plain.total
    assert (plain.reference, plain.gradients, plain.optimizer) == (fused.reference, fused.gradients, fused.optimizer)


def test_a_fused_accumulation_spares_half_of_a_backward_at_most():
    """Where rows are so short that passes over gradients would take longer than products do."""
    constants = {"memory_gigabytes_per_second": 1e-9}
    plain, fused = (
        training({"fuse_gradient_accumulation": fuse}, constants).step([outline(0, 1, 5)]).seconds for fuse in (False, True)
    )
    assert fused.compute == pytest.approx(plain.compute * 2 / 3)


def test_more_passes_take_longer():
    sequences = outlines_of([make_sequence((1,), (1,) * 9, ())])
    plain = training({}).step(sequences).seconds
    again = training({"recompute": True}).step(sequences).seconds
    config = builders.config(algorithm={"loss": "grpo", "kl_weight": 0.1})
    judged = Training(builders.spec(config), Constants(**FREE)).step(sequences).seconds
    assert again.compute == pytest.approx(plain.compute * 4 / 3)
    assert judged.reference == pytest.approx(plain.compute / 3) and plain.reference == 0


def test_a_group_that_is_split_is_scored_first():
    sequences = outlines_of([make_sequence((1,) * 4, (1,) * 20, (), group=0, chosen=i == 0) for i in range(2)])
    whole, split = (training({"microbatch_tokens": tokens}).step(sequences).seconds for tokens in (64, 32))
    assert whole.again == 0 and split.again == pytest.approx(split.compute / 3)


def test_gradients_travel_by_the_slowest_link_of_their_ring():
    """Twice 4 bytes a parameter, or with the distributed optimizer 4 and the parameter; eight network cards a node together."""
    sequences = outlines_of([make_sequence((i, 0), (1,) * 8, ()) for i in range(32)])
    links = {"nvlink_gigabytes_per_second": 100.0, "network_gigabytes_per_second": 10.0}
    size = num_elements(SMALL)

    def seconds(trainer: dict[str, Any], nodes: int) -> float:
        return training(trainer, links, cluster={"nodes": nodes}).step(sequences).seconds.gradients

    assert seconds({"data_parallel": 8}, 1) == pytest.approx(7 / 8 * size * 8 / 100e9)
    assert seconds({"data_parallel": 16}, 2) == pytest.approx(15 / 16 * size * 8 / 80e9)
    shared = {"data_parallel": 16, "distributed_optimizer": True}
    assert seconds(shared, 2) == pytest.approx(15 / 16 * size * (4 + 4) / 80e9)  # the model is in float32
    assert seconds({}, 1) == 0


def test_gradients_that_overlap_wait_for_what_no_backward_hides_and_half_the_bytes_take_half_as_long():
    """2 GFLOP/s and slow links: the sum takes longer than the last backward; on fast ones a share of 0.3 stays."""
    sequences = outlines_of([make_sequence((i, 0), (1,) * 8, ()) for i in range(8)])
    base = {"data_parallel": 8, "distributed_optimizer": True}

    def gradients(link: float, **more: Any) -> float:
        constants = {"nvlink_gigabytes_per_second": link, "peak_teraflops": 2e-3, "overlap_share": 0.7}
        return training({**base, **more}, constants).step(sequences).seconds.gradients

    ring = 7 / 8 * num_elements(SMALL)
    for link in (1e-3, 100.0):
        whole, hidden = gradients(link), gradients(link, overlap_gradients=True)
        summed, gathered = ring * 4 / (link * 1e9), ring * 4 / (link * 1e9)
        assert whole == pytest.approx(summed + gathered)
        assert summed * 0.3 + gathered <= hidden * (1 + 1e-9) and hidden < whole
    assert gradients(100.0, overlap_gradients=True) == pytest.approx(ring * (0.3 * 4 + 4) / 100e9)
    assert gradients(100.0, gradient_dtype="bfloat16") == pytest.approx(ring * (2 + 4) / 100e9)


def test_a_pipeline_loses_what_its_schedule_loses():
    """Four equal rows on two equal stages without a vocabulary to speak of: a quarter on top."""
    from dataclasses import replace

    shape = replace(SMALL, vocab_size=1, num_layers=64)
    config = with_trainer({"pipeline_parallel": 2, "microbatch_tokens": 10}, algorithm={"loss": "grpo", "kl_weight": 0.0})
    sequences = outlines_of([make_sequence((i,), (1,) * 9, ()) for i in range(4)])
    seconds = Training(builders.spec(config, shape), Constants(**FREE)).step(sequences).seconds
    assert seconds.pipeline / seconds.compute == pytest.approx(1 / 4, rel=0.01)
