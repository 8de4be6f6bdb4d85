"""What the nodes of a run read at its start and hold in their own memory, beside what is on GPUs. Arithmetic on where its
processes go; no machine is looked at.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from engine.capacity.kv_cache import item_bytes
from engine.capacity.memory import TrainerState
from engine.core.errors import CheckpointError
from engine.models.base import ModelShape
from engine.models.config_file import stored_dtype
from engine.models.headers import num_elements
from engine.run.host_memory import most_held, stage_and_replica
from engine.run.spec import Spec


@dataclass(frozen=True, slots=True)
class Hosts:
    """A run's nodes. Bytes."""

    nodes: int  # that have a process
    held: dict[str, int]  # by what is held, of the node that holds most
    weights_bytes: int  # of the model's files, once
    most_read: int  # of weights at the start, by the node that reads most
    read: int  # by all nodes together, off a file system that they share

    @property
    def held_bytes(self) -> int:
        """All that the fullest node holds."""
        return sum(self.held.values())


def hosts(spec: Spec) -> Hosts:
    """Of a run on GPUs. A node is taken to read a file's bytes once, however many of its processes need them: the others find
    them in its page cache. A reward model whose sizes are not known is left out. ConfigError where the processes do not fit
    the nodes."""
    read = _read(spec)
    return Hosts(
        nodes=len({assignment.node for assignment in spec.placed().assignments}),
        held=dict(most_held(spec)),
        weights_bytes=num_elements(spec.shape) * _stored_bytes(spec.config.model.path, spec.config.model.dtype),
        most_read=max(read.values()),
        read=sum(read.values()),
    )


def read_seconds(spec: Spec, disk_bytes_per_second: float) -> float:
    """Seconds for which all nodes read weights at the start, off a file system that they share; where the processes have no
    nodes yet, as if there were one."""
    if spec.placement is None:
        whole = num_elements(spec.shape) * _stored_bytes(spec.config.model.path, spec.config.model.dtype)
        return whole / disk_bytes_per_second
    return sum(_read(spec).values()) / disk_bytes_per_second


def _read(spec: Spec) -> dict[int, int]:
    """By node: bytes of weights. A trainer rank reads what its shards hold, an engine the whole model."""
    config, placed = spec.config, spec.placed()
    each = _stored_bytes(config.model.path, config.model.dtype)
    whole = num_elements(spec.shape) * each
    shards: dict[int, set[tuple[int, int]]] = defaultdict(set)  # (stage, tensor rank) of each node
    for rank, place in enumerate(placed.ranks):
        shards[place.node].add((stage_and_replica(spec, rank)[0], rank % spec.trainer.tp_size))
    sizes = [TrainerState(spec, stage).num_parameters * each for stage in range(spec.trainer.pp_size)]
    found = {node: min(whole, sum(sizes[stage] for stage, _ in there)) for node, there in shards.items()}
    found |= dict.fromkeys((engine.node for engine in placed.engines), whole)
    if spec.reward_shape is not None:
        for node in {engine.node for engine in placed.reward_engines}:
            found[node] = found.get(node, 0) + _reward_bytes(spec, spec.reward_shape)
    return found


def _reward_bytes(spec: Spec, shape: ModelShape) -> int:
    options = spec.config.reward_model
    assert options.path is not None
    return num_elements(shape) * _stored_bytes(options.path, options.dtype)


def _stored_bytes(path: str | Path, dtype: str) -> int:
    """Of an element in a model's files; as it is loaded, where its config.json does not say."""
    try:
        return stored_dtype(path).itemsize
    except CheckpointError:
        return item_bytes(dtype)
