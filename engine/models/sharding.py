"""Where a shard of a megatron trainer, of a vLLM engine or a whole model holds the tensors of a family's table. It serves
import, export, checkpoints and the bridge: names and slices only, no process group, no device, no model.

A shard stacks slices of Hugging Face tensors by rows. The table says which tensors share a parameter and how each is
cut over tensor-parallel ranks; two fusings alone need code: megatron's QKV, whose rows [q.. | k | v] of each query group
follow one another and are then cut evenly, wherever the cuts fall, and vLLM's, which stacks a rank's own q, k and v and
repeats a key-value head on several ranks where there are more ranks than heads. A vector [n] is a slice [n, 1].

Sources: megatron-core 0.16.1 (transformer/attention.py, transformer/transformer_layer.py, models/gpt/gpt_layer_specs.py) and
vLLM 0.32 (models/llama.py, layers/linear.py, layers/vocab_parallel_embedding.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from engine.models.base import Family, ModelShape, Section, TensorMapping
from engine.models.registry import family_of

if TYPE_CHECKING:
    import torch

    from engine.config.options import Inference, Trainer


VLLM_VOCABULARY_MULTIPLE = 64  # vLLM pads the vocabulary to it before it cuts


@dataclass(frozen=True, slots=True)
class TrainerLayout:
    """A megatron trainer's axes. All data-parallel replicas of a model-parallel rank (pipeline rank, tensor rank)
    hold the same weights."""

    tp_size: int = 1
    pp_size: int = 1
    vpp_size: int = 1  # model chunks of a stage
    first_stage_layers: int | None = None  # None: as many as the other stages
    last_stage_layers: int | None = None
    spec: Literal["local", "transformer_engine"] = "local"
    fp8_parameters: bool = False  # matrices are stored in FP8 and dequantized at each access


@dataclass(frozen=True, slots=True)
class EngineLayout:
    """A vLLM engine's tensor-parallel axis; `whole`: every rank holds full tensors under their Hugging Face names."""

    tp_size: int = 1
    whole: bool = False


Layout = TrainerLayout | EngineLayout
WHOLE = EngineLayout(whole=True)


@dataclass(frozen=True, slots=True)
class ShardSlice:
    """A slice [rows, cols] of a Hugging Face tensor, from (row, col) on, and where a shard's parameter holds it."""

    name: str
    row: int
    col: int
    rows: int
    cols: int
    parameter: str
    shard_row: int
    shard_col: int

    def numbered(self, layer: int) -> ShardSlice:
        """A template's slice in the layer of that number."""
        name, parameter = self.name.replace("{}", str(layer)), self.parameter.replace("{}", str(layer))
        return ShardSlice(name, self.row, self.col, self.rows, self.cols, parameter, self.shard_row, self.shard_col)


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part of one parameter: its shape, and the slices in it. What they leave uncovered is vocabulary padding."""

    parameter: str
    shape: tuple[int, ...]
    slices: tuple[ShardSlice, ...]


def trainer_layout(trainer: Trainer) -> TrainerLayout:
    """The layout a configuration asks for."""
    axes = trainer.tensor_parallel, trainer.pipeline_parallel, trainer.virtual_pipeline
    stages = trainer.first_stage_layers, trainer.last_stage_layers
    return TrainerLayout(*axes, *stages, trainer.layer_spec, trainer.fp8_parameters)


def engine_layout(inference: Inference) -> EngineLayout:
    """The layout of the engines that a configuration asks for."""
    return EngineLayout(inference.tensor_parallel, whole=inference.packed_weights)


def padded_vocab(shape: ModelShape, layout: Layout) -> int:
    """Rows of the vocabulary's parameters over all ranks, with padding."""
    on_engine = 1 if _is_whole(layout) else VLLM_VOCABULARY_MULTIPLE
    multiple = layout.tp_size if isinstance(layout, TrainerLayout) else on_engine
    return -(-shape.vocab_size // multiple) * multiple


def stage_sizes(shape: ModelShape, layout: TrainerLayout) -> tuple[int, ...]:
    """Layers of each pipeline stage: what the first and the last leave is shared evenly by those in between."""
    ends = {0: layout.first_stage_layers, layout.pp_size - 1: layout.last_stage_layers}
    given = {stage: count for stage, count in ends.items() if count is not None}
    each = (shape.num_layers - sum(given.values())) // max(1, layout.pp_size - len(given))
    return tuple(given.get(stage, each) for stage in range(layout.pp_size))


@lru_cache(maxsize=64)
def stage_layers(shape: ModelShape, layout: TrainerLayout) -> tuple[tuple[range, ...], ...]:
    """Layer numbers by pipeline rank, then by model chunk: chunk c of rank p is virtual stage c * pp_size + p."""
    sizes = [count // layout.vpp_size for count in stage_sizes(shape, layout)]
    start, chunks = 0, []
    for _ in range(layout.vpp_size):
        for size in sizes:
            chunks.append(range(start, start + size))
            start += size
    assert start == shape.num_layers, (start, shape.num_layers, layout)
    return tuple(tuple(chunks[rank :: layout.pp_size]) for rank in range(layout.pp_size))


@lru_cache(maxsize=1024)
def template(shape: ModelShape, layout: Layout, section: Section, tp_rank: int) -> tuple[Shard, ...]:
    """A tensor rank's shards at the first stage's start, of any one layer (`{}` in names), or at the last stage's end."""
    family = family_of(shape)
    mappings = [mapping for mapping in family.table if mapping.section == section]
    shards = []
    for parameter, sources in groupby(mappings, lambda mapping: _parameter(family, mapping, layout)):
        fused = list(sources)
        if fused[0].name == family.head() and shape.tied:
            if not isinstance(layout, TrainerLayout) or layout.pp_size == 1:
                continue  # the output layer is the embedding itself
            fused = [mapping for mapping in family.table if mapping.name == family.embedding()]  # the last stage's copy of it
        slices = tuple(_stack(parameter, _tensor_slices(shape, layout, fused, tp_rank)))
        mapping, num_rows = fused[0], sum(part.rows for part in slices)
        if mapping.cut == "vocabulary" and not _is_whole(layout):
            num_rows = padded_vocab(shape, layout) // layout.tp_size
        width = _sizes(shape, mapping)[1] // (layout.tp_size if mapping.cut == "columns" and not _is_whole(layout) else 1)
        shards.append(Shard(parameter, (num_rows,) if mapping.cols == "one" else (num_rows, width), slices))
    return tuple(shards)


def _parameter(family: type[Family], mapping: TensorMapping, layout: Layout) -> str:
    if isinstance(layout, EngineLayout):
        return mapping.name if layout.whole else mapping.engine
    fused = layout.spec == "transformer_engine"
    return family.transformer_engine_names.get(mapping.trainer, mapping.trainer) if fused else mapping.trainer


def _is_whole(layout: Layout) -> bool:
    return isinstance(layout, EngineLayout) and layout.whole


def _sizes(shape: ModelShape, mapping: TensorMapping) -> tuple[int, int]:
    sizes = {
        "vocabulary": shape.vocab_size,
        "hidden": shape.hidden,
        "heads": shape.num_heads * shape.head_dim,
        "kv_heads": shape.num_kv_heads * shape.head_dim,
        "ffn": shape.ffn_hidden,
        "head_dim": shape.head_dim,
        "one": 1,
    }
    return sizes[mapping.rows], sizes[mapping.cols]


_TensorSlice = tuple[str, int, int, int, int]  # name, row, col, rows, cols


def _tensor_slices(shape: ModelShape, layout: Layout, fused: list[TensorMapping], tp_rank: int) -> Iterator[_TensorSlice]:
    """What a rank's shard holds of the tensors fused in it, from its first row to its last."""
    if fused[0].cut == "heads" and isinstance(layout, TrainerLayout):
        yield from _cut_groups(shape, fused, layout.tp_size, tp_rank)
        return
    for mapping in fused:
        num_rows, num_cols = _sizes(shape, mapping)
        size = layout.tp_size
        if mapping.cut == "whole" or _is_whole(layout):
            yield mapping.name, 0, 0, num_rows, num_cols
        elif mapping.cut == "columns":
            yield mapping.name, 0, tp_rank * num_cols // size, num_rows, num_cols // size
        elif mapping.cut == "vocabulary":
            each = padded_vocab(shape, layout) // size
            start, end = (min(rank * each, num_rows) for rank in (tp_rank, tp_rank + 1))
            yield mapping.name, start, 0, end - start, num_cols
        else:
            # Ranks in excess of the heads share one: rank r holds key-value head r // (size // heads).
            parts = min(size, shape.num_kv_heads) if mapping.rows == "kv_heads" else size
            yield mapping.name, tp_rank * parts // size * (num_rows // parts), 0, num_rows // parts, num_cols


def _cut_groups(shape: ModelShape, fused: list[TensorMapping], size: int, tp_rank: int) -> Iterator[_TensorSlice]:
    """megatron's QKV: query groups one after another, a rank holds an even share of all the rows."""
    each = [_sizes(shape, mapping)[0] // shape.num_kv_heads for mapping in fused]
    share = shape.num_kv_heads * sum(each) // size
    first, end, start = tp_rank * share, (tp_rank + 1) * share, 0
    for group in range(shape.num_kv_heads):
        for mapping, rows in zip(fused, each, strict=True):
            low, high = max(first, start), min(end, start + rows)
            if low < high:
                yield mapping.name, group * rows + low - start, 0, high - low, _sizes(shape, mapping)[1]
            start += rows


def _stack(parameter: str, slices: Iterator[_TensorSlice]) -> Iterator[ShardSlice]:
    start = 0
    for name, row, col, rows, cols in slices:
        if rows:  # a rank may hold nothing but padding
            yield ShardSlice(name, row, col, rows, cols, parameter, start, 0)
        start += rows


def shard_slices(
    shape: ModelShape, layout: Layout, tp_rank: int, pp_rank: int = 0, chunk: int | None = None
) -> tuple[ShardSlice, ...]:
    """Everything that a rank holds (of one model chunk only, if given), in the order of the layers."""
    held: list[ShardSlice] = []
    for shard, layer in held_shards(shape, layout, tp_rank, pp_rank, chunk):
        held += shard.slices if layer is None else [part.numbered(layer) for part in shard.slices]
    return tuple(held)


def shard_shapes(
    shape: ModelShape, layout: Layout, tp_rank: int, pp_rank: int = 0, chunk: int | None = None
) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a rank (of one model chunk only, if given)."""
    return {
        shard.parameter if layer is None else shard.parameter.replace("{}", str(layer)): shard.shape
        for shard, layer in held_shards(shape, layout, tp_rank, pp_rank, chunk)
    }


def layer_matrices(shape: ModelShape, layout: Layout, tp_rank: int = 0) -> tuple[tuple[int, ...], ...]:
    """The shapes of the matrices that a rank holds of any one layer: what FP8 is asked for of."""
    return tuple(shard.shape for shard in template(shape, layout, "layer", tp_rank) if len(shard.shape) == 2)


def held_shards(
    shape: ModelShape, layout: Layout, tp_rank: int, pp_rank: int, chunk: int | None
) -> Iterator[tuple[Shard, int | None]]:
    """The shards of a rank (of one model chunk only, if given) in the order of the model, each with its layer or None."""
    trainer = layout if isinstance(layout, TrainerLayout) else TrainerLayout()
    chunks = range(trainer.vpp_size) if chunk is None else range(chunk, chunk + 1)
    if pp_rank == 0 and 0 in chunks:
        yield from ((shard, None) for shard in template(shape, layout, "first", tp_rank))
    for here in chunks:
        for layer in stage_layers(shape, trainer)[pp_rank][here]:
            yield from ((shard, layer) for shard in template(shape, layout, "layer", tp_rank))
    if pp_rank == trainer.pp_size - 1 and trainer.vpp_size - 1 in chunks:
        yield from ((shard, None) for shard in template(shape, layout, "last", tp_rank))


def matrix_slice(tensor: torch.Tensor, row: int, col: int, rows: int, cols: int) -> torch.Tensor:
    """The view [rows, cols] of a contiguous matrix or vector."""
    return tensor.view(tensor.shape[0], -1)[row : row + rows, col : col + cols]


def tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor with its full shape: embedding, layers, end; no lm_head where it is tied."""
    return shard_shapes(shape, WHOLE, 0)
