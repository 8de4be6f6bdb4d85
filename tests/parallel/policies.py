"""A policy of the parallel tests, whose configuration names no folder: its sizes and its layout are derived here, as a Spec
does for a run.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from engine.algorithms.base import Loss
from engine.config.load import Copy, RunConfig
from engine.megatron.parallel_state import ParallelState
from engine.megatron.policy import Policy
from engine.models.config_file import read_shape
from engine.models.sharding import trainer_layout
from engine.run.spec import settled


def make_policy(
    config: RunConfig, parallel: ParallelState, loss: Loss, checkpoint: str | Path, *, copies: Collection[Copy] | None = None
) -> Policy:
    """This rank's part of the model in the folder `checkpoint`, of a run that is resolved as without GPUs."""
    config = settled(config, on_gpus=False)
    shape = read_shape(checkpoint, family=config.model.family)
    return Policy(config, parallel, loss, checkpoint, shape, trainer_layout(config.trainer), copies=copies)
