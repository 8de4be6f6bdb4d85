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

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Literal, Protocol

from engine.models.base import Family, ModelShape, Section, TensorMapping
from engine.models.registry import family_of

if TYPE_CHECKING:
    import torch

    from engine.config.options import Inference, Trainer


class Sized(Protocol):
    """A dtype, of which only the size counts."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        ...


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


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """A Hugging Face tensor by name and full shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExportBucket:
    """Consecutive tensors of one pipeline stage that travel together, and the rank of the stage where they become whole."""

    stage: int  # pipeline rank that holds them
    tensors: tuple[TensorMeta, ...]
    tp_rank: int = 0
    dp_rank: int = 0


@dataclass(frozen=True, slots=True)
class ExportFile:
    """A file of a Hugging Face folder, written by one trainer rank, whose tensors come to it in buckets."""

    buckets: tuple[ExportBucket, ...]

    @property
    def writer(self) -> tuple[int, int, int]:
        """(pipeline, data, tensor) rank that writes it."""
        first = self.buckets[0]
        return first.stage, first.dp_rank, first.tp_rank

    @property
    def names(self) -> tuple[str, ...]:
        """Its tensors in the order of the model."""
        return tuple(meta.name for bucket in self.buckets for meta in bucket.tensors)


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
    for shard, layer in _held(shape, layout, tp_rank, pp_rank, chunk):
        held += shard.slices if layer is None else [part.numbered(layer) for part in shard.slices]
    return tuple(held)


def shard_shapes(
    shape: ModelShape, layout: Layout, tp_rank: int, pp_rank: int = 0, chunk: int | None = None
) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a rank (of one model chunk only, if given)."""
    return {
        shard.parameter if layer is None else shard.parameter.replace("{}", str(layer)): shard.shape
        for shard, layer in _held(shape, layout, tp_rank, pp_rank, chunk)
    }


def layer_matrices(shape: ModelShape, layout: Layout, tp_rank: int = 0) -> tuple[tuple[int, ...], ...]:
    """The shapes of the matrices that a rank holds of any one layer: what FP8 is asked for of."""
    return tuple(shard.shape for shard in template(shape, layout, "layer", tp_rank) if len(shard.shape) == 2)


def _held(
    shape: ModelShape, layout: Layout, tp_rank: int, pp_rank: int, chunk: int | None
) -> Iterator[tuple[Shard, int | None]]:
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


def export_plan(shape: ModelShape, layout: TrainerLayout, dtype: torch.dtype, max_bytes: int) -> tuple[ExportBucket, ...]:
    """All Hugging Face tensors in buckets of one stage and at most `max_bytes` each; a larger tensor stands alone.

    Pure: every rank computes the same plan. A tied embedding is the first stage's.
    """
    return tuple(
        ExportBucket(stage, bucket)
        for stage, metas in groupby(_by_stage(shape, layout), key=lambda pair: pair[0])
        for bucket in _runs([meta for _, meta in metas], dtype, max_bytes)
    )


def export_files(
    shape: ModelShape,
    layout: TrainerLayout,
    dp_size: int,
    dtype: Sized,
    max_bytes: int,
    *,
    min_file_bytes: int = 64 << 20,
    max_file_bytes: int = 5 << 30,
) -> tuple[ExportFile, ...]:
    """The files of the whole model as a Hugging Face folder, shared evenly by all ranks of each stage: each tensor is written
    by one rank, and a rank of a large model writes 1 / (tp_size * dp_size) of its stage. A stage has as many files as ranks, or
    more where they would be larger than `max_file_bytes`, or fewer where they would be smaller than `min_file_bytes`.
    `max_bytes`: of a bucket, as in `export_plan`.

    Pure: every rank computes the same files.
    """
    ranks = [(tp_rank, dp_rank) for dp_rank in range(dp_size) for tp_rank in range(layout.tp_size)]
    found: list[ExportFile] = []
    turns = [0] * layout.pp_size  # interleaved stages come back, and go on with the next rank
    for stage, pairs in groupby(_by_stage(shape, layout), key=lambda pair: pair[0]):
        metas = [meta for _, meta in pairs]
        total = sum(_num_bytes(meta, dtype) for meta in metas)
        count = max(-(-total // max_file_bytes), min(len(ranks), max(1, total // min_file_bytes)))
        parts = _even_parts(metas, dtype, count)
        for index, part in enumerate(parts):
            place = turns[stage] + index * max(1, len(ranks) // len(parts))  # spread over the stage's nodes
            tp_rank, dp_rank = ranks[place % len(ranks)]
            found.append(ExportFile(tuple(ExportBucket(stage, run, tp_rank, dp_rank) for run in _runs(part, dtype, max_bytes))))
        turns[stage] += len(parts)
    return tuple(found)


def file_bytes(file: ExportFile, dtype: Sized) -> int:
    """Bytes of a file's tensors."""
    return sum(_num_bytes(meta, dtype) for bucket in file.buckets for meta in bucket.tensors)


def in_turns(plan: Sequence[ExportFile]) -> tuple[tuple[int, ...], ...]:
    """The places of a plan's files in turns, in each of which a rank writes one at most, so that it need hold no more.

    Pure: every rank computes the same turns.
    """
    turns: list[list[int]] = []
    num_written = dict[tuple[int, int, int], int]()
    for place, file in enumerate(plan):
        turn = num_written.get(file.writer, 0)
        num_written[file.writer] = turn + 1
        if turn == len(turns):
            turns.append([])
        turns[turn].append(place)
    return tuple(map(tuple, turns))


def _by_stage(shape: ModelShape, layout: TrainerLayout) -> Iterator[tuple[int, TensorMeta]]:
    """Every Hugging Face tensor with the stage that holds it, in the order of the model; stages may come back (interleaved)."""
    stages = {layer: p for p, chunks in enumerate(stage_layers(shape, layout)) for chunk in chunks for layer in chunk}
    embedding = family_of(shape).embedding()
    for shard, layer in _held(shape, WHOLE, 0, 0, None):
        last_stage = layout.pp_size - 1 if shard.parameter != embedding else 0
        name = shard.parameter if layer is None else shard.parameter.replace("{}", str(layer))
        yield stages[layer] if layer is not None else last_stage, TensorMeta(name, shard.shape)


def _num_bytes(meta: TensorMeta, dtype: Sized) -> int:
    return math.prod(meta.shape) * dtype.itemsize


def _runs(metas: list[TensorMeta], dtype: Sized, max_bytes: int) -> Iterator[tuple[TensorMeta, ...]]:
    """Consecutive tensors of at most `max_bytes`; a larger one stands alone."""
    held: list[TensorMeta] = []
    held_bytes = 0
    for meta in metas:
        num_bytes = _num_bytes(meta, dtype)
        if held and held_bytes + num_bytes > max_bytes:
            yield tuple(held)
            held, held_bytes = [], 0
        held.append(meta)
        held_bytes += num_bytes
    yield tuple(held)


def _even_parts(metas: list[TensorMeta], dtype: Sized, count: int) -> list[list[TensorMeta]]:
    """At most `count` consecutive parts of about as many bytes each; none is empty."""
    total, before = sum(_num_bytes(meta, dtype) for meta in metas), 0
    parts: dict[int, list[TensorMeta]] = {}
    for meta in metas:
        middle = before + _num_bytes(meta, dtype) // 2
        parts.setdefault(middle * count // total, []).append(meta)
        before += _num_bytes(meta, dtype)
    return [parts[index] for index in sorted(parts)]
