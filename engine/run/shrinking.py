"""The layout in which a run goes on when a node is lost for good: the configured one on fewer nodes, with fewer data-parallel
replicas or engines. A function of the configuration and of a GPU's and a node's memory; it starts nothing.

What a step trains on is unchanged, for prompts and samples are counted by the step and not by the replica. The checkpoint is
resumed in another layout (checkpoint.other_layout), so sums have another order and nothing else changes. But fewer replicas
hold more each, where the optimizer is distributed over them: a layout must fit the GPUs and the nodes' own memory, where they
are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from engine.capacity.kv_cache import GIB, MIB
from engine.capacity.memory import STAGING_BUCKETS, Channel, Device, estimate
from engine.config.load import RunConfig
from engine.config.placement import place, training_parts
from engine.core.errors import ConfigError
from engine.run.host_memory import most_held
from engine.run.machine import host_bytes, least_gpu_bytes, listed_gpus, visible_gpus
from engine.run.spec import Spec, assemble, resolve


@dataclass(frozen=True, slots=True)
class Room:
    """A GPU's memory, the run as resolved on all its nodes, whose model fills it, and a node's memory, where it is known."""

    gpu_bytes: int
    spec: Spec
    host_bytes: int | None = None

    @classmethod
    def here(cls, config: RunConfig) -> Room | None:
        """That of this machine and of its smallest GPU, whose like all nodes are taken to have; None where no GPU is here, as
        on CPUs or where the command runs on a machine without one: then memory is not looked at."""
        gpu_bytes = least_gpu_bytes(listed_gpus()[0]) if visible_gpus() else None
        return cls(gpu_bytes, resolve(config, digests=False), host_bytes()) if gpu_bytes is not None else None

    def fullest(self, layout: RunConfig | None = None) -> Device:
        """The fullest device of the whole run, or of another layout of it, by the estimate of `semion plan`. What a weight sync
        stages, which its plan knows, the most that it may be is counted."""
        spec = self._resolved(layout)
        staged = STAGING_BUCKETS * spec.config.sync.bucket_mebibytes * MIB if spec.starts_engines else 0
        return estimate(spec, Channel(staged, staged), self.gpu_bytes).fullest

    def on_host(self, layout: RunConfig | None = None) -> int:
        """Bytes of the host's memory on the node that holds most, of the whole run or of another layout of it."""
        return sum(most_held(self._resolved(layout)).values())

    def holds(self, layout: RunConfig) -> bool:
        """Whether it fits GPUs and hosts. By the same estimate the whole run may not fit either, though it runs: what needs no
        more fits."""
        return self.gpus_hold(layout) and self._hosts_hold(layout)

    def gpus_hold(self, layout: RunConfig) -> bool:
        """Whether it fits the GPUs."""
        return self.fullest(layout).num_bytes <= max(self.gpu_bytes, self.fullest().num_bytes)

    def _hosts_hold(self, layout: RunConfig) -> bool:
        return self.host_bytes is None or self.on_host(layout) <= max(self.host_bytes, self.on_host())

    def _resolved(self, layout: RunConfig | None) -> Spec:
        known = self.spec
        if layout is None:
            return known
        return assemble(layout, known.shape, parts=known.parts, source=known.source, reward_shape=known.reward_shape)


def shrunk(config: RunConfig, nodes: int, room: Room | None = None) -> RunConfig | None:
    """The configuration on so many nodes: of the layouts that fit the one in which both the replicas and the engines keep the
    largest share of what they were; of equal ones that with the most replicas. None where none fits. `room`: what a GPU and a
    node hold, where that is known."""
    known: dict[int, bool] = {}  # by replicas, on which alone of the two the memory of a device and of a host depends
    for found in _layouts(config, nodes):
        replicas = found.trainer.data_parallel
        if room is not None and replicas not in known:
            known[replicas] = room.holds(found)
        if room is None or known[replicas]:
            return found
    return None


def _layouts(config: RunConfig, nodes: int) -> Iterator[RunConfig]:
    """Those that fit so many nodes, best first."""
    replicas, engines = config.trainer.data_parallel, config.inference.engines
    fewest = 1 if "engines" in training_parts(config) else engines

    def kept(layout: tuple[int, int]) -> tuple[float, int, int]:
        return min(layout[0] / replicas, layout[1] / engines), *layout

    layouts = product(range(1, replicas + 1), range(fewest, engines + 1))
    for layout in sorted(layouts, key=kept, reverse=True):
        if _devices(config, *layout) <= nodes * config.cluster.gpus_per_node:
            found = _laid_out(config, nodes, *layout)
            if _fits(found):
                yield found


def check_can_shrink(config: RunConfig, room: Room | None = None) -> None:
    """ConfigError where run.on_lost_node asks for a smaller layout and none fits one node less, or none its memory. `room`: see
    `shrunk`."""
    left = config.cluster.nodes - 1
    if config.run.on_lost_node != "shrink" or shrunk(config, left, room) is not None:
        return
    largest = shrunk(config, left)
    if largest is None or room is None:
        t = config.trainer
        raise ConfigError(
            f"run.on_lost_node = 'shrink' needs a layout that fits cluster.nodes - 1 = {left} nodes of cluster.gpus_per_node = "
            f"{config.cluster.gpus_per_node} GPUs; found none, with one replica (trainer.tensor_parallel * pipeline_parallel = "
            f"{t.tensor_parallel * t.pipeline_parallel} GPUs) and one engine (inference.tensor_parallel = "
            f"{config.inference.tensor_parallel}): make them smaller, or set on_lost_node = 'wait'"
        )
    if room.gpus_hold(largest):
        assert room.host_bytes is not None
        has, on_host, of_whole = (size / GIB for size in (room.host_bytes, room.on_host(largest), room.on_host()))
        raise ConfigError(
            f"run.on_lost_node = 'shrink' needs a layout on cluster.nodes - 1 = {left} nodes that fits a node's memory of "
            f"{has:.1f} GiB; found {on_host:.1f} GiB on the fullest node with trainer.data_parallel = "
            f"{largest.trainer.data_parallel}, {of_whole:.1f} GiB with all nodes: a node holds more of the optimizer and its "
            f"snapshot. Set on_lost_node = 'wait', or hold less there (optimizer.offload_share, trainer.reference_memory)"
        )
    device, whole = room.fullest(largest), room.fullest()
    raise ConfigError(
        f"run.on_lost_node = 'shrink' needs a layout on cluster.nodes - 1 = {left} nodes that fits a GPU of "
        f"{room.gpu_bytes / GIB:.1f} GiB; found {device.num_bytes / GIB:.1f} GiB on the fullest device ({device.name}) with "
        f"trainer.data_parallel = {largest.trainer.data_parallel}, {whole.num_bytes / GIB:.1f} GiB with all nodes: fewer "
        f"replicas hold more of the optimizer each. Set on_lost_node = 'wait', or hold less (semion plan shows what)"
    )


def told(config: RunConfig) -> dict[str, int]:
    """What may be smaller of a configuration's layout, by option."""
    return {
        "cluster.nodes": config.cluster.nodes,
        "trainer.data_parallel": config.trainer.data_parallel,
        "inference.engines": config.inference.engines,
    }


def _devices(config: RunConfig, replicas: int, engines: int) -> int:
    """At least so many are needed. Colocated engines stand on the trainer's."""
    training = replicas * config.trainer.tensor_parallel * config.trainer.pipeline_parallel
    apart = config.inference.placement != "colocated" and "engines" in training_parts(config)
    return training + (engines * config.inference.tensor_parallel if apart else 0)


def _laid_out(config: RunConfig, nodes: int, replicas: int, engines: int) -> RunConfig:
    """What is so much smaller; it loses no further node by itself."""
    changed = {
        "run": {"on_lost_node": "wait"},
        "cluster": {"nodes": nodes},
        "trainer": {"data_parallel": replicas},
        "inference": {"engines": engines},
    }
    return config.model_copy(
        update={section: getattr(config, section).model_copy(update=options) for section, options in changed.items()}
    )


def _fits(config: RunConfig) -> bool:
    """Whether every process has a place, and no rule is broken."""
    try:
        place(config, training_parts(config))
    except ConfigError:
        return False
    return not config.broken_rules
