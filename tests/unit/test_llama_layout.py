"""The table of tensors: cutting and joining are inverses, every tensor has one place, buckets cover everything once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.llama import layout
from engine.llama.hf import LlamaShape


@st.composite
def shapes(draw: st.DrawFn) -> tuple[LlamaShape, int]:
    """A small Llama and a tensor-parallel size 1 to 8 that its heads allow; any vocabulary, tied or not."""
    tp_size = draw(st.integers(1, 8))
    kv_heads = tp_size * draw(st.integers(1, 2))
    shape = LlamaShape(
        num_layers=draw(st.integers(1, 4)),
        hidden=draw(st.integers(1, 5)),
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 3)),
        ffn_hidden=tp_size * draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 40)),
        rope_theta=1e4,
        rope_scaling=None,
        norm_eps=1e-5,
        tied=draw(st.booleans()),
        max_positions=16,
    )
    return shape, tp_size


def model_of(shape: LlamaShape) -> dict[str, torch.Tensor]:
    """Every element of every tensor is a different number."""
    made, start = {}, 0
    for name in layout.tensor_names(shape):
        size = torch.Size(layout.tensor_shape(shape, name))
        made[name] = torch.arange(start, start + size.numel()).view(size)
        start += size.numel()
    return made


@given(shapes())
@settings(max_examples=60, deadline=None)
def test_join_undoes_take(case: tuple[LlamaShape, int]) -> None:
    """All ranks' shards of every parameter give back the Hugging Face tensors, TP 1 to 8, GQA, odd vocabularies."""
    shape, tp_size = case
    model = model_of(shape)
    joined: dict[str, torch.Tensor] = {}
    for parameter in dict.fromkeys(layout.parameter_of(name)[0] for name in model):
        shards = [layout.take_shard(shape, parameter, model.__getitem__, rank, tp_size) for rank in range(tp_size)]
        assert len({shard.shape for shard in shards}) == 1
        joined |= layout.join_shards(shape, parameter, shards)
    assert joined.keys() == model.keys()
    assert all(torch.equal(joined[name], model[name]) for name in model)


def test_query_groups_stand_together() -> None:
    """megatron's order, written out: rank 1 of 2 holds [q2 q3 k1 v1] for 4 heads and 2 key-value heads of size 1."""
    shape = LlamaShape(1, 1, 4, 2, 1, 2, 3, 1e4, None, 1e-5, False, 16)
    heads = {"q": [10, 11, 12, 13], "k": [20, 21], "v": [30, 31]}
    model = {f"model.layers.0.self_attn.{x}_proj.weight": torch.tensor(rows).view(-1, 1) for x, rows in heads.items()}
    parameter = "decoder.layers.0.self_attention.linear_qkv.weight"
    shards = [layout.take_shard(shape, parameter, model.__getitem__, rank, 2) for rank in range(2)]
    assert [shard.flatten().tolist() for shard in shards] == [[10, 11, 20, 30], [12, 13, 21, 31]]
    whole = layout.take_shard(shape, parameter, model.__getitem__, 0, 1)
    assert whole.flatten().tolist() == [10, 11, 20, 30, 12, 13, 21, 31]


def test_vocabulary_padding_is_zero_and_never_exported() -> None:
    """3 rows over 2 ranks: the second rank's last row is padding."""
    shape = LlamaShape(1, 1, 2, 2, 1, 2, 3, 1e4, None, 1e-5, False, 16)
    full = torch.tensor([[1], [2], [3]])
    parts = [layout.cut_part(shape, "lm_head.weight", full, rank, 2) for rank in range(2)]
    assert [part.flatten().tolist() for part in parts] == [[1, 2], [3, 0]]
    parts[1][1] = 99
    assert torch.equal(layout.join_parts(shape, "lm_head.weight", parts), full)


@given(shapes(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_export_plan_covers_every_tensor_once(
    case: tuple[LlamaShape, int], pp_size: int, vpp_size: int, max_bytes: int
) -> None:
    """In order, each bucket of one stage and within the limit unless it holds a single tensor; no lm_head when tied."""
    shape = case[0]
    vpp_size = 1 if pp_size == 1 else vpp_size
    shape = LlamaShape(
        **{f: getattr(shape, f) for f in shape.__slots__} | {"num_layers": shape.num_layers * pp_size * vpp_size}
    )
    plan = layout.export_plan(shape, pp_size, vpp_size, torch.float32, max_bytes)
    assert tuple(meta.name for bucket in plan for meta in bucket.tensors) == layout.tensor_names(shape)
    for bucket in plan:
        assert {layout.stage_of(meta.name, shape, pp_size, vpp_size)[0] for meta in bucket.tensors} == {bucket.stage}
        num_bytes = sum(4 * torch.Size(meta.shape).numel() for meta in bucket.tensors)
        assert num_bytes <= max_bytes or len(bucket.tensors) == 1
    assert ("lm_head.weight" in layout.tensor_names(shape)) is not shape.tied


def test_virtual_stages_alternate() -> None:
    """8 layers on 2 stages of 2 chunks: chunk c of rank p is virtual stage 2c + p, two layers each."""
    shape = LlamaShape(8, 1, 2, 2, 1, 2, 3, 1e4, None, 1e-5, False, 16)
    places = [layout.stage_of(f"model.layers.{i}.input_layernorm.weight", shape, 2, 2) for i in range(8)]
    assert places == [(0, 0), (0, 0), (1, 0), (1, 0), (0, 1), (0, 1), (1, 1), (1, 1)]
    assert layout.stage_of("model.embed_tokens.weight", shape, 2, 2) == (0, 0)
    assert layout.stage_of("lm_head.weight", shape, 2, 2) == (1, 1)


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [((3, 1, 1), "tensor_parallel must divide"), ((1, 3, 1), "pipeline"), ((1, 4, 4), "virtual_pipeline must divide")],
)
def test_uneven_layouts_are_refused(sizes: tuple[int, int, int], rule: str) -> None:
    """Key-value heads over tensor ranks, layers over stages and chunks."""
    shape = LlamaShape(8, 1, 4, 2, 1, 4, 3, 1e4, None, 1e-5, False, 16)
    with pytest.raises(ConfigError, match=rule):
        layout.check_layout(shape, *sizes)
