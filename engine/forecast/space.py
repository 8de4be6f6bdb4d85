"""What is searched for layouts: so many GPUs, and one configuration's model, data and algorithm. It looks at parts of a
configuration without its rules, so that thousands of layouts can be compared; which of them fit is not decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from engine.capacity.kv_cache import GIB
from engine.capacity.memory import STAGING_BUCKETS, Channel
from engine.capacity.transfer import Machine
from engine.config.load import RunConfig
from engine.core.errors import ConfigError
from engine.forecast.constants import Constants
from engine.forecast.decoding import Deals
from engine.forecast.lengths import Workload, draw_steps
from engine.forecast.rows import Rows
from engine.run.spec import Spec, assemble

MANY = 64  # GPUs, above which less is tried: rows as the configuration has them, no handful of GPUs


class Space:
    """The GPUs, the configuration, and the steps that layouts are compared by."""

    def __init__(self, spec: Spec, machine: Machine, constants: Constants, workload: Workload, num_gpus: int) -> None:
        """ConfigError for GPUs that are no whole nodes, or none beside the reward model's."""
        self.spec, self.machine, self.constants = spec, machine, constants
        self.config = spec.config
        per_node = spec.config.cluster.gpus_per_node
        if num_gpus < 1:
            raise ConfigError(f"--gpus must be at least 1; found {num_gpus}: give the number of GPUs there are")
        if num_gpus > per_node and num_gpus % per_node:
            raise ConfigError(
                f"--gpus must be whole nodes of cluster.gpus_per_node = {per_node}; found {num_gpus}: give a multiple of it"
            )
        self.per_node = min(num_gpus, per_node)
        self.nodes = num_gpus // self.per_node
        self.num_reward_gpus = spec.num_reward_gpus
        self.gpus = num_gpus - self.num_reward_gpus
        if self.gpus < 1:
            raise ConfigError(
                f"--gpus must leave one beside the {self.num_reward_gpus} of the reward model (reward_model.engines * "
                f"reward_model.tensor_parallel); found {num_gpus}: give more"
            )
        self.gpu_bytes = round(machine.gpu_gibibytes * GIB)
        self.works = draw_steps(spec.config, workload, spec.config.run.steps)
        self.deals, self.rows = Deals(self.works), Rows()

    @property
    def sizes(self) -> list[int]:
        """Numbers of GPUs that are tried for either: some ten to twenty, evenly."""
        step = 1
        while step * 2 <= (self.gpus + self.num_reward_gpus) / 10:
            step *= 2
        sizes = {*range(step, self.gpus + 1, step), self.gpus} | ({1, 2, 4} if self.gpus <= MANY else set())
        return sorted(size for size in sizes if size <= self.gpus)

    def powers(self, most: int) -> list[int]:
        """Of two, up to so many."""
        return [1 << power for power in range(most.bit_length()) if 1 << power <= most]

    @property
    def channel(self) -> Channel:
        """What a sync holds on both sides, as all layouts are compared."""
        staged = STAGING_BUCKETS * (self.config.sync.bucket_mebibytes << 20)
        return Channel(staged, staged)

    def light(self, options: Mapping[str, Any]) -> RunConfig:
        """The configuration with options set anew and no rule checked, for a look at a part of it."""
        changed: dict[str, dict[str, Any]] = {}
        for key, value in options.items():
            section, name = key.split(".")
            changed.setdefault(section, {})[name] = value
        cluster = {"nodes": self.nodes, "gpus_per_node": self.per_node}
        changed["cluster"] = cluster
        sections = {name: getattr(self.config, name).model_copy(update=update) for name, update in changed.items()}
        run = self.config.run.model_copy(update={"steps": 1})  # steps of no interest here
        return self.config.model_copy(update={**sections, "run": run})

    def assembled(self, config: RunConfig) -> Spec:
        """Such a configuration resolved, wherever its processes would be."""
        one_node = config.model_copy(update={"cluster": config.cluster.model_copy(update={"nodes": 1})})
        spec = assemble(one_node, self.spec.shape, source=self.spec.source, reward_shape=self.spec.reward_shape)
        return replace(spec, config=config)
