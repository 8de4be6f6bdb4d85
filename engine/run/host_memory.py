"""What a run's nodes hold in their own memory, beside what is on GPUs, and whether they have as much: arithmetic on where its
processes go. What a node has is looked at in machine.py, and comes from there as a number.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from engine.capacity.kv_cache import GIB, item_bytes
from engine.capacity.memory import TrainerState
from engine.core.errors import ConfigError
from engine.models.export_plan import export_files, file_bytes, in_turns
from engine.run.checkpoint import reference_place
from engine.run.spec import Spec

ROLLOUT_TOKEN_BYTES = 12  # of a token that rank 0 holds: id and log-prob of 4 bytes each, and 4 letters of its text
SNAPSHOT, OFFLOADED, ROLLOUTS = "snapshot of a checkpoint", "optimizer state and reference", "rollouts"
EXPORTED = "files of the exported model"

Held = dict[str, int]  # bytes, by what is held


def held_by_node(spec: Spec) -> dict[int, Held]:
    """By node: what its trainer ranks have on the host while a checkpoint, or the model that supervised training exports, is
    written, and rank 0's rollouts. Of a run on GPUs; ConfigError where its processes do not fit the nodes."""
    found: dict[int, Held] = {}
    for rank, place in enumerate(spec.placed().ranks):
        stage, replica = stage_and_replica(spec, rank)
        parts = found.setdefault(place.node, defaultdict(int))
        if spec.checkpoint_steps:
            parts[SNAPSHOT] += snapshot_bytes(spec, stage, first_replica=replica == 0)
        parts[OFFLOADED] += TrainerState(spec, stage).host_bytes
        if rank == 0:
            parts[ROLLOUTS] += rollout_bytes(spec)
    for node, size in exported_by_node(spec).items():
        found[node][EXPORTED] = size
    return found


def most_held(spec: Spec) -> Held:
    """What the node holds that holds most; nothing where no rank is placed."""
    return max(held_by_node(spec).values(), key=lambda parts: sum(parts.values()), default={})


def check_holds(spec: Spec, held: Held, host_bytes: int, where: str) -> None:
    """ConfigError where a node with `host_bytes` of memory is to hold more, but for rollouts, which are counted as long as they
    may be. `where`: what the node is called."""
    needed = sum(held.values())
    if needed - held.get(ROLLOUTS, 0) <= host_bytes:
        return
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in held.items() if size)
    who = "each of cluster.nodes" if spec.config.cluster.nodes > 1 else "the machine"
    raise ConfigError(
        f"{who} must have the memory for what is kept on the host; found {host_bytes / GIB:.1f} GiB {where} for "
        f"{needed / GIB:.1f} GiB needed ({parts}): {_mended(spec, held)}"
    )


def _mended(spec: Spec, held: Held) -> str:
    """What makes a node hold less, of what the run asks for."""
    optimizer, trainer = spec.config.optimizer, spec.config.trainer
    fixes = []
    if optimizer.offload_share > 0:
        fixes.append(f"lower optimizer.offload_share = {optimizer.offload_share:g}")
    if optimizer.memory_while_sampling == "host":
        fixes.append("set optimizer.memory_while_sampling = 'device'")
    if trainer.reference_memory == "host" and "reference" in spec.copies:
        fixes.append("set trainer.reference_memory = 'device'")
    if held.get(ROLLOUTS, 0) > max(held.get(SNAPSHOT, 0), held.get(OFFLOADED, 0)):
        fixes.append("lower sync.sync_interval, data.prompts_per_step or sampling.max_tokens")
    if spec.config.cluster.nodes > 1:
        fixes.append("put fewer trainer ranks on a node (raise cluster.nodes, lower cluster.gpus_per_node)")
    return ", or ".join([*fixes, "take nodes, or a container's limit, with more memory"])


def rollout_bytes(spec: Spec) -> int:
    """What rank 0 holds of rollouts at most: of all steps that are sampled before the first of them is trained on, each as long
    as it may be."""
    config = spec.config
    if spec.source != "rollouts" or config.sft.checkpoint_out is not None:
        return 0
    opened = (opens.stop - step for step in range(config.run.steps) if (opens := config.schedule.opens(step)))
    return max(opened, default=0) * config.rollouts_per_step * config.sampling.max_tokens * ROLLOUT_TOKEN_BYTES


def snapshot_bytes(spec: Spec, stage: int | None = None, *, first_replica: bool = True) -> int:
    """What a trainer rank of a stage, of the one that holds most where not said, copies to its host and writes: its share of
    the weights and, where nothing else holds it, of the reference, and its optimizer's state. `first_replica`: whether it is of
    the first, which alone writes the state where all hold the same one."""
    if stage is None:
        return max(snapshot_bytes(spec, each) for each in range(spec.trainer.pp_size))
    t, state = spec.config.trainer, TrainerState(spec, stage)
    weights = state.num_parameters * item_bytes(spec.config.model.dtype) * num_models(spec)
    writes_state = first_replica or t.distributed_optimizer
    return weights // t.data_parallel + (state.saved_bytes if writes_state else 0)


@dataclass(frozen=True, slots=True)
class _Item:
    itemsize: int


def exported_by_node(spec: Spec) -> dict[int, int]:
    """By node: what its trainer ranks have on the host at most of the model that supervised training exports at its end: each
    one file at a time, whole (`milestones.weights_in_turns`). Of a run on GPUs."""
    if spec.config.sft.checkpoint_out is None:
        return {}
    t, dtype = spec.config.trainer, _Item(item_bytes(spec.config.model.dtype))
    plan = export_files(spec.shape, spec.trainer, t.data_parallel, dtype, spec.config.sync.bucket_mebibytes << 20)
    ranks = spec.placed().ranks
    found: dict[int, int] = defaultdict(int)
    for turn in in_turns(plan):
        held: dict[int, int] = defaultdict(int)
        for file in (plan[place] for place in turn):
            stage, replica, tp_rank = file.writer
            rank = (stage * t.data_parallel + replica) * spec.trainer.tp_size + tp_rank
            held[ranks[rank].node] += file_bytes(file, dtype)
        for node, size in held.items():
            found[node] = max(found[node], size)
    return found


def num_models(spec: Spec) -> int:
    """Hugging Face folders in a checkpoint: the policy, and a reference of its own."""
    places = (reference_place(spec.config, step) for step in spec.checkpoint_steps)
    return 2 if "reference" in spec.copies and any(place == "own" for place in places) else 1


def stage_and_replica(spec: Spec, rank: int) -> tuple[int, int]:
    """(stage, data-parallel replica) of a trainer rank."""
    tp_size, dp_size = spec.trainer.tp_size, spec.config.trainer.data_parallel
    return rank // (tp_size * dp_size), rank // tp_size % dp_size
