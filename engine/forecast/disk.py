"""What a run writes: checkpoints, their bytes and seconds. Arithmetic; no disk is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.capacity.kv_cache import item_bytes
from engine.capacity.memory import TrainerState
from engine.core.tensor_files import SYNC_BYTES
from engine.models.headers import num_elements
from engine.run.host_memory import num_models, snapshot_bytes
from engine.run.spec import Spec

if TYPE_CHECKING:
    from engine.forecast.constants import Constants  # whose links load torch, which a preflight does not

AHEAD_TOKEN_BYTES = 16  # 4 each of a token's id and log-prob, and its text in JSON


@dataclass(frozen=True, slots=True)
class Saving:
    """A checkpoint of a run: bytes and seconds."""

    count: int  # over the run
    num_bytes: int  # each element once, whatever the number of replicas
    rank_bytes: int  # of the rank that writes most
    kept_bytes: int  # on the disk at its fullest moment
    pause_seconds: float  # for which training stands still, where the one before is written
    write_seconds: float  # then, beside training, until it is named
    silent_seconds: float  # at most, for which nothing new appears on the disk while all ranks wait for it


def saving(spec: Spec, constants: Constants) -> Saving | None:
    """Of a training run; None where it has no checkpoint. Ranks hash what they write, each in one thread, and the disk takes
    what all of them write together: the slower of both counts."""
    if not spec.checkpoint_steps:
        return None
    num_bytes, most, disk = checkpoint_bytes(spec), snapshot_bytes(spec), constants.disk_gigabytes_per_second * 1e9
    return Saving(
        count=len(spec.checkpoint_steps),
        num_bytes=num_bytes,
        rank_bytes=most,
        kept_bytes=num_bytes * num_checkpoints(spec),
        pause_seconds=most / (constants.host_copy_gigabytes_per_second * 1e9),
        write_seconds=max(num_bytes / disk, most / (constants.digest_gigabytes_per_second * 1e9)),
        silent_seconds=spec.config.trainer.world_size * min(most, SYNC_BYTES) / disk,
    )


def num_checkpoints(spec: Spec) -> int:
    """How many checkpoints of a training run lie on the disk at its fullest moment."""
    checkpoint = spec.config.checkpoint
    kept = checkpoint.keep + 1 + (checkpoint.best_by is not None)  # the one being written comes on top
    return min(len(spec.checkpoint_steps), kept)


def checkpoint_bytes(spec: Spec) -> int:
    """What one takes: the policy's weights, the optimizer's state of every rank, a reference that nothing else holds, and
    rollouts of later steps."""
    trainer = spec.config.trainer
    ranks = trainer.tensor_parallel * (trainer.data_parallel if trainer.distributed_optimizer else 1)
    states = sum(TrainerState(spec, stage).saved_bytes * ranks for stage in range(spec.trainer.pp_size))
    weights = num_elements(spec.shape) * item_bytes(spec.config.model.dtype) * num_models(spec)
    return weights + states + ahead_bytes(spec)


def ahead_bytes(spec: Spec) -> int:
    """What the rollouts take at most that a checkpoint keeps for later steps (sync.lookahead): all of them as long as they may
    be, tokens and log-probs in columns that count as if they were not compressed."""
    config = spec.config
    if spec.source != "rollouts":
        return 0
    steps = max((len(config.schedule.in_flight(step)) for step in spec.checkpoint_steps), default=0)
    return steps * config.rollouts_per_step * config.sampling.max_tokens * AHEAD_TOKEN_BYTES
