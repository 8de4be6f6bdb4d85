"""What a trainer rank needs to continue bit for bit, as CPU tensors by name, and how it is taken up again: weights, the
reference, the optimizer, FP8 scales. It writes and names no file; checkpoints are engine/run's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from engine.core.errors import CheckpointError
from engine.megatron import build
from engine.megatron.fp8.parameters import Weights, in_fp8, load, scale
from engine.megatron.optimizer import PolicyOptimizer
from engine.megatron.parallel_state import ParallelState
from engine.megatron.reshard import SavedOptimizer
from engine.models import sharding as layout
from engine.models.base import ModelShape
from engine.models.hf import HfCheckpoint
from engine.models.registry import family_of
from engine.observe.telling import BYTES, activity


class PolicyState:
    """The state of this rank's part of the policy."""

    def __init__(
        self,
        tables: Mapping[str, Mapping[str, torch.Tensor]],
        optimizer: PolicyOptimizer,
        shape: ModelShape,
        axes: layout.TrainerLayout,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        """`tables`: the tensors of the state that are there from the start, by megatron's names, which are read and filled in
        place: "policy", "reference", which may be empty, and "fp8", the scales. `dtype`: of the model."""
        self._tables, self._optimizer = tables, optimizer
        self._shape, self._axes, self._parallel, self._dtype = shape, axes, parallel, dtype
        self._local_name = family_of(shape).local_name

    def copy(self, *, weights: bool = True) -> dict[str, torch.Tensor]:
        """CPU copies of all. Local shards, named as in megatron-core's local spec whatever trainer.layers is; in the model's
        dtype, with their scales beside them where they are kept in FP8. Without `weights`, what `load_checkpoint` needs beside
        files of the weights."""
        return {name: value.detach().to("cpu", copy=True) for name, value in self._tensors(weights)}

    def _tensors(self, weights: bool) -> Iterator[tuple[str, torch.Tensor]]:
        """One tensor at a time: one in FP8 is dequantized at every access."""
        for prefix, table in self._tables.items():
            held = Weights(table)
            for name, value in table.items():
                local = self._local_name(name)
                if weights or prefix == "fp8":
                    yield f"{prefix}.{local}", held[name]
                if in_fp8(value):
                    yield f"{prefix}_scale.{local}", scale(value)
        for name, value in self._optimizer.state().items():
            yield f"optimizer.{name}", value

    def of_other_layout(self, saved: SavedOptimizer) -> dict[str, torch.Tensor]:
        """What `load_checkpoint` takes on this rank, of a state that ranks of another layout wrote."""
        return saved.state_of(self._axes, self._parallel.tp_rank, self._parallel.pp_rank, self._optimizer.slots)

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Continues from what `copy` returned on this rank of the same layout; CheckpointError names what differs."""
        for prefix in self._tables:
            self._load_table(prefix, tensors)
        self._load_optimizer(tensors)

    @torch.no_grad()
    def load_checkpoint(
        self, tensors: dict[str, torch.Tensor], policy: HfCheckpoint, reference: HfCheckpoint | None = None
    ) -> None:
        """Continues from what `copy(weights=False)` returned on this rank of the same layout, and from the policy's and the
        reference's weights; without the latter the reference stays the model that this policy was made from.
        CheckpointError names what differs."""
        self._read("policy", policy, tensors)
        if reference is not None and self._tables["reference"]:
            self._read("reference", reference, tensors)
        self._load_table("fp8", tensors)
        self._load_optimizer(tensors)

    def _read(self, prefix: str, checkpoint: HfCheckpoint, tensors: dict[str, torch.Tensor]) -> None:
        """Fills a set of weights from a Hugging Face folder; one in FP8 is put together in the host's memory."""
        table = self._tables[prefix]
        places = {
            name: torch.empty(value.shape, dtype=self._dtype) if in_fp8(value) else value.data for name, value in table.items()
        }
        held = layout.shard_slices(self._shape, self._axes, self._parallel.tp_rank, self._parallel.pp_rank)
        num_bytes = sum(part.rows * part.cols for part in held) * self._dtype.itemsize
        with activity("weights", f"of the {prefix}", total=num_bytes, unit=BYTES) as reading:
            build.read_slices(places, held, layout.tensors(self._shape), checkpoint, reading)
        for name, value in table.items():
            if in_fp8(value):
                load(value, places[name], tensors.get(f"{prefix}_scale.{self._local_name(name)}"))

    def _load_table(self, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
        for name, value in self._tables[prefix].items():
            key = f"{prefix}.{self._local_name(name)}"
            saved = tensors.get(key)
            if saved is None or saved.shape != value.shape or saved.dtype != value.dtype:
                raise CheckpointError(
                    f"trainer state must hold {key} as {list(value.shape)} {value.dtype}; found "
                    f"{'nothing' if saved is None else f'{list(saved.shape)} {saved.dtype}'}: resume with the "
                    f"configuration that saved it"
                )
            load(value, saved, tensors.get(f"{prefix}_scale.{self._local_name(name)}"))

    def _load_optimizer(self, tensors: dict[str, torch.Tensor]) -> None:
        prefix = "optimizer."
        self._optimizer.load_state({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
