"""Checkpoints of one rank as tests make them: any tensors for a state and for the weights, waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.config.load import RunConfig
from engine.run.model_folder import Weights
from engine.run.saving import Checkpoints, Snapshot


class Alone:
    """The words of a rank that hears and waits for nobody."""

    rank = 0

    def broadcast(self, word: bytes) -> bytes:
        """Its own."""
        return word

    def barrier(self) -> None:
        """Nobody is there."""

    def agreed(self, word: bytes, judge: Callable[[list[bytes]], bytes]) -> bytes:
        """Of its own."""
        return judge([word])


ALONE = Alone()


def open_folder(folder: Path, rank: int = 0, world_size: int = 1, **options: Any) -> Checkpoints:
    """The checkpoints in a folder as a rank sees them that waits for no other."""
    return Checkpoints(folder, rank=rank, world_size=world_size, host=ALONE, **options)


def weights_of(tensors: Mapping[str, torch.Tensor]) -> Weights:
    """All in one file, written by the rank that has them."""
    return Weights((tuple(tensors),), {0: dict(tensors)}, sum(tensor.nbytes for tensor in tensors.values()))


def snapshot_of(state: Mapping[str, torch.Tensor], weights: Iterable[tuple[str, torch.Tensor]], **reference: Any) -> Snapshot:
    """What one rank that holds the whole model writes."""
    tensors = dict(weights)
    return Snapshot(state, next(iter(tensors.values())).dtype, weights_of(tensors), **reference)


def commit(
    checkpoints: Checkpoints,
    step: int,
    state: Mapping[str, torch.Tensor],
    weights: Iterable[tuple[str, torch.Tensor]],
    config: RunConfig,
    records: Mapping[str, Any] | None = None,
    end_ids: Iterable[int] = (),
) -> Path:
    """Writes a checkpoint and waits for it; its folder."""
    checkpoints.commit(step, snapshot_of(state, weights), config, records, end_ids)
    checkpoints.wait()
    return config.run_directory / "checkpoints" / f"step_{step:08d}"
