"""The optimizer's state of a checkpoint as the rank of another layout needs it: each element of a moment or of the fp32 weights
has a place in a Hugging Face tensor, by which it is found in the ranks' files that wrote it. Weights need none of this, for
they are kept as Hugging Face tensors. It opens no process group and changes no model.

A state in another layout is equivalent and not bit-equal to one that was never moved: sums over ranks have another order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
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
KEY = re.compile(rf"^optimizer\.(?P<name>.+?)(?:\[(?P<start>\d+):(?P<end>\d+)\])?\.(?P<kind>{_KIND})$")
FP8_KINDS = frozenset(f"{moment}.{part}" for moment in MOMENTS for part in FP8_PARTS)


@dataclass(frozen=True)
class Part:
    """Where the elements `start` to `end` of a flat parameter's moment, or of its fp32 weights, are."""

    rank: int
    key: str
    start: int
    end: int | None  # None: all of them


@dataclass
class SavedOptimizer:
    """The optimizer's state that the ranks of one layout wrote.

    `open_rank` gives a rank's file as safetensors opens it: `keys()` and `get_tensor(name)`.
    """

    shape: ModelShape
    layout: TrainerLayout
    dp_size: int
    open_rank: Callable[[int], Any]
    _files: dict[int, Any] = field(default_factory=dict)
    _whole: dict[tuple[int, int, str, str], torch.Tensor] = field(default_factory=dict)  # the last few that were put together

    def state_of(
        self, layout: TrainerLayout, tp_rank: int, pp_rank: int, slots: Mapping[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor]:
        """The state of a rank of another layout, as `Policy.state(weights=False)` names it. `slots`: what its optimizer moves,
        by the parameter's name, with [start:end] where it has a part of it only, and in which shape. CheckpointError where the
        state is of a kind that cannot be cut anew."""
        self._check()
        family = family_of(self.shape)
        slices: dict[str, list[ShardSlice]] = {}
        for one in shard_slices(self.shape, layout, tp_rank, pp_rank):
            slices.setdefault(family.local_name(one.parameter), []).append(one)
        shapes = {family.local_name(name): size for name, size in shard_shapes(self.shape, layout, tp_rank, pp_rank).items()}
        any_file = self._open(next(iter(self._ranks(0, 0))))
        found = {name: any_file.get_tensor(name) for name in any_file.keys() if name == f"{OPTIMIZER}schedule.step"}  # noqa: SIM118
        for slot, size in slots.items():
            name, _, part = slot.partition("[")
            start, end = map(int, part.rstrip("]").split(":")) if part else (0, None)
            for kind in self._kinds(slices[name]):
                if kind == "step":
                    found[f"{OPTIMIZER}{slot}.step"] = self._step(slices[name][0])
                    continue
                whole = self._assemble(shapes[name], slices[name], kind)
                found[f"{OPTIMIZER}{slot}.{kind}"] = whole.flatten()[start:end].view(size).clone()
        return found

    def _check(self) -> None:
        """CheckpointError for what is kept per tensor or per rank."""
        for tp_rank, pp_rank in product(range(self.layout.tp_size), range(self.layout.pp_size)):
            for rank in self._ranks(tp_rank, pp_rank):
                for key in self._open(rank).keys():  # noqa: SIM118
                    known = KEY.match(key)
                    if key.startswith("fp8.") or (known is not None and known["kind"] in FP8_KINDS):
                        raise CheckpointError(
                            f"the trainer's layout must be the one that wrote the checkpoint where trainer.fp8 = 'delayed' or "
                            f"optimizer.moment_dtype = 'fp8'; found {key}, whose scale is of a whole shard: resume with that "
                            f"layout"
                        )

    def _ranks(self, tp_rank: int, pp_rank: int) -> list[int]:
        """The ranks that hold the same shards."""
        return [(pp_rank * self.dp_size + dp_rank) * self.layout.tp_size + tp_rank for dp_rank in range(self.dp_size)]

    def _open(self, rank: int) -> Any:
        if rank not in self._files:
            self._files[rank] = self.open_rank(rank)
        return self._files[rank]

    @cached_property
    def _holders(self) -> dict[str, list[tuple[int, int, ShardSlice]]]:
        """(tp_rank, pp_rank, slice) of every shard that holds part of a Hugging Face tensor."""
        found: dict[str, list[tuple[int, int, ShardSlice]]] = {}
        for tp_rank, pp_rank in product(range(self.layout.tp_size), range(self.layout.pp_size)):
            for one in shard_slices(self.shape, self.layout, tp_rank, pp_rank):
                found.setdefault(one.name, []).append((tp_rank, pp_rank, one))
        return found

    @cached_property
    def _parts(self) -> dict[tuple[int, int, str, str], list[Part]]:
        """Where each (tp_rank, pp_rank, parameter, kind) is."""
        found: dict[tuple[int, int, str, str], list[Part]] = {}
        for tp_rank, pp_rank in product(range(self.layout.tp_size), range(self.layout.pp_size)):
            for rank in self._ranks(tp_rank, pp_rank):
                for key in self._open(rank).keys():  # noqa: SIM118
                    if (known := KEY.match(key)) is not None:
                        end = int(known["end"]) if known["end"] is not None else None
                        part = Part(rank, key, int(known["start"] or 0), end)
                        found.setdefault((tp_rank, pp_rank, known["name"], known["kind"]), []).append(part)
        return found

    def _local(self, one: ShardSlice) -> str:
        return family_of(self.shape).local_name(one.parameter)

    def _kinds(self, slices: list[ShardSlice]) -> list[str]:
        """What is kept of a parameter."""
        tp_rank, pp_rank, held = self._holders[slices[0].name][0]
        name = self._local(held)
        return [kind for (tp, pp, local, kind) in self._parts if (tp, pp, local) == (tp_rank, pp_rank, name)]

    def _step(self, one: ShardSlice) -> torch.Tensor:
        tp_rank, pp_rank, held = self._holders[one.name][0]
        part = self._parts[tp_rank, pp_rank, self._local(held), "step"][0]
        found: torch.Tensor = self._open(part.rank).get_tensor(part.key)
        return found

    def _assemble(self, shape: tuple[int, ...], slices: list[ShardSlice], kind: str) -> torch.Tensor:
        """A whole shard of the new layout; what no slice covers, padding of the vocabulary, is 0."""
        made: torch.Tensor | None = None
        for wanted in slices:
            for tp_rank, pp_rank, held in self._holders[wanted.name]:
                rows = overlap(wanted.row, wanted.rows, held.row, held.rows)
                cols = overlap(wanted.col, wanted.cols, held.col, held.cols)
                if not rows or not cols:
                    continue
                source = self._shard(tp_rank, pp_rank, held, kind)
                if made is None:
                    made = torch.zeros(shape, dtype=source.dtype)
                into = wanted.shard_row + rows.start - wanted.row, wanted.shard_col + cols.start - wanted.col
                out_of = held.shard_row + rows.start - held.row, held.shard_col + cols.start - held.col
                matrix_slice(made, *into, len(rows), len(cols)).copy_(matrix_slice(source, *out_of, len(rows), len(cols)))
        return torch.zeros(shape) if made is None else made  # a shard of nothing but padding

    def _shard(self, tp_rank: int, pp_rank: int, held: ShardSlice, kind: str) -> torch.Tensor:
        """One kind of one parameter of a shard that was saved, put together from its data-parallel ranks' parts."""
        key = tp_rank, pp_rank, self._local(held), kind
        if key not in self._whole:
            shape = shard_shapes(self.shape, self.layout, tp_rank, pp_rank)[held.parameter]
            self._whole[key] = self._join(shape, self._parts[key])
            for former in list(self._whole)[: -4 * self.layout.tp_size]:
                del self._whole[former]
        return self._whole[key]

    def _join(self, shape: tuple[int, ...], parts: list[Part]) -> torch.Tensor:
        tensors: Iterator[tuple[Part, torch.Tensor]] = ((part, self._open(part.rank).get_tensor(part.key)) for part in parts)
        flat: torch.Tensor | None = None
        for part, value in tensors:
            if part.end is None:
                return value.view(shape)
            if flat is None:
                flat = torch.zeros(torch.Size(shape).numel(), dtype=value.dtype)
            flat[part.start : part.end] = value.flatten()
        assert flat is not None
        return flat.view(shape)


def overlap(start: int, length: int, other: int, other_length: int) -> range:
    """What two ranges of numbers have in common."""
    return range(max(start, other), min(start + length, other + other_length))
