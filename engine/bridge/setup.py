"""How a run's bridge is opened: what carries its weight syncs, whether there is room for that, which engines share a machine,
and which trainer ranks may send to them. It sends nothing; publish.py does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

import torch
import torch.distributed as dist

from engine.bridge.sender import Engines, Place, Publisher, Source
from engine.bridge.terms import SyncTerms
from engine.bridge.transports.base import Kind
from engine.bridge.transports.ipc import room_for
from engine.config.load import RunConfig
from engine.config.placement import Homes, homes
from engine.core.errors import ConfigError
from engine.models.hf import LlamaShape
from engine.models.sharding import engine_layout, trainer_layout

Groups = tuple[tuple[int, ...], ...]
log = logging.getLogger(__name__)


class Policy(Source, Protocol):
    """The model that is published."""

    @property
    def shape(self) -> LlamaShape:
        """Its sizes."""
        ...


class Standing(Place, Protocol):
    """Where this rank stands, and how many replicas there are."""

    @property
    def dp_size(self) -> int:
        """Data-parallel replicas."""
        ...


class Pool(Engines, Protocol):
    """The engines, and where they are."""

    def nodes(self) -> tuple[tuple[int, ...], ...]:
        """Engines by machine."""
        ...


def open_publisher(config: RunConfig, policy: Policy, place: Standing, host: str, pool: Pool | None) -> Publisher:
    """The bridge from this policy to the pool's engines; collective, `pool` is rank 0's."""
    turns = homes(config)
    has_room, num_bytes = _room(config, policy, place, turns)
    seen = torch.zeros(config.inference.engines, dtype=torch.int64, device=place.device)  # by rank 0: the machine of each
    if pool is not None:
        for machine, engines in enumerate(pool.nodes()):
            seen[list(engines)] = machine
    dist.broadcast(seen, 0)
    transport = choose_transport(config, place.device.type, has_room=has_room, num_bytes=num_bytes)
    nodes, senders = channel(seen.tolist(), transport, turns)
    terms = SyncTerms(
        shape=policy.shape,
        dtype=config.model.dtype,
        trainer=trainer_layout(config.trainer),
        dp_size=place.dp_size,
        engine=engine_layout(config.inference),
        nodes=nodes,
        bucket_bytes=config.sync.bucket_mebibytes << 20,
        transport=transport,
        senders=senders,
    )
    return Publisher(policy, place, terms, host=host, timeout_seconds=config.sync.timeout_seconds, pool=pool)


def channel(machines: list[int], transport: Kind, turns: Homes | None) -> tuple[Groups, Groups]:
    """(engines by node, trainer ranks that may send to each), as a plan wants them. `machines`: of every engine, as found;
    `turns`: the nodes of a run whose engines are served by their own node alone, which then count. ConfigError where
    `ipc` would have to leave a machine."""
    found = list(turns.engines) if turns else machines
    if transport == "ipc" and not turns and len(set(found)) > 1:
        raise ConfigError("sync.transport = 'ipc' needs all engines on one machine; found several: use 'auto'")
    if transport == "ipc":  # each takes what it needs from where it lies: nothing is passed on
        found = list(range(len(found)))
    nodes = tuple(tuple(engine for engine, node in enumerate(found) if node == n) for n in sorted(set(found)))
    return nodes, tuple(turns.beside(engines[0]) for engines in nodes) if turns else ()


def _room(config: RunConfig, policy: Policy, place: Standing, turns: Homes | None) -> tuple[bool, int]:
    """(whether the memory that processes share has room for weight syncs on every machine, the bytes it needs on the fullest);
    collective."""
    own = turns.ranks[place.rank] if turns else 0
    needed = torch.zeros(config.cluster.nodes, dtype=torch.int64, device=place.device)
    needed[own] = shared_bytes(config, policy)
    dist.all_reduce(needed)  # stages differ in size
    has_room = torch.tensor([room_for(int(needed[own]))], dtype=torch.int64, device=place.device)
    dist.all_reduce(has_room, dist.ReduceOp.MIN)
    return bool(has_room), int(needed.max())


class Weights(Protocol):
    """Who holds weights that a sync sends."""

    @property
    def parameters(self) -> Mapping[str, torch.Tensor]:
        """Them, by name."""
        ...


def shared_bytes(config: RunConfig, policy: Weights) -> int:
    """What weight syncs through the memory of a machine move into it, of this trainer rank: weights and staging. Weights in FP8
    are made for a look, and everything then goes by way of staging."""
    held = () if config.trainer.fp8_parameters else policy.parameters.values()
    weights = sum(p.numel() * p.element_size() for p in held) * (2 if config.keeps_seed else 1)
    return weights + 2 * (config.sync.bucket_mebibytes << 20)


def choose_transport(config: RunConfig, device: str, *, has_room: bool, num_bytes: int) -> Kind:
    """What carries a sync of weights on this device. `has_room`: shared memory takes the `num_bytes` that it would need.
    ConfigError for a transport that cannot carry it."""
    asked, placement, nodes = config.sync.transport, config.inference.placement, config.cluster.nodes
    short = (
        f"{num_bytes >> 20} MiB of shared memory (/dev/shm), which has less: give the container more (docker run --shm-size)"
    )
    if asked == "ipc" and device == "cpu" and not has_room:
        raise ConfigError(f"sync.transport = 'ipc' needs {short}, or use 'gloo'")
    fits: tuple[Kind, ...]
    if device == "cuda":  # NCCL cannot join two members on one GPU; memory is mapped where all see all GPUs
        fits = ("ipc",) if placement == "colocated" else ("nccl",)
    else:
        fits = ("ipc", "gloo") if nodes == 1 or placement == "colocated" else ("gloo",)
    if asked == "auto":
        if fits[0] == "ipc" and device == "cpu" and not has_room:
            log.warning("weight syncs go over gloo: through the machine's memory, faster, they need %s", short)
            return "gloo"
        return fits[0]
    if asked not in fits:
        raise ConfigError(
            f"sync.transport must be one of auto, {', '.join(fits)} on {device} with inference.placement = {placement!r} and "
            f"cluster.nodes = {nodes}; found {asked!r}: use 'auto'"
        )
    return asked
