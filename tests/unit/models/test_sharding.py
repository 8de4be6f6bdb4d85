"""The table of tensors: slices tile every shard, import and export undo each other, and the shards are those that megatron
and vLLM make by their own rules, written out here a second time. Which stage holds a layer is asked of megatron itself.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.options import Trainer
from engine.core.errors import ConfigError
from engine.models import checks
from engine.models import sharding as layout
from engine.models.base import ModelShape
from engine.models.export_plan import export_files, export_plan, in_turns
from engine.models.llama import Llama
from engine.models.sharding import EngineLayout, Layout, TrainerLayout

SMALL = ModelShape(8, 1, 4, 2, 1, 4, 3, 1e4, None, 1e-5, False, 16)
Tensors = dict[str, torch.Tensor]


@st.composite
def shapes(draw: st.DrawFn) -> tuple[ModelShape, int]:
    """A small Llama and a tensor-parallel size 1 to 8 that divides its heads; key-value heads more or fewer than ranks."""
    size = draw(st.integers(1, 8))
    kv_heads = size * draw(st.integers(1, 2)) if draw(st.booleans()) else draw(st.sampled_from(divisors(size)))
    shape = ModelShape(
        num_layers=draw(st.integers(1, 3)),
        hidden=draw(st.integers(1, 5)),
        num_heads=max(size, kv_heads) * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        head_dim=size * draw(st.integers(1, 2)),  # so that the rows of a query group can be cut anywhere
        ffn_hidden=size * draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 40)),
        rope_theta=1e4,
        rope_scaling=None,
        norm_eps=1e-5,
        tied=draw(st.booleans()),
        max_positions=16,
    )
    return shape, size


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def model_of(shape: ModelShape) -> Tensors:
    """Every element of every tensor is a different number, from 1 on."""
    made, start = {}, 1
    for name, sizes in layout.tensors(shape).items():
        size = torch.Size(sizes)
        made[name] = torch.arange(start, start + size.numel()).view(size)
        start += size.numel()
    return made


def fill(shape: ModelShape, spread: Layout, model: Tensors, *ranks: int) -> Tensors:
    """A model-parallel rank's shards from its slices, 0 where none reaches; no element is written twice."""
    shapes = layout.shard_shapes(shape, spread, *ranks)
    shards = {name: torch.zeros(sizes, dtype=torch.int64) for name, sizes in shapes.items()}
    for p in layout.shard_slices(shape, spread, *ranks):
        place = layout.matrix_slice(shards[p.parameter], p.shard_row, p.shard_col, p.rows, p.cols)
        assert place.shape == (p.rows, p.cols)
        assert not place.any()
        place.copy_(layout.matrix_slice(model[p.name], p.row, p.col, p.rows, p.cols))
    return shards


def megatron_layer(shape: ModelShape, model: Tensors, rank: int, size: int) -> list[torch.Tensor]:
    """Rank's shards of layer 0 as megatron fuses and cuts them, by reshaping whole tensors."""
    q, k, v, o, gate, up, down, *_ = (t for name, t in model.items() if ".layers.0." in name)
    groups = [t.view(shape.num_kv_heads, -1, shape.hidden) for t in (q, k, v)]
    qkv = torch.cat(groups, 1).flatten(0, 1).chunk(size)[rank]
    fc1 = torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    return [qkv, o.chunk(size, 1)[rank], fc1, down.chunk(size, 1)[rank]]


def vllm_layer(shape: ModelShape, model: Tensors, rank: int, size: int) -> list[torch.Tensor]:
    """The same as vLLM's weight loaders narrow them: a head's replicas are num_replicas neighbouring ranks."""
    q, k, v, o, gate, up, down, *_ = (t for name, t in model.items() if ".layers.0." in name)
    num_replicas = max(1, size // shape.num_kv_heads)
    kv = [t.chunk(size // num_replicas)[rank // num_replicas] for t in (k, v)]
    gate_up = torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    return [torch.cat([q.chunk(size)[rank], *kv]), o.chunk(size, 1)[rank], gate_up, down.chunk(size, 1)[rank]]


@given(shapes())
@settings(max_examples=60, deadline=None)
def test_layers_are_fused_and_cut_as_megatron_and_vllm_do(case: tuple[ModelShape, int]) -> None:
    shape, size = case
    model = model_of(shape)
    for rank in range(size):
        for spread, oracle in ((TrainerLayout(size), megatron_layer), (EngineLayout(size), vllm_layer)):
            shards = fill(shape, spread, model, rank)
            wanted = oracle(shape, model, rank, size)
            matrices = [t for name, t in shards.items() if ".layers.0." in name and t.ndim == 2]
            assert len(matrices) == len(wanted) == 4
            assert all(torch.equal(found, expected) for found, expected in zip(matrices, wanted, strict=True))
            norms = [t for name, t in shards.items() if t.ndim == 1]
            expected = [t for t in model.values() if t.ndim == 1]
            assert all(torch.equal(a, b) for a, b in zip(norms, expected, strict=True))


@given(shapes(), st.sampled_from(["trainer", "engine"]))
@settings(max_examples=40, deadline=None)
def test_vocabulary_is_padded_then_cut(case: tuple[ModelShape, int], side: str) -> None:
    """To a multiple of the tensor ranks for megatron, of 64 for vLLM; padding stays as it was."""
    shape, size = case
    spread: Layout = TrainerLayout(size) if side == "trainer" else EngineLayout(size)
    multiple = size if side == "trainer" else 64
    model = model_of(shape)
    name = "embedding.word_embeddings.weight" if side == "trainer" else "model.embed_tokens.weight"
    shards = [fill(shape, spread, model, rank)[name] for rank in range(size)]
    whole = model["model.embed_tokens.weight"]
    padding = -shape.vocab_size % multiple
    if (shape.vocab_size + padding) % size == 0:
        assert torch.equal(torch.cat(shards), torch.nn.functional.pad(whole, (0, 0, 0, padding)))


@given(shapes(), st.integers(1, 3), st.integers(1, 2), st.sampled_from(["local", "transformer_engine"]))
@settings(max_examples=40, deadline=None)
def test_export_undoes_import(case: tuple[ModelShape, int], pp_size: int, vpp_size: int, spec: Any) -> None:
    """All ranks' shards give back every element; all but norms and the tied embedding from one rank only."""
    shape, size = case
    vpp_size = 1 if pp_size == 1 else vpp_size
    shape = replace(shape, num_layers=shape.num_layers * pp_size * vpp_size)
    spread = TrainerLayout(size, pp_size, vpp_size, spec=spec)
    model = model_of(shape)
    found = {name: torch.zeros_like(value) for name, value in model.items()}
    times = {name: torch.zeros_like(value) for name, value in model.items()}
    for pp_rank in range(pp_size):
        for rank in range(size):
            shards = fill(shape, spread, model, rank, pp_rank)
            held = layout.shard_slices(shape, spread, rank, pp_rank)
            by_chunk = [layout.shard_slices(shape, spread, rank, pp_rank, chunk) for chunk in range(vpp_size)]
            assert held == tuple(p for slices in by_chunk for p in slices)
            for p in held:
                part = layout.matrix_slice(shards[p.parameter], p.shard_row, p.shard_col, p.rows, p.cols)
                layout.matrix_slice(found[p.name], p.row, p.col, p.rows, p.cols).copy_(part)
                layout.matrix_slice(times[p.name], p.row, p.col, p.rows, p.cols).add_(1)
    for name in model:
        assert torch.equal(found[name], model[name])
        copies = size if "norm" in name else 1 + (shape.tied and pp_size > 1 and "embed" in name)
        assert (times[name] == copies).all()


@given(shapes())
@settings(max_examples=20, deadline=None)
def test_the_whole_layout_is_the_model(case: tuple[ModelShape, int]) -> None:
    shape, size = case
    model = model_of(shape)
    shards = fill(shape, EngineLayout(size, whole=True), model, size - 1)
    assert list(shards) == list(model)
    assert all(torch.equal(shards[name], model[name]) for name in model)
    assert ("lm_head.weight" in model) is not shape.tied


@given(shapes())
@settings(max_examples=40, deadline=None)
def test_no_two_pieces_of_a_shard_could_be_one(case: tuple[ModelShape, int]) -> None:
    shape, size = case
    for spread in (TrainerLayout(size), EngineLayout(size)):
        for rank in range(size):
            held = layout.shard_slices(shape, spread, rank)
            for one, next_ in pairwise(held):
                assert (one.parameter, one.name, one.row + one.rows) != (next_.parameter, next_.name, next_.row)


def test_query_groups_stand_together_and_are_cut_anywhere() -> None:
    """megatron's order for 4 heads and 2 key-value heads of size 1: rank 1 of 2 holds [q2 q3 k1 v1], of 4 [k0 v0]."""
    layer = "model.layers.0.self_attn."

    def held(size: int, rank: int) -> list[tuple[str, int, int]]:
        slices = layout.shard_slices(SMALL, TrainerLayout(size), rank)
        fused = [p for p in slices if p.parameter == "decoder.layers.0.self_attention.linear_qkv.weight"]
        return [(p.name.removeprefix(layer)[0], p.row, p.rows) for p in fused]

    assert held(2, 1) == [("q", 2, 2), ("k", 1, 1), ("v", 1, 1)]
    assert held(1, 0) == [("q", 0, 2), ("k", 0, 1), ("v", 0, 1), ("q", 2, 2), ("k", 1, 1), ("v", 1, 1)]
    assert [held(4, rank) for rank in (0, 1, 2)] == [[("q", 0, 2)], [("k", 0, 1), ("v", 0, 1)], [("q", 2, 2)]]


def test_transformer_engine_keeps_norms_in_the_layer_after_them() -> None:
    """Only names differ from the local spec: two of them."""
    local, fused = (layout.shard_shapes(SMALL, TrainerLayout(spec=spec), 0) for spec in ("local", "transformer_engine"))
    renamed = [(a, b) for a, b in zip(local, fused, strict=True) if a != b and ".0." in a]
    assert renamed == [
        ("decoder.layers.0.input_layernorm.weight", "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"),
        ("decoder.layers.0.pre_mlp_layernorm.weight", "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"),
    ]
    assert list(local.values()) == list(fused.values())


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[int, TrainerLayout]:
    """Layers and a pipeline of 2 to 5 stages that may hold them, first or last stage smaller or larger than the others."""
    virtual, stages = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    first, last = (draw(st.none() | st.integers(1, 3).map(lambda n: n * virtual)) for _ in range(2))
    between = stages - (first is not None) - (last is not None)
    if virtual > 1 and not between:
        last, between = None, 1
    each = virtual * draw(st.integers(1, 3))
    return (first or 0) + (last or 0) + between * each, TrainerLayout(1, stages, virtual, first, last)


@pytest.mark.filterwarnings("ignore::UserWarning")  # megatron's, on what is not installed
@given(pipelines())
@settings(max_examples=60, deadline=None)
def test_layers_stand_where_megatron_puts_them(case: tuple[int, TrainerLayout]) -> None:
    """Against its own get_transformer_layer_offset and get_num_layers_to_build: even, uneven, virtual."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    num_layers, spread = case
    shape = replace(SMALL, num_layers=num_layers)
    checks.check_layout(shape, spread)
    config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=4,
        num_attention_heads=1,
        pipeline_model_parallel_size=spread.pp_size,
        virtual_pipeline_model_parallel_size=spread.vpp_size if spread.vpp_size > 1 else None,
        num_layers_in_first_pipeline_stage=spread.first_stage_layers,
        num_layers_in_last_pipeline_stage=spread.last_stage_layers,
        pipeline_dtype=torch.float32,
    )
    for pp_rank, chunks in enumerate(layout.stage_layers(shape, spread)):
        for chunk, layers in enumerate(chunks):
            virtual = chunk if spread.vpp_size > 1 else None
            offset = get_transformer_layer_offset(config, virtual, pp_rank)
            assert layers == range(offset, offset + get_num_layers_to_build(config, virtual, pp_rank))


@given(pipelines(), st.integers(1, 400), st.booleans())
@settings(max_examples=40, deadline=None)
def test_export_plan_covers_every_tensor_once(case: tuple[int, TrainerLayout], max_bytes: int, tied: bool) -> None:
    """In order, each bucket of the stage that holds it and within the limit unless it is a single tensor."""
    shape = replace(SMALL, num_layers=case[0], tied=tied)
    plan = export_plan(shape, case[1], torch.float32, max_bytes)
    assert {meta.name: meta.shape for bucket in plan for meta in bucket.tensors} == layout.tensors(shape)
    assert sum(len(bucket.tensors) for bucket in plan) == len(layout.tensors(shape))
    for bucket in plan:
        held = {p.name for p in layout.shard_slices(shape, case[1], 0, bucket.stage)}
        assert held.issuperset(meta.name for meta in bucket.tensors)
        num_bytes = sum(4 * torch.Size(meta.shape).numel() for meta in bucket.tensors)
        assert num_bytes <= max_bytes or len(bucket.tensors) == 1
    assert plan[0].stage == 0


@given(pipelines(), st.integers(1, 4), st.integers(1, 400), st.booleans())
@settings(max_examples=40, deadline=None)
def test_files_are_shared_by_the_ranks_of_each_stage(case: tuple[int, TrainerLayout], dp: int, most: int, tied: bool) -> None:
    """Every tensor once and in order, each file of one writer of the stage that holds it, and no rank with two files more than
    another of its stage; a small model is one file a stage."""
    shape, spread = replace(SMALL, num_layers=case[0], tied=tied), replace(case[1], tp_size=2)
    files = export_files(shape, spread, dp, torch.float32, most, min_file_bytes=1)
    assert [name for file in files for name in file.names] == [*layout.tensors(shape)]
    turns = in_turns(files)
    assert sorted(place for turn in turns for place in turn) == [*range(len(files))]
    written = [[files[place].writer for place in turn] for turn in turns]
    assert all(len(turn) == len(set(turn)) for turn in written), "of a rank one at most"
    assert all(set(after) <= set(before) for before, after in pairwise(written)), "and none waits for a later turn"
    for file in files:
        assert {(b.stage, b.dp_rank, b.tp_rank) for b in file.buckets} == {file.writer}
        held = {p.name for tp_rank in range(2) for p in layout.shard_slices(shape, spread, tp_rank, file.writer[0])}
        assert held.issuperset(file.names)
    if spread.vpp_size == 1:
        for stage in range(spread.pp_size):
            writers = [file.writer for file in files if file.writer[0] == stage]
            assert len(writers) == len(set(writers)), "one file each"
            assert len(writers) > 1 or 2 * dp == 1, "and not all by one"
        small = export_files(shape, spread, dp, torch.float32, most)
        assert [file.writer for file in small] == [(stage, 0, 0) for stage in range(spread.pp_size)]


@pytest.mark.parametrize(
    ("spread", "rule"),
    [
        (TrainerLayout(3), "tensor_parallel must divide .* 2 key-value heads or be a multiple"),
        (TrainerLayout(8), "tensor_parallel must divide .* 4 attention heads"),
        (TrainerLayout(1, 3), "pipeline_parallel .* 8 layers; found 3"),
        (TrainerLayout(1, 4, 4), "virtual_pipeline must divide .* 8 layers; found 16"),
        (TrainerLayout(1, 4, 1, 3), "first_stage_layers .* found 3 and None, which leave 5 for 3 stages"),
        (TrainerLayout(1, 2, 1, 4, 3), "found 4 and 3, which leave 1 for 0 stages"),
        (TrainerLayout(1, 3, 1, 4, 4), "found 4 and 4, which leave 0 for 1 stages"),
        (TrainerLayout(1, 2, 1, 9), "found 9 and None, which leave -1"),
        (TrainerLayout(1, 1, 1, 4, 4), "found 4 and 4"),
        (TrainerLayout(1, 2, 2, 3), r"virtual_pipeline must divide .* found 2 with stages of \[3, 5\]"),
        (TrainerLayout(1, 2, 2, 4, 4), "must not both be set on two stages"),
    ],
)
def test_layouts_that_megatron_cannot_do_are_refused(spread: TrainerLayout, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        checks.check_layout(SMALL, spread)


def test_a_cut_through_a_row_of_fused_queries_is_refused() -> None:
    """8 query heads, a key and a value head of size 1 over 4 ranks would be 2.5 rows each."""
    shape = replace(SMALL, num_heads=8, num_kv_heads=1, head_dim=1, ffn_hidden=4)
    with pytest.raises(ConfigError, match="must divide the model's 10 rows of fused"):
        checks.check_layout(shape, TrainerLayout(4))


@pytest.mark.parametrize(("size", "rule"), [(3, "key-value heads"), (8, "attention heads"), (4, None), (1, None)])
def test_engines_that_vllm_cannot_do_are_refused(size: int, rule: str | None) -> None:
    if rule is None:
        checks.check_engine_layout(SMALL, EngineLayout(size))
        return
    with pytest.raises(ConfigError, match=f"inference.tensor_parallel must divide .* {rule}"):
        checks.check_engine_layout(SMALL, EngineLayout(size))


def test_an_engine_whose_padded_vocabulary_cannot_be_cut_is_refused() -> None:
    shape = replace(SMALL, num_heads=3, num_kv_heads=3, ffn_hidden=3)
    with pytest.raises(ConfigError, match="64 vocabulary rows padded to a multiple of 64; found 3"):
        checks.check_engine_layout(shape, EngineLayout(3))


@given(shapes())
def test_both_specs_have_one_set_of_local_names(drawn: tuple[ModelShape, int]) -> None:
    """A trainer state uses them; names that are the local spec's already stay."""
    shape, tp_size = drawn
    local, fused = (
        layout.shard_shapes(shape, TrainerLayout(tp_size, spec=spec), 0) for spec in ("local", "transformer_engine")
    )
    assert {Llama.local_name(name): size for name, size in fused.items()} == local
    assert {Llama.local_name(name) for name in local} == set(local)
    assert set(fused) != set(local)


def test_the_spec_is_the_configured_one() -> None:
    assert layout.trainer_layout(Trainer(layers="transformer_engine", tensor_parallel=2)) == TrainerLayout(
        2, spec="transformer_engine"
    )
