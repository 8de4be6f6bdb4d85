"""Which trainer rank makes which Hugging Face tensors whole, and which file it writes them into: buckets of one pipeline stage,
and files that all ranks of a stage share. Plans only; the tensors come together in megatron/gathering.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

from engine.models.base import ModelShape
from engine.models.registry import family_of
from engine.models.sharding import WHOLE, TrainerLayout, held_shards, stage_layers

if TYPE_CHECKING:
    import torch


class Sized(Protocol):
    """A dtype, of which only the size counts."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        ...


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
    for shard, layer in held_shards(shape, WHOLE, 0, 0, None):
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
