"""The run, resolved once: what follows from a configuration and the files it names, before any process starts. `check` prints
it, `plan` weighs it, and every process of the run gets it as JSON, checks no rule again and derives none of it anew. It starts
nothing, looks at no device, and does not say whether the run can work (preflight does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from engine.algorithms.registry import make_loss
from engine.bridge.transports.registry import choose
from engine.capacity.kv_cache import KvCache
from engine.capacity.memory import resolve_kv_cache
from engine.config.load import CHECKED, Copy, RunConfig
from engine.config.options import source_key
from engine.config.placement import Colocation, Part, Placement, colocation, place, training_parts
from engine.config.transport import AUTO, Carrier, setting
from engine.core.errors import ConfigError
from engine.models.base import ModelShape
from engine.models.config_file import read_shape
from engine.models.reward_head import FAMILY, OPTION
from engine.models.sharding import EngineLayout, TrainerLayout, engine_layout, trainer_layout
from engine.run.machine import visible_gpus

SourceKind = Literal["rollouts", "ledger", "preferences", "supervised"]


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Problems that are held out, under their name in the run's records."""

    name: str
    option: str  # that names the file
    path: str


@dataclass(frozen=True, slots=True)
class Spec:
    """A run as resolved. Equal configurations and files give equal records."""

    config: RunConfig
    shape: ModelShape  # the policy's sizes
    reward_shape: ModelShape | None  # the reward model's; None where none is started, or its config.json is not there
    trainer: TrainerLayout
    engine: EngineLayout
    parts: tuple[Part, ...]  # what is started
    source: SourceKind  # where training sequences come from
    placement: Placement | None  # on GPUs; None where they are too few
    colocation: Colocation | None  # where ranks and engines are, where they take turns on GPUs
    transports: tuple[Carrier, ...]  # in order of preference for each type of device; empty without weight syncs
    copies: tuple[Copy, ...]  # of its weights that a trainer rank keeps beside the policy
    evaluation_sets: tuple[EvaluationSet, ...]
    evaluation_steps: tuple[int, ...]  # numbers of steps done
    checkpoint_steps: tuple[int, ...]
    kv_cache: KvCache | None  # of each rank of an engine; None where none is started
    digests: Mapping[str, str | None]  # of every data file by its option and of what judges; empty where not asked for

    @property
    def starts_engines(self) -> bool:
        """Whether inference engines run beside whatever else is started."""
        return "engines" in self.parts

    @property
    def colocated(self) -> bool:
        """Whether engines stand on the trainer's devices and sleep while it trains."""
        return self.starts_engines and self.config.inference.placement == "colocated"

    @property
    def sampled(self) -> bool:
        """Whether the training sequences are rollouts, which have log-probs of the model that sampled them."""
        return self.source != "preferences"

    @property
    def starts_reward_engine(self) -> bool:
        """Whether the reward model's engines do."""
        return "reward_engine" in self.parts and self.config.reward_model.path is not None

    @property
    def num_reward_engines(self) -> int:
        """Of the reward model."""
        return self.config.reward_model.engines if self.starts_reward_engine else 0

    @property
    def num_reward_gpus(self) -> int:
        """That the reward model's engines have to themselves."""
        return self.num_reward_engines * self.config.reward_model.tensor_parallel

    @property
    def nodes(self) -> tuple[int, ...]:
        """The nodes that it has processes on; rank 0 is on the first."""
        return (0,) if self.placement is None else tuple(sorted({place.node for place in self.placement.assignments}))

    def threads_on(self, node: int) -> int:
        """CPU threads that ranks and engines of a node are taken to keep busy: those that each computes with, and one more."""
        trainer, inference = self.config.trainer, self.config.inference
        if self.placement is None:
            ranks = trainer.world_size if "trainer" in self.parts else 0
            counts = [ranks, inference.engines if self.starts_engines else 0, self.num_reward_engines]
        else:
            placed = self.placement.ranks, self.placement.engines, self.placement.reward_engines
            counts = [sum(place.node == node for place in of_kind) for of_kind in placed]
        threads = inference.threads + 1
        each = trainer.threads + 1, inference.tensor_parallel * threads, self.config.reward_model.tensor_parallel * threads
        return sum(count * busy for count, busy in zip(counts, each, strict=True))

    @property
    def missing_reward_model(self) -> str | None:
        """The file that would tell the reward model's sizes, where it is to be started and the file is not there."""
        return str(_reward_file(self.config)) if self.starts_reward_engine and self.reward_shape is None else None

    def carrier(self, device: Literal["cuda", "cpu"]) -> Carrier:
        """What carries the weight syncs on devices of that type; of a run without any, what would."""
        return next(carrier for carrier in self.transports or _transports(self.config) if carrier.device == device)

    def placed(self, gpus_per_node: int | None = None) -> Placement:
        """Where every process goes on nodes with so many GPUs, as many as configured where not said. ConfigError when they do
        not fit."""
        fewer = gpus_per_node is not None and gpus_per_node < self.config.cluster.gpus_per_node
        if self.placement is not None and not fewer:
            return self.placement
        return place(self.config, self.parts, gpus_per_node)

    def to_json(self) -> str:
        """As a process of the run is told it."""
        return _ADAPTER.dump_json(self).decode()

    @staticmethod
    def from_json(text: str) -> Spec:
        """What `to_json` wrote. The configuration's values are read, its rules are not checked again."""
        return _ADAPTER.validate_json(text, context=CHECKED)


_ADAPTER = TypeAdapter(Spec)


def settled(config: RunConfig, *, on_gpus: bool | None = None) -> RunConfig:
    """The configuration with what 'auto' becomes. trainer.layers: Transformer Engine's on GPUs with model.dtype = 'bfloat16',
    or where an option asks for them, else megatron-core's own. trainer.fuse_gradient_accumulation: true on GPUs. What is
    installed decides nothing. `on_gpus`: whether the run is for GPUs, by what this machine has where not said. Any other
    configuration is returned as it is."""
    t, chosen = config.trainer, dict[str, Any]()
    if "auto" not in (t.layers, t.fuse_gradient_accumulation):
        return config
    if on_gpus is None:
        on_gpus = visible_gpus() > 0
    if t.layers == "auto":
        asked = t.fp8 != "none" or t.overlap_tensor_parallel
        chosen["layers"] = "transformer_engine" if config.may_use_te and (asked or on_gpus) else "local"
    if t.fuse_gradient_accumulation == "auto":
        chosen["fuse_gradient_accumulation"] = on_gpus
    return config.model_copy(update={"trainer": t.model_copy(update=chosen)})


def resolve(config: RunConfig, parts: tuple[Part, ...] | None = None, *, digests: bool = True) -> Spec:
    """Resolves a run from its configuration and the files that it names. `parts`: what is started, a training run's where not
    said. `digests`: whether the data files are read through for their SHA-256.

    ConfigError, DataError or CheckpointError for the model's config.json or the file of data.replay; other files are read in
    a preflight.
    """
    from engine.run.checkpoint import data_digests

    file = _reward_file(config)
    reward_shape = read_shape(file.parent, OPTION, FAMILY) if file is not None and file.exists() else None
    judges_alone = parts is not None and not {"trainer", "engines"} & {*parts}  # of `semion score`, which has no policy
    shape = reward_shape if judges_alone else None
    if shape is None:
        shape = read_shape(config.model.path, family=config.model.family)
    found = data_digests(config) if digests else {}
    return assemble(config, shape, parts=parts, source=source_kind(config), reward_shape=reward_shape, digests=found)


def assemble(
    config: RunConfig,
    shape: ModelShape,
    *,
    parts: tuple[Part, ...] | None = None,
    source: SourceKind | None = None,
    reward_shape: ModelShape | None = None,
    digests: Mapping[str, str | None] | None = None,
) -> Spec:
    """The run of a configuration whose files have been looked at: what else there is to know is arithmetic. `source`: a replay
    is of a ledger where not said."""
    config = settled(config)
    parts = training_parts(config) if parts is None else parts
    kind: SourceKind = source or ("ledger" if config.data.replay is not None else _sampled(config))
    trains, steps = "trainer" in parts, range(config.run.steps + 1)
    starts_reward_engine = "reward_engine" in parts and config.reward_model.path is not None
    spec = Spec(
        config=config,
        shape=shape,
        reward_shape=reward_shape if starts_reward_engine else None,
        trainer=trainer_layout(config.trainer),
        engine=engine_layout(config.inference),
        parts=parts,
        source=kind,
        placement=(placement := _placement(config, parts)),
        colocation=colocation(config, placement) if trains else None,
        transports=_transports(config) if trains and "engines" in parts else (),
        copies=_copies(config, kind) if trains else (),
        evaluation_sets=_evaluation_sets(config) if "engines" in parts else (),
        evaluation_steps=tuple(step for step in steps if trains and "engines" in parts and config.evaluation_due(step)),
        checkpoint_steps=tuple(step for step in steps if trains and kind != "supervised" and config.checkpoint_due(step)),
        kv_cache=None,
        digests=digests or {},
    )
    return replace(spec, kv_cache=resolve_kv_cache(spec)) if spec.starts_engines else spec


def source_kind(config: RunConfig) -> SourceKind:
    """Where training sequences come from: data.replay is told by its first row, and taken for a ledger where it is not there.
    DataError when it is neither a ledger nor a preference file, ConfigError when the run cannot train on it."""
    from engine.data.records import HUB
    from engine.rollouts.replay import replay_kind

    path = config.data.replay
    if path is None:
        return _sampled(config)
    there = path.startswith(HUB) or Path(path).exists()
    return "preferences" if there and replay_kind(config) == "preferences" else "ledger"


def _sampled(config: RunConfig) -> SourceKind:
    return "rollouts" if config.sft.checkpoint_out is None else "supervised"


def _copies(config: RunConfig, kind: SourceKind) -> tuple[Copy, ...]:
    """A reference is kept where a pass with its weights is what tells its log-probs. One that never moves is the seed's weights
    too, and is kept once."""
    needs_reference = kind != "supervised" and make_loss(config.algorithm, sampled=kind != "preferences").needs_reference
    needs_reference = needs_reference and config.reference_source == "pass"
    shared = needs_reference and config.sync.reference == "never"
    kept: dict[Copy, bool] = {"reference": needs_reference, "seed": config.keeps_seed and not shared}
    return tuple(name for name, is_kept in kept.items() if is_kept)


def _reward_file(config: RunConfig) -> Path | None:
    return Path(config.reward_model.path) / "config.json" if config.reward_model.path is not None else None


def _placement(config: RunConfig, parts: tuple[Part, ...]) -> Placement | None:
    """On cluster.nodes * cluster.gpus_per_node GPUs; None where they are too few, as a run on CPUs may have it."""
    try:
        return place(config, parts)
    except ConfigError:
        return None


def _transports(config: RunConfig) -> tuple[Carrier, ...]:
    """What the bridge will choose on GPUs and on CPUs, which are not seen here; and what it falls back to."""
    found = []
    asked, colocated = config.sync.transport, config.inference.placement == "colocated"
    reason = f"sync.transport = {asked!r}, {'colocated' if colocated else 'disaggregated'}, {config.cluster.nodes} nodes"
    devices: tuple[Literal["cuda", "cpu"], ...] = ("cuda", "cpu")
    for device in devices:
        try:
            choice = choose(asked, setting(config, device))
        except ConfigError as error:
            found.append(Carrier(device, None, str(error)))
            continue
        found.append(Carrier(device, choice.name, reason))
        if asked == AUTO and (without := choose(asked, setting(config, device, has_room=False)).name) != choice.name:
            found.append(Carrier(device, without, "where the memory that processes share has no room for the weights"))
    return tuple(found)


def _evaluation_sets(config: RunConfig) -> tuple[EvaluationSet, ...]:
    from engine.data.mixture import held_out_sources

    return tuple(
        EvaluationSet(name, f"{source_key(place)}.held_out", str(config.data.sources[place].held_out))
        for name, place in held_out_sources(config).items()
    )
