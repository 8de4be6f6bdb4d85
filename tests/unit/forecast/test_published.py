"""Figures that others have published for Llama models, with the set-up that they tell, beside what the planner says from
data-sheet constants and its guesses; docs/planner.md has the table. A factor says how far off it is: a record, not a wish.
None of these figures was measured by us, and their software is not ours.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.load import RunConfig, load_config, override
from engine.forecast.constants import Constants
from engine.forecast.lengths import LogNormal, Workload
from engine.forecast.seconds import Forecaster, Inputs
from engine.forecast.speed import speed_of
from engine.forecast.training import Training
from engine.megatron.outlines import outlines_of
from engine.run.spec import resolve
from tests.rollouts import make_sequence

NO_REFERENCE = {"algorithm__loss": "grpo", "algorithm__kl_weight": 0.0, "sync__reference": "never"}
ROOT = Path(__file__).parents[3]
H100 = Constants(memory_gigabytes_per_second=3350.0)  # NVIDIA's data sheets; the peak is the H200's
A100 = Constants(memory_gigabytes_per_second=1555.0, peak_teraflops=312.0)  # of 40 GB, as its figure is


def config(model: str, **changes: object) -> RunConfig:
    base = load_config(ROOT / "configs/scale/llama-3.1-8b-4x4.toml", [f"model.path={ROOT}/configs/models/{model}"])
    return override(base, {name.replace("__", "."): value for name, value in changes.items()})


@pytest.mark.parametrize(
    ("model", "gpus", "layout", "sequences", "published", "factor"),
    [  # Megatron-Bridge's performance summaries of 25.09, 25.11 and 26.02: DGX-H100, FP8, 8,192 tokens a sequence
        ("llama-3.1-8b", 8, (1, 1, 1), 128, 14_451, 1.5),
        ("llama-3.1-8b", 8, (1, 1, 1), 128, 14_079, 1.45),
        ("llama-3.1-70b", 64, (4, 8, 5), 128, 1_602, 1.8),
        ("llama-3.1-70b", 64, (4, 8, 5), 256, 1_621, 1.75),
    ],
)
def test_training_on_h100s(model, gpus, layout, sequences, published, factor):
    """Tokens a second and GPU of pre-training."""
    tp, pp, chunks = layout
    trainer = {"tensor_parallel": tp, "pipeline_parallel": pp, "virtual_pipeline": chunks, "data_parallel": gpus // (tp * pp)}
    more = {"sequence_parallel": tp > 1, "distributed_optimizer": True, "microbatch_tokens": 8192, "fp8": "current"}
    more |= {"overlap_gradients": chunks == 1}
    changes = {f"trainer__{name}": value for name, value in (trainer | more | {"layers": "transformer_engine"}).items()}
    spec = resolve(config(model, **changes, cluster__nodes=gpus // 8 + 1, **NO_REFERENCE), digests=False)
    drawn = outlines_of([make_sequence((place,), (1,) * 8191, ()) for place in range(sequences)])
    step = Training(spec, H100).step(drawn)
    predicted = sequences * 8192 / step.seconds.total / gpus
    assert max(predicted / published, published / predicted) < factor, (predicted, step.seconds)


@pytest.mark.parametrize(
    ("constants", "batch", "context", "published", "factor"),
    [
        (H100, 1, 200, 6.48e-3, 1.5),  # yobitel's bench, vLLM 0.21.0 on an H100 of 80 GB: time per output token
        (H100, 4, 200, 6.59e-3, 1.5),
        (H100, 16, 200, 10.94e-3, 1.15),
        (A100, 1, 1088, 1 / 75, 1.3),  # J. Musgrave's sweep, vLLM 0.23.0 on an A100 of 40 GB, 1,024 tokens in and 128 out
    ],
)
def test_decoding_8b(constants, batch, context, published, factor):
    """Seconds of an iteration."""
    spec = resolve(config("llama-3.1-8b"), digests=False)
    predicted = speed_of(spec.shape, spec.config, constants).iterations(1, batch, batch * context)
    assert max(predicted / published, published / predicted) < factor, predicted


@pytest.mark.parametrize(("lookahead", "mean", "published", "factor"), [(0, 1060, 97.7, 1.45), (1, 1129, 74.6, 1.45)])
def test_grpo_of_8b_on_16_h100s(lookahead, mean, published, factor):
    """NeMo-RL 0.4: seconds a step of 2,048 responses on 16 H100s, trainer TP1 PP2, engines TP1; on policy on the same GPUs, and
    one step off policy. Means are of prompt and response; the prompt's 100 tokens and the spread are our guess, as is how the
    16 GPUs are split one step off policy."""
    turns = lookahead == 0
    changes = {
        "algorithm__loss": "grpo",
        "algorithm__kl_weight": 0.01,
        "algorithm__samples_per_prompt": 32,
        "data__prompts_per_step": 64,
        "sampling__max_tokens": 3996,
        "data__max_prompt_tokens": 100,
        "inference__max_model_tokens": 4096,
        "sync__sync_interval": 1,
        "sync__reference": "never",
        "sync__lookahead": lookahead,
        "trainer__microbatch_tokens": 4096,
        "trainer__pipeline_parallel": 2,
        "trainer__data_parallel": 8 if turns else 4,
        "trainer__distributed_optimizer": True,
        "inference__engines": 16 if turns else 8,
        "inference__placement": "colocated" if turns else "disaggregated",
        "inference__max_concurrent": 256,
        "cluster__nodes": 2,
        "rewards__workers": 16,
        "checkpoint__every": "end",
    }
    spec = resolve(config("llama-3.1-8b", **changes), digests=False)
    workload = Workload(LogNormal(mean - 100, 0.6, 3996), LogNormal(100, 0.0, 100))
    found = Forecaster(Inputs(spec, H100, workload, 0.1, 79 << 30)).forecast()
    assert max(found.step_seconds / published, published / found.step_seconds) < factor, (found.step_seconds, found.parts)
