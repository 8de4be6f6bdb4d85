"""Every layout against one rank and against transformers: logits, losses, gradients, clipping, weights; resume; bad
numbers. What a loss should be is not asked here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from engine.algorithms.oapl import SHARE
from engine.config.options import Trainer
from engine.core.types import IGNORED
from engine.megatron.dealing import deal_step
from engine.megatron.outlines import outlines_of
from engine.megatron.scatter import Coded, encode
from engine.models.hf import HfCheckpoint
from tests.parallel import material
from tests.parallel.pool import WorkerPool
from tests.rollouts import make_sequence

LAYOUTS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name: checkpoint, loss, trainer options
    "prompts_not_shared": ("plain", "dpo", {"share_prompts": False}),
    "prompts_not_shared_grpo": ("plain", "grpo", {"share_prompts": False}),
    "tp2": ("plain", "dpo", {"tensor_parallel": 2}),
    "tp2_sequence_parallel_recompute": (
        "plain",
        "grpo",
        {"tensor_parallel": 2, "sequence_parallel": True, "recompute": True},
    ),
    "tp2_odd_vocabulary": ("odd", "nll", {"tensor_parallel": 2}),
    "tp2_tied": ("tied", "nll", {"tensor_parallel": 2}),
    "pp2": ("plain", "dpo", {"pipeline_parallel": 2}),
    "pp2_tied": ("tied", "nll", {"pipeline_parallel": 2}),
    "pp2_virtual2": ("plain", "grpo", {"pipeline_parallel": 2, "virtual_pipeline": 2}),
    "pp2_uneven": ("tied", "nll", {"pipeline_parallel": 2, "first_stage_layers": 1}),
    "tp4_over_two_kv_heads": ("plain", "dpo", {"tensor_parallel": 4}),
    "dp2": ("plain", "dpo", {"data_parallel": 2}),
    "dp2_distributed_optimizer": ("plain", "dpo", {"data_parallel": 2, "distributed_optimizer": True}),
    "tp2_pp2": ("odd", "nll", {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "tp2_pp2_tied_sequence_parallel": (
        "tied",
        "nll",
        {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True},
    ),
    "tp2_dp2_distributed_optimizer": (
        "plain",
        "grpo",
        {"tensor_parallel": 2, "data_parallel": 2, "distributed_optimizer": True},
    ),
    "pp2_dp2_distributed_optimizer": (
        "tied",
        "nll",
        {"pipeline_parallel": 2, "data_parallel": 2, "distributed_optimizer": True},
    ),
}
HEADLESS: dict[str, tuple[str, str, dict[str, Any]]] = {  # log-probs from hidden states
    "fused_head": ("odd", "grpo", {"fused_lm_head": True}),
    "fused_head_tp2_sequence_parallel": (
        "plain",
        "nll",
        {"fused_lm_head": True, "tensor_parallel": 2, "sequence_parallel": True},
    ),
    "fused_head_tp2_pp2_tied": ("tied", "dpo", {"fused_lm_head": True, "tensor_parallel": 2, "pipeline_parallel": 2}),
}
EVERYTHING: dict[str, tuple[str, str, dict[str, Any]]] = {  # groups of two pairs, split over rows of 64 on one rank
    "everything_in_whole_rows": ("odd", "everything", {"microbatch_tokens": 256}),
    "everything_with_prompts_not_shared": ("odd", "everything", {"share_prompts": False}),
    "everything_tp2": ("odd", "everything", {"tensor_parallel": 2, "sequence_parallel": True}),
    "everything_pp2_dp2": ("odd", "everything", {"pipeline_parallel": 2, "data_parallel": 2}),
    # a group that both ranks have, and one that is larger than a row on one of them
    "everything_in_small_rows_dp2": ("odd", "everything", {"data_parallel": 2, "microbatch_tokens": 40}),
    "own_loss_in_small_rows_dp2": ("odd", "own", {"data_parallel": 2, "microbatch_tokens": 40}),
    "everything_dp4": ("odd", "everything", {"data_parallel": 4}),
    "everything_in_one_group_in_a_whole_row": ("odd", "everything_in_one_group", {"microbatch_tokens": 256}),
    "everything_in_one_group_tp2_dp2": (
        "odd",
        "everything_in_one_group",
        {"tensor_parallel": 2, "data_parallel": 2, "distributed_optimizer": True},
    ),
    "everything_in_one_group_pp2_virtual2_dp2": (
        "plain",
        "everything_in_one_group",
        {"pipeline_parallel": 2, "virtual_pipeline": 2, "data_parallel": 2, "microbatch_tokens": 128},
    ),
    "own_loss_in_one_group_dp4": ("odd", "own_in_one_group", {"data_parallel": 4}),
    "own_loss_in_whole_rows": ("odd", "own", {"microbatch_tokens": 256}),
    "own_loss_dp2": ("odd", "own", {"data_parallel": 2}),
    "own_loss_tp2": ("odd", "own", {"tensor_parallel": 2, "sequence_parallel": True}),
    "own_loss_with_entropy_pp2_dp2": ("odd", "own_with_entropy", {"pipeline_parallel": 2, "data_parallel": 2}),
}
OFF_POLICY: dict[str, tuple[str, str, dict[str, Any]]] = {  # what is weighed or regressed on by response or token
    "corrected_tp2": ("odd", "corrected", {"tensor_parallel": 2, "sequence_parallel": True}),
    "cispo_fused_head_tp2": ("odd", "cispo", {"fused_lm_head": True, "tensor_parallel": 2}),
    "oapl_pp2_dp2": ("odd", "oapl", {"pipeline_parallel": 2, "data_parallel": 2}),
}
CLIP_NORM = 0.5  # below the gradient norm of every step of every loss
CLIPPED = ("tp2", "tp2_sequence_parallel_recompute", "pp2_tied", "dp2_distributed_optimizer")
Checkpoint = Callable[[str], Path]


@dataclass(frozen=True)
class Trained:
    """What three steps of the case `train` left behind."""

    metrics: list[list[dict[str, float]]]  # by rank, by step
    tensors: dict[str, torch.Tensor]  # of all leaders

    def select(self, *prefixes: str) -> dict[str, torch.Tensor]:
        """Tensors whose names start with one of the prefixes."""
        return {key: value for key, value in self.tensors.items() if key.startswith(prefixes)}


Train = Callable[..., Trained]


@pytest.fixture(scope="module")
def train(pool: WorkerPool, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Runs the case `train` once per checkpoint, loss, layout and clip_norm."""
    made: dict[str, Trained] = {}

    def run(variant: str, loss: str, trainer: dict[str, Any], clip_norm: float = material.UNCLIPPED) -> Trained:
        key = json.dumps([variant, loss, trainer, clip_norm])
        if key not in made:
            size = math.prod(trainer.get(f"{axis}_parallel", 1) for axis in ("tensor", "pipeline", "data"))
            output = tmp_path_factory.mktemp("train")
            where = {"checkpoint": str(checkpoint(variant)), "output": str(output)}
            options = {"optimizer": {"clip_norm": clip_norm}}
            metrics = pool.run("train", size, trainer=trainer, options=options, loss=loss, **where)
            tensors: dict[str, torch.Tensor] = {}
            for file in output.glob("*.safetensors"):
                tensors |= load_file(file)
            made[key] = Trained(metrics, tensors)
        return made[key]

    return run


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference over tensors of the same names."""
    assert found.keys() == expected.keys()
    return max(float((found[key] - expected[key]).abs().max()) for key in expected)


@pytest.mark.parametrize(
    ("name", "clip_norm"),
    [
        *((name, material.UNCLIPPED) for name in [*LAYOUTS, *HEADLESS, *EVERYTHING, *OFF_POLICY]),
        *((name, CLIP_NORM) for name in CLIPPED),
    ],
    ids=[*LAYOUTS, *HEADLESS, *EVERYTHING, *OFF_POLICY, *(f"{name}-clipped" for name in CLIPPED)],
)
def test_layout_equals_one_rank(name: str, clip_norm: float, train: Train) -> None:
    """Three optimizer steps: metrics equal on all ranks and within 2e-5 of one rank; gradients within 1e-5 (or a millionth of
    their norm), weights 2e-5. Also of rows that hold a prompt for each of its samples, which all others do not."""
    variant, loss, trainer = (LAYOUTS | HEADLESS | EVERYTHING | OFF_POLICY)[name]
    found, expected = train(variant, loss, trainer, clip_norm), train(variant, loss, {}, clip_norm)
    assert all(metrics == found.metrics[0] for metrics in found.metrics)
    for step, wanted in zip(found.metrics[0], expected.metrics[0], strict=True):
        assert step["grad_norm"] > CLIP_NORM
        for key in wanted.keys() - {"num_tokens", "shared_token_share"}:  # padding and what shares a row differ with the layout
            assert step[key] == pytest.approx(wanted[key], abs=2e-5, rel=1e-5), key
    largest = max(step["grad_norm"] for step in expected.metrics[0])
    assert worst(found.select("gradient."), expected.select("gradient.")) <= max(1e-5, 1e-6 * largest)
    assert worst(found.select("weight."), expected.select("weight.")) <= 2e-5


@pytest.mark.parametrize(
    ("variant", "loss", "trainer"),
    [
        ("odd", "grpo", {}),
        ("odd", "dpo", {"tensor_parallel": 2, "sequence_parallel": True}),
        ("tied", "dpo", {}),
        ("tied", "grpo", {"data_parallel": 2, "overlap_gradients": True}),
        ("tied", "dpo", {"tensor_parallel": 2, "pipeline_parallel": 2}),
        ("deep", "dpo", {"pipeline_parallel": 2, "virtual_pipeline": 2, "recompute": True}),
    ],
    ids=["one_rank", "tp2_sp", "tied", "tied_dp2_overlap", "tied_tp2_pp2", "pp2_virtual2_recompute"],
)
@pytest.mark.parametrize("fused_lm_head", [False, True], ids=["", "fused_head"])
def test_products_that_add_to_main_grad_give_the_same_gradients(
    variant: str, loss: str, trainer: dict[str, Any], fused_lm_head: bool, train: Train
) -> None:
    """Those of all layers, of the output layer in both forms, and of embeddings that are the same weight. Three steps; in
    float32, where nothing is rounded either way."""
    layout = trainer | {"fused_lm_head": fused_lm_head}
    found, expected = train(variant, loss, layout | {"fuse_gradient_accumulation": True}), train(variant, loss, layout)
    largest = max(step["grad_norm"] for step in expected.metrics[0])
    assert worst(found.select("gradient."), expected.select("gradient.")) <= max(1e-6, 1e-6 * largest)
    assert worst(found.select("weight."), expected.select("weight.")) <= 2e-5


@pytest.mark.parametrize("name", ["one_rank", *(n for n in LAYOUTS if "dp2" not in n)])
def test_logits_equal_transformers(name: str, train: Train, checkpoint: Checkpoint) -> None:
    """Packed rows through every layout against LlamaForCausalLM on each sequence alone, within 1e-4 in fp32."""
    variant, loss, trainer = LAYOUTS.get(name, ("odd", "nll", {}))
    found = train(variant, loss, trainer)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(variant)).eval()
    batch = material.batch_of(0, model.config.vocab_size, material.run_config(trainer, {}).trainer, 0)
    for index, row in enumerate(batch.microbatches):
        for member in material.members(row):
            with torch.no_grad():
                wanted = model(member.tokens[None]).logits[0, member.predicting]
            assert (found.tensors[f"logits.{index}"][member.among] - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("algorithm", "trainer", "temperature"),
    [
        ({"loss": "grpo"}, {}, 0.7),
        ({"loss": "grpo"}, {"fused_lm_head": True}, 0.7),
        ({"loss": "grpo"}, {"tensor_parallel": 2, "sequence_parallel": True}, 0.7),
        ({"loss": "group_dpo", "alpha": 0.1}, {}, 0.7),
        ({"loss": "dpo"}, {}, 1.0),
        ({"loss": "group_dpo"}, {"fused_lm_head": True}, 1.0),
    ],
    ids=["grpo", "grpo_fused_head", "grpo_tp2", "group_dpo_with_grpo", "dpo", "group_dpo_fused_head"],
)
def test_log_probs_are_of_what_was_sampled_for_ratios_and_of_the_model_for_preferences(
    algorithm: dict[str, Any], trainer: dict[str, Any], temperature: float, pool: WorkerPool, checkpoint: Checkpoint
) -> None:
    """sampling.temperature = 0.7: policy and reference against transformers' logits over `temperature` in float64."""
    options = {"algorithm": algorithm, "sampling": {"temperature": 0.7}}
    size = trainer.get("tensor_parallel", 1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint("odd")).eval()
    batch = material.batch_of(0, model.config.vocab_size, material.run_config(trainer, {}).trainer, 0)
    for found in pool.run("distribution", size, trainer=trainer, options=options, checkpoint=str(checkpoint("odd"))):
        assert len(found["own"]) == len(found["reference"]) == len(batch.microbatches)
        for row, own, reference in zip(batch.microbatches, found["own"], found["reference"], strict=True):
            for member in material.members(row):
                with torch.no_grad():
                    logits = model(member.tokens[None]).logits[0].double() / temperature
                wanted = -F.cross_entropy(logits, member.targets, ignore_index=IGNORED, reduction="none")[member.predicting]
                for mine in (own, reference):
                    assert (torch.tensor(mine[member.span]) - wanted).abs().max() <= 2e-5


@pytest.mark.parametrize("head", ["model", "float32"])
def test_a_head_in_float32_has_float32s_error(head: str, pool: WorkerPool, checkpoint: Checkpoint) -> None:
    """Of bf16 hidden states and weights: log-probs within 1e-5 of float64 products of the same. Where the processor has no
    products of bf16 the fused head multiplies in float32 anyway."""
    options = {"model": {"dtype": "bfloat16", "head": head}, "algorithm": {"loss": "grpo"}}
    arguments: dict[str, Any] = {"trainer": {"fused_lm_head": True}, "options": options}
    (found,) = pool.run("distribution", 1, checkpoint=str(checkpoint("plain")), **arguments)
    widened = head == "float32" or not torch.cpu._is_avx512_bf16_supported()
    assert (found["distance"] <= 1e-5) == widened


@pytest.mark.parametrize("clip_norm", [material.UNCLIPPED, CLIP_NORM], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("variant", ["odd", "tied"])
def test_one_rank_equals_transformers(variant: str, clip_norm: float, train: Train, checkpoint: Checkpoint) -> None:
    """The anchor of all layouts: three NLL steps of LlamaForCausalLM and torch's AdamW, warm-up, decay, clipping."""
    found = train(variant, "nll", {}, clip_norm)
    config = material.run_config({}, {})
    options = config.optimizer
    model = AutoModelForCausalLM.from_pretrained(checkpoint(variant))
    decayed = [{"params": [p for p in model.parameters() if (p.ndim > 1) is wide]} for wide in (True, False)]
    adamw = torch.optim.AdamW(decayed, betas=(options.beta1, options.beta2), eps=options.eps)
    for step, metrics in enumerate(found.metrics[0]):
        batch = material.batch_of(step, model.config.vocab_size, config.trainer, 0)
        adamw.zero_grad()
        loss = torch.zeros(())
        for row in batch.microbatches:
            for member in material.members(row):
                logits = model(member.tokens[None]).logits[0]
                loss = loss + F.cross_entropy(logits, member.targets, ignore_index=IGNORED, reduction="sum")
        (loss / batch.num_target_tokens).backward()
        assert metrics["loss"] == pytest.approx(loss.item() / batch.num_target_tokens, abs=1e-5)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm).item()
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert norm > CLIP_NORM
        gradients = {f"gradient.{step}.{name}": p.grad for name, p in model.named_parameters()}
        assert worst(found.select(f"gradient.{step}."), gradients) <= 1e-5
        for group, decay in zip(adamw.param_groups, (options.weight_decay, 0.0), strict=True):
            group["weight_decay"] = decay
            group["lr"] = metrics["learning_rate"]
        assert metrics["learning_rate"] == pytest.approx(options.learning_rate * min(1.0, (step + 1) / 2))
        adamw.step()
    assert worst(found.select("weight."), {f"weight.{n}": p.detach() for n, p in model.named_parameters()}) <= 2e-5


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        ({"tensor_parallel": 2}, {}),
        ({"data_parallel": 2, "distributed_optimizer": True}, {}),
        ({"data_parallel": 2, "distributed_optimizer": True}, {"model": {"dtype": "bfloat16"}}),
        ({"tensor_parallel": 2}, {"model": {"dtype": "bfloat16"}}),
        ({"pipeline_parallel": 2, "virtual_pipeline": 2}, {}),
        ({"data_parallel": 2}, {"algorithm": material.ALGORITHMS["own_with_entropy"]}),
        ({"tensor_parallel": 2}, {"sync": {"reference": 1, "reference_mix": 0.25}}),
    ],
    ids=["tp2", "dp2_distributed", "dp2_distributed_bf16", "tp2_bf16", "pp2_virtual2", "dp2_own_loss", "tp2_mixed"],
)
def test_resumed_policy_continues_bit_for_bit(
    trainer: dict[str, Any], options: dict[str, Any], pool: WorkerPool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """State through a safetensors file into a fresh policy, before the first step and after it, reference moved."""
    where = {"checkpoint": str(checkpoint("plain")), "output": str(tmp_path)}
    for rank in pool.run("resume", 2, trainer=trainer, options=options, **where):
        assert rank == {"metrics": True, "keys": True, "tensors": True, "from_start": True, "mixed": True}


DP2, SHARED = {"data_parallel": 2}, {"data_parallel": 2, "distributed_optimizer": True}


@pytest.mark.parametrize(
    ("trainer", "other", "dtype"),
    [
        (SHARED, {"reference_memory": "host"}, "bfloat16"),
        ({"pipeline_parallel": 2}, {"reference_memory": "host"}, "float32"),
        (DP2, {"overlap_gradients": True}, "float32"),
        (SHARED, {"overlap_gradients": True, "reference_memory": "host"}, "bfloat16"),
        ({"pipeline_parallel": 2, **SHARED}, {"overlap_gradients": True}, "float32"),
    ],
    ids=str,
)
def test_where_the_reference_is_and_when_gradients_are_summed_change_no_bit(
    trainer: dict[str, Any], other: dict[str, Any], dtype: str, pool: WorkerPool, checkpoint: Checkpoint
) -> None:
    """Nor that gradients have no memory between two steps."""
    size = trainer.get("data_parallel", 1) * trainer.get("pipeline_parallel", 1)
    options = {"model": {"dtype": dtype}}
    for rank in pool.run(
        "same_steps", size, trainer=trainer, options=options, other=other, checkpoint=str(checkpoint("plain"))
    ):
        assert rank["metrics"] and rank["tensors"] and rank["moved"] > 0, rank


@pytest.mark.parametrize(
    ("trainer", "dtype"),
    [({"distributed_optimizer": True}, "bfloat16"), ({}, "bfloat16"), (SHARED, "bfloat16"), (SHARED, "float32")],
    ids=str,
)
def test_an_optimizer_that_makes_room_for_engines_changes_no_bit(
    trainer: dict[str, Any], dtype: str, pool: WorkerPool, checkpoint: Checkpoint
) -> None:
    """Its storages have no bytes meanwhile; the state is what it was, then, after the next steps and when it was loaded."""
    size = trainer.get("data_parallel", 1)
    for rank in pool.run(
        "makes_room", size, trainer=trainer, options={"model": {"dtype": dtype}}, checkpoint=str(checkpoint("plain"))
    ):
        assert all(rank.values()), rank


def test_gradients_in_bfloat16_are_near_and_go_on_bit_for_bit(pool: WorkerPool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A gradient is rounded to 8 bits once a sum; AdamW's first steps are of the size of the learning rate in any case."""
    where, options = {"checkpoint": str(checkpoint("plain"))}, {"model": {"dtype": "bfloat16"}}
    for rank in pool.run("same_steps", 2, trainer=SHARED, options=options, other={"gradient_dtype": "bfloat16"}, **where):
        assert rank["dtypes"] == ["torch.bfloat16"] and not rank["tensors"]
        assert all(one == pytest.approx(other, rel=0.02) for one, other in rank["norms"]), rank
        assert 0 < rank["apart"] < 0.02
    trainer = SHARED | {"gradient_dtype": "bfloat16"}
    for rank in pool.run("resume", 2, trainer=trainer, options=options, output=str(tmp_path), **where):
        assert all(rank.values()), rank


LAYOUTS_IN_TURN = {  # (written by, gone on by)
    "tp2_to_dp2": ({"tensor_parallel": 2}, {"data_parallel": 2, "distributed_optimizer": True}),
    "dp2_to_pp2": ({"data_parallel": 2, "distributed_optimizer": True}, {"pipeline_parallel": 2}),
    "pp2_virtual2_to_tp2": ({"pipeline_parallel": 2, "virtual_pipeline": 2}, {"tensor_parallel": 2}),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYOUTS_IN_TURN)
def test_a_policy_goes_on_in_another_layout(
    name: str, dtype: str, pool: WorkerPool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Losses and gradient norms of the next two steps within rounding of the uninterrupted run's; in bfloat16 the other order
    of sums shows in weights and activations too."""
    before, after = LAYOUTS_IN_TURN[name]
    where = {"checkpoint": str(checkpoint("plain")), "output": str(tmp_path), "options": {"model": {"dtype": dtype}}}
    whole = pool.run("leave", 2, trainer=before, **where)[0][2:]
    again = pool.run("go_on", 2, trainer=after, before=before, **where)[0]
    assert len(whole) == len(again) == 2
    for one, other in zip(whole, again, strict=True):
        for key in ("loss", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-5 if dtype == "float32" else 0.02), key


@pytest.mark.parametrize(
    ("loss", "trainer"),
    [
        ("everything", {}),  # with groups that are split over rows
        ("grpo", {"tensor_parallel": 2, "sequence_parallel": True, "recompute": True}),
        ("grpo", {"fused_lm_head": True}),
        ("dpo", {"pipeline_parallel": 2}),
        ("own_with_entropy", {"data_parallel": 2}),
    ],
)
def test_a_reference_that_is_the_policy_needs_no_copy_and_no_pass(
    loss: str, trainer: dict[str, Any], pool: WorkerPool, checkpoint: Checkpoint
) -> None:
    """Bit for bit what a copy and a pass give, and what rollouts give that the reference sampled."""
    size = math.prod(trainer.get(f"{axis}_parallel", 1) for axis in ("tensor", "pipeline", "data"))
    options = {"sync": {"reference": "follow"}, "algorithm": material.ALGORITHMS[loss]}
    for rank in pool.run(
        "without_reference", size, trainer=trainer, options=options, loss=loss, checkpoint=str(checkpoint("odd"))
    ):
        assert rank == {"metrics": True, "state": True, "copies": True, "rollouts": True}


@pytest.mark.parametrize(
    ("reference", "trainer"),
    [
        ("never", {"tensor_parallel": 2}),  # the reference is the seed's copy
        (1, {"data_parallel": 2, "distributed_optimizer": True}),  # a copy of its own
    ],
)
def test_an_offline_policy_lends_the_seeds_weights(
    reference: Any, trainer: dict[str, Any], pool: WorkerPool, checkpoint: Checkpoint
) -> None:
    sync = {"sync_interval": "never", "reference": reference}
    options = {"sync": sync, "evaluation": {"every": 1}, "data": {"held_out": "unused"}, "checkpoint": {"every": 1}}
    for rank in pool.run("seed", 2, trainer=trainer, options=options, checkpoint=str(checkpoint("plain"))):
        assert len(rank) == 4
        assert all(rank.values()), rank


@pytest.mark.parametrize("trainer", [{"data_parallel": 2}, {"tensor_parallel": 2}, {"pipeline_parallel": 2}])
def test_infinite_advantage_stops_every_rank(trainer: dict[str, Any], pool: WorkerPool, checkpoint: Checkpoint) -> None:
    """One infinite advantage on one rank: NumericsError names the step on every rank, no weight has moved."""
    for rank in pool.run("infinite", 2, trainer=trainer, checkpoint=str(checkpoint("plain"))):
        assert rank["message"].startswith("step 7: the loss must be finite")
        assert rank["untouched"]


@pytest.mark.parametrize(
    ("name", "distance", "counted", "count"),
    [("tp2", "margin_mean", "pairs", 4.0), ("pp2_virtual2", "kl_mean", "with_signal", 8.0)],
)
def test_reference_stays_as_policy_moves(name: str, distance: str, counted: str, count: float, train: Train) -> None:
    """The margin over the reference, or the KL to it, is exactly 0 before the first step, and not afterwards."""
    steps = train(*LAYOUTS[name]).metrics[0]
    assert [metrics[distance] != 0.0 for metrics in steps] == [False, True, True]
    assert [metrics[counted] for metrics in steps] == [count] * 3


def test_groups_are_split_over_rows_of_one_rank_and_whole_in_larger_ones(train: Train) -> None:
    """What the layouts of EVERYTHING compare: both kinds in the small rows, none split in the large, the same sums."""
    split = []
    for trainer in ({}, {"microbatch_tokens": 256}):
        options = material.run_config(trainer, {}).trainer
        batches = [material.batch_of(step, 67, options, 0, group_pairs=2) for step in range(3)]
        rows = [row for batch in batches for row in batch.microbatches]
        split.append([bool(row.split.any()) for row in rows])
    assert any(split[0]) and not any(split[1])


SPREAD = [name for name in EVERYTHING if name.endswith(("_dp4", "_one_group_tp2_dp2", "_virtual2_dp2"))]


def test_only_what_several_ranks_have_is_exchanged() -> None:
    """The rows of a group that is larger than a row, but on one rank alone, stand behind those of the group that is spread."""
    options = material.run_config({"data_parallel": 2, "microbatch_tokens": 40}, {}).trainer
    batches = [material.batch_of(0, 67, options, rank, 2) for rank in range(2)]
    found = [[set(row.groups[row.split].tolist()) for row in batch.microbatches] for batch in batches]
    assert found == [[{1}, {1}, {1}], [{1}, {0}, {0}]]
    assert [batch.num_spread_rows for batch in batches] == [3, 1]
    assert {batch.num_spread_groups for batch in batches} == {1}


@pytest.mark.parametrize("name", SPREAD)
def test_groups_are_spread_over_ranks(name: str) -> None:
    """What these layouts compare with one rank: every step has a group of which several ranks have sequences, in rows that hold
    those of such groups alone."""
    _, loss, trainer = EVERYTHING[name]
    options = material.run_config(trainer, {}).trainer
    for step in range(3):
        ranks = range(options.data_parallel)
        batches = [material.batch_of(step, 67, options, rank, material.pairs_in_a_group(loss)) for rank in ranks]
        (num_spread,) = {batch.num_spread_groups for batch in batches}
        assert 1 <= num_spread <= 4 // material.pairs_in_a_group(loss)
        holders = [rank for rank, batch in enumerate(batches) if any(bool(row.split.any()) for row in batch.microbatches)]
        assert len(holders) > 1
        for row in (row for batch in batches for row in batch.microbatches):
            assert bool((row.split == (row.groups >= 0)).all()) or not bool(row.split.any())


def test_a_share_and_its_sequences_survive_the_scatter() -> None:
    """Groups, marks, advantages, rewards, named values and empty rollout log-probs included, and shares of nothing."""
    made = [*material.sequences(0, 67, group_pairs=2), make_sequence((1,), (2, 3), (), values={"length": 0.1, SHARE: 0.5})]
    for num_ranks in (1, 3, 64):
        trainer = Trainer(data_parallel=num_ranks, microbatch_tokens=64)
        shares = deal_step(outlines_of(made), step=7, num_prompts=5, trainer=trainer)
        coded = [Coded(encode(share, made)) for share in shares]
        assert [one.share for one in coded] == shares
        assert dict(sorted(pair for one in coded for pair in one.sequences.items())) == dict(enumerate(made))


@pytest.mark.parametrize(
    "trainer",
    [
        {},
        {"data_parallel": 4},
        {"data_parallel": 2, "tensor_parallel": 2},
        {"data_parallel": 2, "pipeline_parallel": 2},
        {"tensor_parallel": 2, "pipeline_parallel": 2},
    ],
)
def test_a_rank_is_sent_what_it_would_deal_itself(pool: WorkerPool, trainer: dict[str, int]) -> None:
    """On every layout; of full steps, one of fewer sequences than ranks, and one of none."""
    num_ranks = math.prod(trainer.values())
    assert pool.run("scattered", num_ranks, trainer=trainer, steps=[8, 1, 0, 8]) == [[True] * 4] * num_ranks


def test_export_is_the_checkpoint(train: Train, checkpoint: Checkpoint) -> None:
    """Names and shapes gathered after training are exactly those of the Hugging Face folder, odd vocabulary, TP 2."""
    source = HfCheckpoint(checkpoint("odd"))
    found = train("odd", "nll", {"tensor_parallel": 2}).select("weight.")
    assert {name: value.shape for name, value in found.items()} == {
        f"weight.{name}": source.tensor(name).shape for name in source.names()
    }


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_an_offloaded_optimizer_does_the_same_and_resumes(
    share: float, pool: WorkerPool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Weights after three steps within a rounding of bf16; a resumed run is the uninterrupted one."""
    options = {"optimizer": {"offload_share": share}, "model": {"dtype": "bfloat16"}}
    arguments: dict[str, Any] = {"trainer": {"distributed_optimizer": True}, "options": options}
    (found,) = pool.run("offload", 1, checkpoint=str(checkpoint("plain")), output=str(tmp_path), **arguments)
    assert found.pop("worst") <= 4e-3
    hosted = found.pop("hosted")
    assert share <= hosted <= 1
    assert hosted < 1 or share == 1
    assert all(found.values()), found


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        ({"data_parallel": 2, "distributed_optimizer": True}, {}),
        ({"data_parallel": 2, "distributed_optimizer": True}, {"model": {"dtype": "bfloat16"}}),
        ({"pipeline_parallel": 2}, {}),
    ],
    ids=["dp2_distributed", "dp2_distributed_bf16", "pp2"],
)
def test_a_step_without_any_signal_moves_nothing(
    trainer: dict[str, Any], options: dict[str, Any], pool: WorkerPool, checkpoint: Checkpoint
) -> None:
    """Weights, moments and AdamW's count stay to the bit and only the place in the schedule moves; a step of one pair, which a
    data-parallel rank has no part of, still counts; and a run resumed after the empty step goes on as it would have."""
    decaying = {"schedule": "linear", "decay_steps": 4, "warmup_steps": 0}
    where = {"checkpoint": str(checkpoint("plain"))}
    for rank in pool.run("without_signal", 2, trainer=trainer, options={**options, "optimizer": decaying}, **where):
        assert rank["updated"] == [1.0, 0.0, 1.0] and rank["norm"] == 0.0
        assert rank["rates"] == pytest.approx([3e-3, 3e-3 * 3 / 4, 3e-3 * 2 / 4])
        assert rank["changed"] == ["optimizer.schedule.step"]
        assert rank["resumed"]
