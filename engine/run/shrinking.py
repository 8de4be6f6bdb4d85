"""The layout in which a run goes on when a node is lost for good: the configured one on fewer nodes, with fewer data-parallel
replicas or engines. A pure function of the configuration; it starts nothing and looks at no machine.

What a step trains on is unchanged, for prompts and samples are counted by the step and not by the replica. The checkpoint is
resumed in another layout (checkpoint.other_layout), so sums have another order and nothing else changes.
"""

from __future__ import annotations

from itertools import product

from engine.config.load import RunConfig
from engine.config.placement import place, training_parts
from engine.core.errors import ConfigError


def shrunk(config: RunConfig, nodes: int) -> RunConfig | None:
    """The configuration on so many nodes: of the layouts that fit the one in which both the replicas and the engines keep the
    largest share of what they were; of equal ones that with the most replicas. None where none fits."""
    replicas, engines = config.trainer.data_parallel, config.inference.engines
    fewest = 1 if "engines" in training_parts(config) else engines

    def kept(layout: tuple[int, int]) -> tuple[float, int, int]:
        return min(layout[0] / replicas, layout[1] / engines), *layout

    layouts = product(range(1, replicas + 1), range(fewest, engines + 1))
    for layout in sorted(layouts, key=kept, reverse=True):
        if _devices(config, *layout) <= nodes * config.cluster.gpus_per_node:
            found = _laid_out(config, nodes, *layout)
            if _fits(found):
                return found
    return None


def check_can_shrink(config: RunConfig) -> None:
    """ConfigError where run.on_lost_node asks for a smaller layout and none fits one node less."""
    left = config.cluster.nodes - 1
    if config.run.on_lost_node == "shrink" and shrunk(config, left) is None:
        t = config.trainer
        raise ConfigError(
            f"run.on_lost_node = 'shrink' needs a layout that fits cluster.nodes - 1 = {left} nodes of cluster.gpus_per_node = "
            f"{config.cluster.gpus_per_node} GPUs; found none, with one replica (trainer.tensor_parallel * pipeline_parallel = "
            f"{t.tensor_parallel * t.pipeline_parallel} GPUs) and one engine (inference.tensor_parallel = "
            f"{config.inference.tensor_parallel}): make them smaller, or set on_lost_node = 'wait'"
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
