"""What a run writes: checkpoints and records. Bytes by arithmetic; no disk is looked at."""

from __future__ import annotations

from engine.capacity.kv_cache import item_bytes
from engine.capacity.memory import TrainerState
from engine.models.headers import num_elements
from engine.run.checkpoint import reference_place
from engine.run.spec import Spec

AHEAD_TOKEN_BYTES = 40  # JSON of a token's id and log-prob, and its text


def num_checkpoints(spec: Spec) -> int:
    """How many checkpoints of a training run lie on the disk at its fullest moment."""
    checkpoint = spec.config.checkpoint
    kept = checkpoint.keep + 1 + (checkpoint.best_by is not None)  # the one being written comes on top
    return min(len(spec.checkpoint_steps), kept)


def checkpoint_bytes(spec: Spec) -> int:
    """What one takes: the policy's weights, the optimizer's state of every rank, a reference that nothing else holds, and
    rollouts of later steps."""
    trainer, shape = spec.config.trainer, spec.shape
    ranks = trainer.tensor_parallel * (trainer.data_parallel if trainer.distributed_optimizer else 1)
    states = sum(TrainerState(spec, stage).saved_bytes * ranks for stage in range(spec.trainer.pp_size))
    own = "reference" in spec.copies and any(reference_place(spec.config, step) == "own" for step in spec.checkpoint_steps)
    weights = num_elements(shape) * item_bytes(spec.config.model.dtype) * (2 if own else 1)
    return weights + states + ahead_bytes(spec)


def ahead_bytes(spec: Spec) -> int:
    """What the rollouts take at most that a checkpoint keeps for later steps (sync.lookahead): all of them as long as they may
    be, as rows of JSON."""
    config = spec.config
    if spec.source != "rollouts":
        return 0
    steps = max((len(config.schedule.in_flight(step)) for step in spec.checkpoint_steps), default=0)
    return steps * config.rollouts_per_step * config.sampling.max_tokens * AHEAD_TOKEN_BYTES


def snapshot_bytes(spec: Spec) -> int:
    """What a trainer rank copies to its host at most: its share of the weights, and its optimizer's state."""
    t = spec.config.trainer
    states = [TrainerState(spec, stage) for stage in range(spec.trainer.pp_size)]
    return max(state.weights // t.data_parallel + state.saved_bytes for state in states)
