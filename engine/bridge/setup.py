"""How a run's bridge is opened: what carries its weight syncs, whether there is room for that, which engines share a machine,
and which trainer ranks may send to them. It sends nothing; sender.py does.
"""

from __future__ import annotations

import json
import logging
from typing import Protocol

from engine.bridge.sender import Engines, ParallelState, Publisher, Source
from engine.bridge.terms import SyncTerms
from engine.bridge.transports.base import Transport, room_for
from engine.bridge.transports.registry import choose, kind_of
from engine.config.load import RunConfig
from engine.config.placement import Colocation
from engine.config.transport import Setting, setting
from engine.models.base import ModelShape
from engine.models.sharding import EngineLayout, TrainerLayout

Groups = tuple[tuple[int, ...], ...]
log = logging.getLogger(__name__)


class Run(Protocol):
    """The run as resolved: engine.run.spec's Spec, which stands above this package."""

    @property
    def config(self) -> RunConfig:
        """The configuration."""
        ...

    @property
    def trainer(self) -> TrainerLayout:
        """How trainer ranks share the model."""
        ...

    @property
    def engine(self) -> EngineLayout:
        """How the ranks of an engine do."""
        ...

    @property
    def colocation(self) -> Colocation | None:
        """Where ranks and engines are, where they take turns on GPUs."""
        ...


class Policy(Source, Protocol):
    """The model that is published."""

    @property
    def shape(self) -> ModelShape:
        """Its sizes."""
        ...


class ReplicatedState(ParallelState, Protocol):
    """The same, and how many replicas there are."""

    @property
    def dp_size(self) -> int:
        """Data-parallel replicas."""
        ...


class Pool(Engines, Protocol):
    """The engines, and where they are."""

    def nodes(self) -> tuple[tuple[int, ...], ...]:
        """Engines by machine."""
        ...


def open_publisher(run: Run, policy: Policy, parallel: ReplicatedState, host: str, pool: Pool | None) -> Publisher:
    """The bridge from this policy to the pool's engines; collective, `pool` is rank 0's."""
    config = run.config
    found = [-1] * config.inference.engines  # the machine of each
    for machine, engines in enumerate(pool.nodes() if pool is not None else ()):
        for engine in engines:
            found[engine] = machine
    machines = json.loads(parallel.host.broadcast(json.dumps(found).encode()))  # rank 0 waits for engines to start
    choice = choose(config.sync.transport, _setting(run, policy, parallel, machines))
    if choice.reason and parallel.rank == 0:
        log.warning(choice.reason)
    nodes, senders = channel(machines, kind_of(choice.name), run.colocation)
    terms = SyncTerms(
        shape=policy.shape,
        dtype=config.model.dtype,
        trainer=run.trainer,
        dp_size=parallel.dp_size,
        engine=run.engine,
        nodes=nodes,
        bucket_bytes=config.sync.bucket_mebibytes << 20,
        transport=choice.name,
        senders=senders,
    )
    return Publisher(policy, parallel, terms, host=host, timeout_seconds=config.sync.timeout_seconds, pool=pool)


def channel(machines: list[int], transport: type[Transport], colocated: Colocation | None) -> tuple[Groups, Groups]:
    """(engines by node, trainer ranks that may send to each), as a plan wants them. `machines`: of every engine, as found.
    `colocated`: if set, each node syncs only its own engines, and one that reads in place takes from its own GPUs what lies
    there; overrides the machines found."""
    found = list(colocated.engines) if colocated else machines
    if transport.reads_in_place:  # each takes what it needs from where it lies: nothing is passed on
        found = list(range(len(found)))
    nodes = tuple(tuple(engine for engine, node in enumerate(found) if node == n) for n in sorted(set(found)))
    if colocated is None:
        return nodes, ()
    if transport.reads_in_place:
        return nodes, tuple(colocated.nearest[engine] for (engine,) in nodes)
    return nodes, tuple(colocated.ranks_on_node_of(engines[0]) for engines in nodes)


def _setting(run: Run, policy: Policy, parallel: ReplicatedState, machines: list[int]) -> Setting:
    """What the transports are asked about: among the rest whether the memory that processes share has room for weight syncs on
    every machine, and the bytes it needs on the fullest; collective."""
    config, colocated = run.config, run.colocation
    own = colocated.ranks[parallel.rank] if colocated else 0
    held = () if config.trainer.fp8_parameters else policy.parameters.values()
    mine = config.shared_bytes(sum(p.numel() * p.element_size() for p in held))

    def summed(words: list[bytes]) -> bytes:
        sums = [0] * config.cluster.nodes
        for node, num_bytes in map(json.loads, words):  # stages differ in size
            sums[node] += num_bytes
        return json.dumps(sums).encode()

    needed = json.loads(parallel.host.agreed(json.dumps([own, mine]).encode(), summed))
    has_room = parallel.host.agreed(b"yes" if room_for(needed[own]) else b"no", lambda words: min(words))  # of "no" and "yes"
    return setting(
        config,
        "cpu" if parallel.device.type == "cpu" else "cuda",
        has_room=has_room == b"yes",
        needed_bytes=max(needed),
        engines_on_one_machine=len(set(machines)) == 1,
    )
