"""The newest checkpoint as a run goes on from it: compared with the configuration, every file checked against its digest, each
rank a share of them. What a checkpoint consists of stands in checkpoint.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config.load import RunConfig
from engine.config.options import Trainer
from engine.core.errors import CheckpointError, combined
from engine.core.tensor_files import file_record
from engine.models.hf import HfCheckpoint
from engine.run.checkpoint import (
    POLICY,
    SLOTS,
    ahead_of,
    latest,
    older,
    other_data,
    other_options,
    rank_file,
    read_manifest,
    recall_schedule,
    reference_folder,
    same_layout,
    state_rank,
    trainer_of,
    verify_file,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Saved:
    """What one rank goes on with."""

    step: int
    state: dict[str, torch.Tensor] | None  # this rank's; None where another layout wrote the checkpoint
    policy: HfCheckpoint
    reference: HfCheckpoint | None  # None: the seed model's weights, or not needed
    folder: Path
    trainer: Trainer  # the options it was written with
    ahead: range  # the steps that it keeps rollouts of
    slots: Mapping[int, Sequence[str]] | None = None  # by rank, as its snapshot had them; None where nothing tells

    def open_rank(self, rank: int) -> Any:
        """The state that a rank of the layout which wrote it holds, as safetensors opens a file."""
        from safetensors import safe_open

        return safe_open(self.folder / rank_file(rank), framework="pt")


def load(folder: Path, config: RunConfig, rank: int, world_size: int) -> Saved:
    """The newest checkpoint of a run's folder of them. This rank checks its own file and its share of the others against their
    digests, so that all ranks together check all. Raises CheckpointError when there is none, it is torn or altered, or it
    belongs to another run.
    """
    from safetensors.torch import load_file

    newest = latest(folder)
    if newest is None:
        raise CheckpointError(f"{folder} must hold a checkpoint to resume from; found none: start without --resume")
    manifest = read_manifest(newest)
    if found := [*other_options(newest, manifest, config), *other_data(newest, manifest, config)]:
        raise combined(found)
    if "seed" not in manifest:
        raise older(newest, "weights in the ranks' own files")
    recall_schedule(config, manifest)
    trainer, state, slots = trainer_of(manifest), None, None
    if same_layout(trainer, config.trainer):
        own = rank_file(state_rank(trainer, rank))
        verify_file(newest, own, manifest)
        state = load_file(newest / own)
    elif SLOTS in manifest["files"]:
        verify_file(newest, SLOTS, manifest)
        slots = {int(rank): own for rank, own in json.loads((newest / SLOTS).read_text(encoding="utf-8")).items()}
    share = slice(rank, None, world_size)
    _verify_files(newest, manifest, share)
    reference = reference_folder(newest, manifest)
    if reference is not None and reference.parent != newest:
        _verify_files(reference.parent, read_manifest(reference.parent), share)
    seed = manifest["seed"]
    for name in sorted(seed)[share]:
        _verify_seed(Path(config.model.path) / name, seed[name], newest)
    policy, other = HfCheckpoint(newest / POLICY), HfCheckpoint(reference) if reference is not None else None
    return Saved(int(manifest["step"]), state, policy, other, newest, trainer, ahead_of(manifest), slots)


def _verify_files(checkpoint: Path, manifest: dict[str, Any], share: slice) -> None:
    """A share of all files, in the order of their names."""
    for name in sorted(manifest["files"])[share]:
        verify_file(checkpoint, name, manifest)


def _verify_seed(file: Path, known: Mapping[str, Any], checkpoint: Path) -> None:
    """CheckpointError where a file of the seed model, which the reference is, is not the one the run began with."""
    found = file_record(file).as_json() if file.exists() else None
    if found != known:
        raise CheckpointError(
            f"model.path must hold the weights that {checkpoint} was written with, for the run goes on needing them (its "
            f"reference, or what its engines sample from); found {'none' if found is None else 'others'} at {file}: put back "
            f"what it was, or start a new run"
        )
