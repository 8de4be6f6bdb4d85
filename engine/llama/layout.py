"""One table of Llama's tensors: the Hugging Face name, the megatron parameter that holds it, how tensor-parallel ranks
cut it, and which pipeline stage owns it. Pure functions on names and tensors: no process group, no device, no model.

How a megatron parameter is made: each of its Hugging Face sources is cut for one rank (`cut_part`), then the parts are
fused inside the rank, block by block: a query group's [q | k | v] rows, or [gate | up]. Both steps are undone the same
way, so a rank can unfuse its own shard and a leader can join parts, without ever seeing the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from engine.errors import ConfigError
from engine.llama.hf import LlamaShape

LAYER = re.compile(r"\blayers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Rule:
    """One megatron parameter; `{}` in a name stands for the layer's number in the whole model."""

    parameter: str
    sources: tuple[str, ...]
    cut: Literal["rows", "vocabulary", "columns", "whole"]  # of each source, over tensor-parallel ranks
    place: Literal["first", "layer", "last"]


RULES = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary", "first"),
    Rule(
        "decoder.layers.{}.self_attention.linear_qkv.weight",
        (
            "model.layers.{}.self_attn.q_proj.weight",
            "model.layers.{}.self_attn.k_proj.weight",
            "model.layers.{}.self_attn.v_proj.weight",
        ),
        "rows",
        "layer",
    ),
    Rule(
        "decoder.layers.{}.self_attention.linear_proj.weight",
        ("model.layers.{}.self_attn.o_proj.weight",),
        "columns",
        "layer",
    ),
    Rule(
        "decoder.layers.{}.mlp.linear_fc1.weight",
        ("model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"),
        "rows",
        "layer",
    ),
    Rule("decoder.layers.{}.mlp.linear_fc2.weight", ("model.layers.{}.mlp.down_proj.weight",), "columns", "layer"),
    Rule("decoder.layers.{}.input_layernorm.weight", ("model.layers.{}.input_layernorm.weight",), "whole", "layer"),
    Rule(
        "decoder.layers.{}.pre_mlp_layernorm.weight",
        ("model.layers.{}.post_attention_layernorm.weight",),
        "whole",
        "layer",
    ),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), "whole", "last"),
    Rule("output_layer.weight", ("lm_head.weight",), "vocabulary", "last"),
)
BY_PARAMETER = {rule.parameter: rule for rule in RULES}
BY_SOURCE = {source: (rule, index) for rule in RULES for index, source in enumerate(rule.sources)}


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """A Hugging Face tensor by name and full shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExportBucket:
    """Consecutive tensors of one pipeline stage that travel together."""

    stage: int  # pipeline rank that holds them
    tensors: tuple[TensorMeta, ...]


def _split_name(name: str) -> tuple[str, int]:
    """A name with its layer's number taken out: ("model.layers.{}.mlp...", 7), or (name, -1)."""
    found = LAYER.search(name)
    return (LAYER.sub("layers.{}.", name), int(found[1])) if found else (name, -1)


def renumber(parameter: str, offset: int) -> str:
    """A megatron parameter name with `offset` added to its layer's number."""
    return LAYER.sub(lambda found: f"layers.{int(found[1]) + offset}.", parameter)


def tensor_names(shape: LlamaShape) -> tuple[str, ...]:
    """Names of all Hugging Face tensors, embedding first, then layer by layer; no lm_head where it is tied."""
    by_place: dict[str, list[str]] = {"first": [], "layer": [], "last": []}
    for rule in RULES:
        by_place[rule.place] += rule.sources
    layers = [source.format(layer) for layer in range(shape.num_layers) for source in by_place["layer"]]
    last = [source for source in by_place["last"] if not (shape.tied and source == "lm_head.weight")]
    return (*by_place["first"], *layers, *last)


def tensor_shape(shape: LlamaShape, name: str) -> tuple[int, ...]:
    """Full shape of a Hugging Face tensor."""
    rule, index = BY_SOURCE[_split_name(name)[0]]
    if rule.cut == "whole":
        return (shape.hidden,)
    if rule.cut == "vocabulary":
        return (shape.vocab_size, shape.hidden)
    attention = "self_attn" in rule.sources[0]
    if rule.cut == "columns":
        return (shape.hidden, shape.num_heads * shape.head_dim if attention else shape.ffn_hidden)
    heads = shape.num_heads if index == 0 else shape.num_kv_heads
    return (heads * shape.head_dim if attention else shape.ffn_hidden, shape.hidden)


def padded_vocab(shape: LlamaShape, tp_size: int) -> int:
    """Vocabulary rows with padding, the next multiple of the tensor-parallel size."""
    return -(-shape.vocab_size // tp_size) * tp_size


def check_layout(shape: LlamaShape, tp_size: int, pp_size: int, vpp_size: int) -> None:
    """ConfigError when tensor or pipeline ranks cannot share this model evenly."""
    rules = (
        ("trainer.tensor_parallel", tp_size, "key-value heads", shape.num_kv_heads),
        ("trainer.tensor_parallel", tp_size, "attention heads", shape.num_heads),
        ("trainer.tensor_parallel", tp_size, "feed-forward columns", shape.ffn_hidden),
        ("trainer.pipeline_parallel * trainer.virtual_pipeline", pp_size * vpp_size, "layers", shape.num_layers),
    )
    for option, size, what, count in rules:
        if count % size:
            raise ConfigError(
                f"{option} must divide the model's {count} {what}; found {size}: use a divisor of {count}"
            )


def stage_of(name: str, shape: LlamaShape, pp_size: int, vpp_size: int = 1) -> tuple[int, int]:
    """(pipeline rank, model chunk) that holds a Hugging Face tensor; chunk c of rank p is virtual stage c * pp + p.

    A tied embedding is owned by the first stage; the last stage's copy of it is not counted here.
    """
    pattern, layer = _split_name(name)
    place = BY_SOURCE[pattern][0].place
    if place == "first":
        return 0, 0
    if place == "last":
        return pp_size - 1, vpp_size - 1
    virtual_stage = layer // (shape.num_layers // (pp_size * vpp_size))
    return virtual_stage % pp_size, virtual_stage // pp_size


def parameter_of(name: str) -> tuple[str, int]:
    """(megatron parameter with the model-wide layer number, index among its sources) of a Hugging Face tensor."""
    pattern, layer = _split_name(name)
    rule, index = BY_SOURCE[pattern]
    return rule.parameter.format(layer), index


def sources_of(parameter: str) -> tuple[str, ...]:
    """Hugging Face names fused in a megatron parameter, in their order."""
    pattern, layer = _split_name(parameter)
    return tuple(source.format(layer) for source in BY_PARAMETER[pattern].sources)


def cut_part(shape: LlamaShape, name: str, full: torch.Tensor, tp_rank: int, tp_size: int) -> torch.Tensor:
    """One tensor-parallel rank's part of a full Hugging Face tensor; vocabulary rows are padded with zeros."""
    cut = BY_SOURCE[_split_name(name)[0]][0].cut
    if cut == "whole":
        return full
    if cut == "vocabulary":
        full = F.pad(full, (0, 0, 0, padded_vocab(shape, tp_size) - full.size(0)))
    axis = 1 if cut == "columns" else 0
    return full.chunk(tp_size, axis)[tp_rank]


def part_shape(shape: LlamaShape, name: str, tp_size: int) -> tuple[int, ...]:
    """Shape of one rank's part of a Hugging Face tensor."""
    cut = BY_SOURCE[_split_name(name)[0]][0].cut
    sizes = list(tensor_shape(shape, name))
    if cut == "vocabulary":
        sizes[0] = padded_vocab(shape, tp_size) // tp_size
    elif cut != "whole":
        sizes[cut == "columns"] //= tp_size
    return tuple(sizes)


def join_parts(shape: LlamaShape, name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The full Hugging Face tensor of all ranks' parts in rank order, padding rows dropped."""
    cut = BY_SOURCE[_split_name(name)[0]][0].cut
    if cut == "whole":
        return parts[0]
    full = torch.cat(list(parts), 1 if cut == "columns" else 0)
    return full[: shape.vocab_size] if cut == "vocabulary" else full


def _blocks(shape: LlamaShape, parameter: str, tp_size: int) -> int:
    """How many times a rank's shard repeats the sequence of its sources: once a query group, or once."""
    return shape.num_kv_heads // tp_size if "linear_qkv" in parameter else 1


def unfuse(shape: LlamaShape, parameter: str, shard: torch.Tensor, tp_size: int) -> tuple[torch.Tensor, ...]:
    """A rank's parts of the sources fused in its megatron shard; a view where one source fills it."""
    names = sources_of(parameter)
    if len(names) == 1:
        return (shard,)
    blocks = _blocks(shape, parameter, tp_size)
    rows = [part_shape(shape, name, tp_size)[0] // blocks for name in names]
    parts = shard.view(blocks, sum(rows), -1).split(rows, 1)
    return tuple(part.reshape(-1, shard.size(1)) for part in parts)


def take_shard(
    shape: LlamaShape, parameter: str, fetch: Callable[[str], torch.Tensor], tp_rank: int, tp_size: int
) -> torch.Tensor:
    """One rank's megatron shard, from full Hugging Face tensors that `fetch` gives by name."""
    parts = [cut_part(shape, name, fetch(name), tp_rank, tp_size) for name in sources_of(parameter)]
    if len(parts) == 1:
        return parts[0]
    blocks = _blocks(shape, parameter, tp_size)
    return torch.cat([part.reshape(blocks, -1, part.size(1)) for part in parts], 1).flatten(0, 1)


def join_shards(shape: LlamaShape, parameter: str, shards: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The full Hugging Face tensors held by all ranks' megatron shards in rank order: the inverse of `take_shard`."""
    parts = [unfuse(shape, parameter, shard, len(shards)) for shard in shards]
    return {
        name: join_parts(shape, name, [part[index] for part in parts])
        for index, name in enumerate(sources_of(parameter))
    }


def export_plan(
    shape: LlamaShape, pp_size: int, vpp_size: int, dtype: torch.dtype, max_bytes: int
) -> tuple[ExportBucket, ...]:
    """All Hugging Face tensors in buckets of one stage and at most `max_bytes` each; a larger tensor stands alone.

    Pure: every rank computes the same plan.
    """
    buckets: list[ExportBucket] = []
    held: list[TensorMeta] = []
    held_stage, held_bytes = 0, 0
    for name in tensor_names(shape):
        meta = TensorMeta(name, tensor_shape(shape, name))
        stage = stage_of(name, shape, pp_size, vpp_size)[0]
        num_bytes = torch.Size(meta.shape).numel() * dtype.itemsize
        if held and (stage != held_stage or held_bytes + num_bytes > max_bytes):
            buckets.append(ExportBucket(held_stage, tuple(held)))
            held, held_bytes = [], 0
        held.append(meta)
        held_stage, held_bytes = stage, held_bytes + num_bytes
    buckets.append(ExportBucket(held_stage, tuple(held)))
    return tuple(buckets)
