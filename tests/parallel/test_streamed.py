"""sync.streaming: a step whose gradient is computed in three parts is the step in one piece, whatever it is divided by and
however the trainer is laid out, and has the same bits every time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.material import ALGORITHMS
from tests.parallel.pool import WorkerPool

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # loss, trainer
    "grpo": (ALGORITHMS["grpo"], {}),
    "grpo_tokens_dp2_distributed_optimizer": (
        ALGORITHMS["grpo"] | {"reduction": "tokens"},
        {"data_parallel": 2, "distributed_optimizer": True},
    ),
    "grpo_fused_head_tp2_sequence_parallel": (
        ALGORITHMS["grpo"],
        {"fused_lm_head": True, "tensor_parallel": 2, "sequence_parallel": True},
    ),
    "grpo_pp2_virtual2": (ALGORITHMS["grpo"], {"pipeline_parallel": 2, "virtual_pipeline": 2}),
    "dpo": (ALGORITHMS["dpo"], {}),
    "dpo_pairs_tp2_dp2": (ALGORITHMS["dpo"] | {"reduction": "pairs"}, {"tensor_parallel": 2, "data_parallel": 2}),
    "dpo_pp2_dp2": (ALGORITHMS["dpo"], {"pipeline_parallel": 2, "data_parallel": 2}),
    "everything_dp2": (ALGORITHMS["everything"] | {"reduction": "tokens"}, {"data_parallel": 2}),
    "own": (ALGORITHMS["own"], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_in_parts_is_the_step_in_one_piece(name: str, pool: WorkerPool, checkpoint: Callable[[str], Path]) -> None:
    """Gradients, before they are clipped, within 1e-6 of their norm; weights after three steps; every metric of the loss."""
    algorithm, trainer = CASES[name]
    size = math.prod(trainer.get(f"{axis}_parallel", 1) for axis in ("tensor", "pipeline", "data"))
    options = {"algorithm": algorithm, "sync": {"streaming": True}}
    ranks = pool.run("streamed", size, trainer=trainer, options=options, checkpoint=str(checkpoint("odd")))
    for found in ranks:
        assert found["repeats"], "the same parts give the same bits"
        assert found["gradient"] <= 1e-6 and found["weights"] <= 2e-6
        for whole, parts in zip(*found["metrics"], strict=True):
            assert whole.keys() == parts.keys() and whole["grad_norm"] > 0.1
            for key in whole.keys() - {"num_tokens", "shared_token_share"}:  # rows are others
                assert parts[key] == pytest.approx(whole[key], rel=2e-6, abs=2e-6), key
