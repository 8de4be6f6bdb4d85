"""The optimizer's state of a checkpoint as the rank of another layout needs it: each element of a moment or of the fp32 weights
has a place in a Hugging Face tensor, by which it is found in the ranks' files that wrote it. Weights need none of this, for
they are kept as Hugging Face tensors. It opens no process group and changes no model.

A state in another layout is equivalent and not bit-equal to one that was never moved: sums over ranks have another order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import torch

from engine.core.errors import CheckpointError
from engine.megatron.moments import FP8_PARTS, KINDS, MOMENTS
from engine.models.base import ModelShape
from engine.models.registry import family_of
from engine.models.sharding import ShardSlice, TrainerLayout, matrix_slice, shard_shapes, shard_slices

OPTIMIZER = "optimizer."
_KIND = "|".join(re.escape(kind) for kind in sorted(KINDS, key=len, reverse=True))
KEY = re.compile(rf"^optimizer\.(?!schedule\.)(?P<slot>.+?(?:\[\d+:\d+\])?)\.(?P<kind>{_KIND})$")
FP8_KINDS = frozenset(f"{moment}.{part}" for moment in MOMENTS for part in FP8_PARTS)


@dataclass(frozen=True)
class Part:
    """Where the elements `start` to `end` of a flat parameter are: its moments, and its fp32 weights."""

    rank: int
    slot: str  # the parameter's name, with [start:end] where the rank has a part of it only
    start: int
    end: int | None  # None: all of them


@dataclass(frozen=True)
class Block:
    """Rows of a shard that was saved, some of whose columns a rank needs, and where its own shard takes them."""

    parts: tuple[Part, ...]  # those that hold some of it
    row: int
    rows: int
    width: int  # of the shard that was saved
    col: int
    cols: int
    into: tuple[int, int]  # row and column


@dataclass
class SavedOptimizer:
    """The optimizer's state that the ranks of one layout wrote.

    `open_rank` gives a rank's file as safetensors opens it: `keys()`, `get_tensor(name)` and `get_slice(name)`. A file is
    opened where it holds something that is asked for, so that the files opened do not grow with the ranks that wrote. For that
    it must be known which data-parallel rank has what: `slots` says so by rank, as `slots_of` gave them there; `one_writer`
    where the first of them has everything. Where neither is known, as of a checkpoint of an older version, all those of a
    shard that is needed are opened.
    """

    shape: ModelShape
    layout: TrainerLayout
    dp_size: int
    open_rank: Callable[[int], Any]
    slots: Mapping[int, Sequence[str]] | None = None
    one_writer: bool = False
    _files: dict[int, Any] = field(default_factory=dict)
    _keys: dict[int, dict[str, list[str]]] = field(default_factory=dict)  # by rank, the kinds of each slot in its file
    _shards: dict[tuple[int, int], dict[str, list[Part]]] = field(default_factory=dict)  # by (tp_rank, pp_rank) and parameter

    def state_of(
        self, layout: TrainerLayout, tp_rank: int, pp_rank: int, slots: Mapping[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor]:
        """The state of a rank of another layout, as `PolicyState.copy(weights=False)` names it. `slots`: what its optimizer
        moves, by the parameter's name, with [start:end] where it has a part of it only, and in which shape. CheckpointError
        where the state is of a kind that cannot be cut anew."""
        family = family_of(self.shape)
        slices: dict[str, list[ShardSlice]] = {}
        for one in shard_slices(self.shape, layout, tp_rank, pp_rank):
            slices.setdefault(family.local_name(one.parameter), []).append(one)
        shapes = {family.local_name(name): size for name, size in shard_shapes(self.shape, layout, tp_rank, pp_rank).items()}
        any_file = self._open(0)
        found = {name: any_file.get_tensor(name) for name in any_file.keys() if name == f"{OPTIMIZER}schedule.step"}  # noqa: SIM118
        for slot, size in slots.items():
            name, start, end = _place(slot)
            end = math.prod(shapes[name]) if end is None else end
            blocks = list(self._blocks(shapes[name], slices[name], start, end))
            anywhere = blocks[0].parts[0] if blocks else self._anywhere(slices[name][0])  # padding is of the same kinds
            self._open(anywhere.rank)
            for kind in self._keys[anywhere.rank].get(anywhere.slot, []):
                key = f"{OPTIMIZER}{anywhere.slot}.{kind}"
                if kind == "step":
                    found[f"{OPTIMIZER}{slot}.step"] = self._open(anywhere.rank).get_tensor(key)
                    continue
                dtype = self._open(anywhere.rank).get_slice(key)[0:1].dtype
                found[f"{OPTIMIZER}{slot}.{kind}"] = self._assemble(shapes[name], blocks, kind, dtype, start, end).view(size)
        return found

    def _ranks(self, tp_rank: int, pp_rank: int) -> list[int]:
        """The ranks that hold the same shards."""
        return [(pp_rank * self.dp_size + dp_rank) * self.layout.tp_size + tp_rank for dp_rank in range(self.dp_size)]

    def _open(self, rank: int) -> Any:
        """A rank's file; CheckpointError for what is kept per tensor or per rank."""
        if rank not in self._files:
            self._files[rank] = file = self.open_rank(rank)
            kinds = self._keys[rank] = {}
            for key in file.keys():  # noqa: SIM118
                known = KEY.match(key)
                if key.startswith("fp8.") or (known is not None and known["kind"] in FP8_KINDS):
                    raise whole_shards_only(key)
                if known is not None:
                    kinds.setdefault(known["slot"], []).append(known["kind"])
        return self._files[rank]

    @cached_property
    def _holders(self) -> dict[str, list[tuple[int, int, ShardSlice]]]:
        """(tp_rank, pp_rank, slice) of every shard that holds part of a Hugging Face tensor."""
        found: dict[str, list[tuple[int, int, ShardSlice]]] = {}
        for tp_rank, pp_rank in product(range(self.layout.tp_size), range(self.layout.pp_size)):
            for one in shard_slices(self.shape, self.layout, tp_rank, pp_rank):
                found.setdefault(one.name, []).append((tp_rank, pp_rank, one))
        return found

    def _parts(self, tp_rank: int, pp_rank: int, held: ShardSlice) -> list[Part]:
        """Where a parameter of a shard that was saved is."""
        if (tp_rank, pp_rank) not in self._shards:
            parts: dict[str, list[Part]] = {}
            ranks = self._ranks(tp_rank, pp_rank)
            for rank in ranks[:1] if self.one_writer else ranks:
                for slot in self._slots(rank):
                    name, start, end = _place(slot)
                    parts.setdefault(name, []).append(Part(rank, slot, start, end))
            self._shards[tp_rank, pp_rank] = parts
        return self._shards[tp_rank, pp_rank][family_of(self.shape).local_name(held.parameter)]

    def _slots(self, rank: int) -> Iterable[str]:
        if self.slots is not None:
            return self.slots.get(rank, ())
        self._open(rank)
        return self._keys[rank]

    def _anywhere(self, one: ShardSlice) -> Part:
        """Some part of a tensor."""
        return self._parts(*self._holders[one.name][0])[0]

    def _blocks(self, shape: tuple[int, ...], slices: list[ShardSlice], start: int, end: int) -> Iterator[Block]:
        """What the rows with the elements `start` to `end` of a shard of the new layout are made of, or those elements alone
        where they are in one row; what no block covers is padding of the vocabulary."""
        width = _width(shape)
        first, last = start // width, -(-end // width)
        left, right = (start - first * width, end - first * width) if last - first == 1 else (0, width)
        for wanted in slices:
            needed = overlap(first, last - first, wanted.shard_row, wanted.rows)
            columns = overlap(left, right - left, wanted.shard_col, wanted.cols)
            row, column = wanted.row + needed.start - wanted.shard_row, wanted.col + columns.start - wanted.shard_col
            for tp_rank, pp_rank, held in self._holders[wanted.name]:
                rows = overlap(row, len(needed), held.row, held.rows)
                cols = overlap(column, len(columns), held.col, held.cols)
                if not rows or not cols:
                    continue
                own = _width(shard_shapes(self.shape, self.layout, tp_rank, pp_rank)[held.parameter])
                out_of, col = held.shard_row + rows.start - held.row, held.shard_col + cols.start - held.col
                into = wanted.shard_row + rows.start - wanted.row, wanted.shard_col + cols.start - wanted.col
                low, high = out_of * own + col, (out_of + len(rows) - 1) * own + col + len(cols)
                parts = [
                    part
                    for part in self._parts(tp_rank, pp_rank, held)
                    if part.start < high and (part.end is None or part.end > low)
                ]
                yield Block(tuple(parts), out_of, len(rows), own, col, len(cols), into)

    def _assemble(
        self, shape: tuple[int, ...], blocks: list[Block], kind: str, dtype: torch.dtype, start: int, end: int
    ) -> torch.Tensor:
        """The elements `start` to `end` of a shard of the new layout, flat; what no block covers is 0."""
        width = _width(shape)
        first, last = start // width, -(-end // width)
        made = torch.zeros(last - first, width, dtype=dtype)
        for block in blocks:
            row, col = block.into
            into = matrix_slice(made, row - first, col, block.rows, block.cols)
            into.copy_(matrix_slice(self._read(block, kind, dtype), 0, block.col, block.rows, block.cols))
        return made.flatten()[start - first * width : end - first * width].clone()

    def _read(self, block: Block, kind: str, dtype: torch.dtype) -> torch.Tensor:
        """One kind of the rows of a shard that was saved, put together from its data-parallel ranks' parts; 0 where those have
        nothing of it."""
        low, high = block.row * block.width, (block.row + block.rows) * block.width
        flat = torch.zeros(high - low, dtype=dtype)
        for part in block.parts:
            saved = self._open(part.rank).get_slice(f"{OPTIMIZER}{part.slot}.{kind}")
            if part.end is None and len(saved.get_shape()) > 1:  # in the parameter's own shape
                return saved[block.row : block.row + block.rows].reshape(block.rows, block.width)
            found = overlap(low, high - low, part.start, high if part.end is None else part.end - part.start)
            flat[found.start - low : found.stop - low] = saved[found.start - part.start : found.stop - part.start]
        return flat.view(block.rows, block.width)


def slots_of(state: Iterable[str]) -> list[str]:
    """The parameters of which a rank's state, given by its names, holds what its optimizer keeps, each with [start:end] where
    the rank has a part of it only."""
    return sorted({known["slot"] for key in state if (known := KEY.match(key)) is not None})


def whole_shards_only(found: str) -> CheckpointError:
    """For a state with scales of whole shards, which cannot be cut anew; `found` tells what says that it has some."""
    return CheckpointError(
        f"the trainer's layout must be the one that wrote the checkpoint where trainer.fp8 = 'delayed' or "
        f"optimizer.moment_dtype = 'fp8'; found {found}, whose scale is of a whole shard: resume with that layout"
    )


def _place(slot: str) -> tuple[str, int, int | None]:
    """The parameter of a slot, and which of its elements: the end is None where it has all."""
    name, _, part = slot.partition("[")
    start, end = map(int, part.rstrip("]").split(":")) if part else (0, None)
    return name, start, end


def _width(shape: tuple[int, ...]) -> int:
    """Elements in a row, as `matrix_slice` has them: 1 of a vector."""
    return math.prod(shape[1:])


def overlap(start: int, length: int, other: int, other_length: int) -> range:
    """What two ranges of numbers have in common."""
    return range(max(start, other), min(start + length, other + other_length))
