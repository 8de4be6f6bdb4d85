"""The estimate of engine/capacity/memory.py against what a real Policy allocates on the CPU, to 5 %: by component, and the
most that a training step makes beside them. Sizes are such that every kind of tensor is more than a rounding error, and no
two axes are equal, so that no wrong formula is right by chance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.capacity.memory import Step, TrainerState
from engine.models.base import ModelShape
from engine.models.config_file import read_shape
from engine.run.spec import assemble
from tests.parallel.material import run_config
from tests.parallel.pool import WorkerPool

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "vocab_size": 1500,
    "max_position_embeddings": 4096,
}
T = 256
TOLERANCE = 0.05
PLAIN: dict[str, Any] = {}
RECOMPUTE = {"recompute": True}
FUSED = {"fused_lm_head": True}
SHARDED = {"data_parallel": 2, "distributed_optimizer": True}
SEQUENCE = {"tensor_parallel": 2, "sequence_parallel": True}
NARROW = {"gradient_dtype": "bfloat16"}
PIPELINE = {"pipeline_parallel": 2}
NO_REFERENCE = {"loss": "grpo", "kl_weight": 0.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("medium")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("trainer", "dtype", "algorithm"),
    [
        (PLAIN, "bfloat16", NO_REFERENCE),
        (FUSED, "float32", {}),
        (SHARDED, "bfloat16", {}),
        (SHARDED | RECOMPUTE | FUSED, "bfloat16", NO_REFERENCE),  # sums of gradients on their way decide
        (SHARDED | RECOMPUTE | NARROW, "bfloat16", NO_REFERENCE),  # the update does, here and in the next two
        (PIPELINE | RECOMPUTE | NARROW, "bfloat16", NO_REFERENCE),
        (NARROW, "bfloat16", NO_REFERENCE),
        (SEQUENCE, "bfloat16", {}),
        (SEQUENCE | RECOMPUTE | FUSED, "float32", NO_REFERENCE),
        (PIPELINE, "float32", {}),
        (PIPELINE | {"virtual_pipeline": 2}, "float32", {}),
        (PIPELINE | RECOMPUTE, "bfloat16", {}),
    ],
    ids=str,
)
def test_the_estimate_is_what_a_policy_allocates(trainer, dtype, algorithm, model: Path, pool: WorkerPool):
    options = {
        "model": {"path": str(model), "dtype": dtype},
        "algorithm": algorithm or {"nll_weight": 0.0},
        "data": {"max_prompt_tokens": T // 8},
        "sampling": {"max_tokens": T // 2 - T // 8},
    }
    trainer = {"microbatch_tokens": T, **trainer}
    config, shape = run_config(trainer, options), read_shape(model)
    ranks = pool.run("memory", config.trainer.world_size, checkpoint=str(model), trainer=trainer, options=options)
    for rank, real in enumerate(ranks):
        stage = rank // (config.trainer.data_parallel * config.trainer.tensor_parallel)
        estimated = estimate_of(shape, config, stage)
        for name, size in real.items():
            assert estimated[name] == pytest.approx(size, rel=TOLERANCE), (rank, name, real, estimated)


def estimate_of(shape: ModelShape, config: Any, stage: int) -> dict[str, int]:
    spec = assemble(config, shape)
    state = TrainerState(spec, stage)
    parts = {
        "weights": state.weights,
        "gradients": state.gradients,
        "reference": state.copies,
        "optimizer": state.optimizer,
    }
    step = sum(Step(spec, stage, on_gpu=False).fullest.values())
    return parts | {"step": step, "total": sum(parts.values()) + step}
