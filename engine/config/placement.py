"""Where the processes of a run go: the node and the GPUs of every trainer rank, of every engine and of the reward engines, as
a pure function of the configuration. It starts nothing and looks at no machine; run/processes.py carries it out.

Whoever comes first takes the first node with room: trainer ranks in order, a tensor-parallel group inside one node; engines,
each inside one node, after them, or, where inference.placement is 'colocated', on the trainer's GPUs from the first again;
then the reward engines, each on GPUs of its own in either case, for they judge while the others work. Colocated on several
nodes the trainer is placed replica by replica, all stages of one before the next, so that a node can serve its engines by
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engine.config.options import Options
from engine.core.errors import ConfigError

Part = Literal["trainer", "engines", "reward_engine"]


@dataclass(frozen=True, slots=True)
class GpuAssignment:
    """Node and GPUs of one process; without GPUs the numbers only say how full a node is."""

    node: int
    gpus: tuple[int, ...]  # its own, counted within the node

    def visible(self, devices: Sequence[str]) -> str:
        """CUDA_VISIBLE_DEVICES on a node with these devices: its own first, then the others, whose memory it may open."""
        others = [device for gpu, device in enumerate(devices) if gpu not in self.gpus]
        return ",".join([*(devices[gpu] for gpu in self.gpus), *others])


@dataclass(frozen=True, slots=True)
class Placement:
    """Node and GPUs of each of a run's processes; empty for what it does not start."""

    ranks: tuple[GpuAssignment, ...]
    engines: tuple[GpuAssignment, ...]
    reward_engines: tuple[GpuAssignment, ...]

    @property
    def assignments(self) -> tuple[GpuAssignment, ...]:
        """All of them."""
        return (*self.ranks, *self.engines, *self.reward_engines)


@dataclass(frozen=True, slots=True)
class Colocation:
    """Engines on the trainer's GPUs: node index of each trainer rank and of each engine, and the ranks nearest to each engine:
    those on its own GPUs, and of each shard of the policy that none of them holds, all that hold it on its node."""

    ranks: tuple[int, ...]
    engines: tuple[int, ...]
    nearest: tuple[tuple[int, ...], ...]

    def ranks_on_node_of(self, engine: int) -> tuple[int, ...]:
        """The trainer ranks on an engine's node."""
        return tuple(rank for rank, node in enumerate(self.ranks) if node == self.engines[engine])


def training_parts(config: Options) -> tuple[Part, ...]:
    """What training starts: supervised training and a run from disk without held-out problems have no engines."""
    return ("trainer", "engines", "reward_engine") if config.uses_engines else ("trainer",)


def place(config: Options, parts: tuple[Part, ...], num_gpus: int | None = None) -> Placement:
    """Where the processes of these parts go. `num_gpus`: of a node, where it has fewer than cluster.gpus_per_node.
    ConfigError when they do not fit cluster.nodes times as many."""
    trainer, inference = config.trainer, config.inference
    gpus = config.cluster.gpus_per_node if num_gpus is None else min(num_gpus, config.cluster.gpus_per_node)
    free = [list(range(gpus)) for _ in range(config.cluster.nodes)]
    assigned: dict[int, list[GpuAssignment]] = {}  # by the first rank of a tensor-parallel group
    for first in _group_order(config) if "trainer" in parts else ():
        group = _take(free, trainer.tensor_parallel)
        if group is None:
            ranks_of = f"{trainer.world_size} trainer ranks (trainer.tensor_parallel = {trainer.tensor_parallel})"
            raise _full(config, gpus, f"{ranks_of}, of which {len(assigned) * trainer.tensor_parallel} have a place")
        assigned[first] = [GpuAssignment(group.node, (gpu,)) for gpu in group.gpus]
    ranks = [assignment for first in sorted(assigned) for assignment in assigned[first]]
    colocated = inference.placement == "colocated" and bool(ranks)
    room = [sorted(s.gpus[0] for s in ranks if s.node == n) for n in range(config.cluster.nodes)] if colocated else free
    engines: list[GpuAssignment] = []
    for _ in range(inference.engines if "engines" in parts else 0):
        assignment = _take(room, inference.tensor_parallel)
        if assignment is None:
            wanted = f"inference.engines = {inference.engines} of inference.tensor_parallel = {inference.tensor_parallel}"
            wanted += f", of which {len(engines)} have a place"
            raise _crowded(trainer.world_size, wanted) if colocated else _full(config, gpus, wanted, len(ranks))
        engines.append(assignment)
    judges: list[GpuAssignment] = []
    count, each = config.reward_model.engines, config.reward_model.tensor_parallel
    for _ in range(count if "reward_engine" in parts and config.reward_model.path is not None else 0):
        assignment = _take(free, each)
        if assignment is None:
            taken = len(ranks) + (0 if colocated else len(engines) * inference.tensor_parallel)
            its_own = "a GPU of its own" if each == 1 else f"reward_model.tensor_parallel = {each} GPUs of its own"
            wanted = f"the reward engine (reward_model.path) with {its_own}"
            if count > 1:
                wanted = f"reward_model.engines = {count}, each with {its_own}, of which {len(judges)} have a place"
            raise _full(config, gpus, wanted, taken)
        judges.append(assignment)
    return Placement(tuple(ranks), tuple(engines), tuple(judges))


def colocation(config: Options, placement: Placement | None = None) -> Colocation | None:
    """Where the engines of a training run take turns with its ranks on their GPUs: the nodes of both, for on several nodes each
    is served by its own node's ranks alone, and whose GPUs an engine has. None for every other run, and for one node that is
    not placed on GPUs.

    ConfigError when a node with engines lacks a part of the policy, or when the run does not fit its nodes.
    """
    parts = training_parts(config)
    if config.inference.placement != "colocated" or "engines" not in parts:
        return None
    if placement is None:
        if config.cluster.nodes == 1:
            return None
        placement = place(config, parts)
    t, gpus = config.trainer, config.cluster.gpus_per_node
    whole, stage = t.tensor_parallel * t.pipeline_parallel, t.tensor_parallel * t.data_parallel  # shards, ranks of a stage
    shards = [(rank // stage, rank % t.tensor_parallel) for rank in range(t.world_size)]
    nearest: list[tuple[int, ...]] = []
    for engine, assignment in enumerate(placement.engines):
        node = assignment.node
        on_node = [rank for rank, place in enumerate(placement.ranks) if place.node == node]
        own = [rank for rank in on_node if not set(placement.ranks[rank].gpus).isdisjoint(assignment.gpus)]
        here = {shards[rank] for rank in own}
        nearest.append(tuple(rank for rank in on_node if rank in own or shards[rank] not in here))
        if (held := len({shards[rank] for rank in on_node})) < whole:
            raise ConfigError(
                f"inference.placement = 'colocated' with cluster.nodes = {config.cluster.nodes} needs all {whole} shards of "
                f"the policy (trainer.tensor_parallel * trainer.pipeline_parallel) on every node with engines, for weights do "
                f"not leave their node; found {held} of them beside engine {engine} on node {node}, counted from 0: choose a "
                f"product that divides cluster.gpus_per_node = {gpus}, or set placement to 'disaggregated'"
            )
    return Colocation(
        ranks=tuple(assignment.node for assignment in placement.ranks),
        engines=tuple(assignment.node for assignment in placement.engines),
        nearest=tuple(nearest),
    )


def _group_order(config: Options) -> list[int]:
    """The first rank of every tensor-parallel group, in the order in which they are placed."""
    t = config.trainer
    by_replica = config.inference.placement == "colocated" and config.cluster.nodes > 1
    firsts = range(0, t.world_size, t.tensor_parallel)
    return sorted(firsts, key=lambda first: first // t.tensor_parallel % t.data_parallel) if by_replica else list(firsts)


def _take(free: list[list[int]], count: int) -> GpuAssignment | None:
    """The first `count` free GPUs of the first node that has as many."""
    for node, gpus in enumerate(free):
        if len(gpus) >= count:
            assignment = GpuAssignment(node, tuple(gpus[:count]))
            del gpus[:count]
            return assignment
    return None


def _full(config: Options, gpus: int, wanted: str, taken: int = 0) -> ConfigError:
    nodes, asked = config.cluster.nodes, config.cluster.gpus_per_node
    there = f" ({asked} asked for, {gpus} on this machine)" if gpus < asked else ""
    beside = f" beside {taken} GPUs in use" if taken else ""
    turns = ", or set inference.placement = 'colocated'"
    whole = config.trainer.tensor_parallel * config.trainer.pipeline_parallel
    may_share = taken and config.inference.placement == "disaggregated" and (nodes == 1 or asked % whole == 0)
    return ConfigError(
        f"cluster.nodes * cluster.gpus_per_node must hold every process, tensor-parallel ranks inside one node; found {nodes} "
        f"* {gpus}{there} and{beside} {wanted}: raise cluster.nodes, or make the layout smaller{turns if may_share else ''}"
    )


def _crowded(num_ranks: int, wanted: str) -> ConfigError:
    return ConfigError(
        f"inference.placement = 'colocated' needs every engine inside one node of the trainer's GPUs; found {num_ranks} "
        f"trainer ranks and {wanted}: lower inference.engines or inference.tensor_parallel"
    )
