"""The trainer's GPU options in the processes and cases of tests/parallel: Transformer Engine's layers and megatron's own
against transformers, FP8 recipes against bfloat16, layouts against one rank, AdamW of three libraries, states that change
layers, resume. The same tests run on a GPU and on a CPU, where Transformer Engine's Python code is the real one and its kernels
are those of tests/te_cpu.

    python -m pytest tests/parallel/test_transformer_engine.py     on a GPU: needs requirements/gpu.txt; apex for what names it
"""

import functools
import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from engine.core.types import IGNORED
from tests.parallel import material
from tests.parallel.pool import WorkerPool

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.skipif(
    ON_GPU and find_spec("transformer_engine") is None, reason="Transformer Engine is not installed: requirements/gpu.txt"
)
needs_apex = pytest.mark.skipif(find_spec("amp_C") is None, reason="apex is not installed")
needs_two = pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="takes two GPUs; a CPU does for two")
BF16 = {"model": {"dtype": "bfloat16"}}
TE = {"layers": "transformer_engine", "microbatch_tokens": 128}
CURVE = BF16 | {"optimizer": {"learning_rate": 1e-4}}
RECIPES = ["delayed", "current", "blockwise"]
FP8_LOGITS_ERROR = 0.25  # of their norm: three bits of mantissa in every product of two layers; 0.17 to 0.18 seen
LAYOUT_ERROR = 0.05  # of the gradients' norm; sums of tensor-parallel ranks are rounded to bf16: 0.026 seen
FP8_LOSS_ERROR = 0.03  # of the first loss, at each of 20 steps that learn two batches by heart; 0.017 seen
LONG = TE | {"microbatch_tokens": 256}  # whole blocks of FP8 on each of two ranks
FP8 = {"distributed_optimizer": True, "fp8_parameters": True}
FP8_PARAMETERS = TE | FP8
PARAMETER_RECIPES = ["current", "blockwise"]
SEEN = [
    *("begins_with_the_checkpoint", "reference_is_the_policy", "reference_stays", "reference_moves"),
    *("looked_up", "same_on_all_ranks", "copies_as_counted"),
]
PADDING_BYTES = 2 * 64 * 16  # megatron-core begins every parameter at a multiple of 64 elements


@pytest.fixture(scope="module", autouse=True)
def deterministic():
    """For the pool's processes: attention that repeats bit for bit, and megatron's one hardware queue."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
        patch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if not ON_GPU:
            patch.setenv("SEMION_TE_STAND_IN", "1")
        yield


@pytest.fixture(scope="module")
def pool(workers, deterministic):
    """Processes of this file's own, which begin with its environment."""
    workers.close()
    own = WorkerPool()
    yield own
    own.close()


def trained(pool, folder, output, trainer, options, size=1):
    """Metrics, logits, gradients and weights of three NLL steps."""
    where = {"checkpoint": str(folder), "output": str(output)}
    metrics = pool.run("train", size, trainer=trainer, options=options, loss="nll", **where)
    tensors: dict[str, torch.Tensor] = {}
    for file in output.glob("*.safetensors"):
        tensors |= load_file(file)
    return metrics[0], tensors


@pytest.fixture(scope="module")
def one_rank(pool, checkpoint, tmp_path_factory):
    """Gradients of the first of three NLL steps on one rank, by recipe."""

    @functools.cache
    def gradients(recipe):
        _, found = trained(pool, checkpoint("deep"), tmp_path_factory.mktemp(recipe), LONG | {"fp8": recipe}, BF16)
        return {key: value.to(DEVICE) for key, value in found.items() if key.startswith("gradient.0.")}

    return gradients


LAYOUTS = {
    "tp2": {"tensor_parallel": 2},
    "tp2_sequence_parallel": {"tensor_parallel": 2, "sequence_parallel": True},
    "tp2_sequence_parallel_recompute": {"tensor_parallel": 2, "sequence_parallel": True, "recompute": True},
    "pp2": {"pipeline_parallel": 2},
    "pp2_virtual2": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    "dp2_distributed_optimizer": {"data_parallel": 2, "distributed_optimizer": True},
    "overlap": {"tensor_parallel": 2, "sequence_parallel": True, "overlap_tensor_parallel": True},
}
COMPARED = [
    *(("tp2", "none"), ("tp2", "blockwise")),
    *(("tp2_sequence_parallel", "none"), ("tp2_sequence_parallel", "current")),
    *(("tp2_sequence_parallel_recompute", "delayed"), ("pp2", "delayed"), ("pp2_virtual2", "delayed")),
    ("dp2_distributed_optimizer", "delayed"),
    *(("overlap", "none"), ("overlap", "current")),
]


@needs_two
@pytest.mark.parametrize(("name", "recipe"), COMPARED, ids=["-".join(pair) for pair in COMPARED])
def test_layouts_are_as_near_to_bf16_as_one_rank(name, recipe, pool, checkpoint, one_rank, tmp_path):
    """Gradients in bf16 within LAYOUT_ERROR of one rank's; in FP8 no farther from those than one rank's in FP8, by a fifth; a
    pipeline's are one rank's, where it has the same rows: virtual stages have two for one."""
    if name == "overlap" and not ON_GPU:
        pytest.skip("communication inside products takes two GPUs")
    _, found = trained(pool, checkpoint("deep"), tmp_path, LONG | {"fp8": recipe} | LAYOUTS[name], BF16, size=2)
    if name == "pp2":
        assert all(torch.equal(found[key].to(DEVICE), value) for key, value in one_rank(recipe).items())
    limit = LAYOUT_ERROR if recipe == "none" else 1.2 * error(one_rank(recipe), one_rank("none"))
    assert 0 < error(found, one_rank("none")) <= limit


def curve(pool, folder, num_steps, trainer, options):
    """Losses of DPO steps; the case itself checks that scoring leaves the state alone."""
    (metrics,) = pool.run("curve", 1, trainer=trainer, options=options, checkpoint=str(folder), num_steps=num_steps)
    return [step["loss"] for step in metrics]


def reference(folder, trainer, dtype):
    """transformers' logits by row where something is predicted, and the gradients of the first NLL, in `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE)
    batch = material.batch_of(0, model.config.vocab_size, material.run_config(trainer, BF16).trainer, 0)
    logits, loss = {}, torch.zeros((), device=DEVICE)
    for index, row in enumerate(batch.microbatches):
        parts = []
        for member in material.members(row):
            whole = model(member.tokens[None].to(DEVICE)).logits[0].float()
            parts.append(whole[member.predicting])
            loss = loss + F.cross_entropy(whole, member.targets.to(DEVICE), ignore_index=IGNORED, reduction="sum")
        logits[f"logits.{index}"] = torch.cat(parts)
    (loss / batch.num_target_tokens).backward()
    gradients = {f"gradient.0.{name}": p.grad for name, p in model.named_parameters()}
    return {name: value.detach() for name, value in logits.items()} | gradients


def error(found, wanted):
    """Distance of two sets of tensors, as a share of the second's norm."""
    apart = sum(float((found[name].to(DEVICE).float() - value.float()).square().sum()) for name, value in wanted.items())
    return math.sqrt(apart / sum(float(value.float().square().sum()) for value in wanted.values()))


def errors(found, exact):
    """Of logits and of the first step's gradients."""
    parts = [{n: v for n, v in exact.items() if n.startswith(prefix)} for prefix in ("logits.", "gradient.")]
    return [error(found, part) for part in parts]


@pytest.mark.parametrize("variant", ["plain", "odd", "tied"])
@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
def test_both_layer_specs_are_as_near_to_fp32_as_transformers(layers, variant, pool, checkpoint, tmp_path):
    """bf16 logits and gradients: at most twice as far from transformers in fp32 as transformers in bf16, plus 0.2 %."""
    trainer = {"layers": layers}
    exact = reference(checkpoint(variant), trainer, torch.float32)
    half = reference(checkpoint(variant), trainer, torch.bfloat16)
    _, found = trained(pool, checkpoint(variant), tmp_path, trainer, BF16)
    theirs = errors(half, exact)
    for ours, limit in zip(errors(found, exact), theirs, strict=True):
        assert ours <= 2 * limit + 2e-3, (ours, limit)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_stays_near_fp32(recipe, pool, checkpoint, tmp_path):
    """Logits within FP8_LOGITS_ERROR of transformers in fp32, and not those of bf16 either: FP8 was used."""
    trainer = TE | {"fp8": recipe}
    exact = reference(checkpoint("wide"), trainer, torch.float32)
    half = reference(checkpoint("wide"), trainer, torch.bfloat16)
    metrics, found = trained(pool, checkpoint("wide"), tmp_path, trainer, BF16)
    ours, theirs = errors(found, exact)[0], errors(half, exact)[0]
    assert theirs < ours <= FP8_LOGITS_ERROR
    assert all(math.isfinite(step["grad_norm"]) for step in metrics)


@pytest.fixture(scope="module")
def bf16_curve(pool, checkpoint):
    """20 DPO steps on two batches, without FP8."""
    return curve(pool, checkpoint("wide"), 20, TE, CURVE)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_fp8_loss_curve_is_that_of_bf16(recipe, bf16_curve, pool, checkpoint):
    """Every loss within FP8_LOSS_ERROR of the first of bf16's; with recomputation the same bits, for six steps."""
    found = curve(pool, checkpoint("wide"), 20, TE | {"fp8": recipe}, CURVE)
    again = curve(pool, checkpoint("wide"), 6, TE | {"fp8": recipe, "recompute": True}, CURVE)
    assert found == pytest.approx(bf16_curve, rel=0, abs=FP8_LOSS_ERROR * bf16_curve[0])
    assert bf16_curve[-2] < bf16_curve[0]  # the same batch, nine steps on
    assert found[:6] == again


@pytest.mark.parametrize("recipe", PARAMETER_RECIPES)
def test_fp8_parameters_train_as_bf16_ones_that_are_cast(recipe, pool, checkpoint):
    """Five DPO steps with the same losses to the bit, on a GPU within its FP8's noise: the fp32 weights are rounded to bf16
    on their way into FP8, so products take the same bytes."""
    trainer, options = FP8_PARAMETERS | {"fp8": recipe}, BF16 | {"optimizer": {"learning_rate": 1e-4}}
    wanted = curve(pool, checkpoint("wide"), 5, trainer | {"fp8_parameters": False}, options)
    found = curve(pool, checkpoint("wide"), 5, trainer, options)
    assert found == pytest.approx(wanted, rel=0, abs=FP8_LOSS_ERROR * wanted[0] if ON_GPU else 0)


@pytest.mark.parametrize("recipe", PARAMETER_RECIPES)
@pytest.mark.parametrize("layout", [{}, {"data_parallel": 2}, {"tensor_parallel": 2}])
def test_fp8_parameters_are_what_everyone_sees(layout, recipe, pool, checkpoint):
    """They begin with the checkpoint's bf16 values, the reference is a copy that later steps leave alone, a step gathers a
    byte of each, and exports and engines get them dequantized. Two ranks: the losses of the same two without the option, and
    within FP8's noise those of one."""
    if ON_GPU and layout and torch.cuda.device_count() < 2:
        pytest.skip("takes two GPUs; a CPU does for two")
    size, trainer = 2 if layout else 1, {**LONG, **FP8, "fp8": recipe, **layout}
    where = {"checkpoint": str(checkpoint("deep"))}
    ranks = pool.run("fp8_parameters", size, trainer=trainer, options=BF16, **where)
    for rank in ranks:
        assert rank["kept"] == 16 and all(rank[name] for name in SEEN), rank
        gathered, others = rank["gathered"], rank["of"] - rank["in_fp8"]
        assert gathered["torch.uint8"] == rank["in_fp8"]
        assert 2 * others <= gathered["torch.bfloat16"] <= 2 * others + PADDING_BYTES
    assert all(rank.get("synced", True) for rank in ranks) and ("synced" in ranks[0]) == (not layout)
    if layout:
        arguments = {"options": BF16, "num_steps": 2, **where}
        plain, *_ = pool.run("curve", 2, trainer=trainer | {"fp8_parameters": False}, **arguments)
        alone, *_ = pool.run("curve", 1, trainer=LONG | FP8 | {"fp8": recipe}, **arguments)
        noise = FP8_LOSS_ERROR * alone[0]["loss"]
        found = ranks[0]["losses"][:2]
        assert found == pytest.approx([step["loss"] for step in plain], rel=0, abs=noise if ON_GPU else 0)
        assert found == pytest.approx([step["loss"] for step in alone], rel=0, abs=noise)
        norms = [step["grad_norm"] for step in plain]
        assert ranks[0]["norms"] == pytest.approx(norms, rel=FP8_LOGITS_ERROR if ON_GPU else 1e-6)


@pytest.mark.parametrize("recipe", PARAMETER_RECIPES)
def test_a_state_goes_from_bf16_to_fp8_parameters_and_back(recipe, pool, checkpoint):
    """The same names and fp32 weights; the next loss agrees to the bit on a CPU, since products see the same bytes."""
    trainer = FP8_PARAMETERS | {"fp8": recipe}
    (found,) = pool.run("change_weights", 1, trainer=trainer, options=BF16, checkpoint=str(checkpoint("wide")))
    assert found["names"] and found["optimizer"]
    plain, between, back = found["losses"]
    assert [between, back] == pytest.approx([plain, plain], rel=2e-2 if ON_GPU else 0)


@pytest.mark.parametrize("options", [{}, {"distributed_optimizer": True}])
def test_a_state_goes_from_local_to_te_layers_and_back(options, pool, checkpoint):
    """The same names and bits; the next loss agrees within bf16."""
    trainer = TE | options
    (found,) = pool.run("change_layers", 1, trainer=trainer, options=BF16, checkpoint=str(checkpoint("wide")))
    assert found["names"] and found["tensors"]
    local, between, back = found["losses"]
    assert back == local
    assert between == pytest.approx(local, rel=2e-2)


RESUMED = {
    "te": (TE, {}),
    "delayed": (TE | {"fp8": "delayed"}, {}),
    "delayed_recompute": (TE | {"fp8": "delayed", "recompute": True}, {}),
    "current": (TE | {"fp8": "current"}, {}),
    "te_adam": (TE, {"implementation": "te"}),
    "te_adam_distributed": (TE | {"distributed_optimizer": True}, {"implementation": "te"}),
    "bfloat16_moments": (TE | {"distributed_optimizer": True}, {"implementation": "te", "moment_dtype": "bfloat16"}),
    "fp8_moments": (TE | {"distributed_optimizer": True}, {"implementation": "te", "moment_dtype": "fp8"}),
    "current_parameters": (FP8_PARAMETERS | {"fp8": "current"}, {}),
    "blockwise_parameters": (FP8_PARAMETERS | {"fp8": "blockwise"}, {}),
    "parameters_and_moments": (
        FP8_PARAMETERS | {"fp8": "blockwise", "recompute": True},
        {"implementation": "te", "moment_dtype": "fp8"},
    ),
    "parameters_of_two": (FP8_PARAMETERS | {"fp8": "current", "data_parallel": 2}, {}),
    "parameters_of_two_stages": (FP8_PARAMETERS | {"fp8": "blockwise", "pipeline_parallel": 2}, {}),
    "delayed_of_two": (TE | {"fp8": "delayed", "tensor_parallel": 2, "sequence_parallel": True, "recompute": True}, {}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_policy_continues_bit_for_bit(name, pool, checkpoint, tmp_path):
    trainer, optimizer = RESUMED[name]
    size = 2 if {"data_parallel", "pipeline_parallel", "tensor_parallel"} & trainer.keys() else 1
    if ON_GPU and torch.cuda.device_count() < size:
        pytest.skip("takes two GPUs; a CPU does for two")
    arguments = {"trainer": trainer, "options": BF16 | {"optimizer": optimizer}}
    for found in pool.run("resume", size, checkpoint=str(checkpoint("wide")), output=str(tmp_path), **arguments):
        assert all(found.values()), found


@pytest.mark.parametrize("implementation", ["torch", "te", pytest.param("apex", marks=needs_apex)])
def test_an_offloaded_optimizer_does_the_same_and_resumes(implementation, pool, checkpoint, tmp_path):
    """Half the state on the host: weights within a rounding of bf16 of those without."""
    options = BF16 | {"optimizer": {"implementation": implementation, "offload_share": 0.5}}
    arguments = {"trainer": {"distributed_optimizer": True}, "options": options}
    (found,) = pool.run("offload", 1, checkpoint=str(checkpoint("wide")), output=str(tmp_path), **arguments)
    assert found.pop("worst") <= 2**-7  # a place of bfloat16 between 1 and 2, where the norms are
    assert 0.5 <= found.pop("hosted") < 1
    assert all(found.values()), found


@pytest.mark.parametrize("implementation", ["te", pytest.param("apex", marks=needs_apex)])
@pytest.mark.parametrize("distributed", [False, True])
def test_adamw_of_three_libraries_agrees(distributed, implementation, pool, checkpoint):
    """Five steps in fp32: losses within 1e-4 of torch's."""
    trainer = {"distributed_optimizer": distributed}
    wanted = curve(pool, checkpoint("plain"), 5, trainer, {})
    found = curve(pool, checkpoint("plain"), 5, trainer, {"optimizer": {"implementation": implementation}})
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("moments", ["bfloat16", "fp8"])
def test_small_moments_stay_near_full_ones(moments, pool, checkpoint):
    """Five steps: losses within 2 %, and the moments were what was asked (or the resumed state above would lack them)."""
    trainer = TE | {"distributed_optimizer": True}
    adam = {"implementation": "te", "learning_rate": 1e-4}
    wanted = curve(pool, checkpoint("wide"), 5, trainer, BF16 | {"optimizer": adam})
    found = curve(pool, checkpoint("wide"), 5, trainer, BF16 | {"optimizer": adam | {"moment_dtype": moments}})
    assert found == pytest.approx(wanted, rel=2e-2)


@pytest.mark.parametrize(
    ("trainer", "optimizer"),
    [
        (TE | {"distributed_optimizer": True}, {"implementation": "te"}),
        (TE | {"distributed_optimizer": True}, {"implementation": "te", "moment_dtype": "fp8"}),
        (TE | {"distributed_optimizer": True, "fp8": "current"}, {}),
        (FP8_PARAMETERS | {"fp8": "current"}, {"implementation": "te"}),
        ({"distributed_optimizer": True}, {"offload_share": 0.5}),
        pytest.param({"distributed_optimizer": True}, {"implementation": "apex"}, marks=needs_apex),
    ],
    ids=["te", "fp8_moments", "fp8", "fp8_parameters", "offloaded", "apex"],
)
def test_a_step_without_any_signal_moves_nothing(trainer, optimizer, pool, checkpoint):
    """As in test_policy.py, where weights, moments or products are not torch's own: nothing but the place in the schedule
    moves, and the run goes on from there bit for bit."""
    options = BF16 | {"optimizer": optimizer}
    (found,) = pool.run("without_signal", 1, trainer=trainer, options=options, checkpoint=str(checkpoint("wide")))
    assert found["updated"] == [1.0, 0.0, 1.0] and found["norm"] == 0.0
    assert found["changed"] == ["optimizer.schedule.step"]
    assert found["resumed"]


def test_fp8_moments_of_zero_gradients_are_zero(pool):
    """The first step's, then those of gradients of 1; one byte each."""
    (found,) = pool.run("fp8_moments", 1, trainer={})
    assert found["transposed"] is False and found["finite"]
    assert found["zero"] == [0.0] * 48
    assert found["one"] == pytest.approx([0.1] * 48, rel=0.07)  # three bits of mantissa


FUSED: dict[str, tuple[str, dict[str, Any]]] = {  # checkpoint, trainer
    "local": ("wide", {"layers": "local"}),
    "local_bf16_sum": ("wide", {"layers": "local", "gradient_dtype": "bfloat16"}),
    "te": ("wide", TE),
    "te_tied_recompute": ("tied", TE | {"recompute": True}),
    "te_bf16_sum": ("wide", TE | {"gradient_dtype": "bfloat16"}),
    "te_fp8_delayed": ("wide", TE | {"fp8": "delayed"}),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_gradient_accumulation_gives_the_same_gradients(name, pool, checkpoint, tmp_path):
    """With no apex, whatever the layers: Transformer Engine's add by themselves, all others by torch's product. `plain` rounds
    each microbatch's gradient to bfloat16 before it is added."""
    (variant, trainer), found = FUSED[name], {}
    for kind in ("plain", "fused"):
        (tmp_path / kind).mkdir()
        options = trainer | {"fuse_gradient_accumulation": kind == "fused"}
        _, found[kind] = trained(pool, checkpoint(variant), tmp_path / kind, options, BF16)
    wanted = {key: value.to(DEVICE) for key, value in found["plain"].items() if key.startswith("gradient.0.")}
    assert wanted and error(found["fused"], wanted) <= 1e-2


def test_fused_gradient_accumulation_of_fp8_parameters_gives_the_same_norms(pool, checkpoint):
    where = {"checkpoint": str(checkpoint("wide")), "options": BF16}
    norms = []
    for fuses in (False, True):
        trainer = FP8_PARAMETERS | {"fp8": "blockwise", "fuse_gradient_accumulation": fuses}
        norms.append(pool.run("fp8_parameters", 1, trainer=trainer, **where)[0]["norms"])
    assert norms[1][0] == pytest.approx(norms[0][0], rel=1e-3) and norms[0][0] > 0
    assert norms[1] == pytest.approx(norms[0], rel=5e-2), "a step later weights differ"


def test_a_fused_step_in_parts_is_the_step_in_one_piece(pool, checkpoint):
    """sync.streaming: no part overwrites what an earlier one added. Rows are others, and so is their rounding."""
    options = BF16 | {"sync": {"streaming": True}}
    trainer = TE | {"fuse_gradient_accumulation": True}
    (found,) = pool.run("streamed", 1, trainer=trainer, options=options, checkpoint=str(checkpoint("wide")))
    assert found["repeats"]
    assert found["gradient"] <= 2e-2, found["gradient"]


def test_an_importable_transformer_engine_changes_no_bit(pool, checkpoint, tmp_path, monkeypatch):
    """megatron's own layers and torch's AdamW, asked for where Transformer Engine can be imported and where it cannot."""
    if ON_GPU:
        pytest.skip("there the library is installed, and two processes have it alike")
    monkeypatch.delenv("SEMION_TE_STAND_IN")
    bare = WorkerPool()
    found = []
    for workers, kind in ((pool, "with"), (bare, "without")):
        (tmp_path / kind).mkdir()
        found.append(trained(workers, checkpoint("plain"), tmp_path / kind, {"distributed_optimizer": True}, BF16))
    bare.close()
    (metrics, tensors), (wanted_metrics, wanted) = found
    assert metrics == wanted_metrics and tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], value) for name, value in wanted.items())
