"""This machine: libraries, tools, GPUs, what can carry weight syncs, KV caches, and room on the disk. Other nodes are not seen,
and no device is opened."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from engine.api.faults.look import Faults, Look, caught, tried
from engine.bridge.transports.base import room_for
from engine.bridge.transports.registry import choose
from engine.capacity.kv_cache import item_bytes, require_one_request
from engine.config.load import RunConfig
from engine.config.placement import place
from engine.config.transport import setting
from engine.core.errors import StorageError
from engine.forecast import disk
from engine.inference.arguments import argument_faults
from engine.megatron.libraries import check_installed
from engine.models.base import ModelShape
from engine.models.headers import num_elements
from engine.models.sharding import shard_shapes, trainer_layout
from engine.observe.profiling import nsight
from engine.run.host_memory import check_holds, most_held
from engine.run.machine import host_bytes, visible_gpus
from engine.run.shrinking import Room, check_can_shrink
from engine.run.spec import assemble


def machine_faults(look: Look, *, layouts_fit: bool) -> Faults:
    """Libraries, tools and GPUs that a run on this machine alone needs; those of other nodes are not seen."""
    config = look.config
    if config.profile.tool == "nsys" and look.purpose in ("train", "sft"):
        yield from caught(nsight.check_installed)
    if look.samples:
        yield from argument_faults(config.inference.vllm)
    if config.cluster.nodes > 1:
        fits = tried(place, config, look.parts)[1]
        yield from fits
        if look.purpose == "train" and not fits and config.run.on_lost_node == "shrink":
            yield from caught(check_can_shrink, config, Room.here(config) if layouts_fit else None)
        return
    if "trainer" in look.parts:
        yield from tried(check_installed, config.trainer, config.optimizer)[1]
    if gpus := visible_gpus():
        fits = tried(place, config, look.parts, gpus)[1]
        yield from fits
        if layouts_fit and not fits:
            yield from caught(_host_memory, look)
    if "trainer" in look.parts and look.samples and look.shape is not None and layouts_fit:
        yield from caught(_transport, config, "cuda" if gpus else "cpu", look.shape)


def _host_memory(look: Look) -> None:
    """Whether this machine, which is all of the run, holds what it keeps on the host; other nodes are looked at when they are
    there. Not looked at where no GPU is here: such a machine is none of the nodes of a run on GPUs."""
    if "trainer" in look.parts and look.shape is not None and visible_gpus():
        spec = assemble(look.config, look.shape, parts=look.parts)
        check_holds(spec, most_held(spec), host_bytes(), "on this machine")


def _transport(config: RunConfig, device: Literal["cuda", "cpu"], shape: ModelShape) -> None:
    """Whether what was asked for can carry the weights here, and /dev/shm has room for them."""
    t = config.trainer
    num_bytes = 0
    for stage in range(t.pipeline_parallel):
        shards = shard_shapes(shape, trainer_layout(t), 0, stage)
        held = sum(map(math.prod, shards.values())) * item_bytes(config.model.dtype)
        num_bytes += config.shared_bytes(held) * t.tensor_parallel * t.data_parallel
    choose(config.sync.transport, setting(config, device, has_room=room_for(num_bytes), needed_bytes=num_bytes))


def engine_cache_faults(look: Look) -> Faults:
    """Whether an engine's KV cache holds one request at full length."""
    assert look.shape is not None
    if look.samples:
        yield from caught(require_one_request, "inference", assemble(look.config, look.shape, parts=look.parts).kv_cache)


def storage_faults(look: Look) -> Faults:
    """Whether the disk has room for what will be written."""
    assert look.shape is not None
    config = look.config
    policy = num_elements(look.shape) * item_bytes(config.model.dtype)
    if look.purpose == "sft":
        yield from _room(Path(str(config.sft.checkpoint_out)), policy, "sft.checkpoint_out", "a checkpoint")
    if look.purpose == "train":
        folder = config.run_directory / "checkpoints"
        there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0
        what = f"{disk.num_checkpoints(assemble(config, look.shape))} checkpoints"
        yield from _room(folder, checkpoint_bytes(config, look.shape) - there, "run.directory", what)


def checkpoint_bytes(config: RunConfig, shape: ModelShape) -> int:
    """What the checkpoints of a training run take at the disk's fullest moment."""
    spec = assemble(config, shape)
    return disk.num_checkpoints(spec) * disk.checkpoint_bytes(spec)


def _room(folder: Path, num_bytes: int, option: str, what: str) -> Iterator[StorageError]:
    """A fault where the disk of `folder` has less room."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        yield StorageError(
            f"{option} must be on a disk with room for {what}; found {free:,} bytes free for {num_bytes:,} needed in {folder}, "
            f"at {there}: free some, name another folder, or keep fewer checkpoints"
        )
