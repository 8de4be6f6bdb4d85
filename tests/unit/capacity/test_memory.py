"""The estimate of memory where no CPU run can show it: FP8, moments and offloading by hand, turns on one GPU, and properties
that any layout must have. What torch really allocates is compared in tests/parallel/test_memory.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.bridge import setup as opening
from engine.bridge.plan import plan
from engine.bridge.shard_plan import ShardPlan
from engine.bridge.transports.registry import kind_of
from engine.capacity.dealing import dealt_bytes
from engine.capacity.kv_cache import kv_bytes_per_token
from engine.capacity.memory import ASLEEP, GIB, TRANSIENT, Channel, Memory, Step, TrainerState, estimate, foreign_contexts
from engine.capacity.transfer import Machine, channel, opened, plan_run
from engine.config import options
from engine.config.load import RunConfig, load_config
from engine.megatron.dealing import deal_step
from engine.megatron.outlines import outlines_of
from engine.megatron.scatter import encode
from engine.models.base import ModelShape
from engine.models.config_file import read_shape
from engine.models.sharding import EngineLayout, TrainerLayout, trainer_layout
from engine.ops import lm_head
from engine.ops import swiglu as plain_or_fused
from engine.run.spec import Spec, settled
from tests.builders import spec
from tests.rollouts import make_sequence

ROOT = Path(__file__).parents[3]
LLAMA_8B = read_shape(ROOT / "configs" / "models" / "llama-3.1-8b")
PARAMETERS = 8_030_261_248
VOCABULARY, MATRICES = 2 * 128256 * 4096, PARAMETERS - 2 * 128256 * 4096 - 65 * 4096
SMALL = ModelShape(4, 8, 4, 2, 2, 12, 100, 1e4, None, 1e-5, False, 16)


def configured(name: str = "8b-4x4", *overrides: str) -> RunConfig:
    return load_config(ROOT / "configs" / "scale" / f"llama-3.1-{name}.toml", list(overrides))


def spec_of(name: str, *overrides: str) -> Spec:
    return spec(configured(name, *overrides), LLAMA_8B)


def of_8b(*overrides: str) -> Memory:
    return estimate(spec_of("8b-4x4", *overrides), Channel())


def test_an_8b_trainer_rank_by_hand():
    """bf16 on four data-parallel ranks: 2 bytes, a reference, fp32 gradients, and a quarter of 12 bytes."""
    trainer = of_8b().devices[0].components
    assert (trainer["weights"], trainer["reference"], trainer["gradients"]) == (2 * PARAMETERS, 2 * PARAMETERS, 4 * PARAMETERS)
    assert trainer["optimizer"] == 3 * PARAMETERS
    assert trainer["FP8 copies"] == 0
    assert trainer["logits"] == 2 * 6144 * 128256


@pytest.mark.parametrize(
    ("overrides", "on_device", "on_host"),
    [
        (["optimizer.moment_dtype=bfloat16"], 2 + 4, 0),
        (["optimizer.moment_dtype=fp8"], 2 + 2, 0),
        (["optimizer.offload_share=1.0"], 0, 16),
        (["optimizer.offload_share=0.5"], 6, 8),
    ],
)
def test_bytes_of_the_optimizer_by_its_options(overrides, on_device, on_host):
    """Of every parameter of a rank's quarter; a node has four trainer ranks."""
    held = of_8b(*overrides)
    assert held.devices[0].components["optimizer"] == pytest.approx(on_device * PARAMETERS / 4)
    assert held.host_bytes_per_node == pytest.approx(on_host * PARAMETERS)


def test_gradients_in_bfloat16_are_half_and_are_widened_for_the_update():
    """Where recomputation leaves little else: 4 bytes of each of a rank's quarter."""
    held = of_8b("trainer.gradient_dtype=bfloat16", "trainer.recompute=true", "trainer.fused_lm_head=true").devices[0]
    assert held.components["gradients"] == 2 * PARAMETERS
    assert held.components["workspace"] >= PARAMETERS


def test_a_reference_in_the_hosts_memory_is_on_the_device_only_while_it_scores():
    """Of a node's four ranks each has its own on the host; a step's fullest moment is then the backward or the scoring."""
    here, there = of_8b(), of_8b("trainer.reference_memory=host")
    first, second = here.devices[0].components, there.devices[0].components
    assert (first["reference"], second["reference"]) == (2 * PARAMETERS, 0)
    assert there.host_bytes_per_node == here.host_bytes_per_node + 4 * 2 * PARAMETERS
    saved = here.devices[0].num_bytes - there.devices[0].num_bytes
    assert saved == 2 * PARAMETERS, "the backward is the fullest moment either way"
    lean = "trainer.recompute=true", "trainer.fused_lm_head=true", "trainer.reference_memory=host"
    assert of_8b(*lean).devices[0].components["workspace"] >= 2 * PARAMETERS


def test_fp8_adds_copies_of_the_layers_matrices_and_shrinks_what_products_save():
    plain, fp8 = of_8b().devices[0].components, of_8b("trainer.fp8=current").devices[0].components
    assert fp8["FP8 copies"] == 2 * MATRICES
    assert 0.8 * plain["activations"] < fp8["activations"] < plain["activations"]


@pytest.mark.parametrize(("moments", "each"), [("float32", 12), ("bfloat16", 8)])
def test_fp8_parameters_are_a_byte_in_each_direction_and_keep_whole_fp32_weights(moments: str, each: int):
    """The layers' matrices here and in the reference; the optimizer's quarter has all four bytes of its weights."""
    options = ("trainer.fp8=blockwise", "trainer.fp8_parameters=true", f"optimizer.moment_dtype={moments}")
    trainer = of_8b(*options).devices[0].components
    assert trainer["weights"] == trainer["reference"] == 2 * PARAMETERS - MATRICES
    assert trainer["FP8 copies"] == MATRICES
    assert trainer["optimizer"] == each * PARAMETERS / 4


@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
def test_the_feed_forward_keeps_what_is_counted(layers: str):
    """What autograd saves of both forms of SwiGLU, and the product for the next linear layer. The fused form gives the same."""
    from engine.megatron.build import megatron_config

    width, config = 12, configured("8b-4x4", f"trainer.layers={layers}")
    trainer = settled(config, on_gpus=False).trainer
    fused = megatron_config(LLAMA_8B, trainer_layout(trainer), trainer, torch.bfloat16).bias_activation_fusion
    assert fused == (layers == "transformer_engine")
    both = torch.randn(config.trainer.microbatch_tokens, 2 * width, generator=torch.Generator().manual_seed(1)).requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.compiler.set_stance("force_eager"):
        product = swiglu(both, fused)
    with torch.compiler.set_stance("force_eager"):
        product.backward(torch.ones_like(product))
    again = both.detach().clone().requires_grad_()
    plain = F.silu(again[:, :width]) * again[:, width:]
    plain.backward(torch.ones_like(plain))
    torch.testing.assert_close(product, plain)
    torch.testing.assert_close(both.grad, again.grad)
    step = Step(spec(config, replace(LLAMA_8B, ffn_hidden=width)), 0)
    assert sum(kept.values()) + product.nbytes == 2 * step._feed_forward  # counted in bfloat16, kept here in float32


def swiglu(both: torch.Tensor, fused: bool) -> torch.Tensor:
    """Of gate and up beside each other: megatron-core's one function, or ours where it has no kernel, as on a GPU."""
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    if fused:
        return bias_swiglu_impl(both, None)
    with patch("engine.ops.activation.FUSED", ()):
        return plain_or_fused(both)


@pytest.mark.parametrize("moments", ["bfloat16", "fp8"])
def test_narrow_moments_are_widened_for_the_update(moments: str):
    """8 bytes of each of a rank's quarter, where recomputation leaves little else."""
    held = of_8b(f"optimizer.moment_dtype={moments}", "trainer.recompute=true", "trainer.fused_lm_head=true")
    assert held.devices[0].components["workspace"] == 2 * PARAMETERS


def test_torchs_own_adamw_makes_nothing_for_its_update():
    """It is one pass: where recomputation leaves little else, a step takes what it does with Transformer Engine's."""
    options = ("trainer.recompute=true", "trainer.fused_lm_head=true")
    ours, theirs = (of_8b(f"optimizer.implementation={name}", *options).devices[0].components for name in ("torch", "te"))
    assert ours["workspace"] == theirs["workspace"] < PARAMETERS


def test_an_offline_run_that_evaluates_keeps_the_seed_too():
    """A reference that moves is a further copy; one that never does is the seed itself."""
    offline = ("sync.sync_interval=never", "data.held_out=x.jsonl", "evaluation.every=10")
    assert of_8b(*offline, "sync.reference=100").devices[0].components["reference"] == 4 * PARAMETERS
    assert of_8b(*offline, "sync.reference=never").devices[0].components["reference"] == 2 * PARAMETERS


def test_colocated_devices_take_turns():
    """Training: the engine keeps its context and graphs. Sampling: the trainer keeps all but the step's own tensors and its
    gradients, of which what exceeds optimizer and reference counts, for they are made before those when a run starts."""
    training, sampling = estimate(spec_of("8b-colocated"), Channel(GIB, GIB)).devices
    apart = estimate(spec_of("8b-colocated", "inference.placement=disaggregated"), Channel(GIB, GIB))
    trainer, engine = (device.components for device in apart.devices)
    assert training.components == trainer | {name: engine[name] for name in ASLEEP}
    kept = {name: size for name, size in trainer.items() if name not in TRANSIENT} | engine
    assert kept["gradients"] == 4 * PARAMETERS
    assert not trainer["reference"], "the policy's own log-probs are the reference's"
    left = 4 * PARAMETERS - trainer["optimizer"]
    assert sampling.components == kept | {"gradients": left} and 0 < left < 4 * PARAMETERS
    narrow = estimate(spec_of("8b-colocated", "trainer.gradient_dtype=bfloat16"), Channel(GIB, GIB)).devices[1]
    assert narrow.components["gradients"] == max(0, left - 2 * PARAMETERS)
    assert "engine: KV cache" not in training.components and "activations" not in sampling.components


def test_an_optimizer_that_waits_on_the_host_has_no_memory_while_engines_sample():
    """Two ranks share 12 bytes a parameter. Of their 6 the 2 of fp32 weights are there for a moment when a run starts, and the
    gradients' 4 before, of which 4 count then and none otherwise. On the host each of a node's eight ranks has its 6."""
    layout = "trainer.tensor_parallel=4", "trainer.data_parallel=2"
    here, there = (
        estimate(spec_of("8b-colocated", *layout, f"optimizer.memory_while_sampling={where}"), Channel())
        for where in ("device", "host")
    )
    assert here.devices[0] == there.devices[0], "the state is there for the update"
    sampling = here.devices[1].components
    gradients, state = here.devices[0].components["gradients"], sampling["optimizer"]
    assert (gradients / 4, sampling["gradients"]) == (pytest.approx(state / 6), 0)
    assert there.devices[1].components == sampling | {"optimizer": 0, "gradients": gradients}
    assert there.host_bytes_per_node == here.host_bytes_per_node + 8 * state
    alone = spec_of("8b-colocated", *layout, "optimizer.memory_while_sampling=host", "sft.checkpoint_out=x")
    assert TrainerState(alone, 0).host_bytes == 0, "no engine is there for whom it would go"


@pytest.mark.parametrize("overrides", [["sft.checkpoint_out=x"], ["data.replay=x.jsonl", "sync.sync_interval=never"]])
def test_a_run_that_samples_nothing_has_no_engine(overrides):
    assert [device.name for device in of_8b(*overrides, "sync.reference=never").devices] == ["trainer rank, training"]


def test_an_engine_rank_has_its_part_of_the_weights_and_a_whole_kv_cache():
    """vLLM's kv_cache_memory_bytes is of each rank."""
    one, two = (of_8b(f"inference.tensor_parallel={ranks}").devices[1].components for ranks in (1, 2))
    assert one["engine: weights"] == 2 * PARAMETERS
    assert two["engine: weights"] == pytest.approx(PARAMETERS, rel=1e-3)
    assert one["engine: KV cache"] == two["engine: KV cache"] == 96 * GIB


def test_a_wider_output_layer_is_counted_as_a_copy_of_each_engine_rank():
    """Made by vLLM for every product where the device cannot widen within it."""
    options = "model.head=float32", "inference.packed_weights=false", "trainer.fused_lm_head=true"
    one, two = (of_8b(f"inference.tensor_parallel={ranks}", *options).devices[1].components for ranks in (1, 2))
    assert one["engine: float32 head"] == 2 * two["engine: float32 head"] >= 4 * 4096 * 128256
    assert "engine: float32 head" not in of_8b().devices[1].components


def test_fp8_weights_of_an_engine_by_hand():
    """8B: 32 layers of 218 million elements a byte each, 40,960 rows with a scale of 4; the rest in bfloat16 as before."""
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    rows = (4096 + 2 * 1024) + 4096 + 2 * 14336 + 4096
    plain, fp8 = (of_8b(*more).devices[1].components for more in ((), ("inference.quantization=fp8",)))
    assert fp8["engine: weights"] == plain["engine: weights"] - 32 * (layer - 4 * rows)
    assert fp8["engine: FP8 staging"] == (512 << 20) + 2 * layer + (512 << 20)
    others = set(plain) - {"engine: weights"}
    assert {name: fp8[name] for name in others} == {name: plain[name] for name in others}
    loading = of_8b("inference.quantization=fp8").devices[2]
    assert loading.name == "engine rank, loading" and loading.components["engine: loaded weights"] == 2 * PARAMETERS
    assert loading.components["engine: weights"] == fp8["engine: weights"]
    two = of_8b("inference.quantization=fp8", "inference.tensor_parallel=2").devices[1].components
    assert two["engine: weights"] == pytest.approx(fp8["engine: weights"] / 2, rel=1e-3)


JUDGED = ("data.reward=model", "reward_model.path=rm", "reward_model.dtype=bfloat16")


def test_the_reward_models_engine_by_hand():
    """8B in bf16: no output layer, a head of 4096 float32; a forward of 8192 tokens, or of the longest conversation."""
    apart, colocated = (
        estimate(spec(configured(name, *JUDGED), LLAMA_8B, reward_shape=LLAMA_8B), Channel(GIB, GIB))
        for name in ("8b-4x4", "8b-colocated")
    )
    assert [device.name for device in apart.devices] == ["trainer rank, training", "engine rank", "reward engine"]
    assert [device.name for device in colocated.devices[1:]] == ["trainer rank, sampling", "reward engine"]
    assert colocated.devices[2] == apart.devices[2], "it stands alone either way, and no weight sync stages anything there"
    assert apart.devices[2].components == {
        "engine: weights": 2 * (PARAMETERS - 128256 * 4096) + 4 * 4096,
        "engine: KV cache": (2 * 8192 + 32) * 128 << 10,
        "engine: forward": 8192 * (4 * 4096 + 3 * 14336) * 2,
        "engine: CUDA graphs": GIB,
        "engine: context": GIB,
    }
    longer = configured("8b-4x4", *JUDGED, "reward_model.max_tokens=16384", "reward_model.kv_cache=128 GiB")
    held = estimate(spec(longer, LLAMA_8B, reward_shape=LLAMA_8B), Channel())
    assert held.devices[2].components["engine: forward"] == 2 * apart.devices[2].components["engine: forward"]
    assert held.fullest == held.devices[2], "it can be what does not fit"


def test_ranks_of_a_reward_models_engine_share_its_weights_and_cache():
    judged = (*JUDGED, "reward_model.tensor_parallel=2")
    one, two = (
        estimate(spec(configured("8b-4x4", *options), LLAMA_8B, reward_shape=LLAMA_8B), Channel()).devices[2].components
        for options in (JUDGED, judged)
    )
    assert two["engine: weights"] == pytest.approx(one["engine: weights"] / 2, rel=1e-3)
    assert two["engine: KV cache"] == one["engine: KV cache"] / 2
    assert two["engine: context"] == one["engine: context"] + 2 * GIB, "NCCL's buffers"


def test_without_its_sizes_or_without_samples_there_is_no_reward_engine():
    assert len(estimate(spec_of("8b-4x4", *JUDGED), Channel()).devices) == 2
    supervised = configured("8b-4x4", *JUDGED, "sft.checkpoint_out=x")
    assert len(estimate(spec(supervised, LLAMA_8B, reward_shape=LLAMA_8B), Channel()).devices) == 1


def test_the_channel_has_two_buckets():
    """Of at most 1000 bytes."""
    made = plan(SMALL, 4, TrainerLayout(2, 2), 2, EngineLayout(2), ((0, 1), (2,)), 1000)
    staged = channel(made)
    largest = max(message.bucket.num_bytes for message in made.messages if message.bucket.packed)
    assert staged.trainer_bytes == staged.engine_bytes == 2 * largest <= 2000


@pytest.mark.parametrize(
    ("tensor", "pipeline", "engine_tensor", "most", "planned"),
    [
        (1, 1, 1, 0, 0),  # DP 8: all that an engine needs is on its own GPU
        (2, 1, 1, 4, 4),  # the four engines that have the other shard beside them
        (1, 2, 1, 4, 1),  # the same, but each stage's buckets come from one replica
        (4, 1, 1, 6, 3),
        (2, 1, 2, 0, 0),  # each rank of an engine has the shard that it needs
        (1, 1, 2, 1, 0),
        (4, 1, 2, 3, 2),  # a rank needs two shards of four, of which it has one at most
    ],
)
def test_engines_that_open_memory_on_a_gpu_have_a_context_there(
    tensor: int, pipeline: int, engine_tensor: int, most: int, planned: int
):
    """Eight GPUs, engines on all of them; counted again over the messages of the plan."""
    overrides = [
        f"trainer.data_parallel={8 // tensor // pipeline}",
        f"trainer.tensor_parallel={tensor}",
        f"trainer.pipeline_parallel={pipeline}",
        f"inference.engines={8 // engine_tensor}",
        f"inference.tensor_parallel={engine_tensor}",
    ]
    resolved = spec_of("8b-colocated", *overrides)
    made, placement = planned_messages(resolved), resolved.placement
    assert placement is not None
    pairs = set()
    for message in made.messages:
        assert len(message.path) == 1, "each reads by itself"
        own = placement.engines[message.path[0]].gpus[message.bucket.target]
        pairs.add((own, *placement.ranks[message.source].gpus))  # no two engine ranks share a GPU
    on_each = Counter(there for own, there in pairs if own != there)
    assert max(on_each.values(), default=0) == opened(made, placement) == planned
    assert foreign_contexts(resolved) == most
    for known, wanted in ((None, most), (planned, planned)):
        components = [device.components for device in estimate(resolved, Channel(contexts=known)).devices]
        assert [found["other engines: contexts"] for found in components] == [wanted * GIB] * 2, "awake and asleep"
    figures = plan_run(resolved, Machine())["memory"]["devices"]
    assert [device["components"]["other engines: contexts"] for device in figures] == [planned * GIB] * 2
    apart = spec_of("8b-colocated", *overrides, "inference.placement=disaggregated", "cluster.nodes=2", "sync.transport=auto")
    assert foreign_contexts(apart) == 0


def planned_messages(resolved: Spec) -> ShardPlan:
    """The plan of a run's weight syncs on GPUs."""
    config = resolved.config
    nodes, senders = opening.channel([0] * config.inference.engines, kind_of("ipc"), resolved.colocation)
    dp_size, bucket_bytes = config.trainer.data_parallel, config.sync.bucket_mebibytes << 20
    return plan(resolved.shape, 2, resolved.trainer, dp_size, resolved.engine, nodes, bucket_bytes, senders)


@pytest.mark.parametrize("shares", [True, False])
def test_what_rank_0_deals_is_counted_as_it_is_sent(shares: bool):
    """By hand: of 12 prompts of 100 tokens each of four replicas has three, with 2 answers of 60 tokens: 6 * (60 * 8 + 128) and
    3 * 100 * 4 bytes, and where rows share no prompts 6 * 100 * 4, of which rank 0 holds five. No more is really sent."""
    sizes = [
        "data.prompts_per_step=12",
        "algorithm.samples_per_prompt=2",
        "sampling.max_tokens=60",
        "data.max_prompt_tokens=100",
    ]
    layout = [f"trainer.share_prompts={str(shares).lower()}", "trainer.layers=local", "trainer.data_parallel=4"]
    resolved = spec_of("8b-4x4", *sizes, *layout)
    share = 6 * (60 * 8 + 128) + (3 if shares else 6) * 100 * 4
    assert dealt_bytes(resolved, on_rank_zero=True) == 5 * share
    assert dealt_bytes(resolved, on_rank_zero=False) == share
    made = [
        make_sequence(tuple(range(prompt, prompt + 100)), tuple(range(60)), (0.5,) * 60, group=prompt)
        for prompt in range(12)
        for _ in range(2)
    ]
    shares_of_step = deal_step(outlines_of(made), step=0, num_prompts=12, trainer=resolved.config.trainer)
    sent = [len(encode(one, made)) for one in shares_of_step]
    assert 0.7 * share < max(sent) <= share


def test_a_step_of_which_much_is_dealt_is_fullest_then():
    """2**19 prompts with 8 answers of up to 2048 tokens. Of usual steps it is a thousandth of what a microbatch takes."""
    few, many = (of_8b(f"data.prompts_per_step={prompts}").devices[0].components for prompts in (64, 1 << 19))
    dealt = dealt_bytes(spec_of("8b-4x4", f"data.prompts_per_step={1 << 19}"), on_rank_zero=True)
    assert many["workspace"] == dealt > sum(few[name] for name in TRANSIENT)
    assert not any(many[name] for name in TRANSIENT if name != "workspace")
    assert sum(few[name] for name in TRANSIENT) > 100 * dealt_bytes(spec_of("8b-4x4"), on_rank_zero=True)
    alone = spec_of(
        "8b-4x4", "trainer.data_parallel=1", "trainer.overlap_gradients=false", "trainer.distributed_optimizer=false"
    )
    assert dealt_bytes(alone, on_rank_zero=True) == 0
    supervised = spec_of("8b-4x4", "sft.checkpoint_out=x", "sft.sequences_per_step=10")
    row = supervised.config.trainer.microbatch_tokens
    assert dealt_bytes(supervised, on_rank_zero=True) == 5 * 3 * (4 * row + 128)  # of four replicas one has three of ten


def test_the_head_is_counted_in_the_operators_own_chunks(monkeypatch):
    """F2: how many rows stands in one file: on a GPU as many as a gibibyte holds. With half the bytes, a third of the row."""
    fused = ("trainer.fused_lm_head=true", "trainer.recompute=true")
    before = Step(spec_of("8b-4x4", *fused), 0)._head[0]
    assert before == 3072 * 128256 * 2  # half of the row's 6144 tokens
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", lm_head.CHUNK_BYTES // 2)
    assert Step(spec_of("8b-4x4", *fused), 0)._head[0] == 2048 * 128256 * 2


COLOCATED = ("sync.sync_interval=never", "sync.reference=100")
NO_REFERENCE = ("algorithm.loss=grpo", "algorithm.kl_weight=0", "sync.sync_interval=never", "sync.reference=never")


@pytest.mark.parametrize(
    ("overrides", "copies"),
    [
        (COLOCATED, ("reference", "seed")),
        ((*COLOCATED[:1], "sync.reference=never"), ("reference",)),
        (NO_REFERENCE, ("seed",)),
        (("sync.sync_interval=2", "checkpoint.every=2"), ("reference",)),
        ((), ()),  # online, the reference that follows is the policy itself
    ],
)
def test_a_colocated_run_counts_the_seed_that_its_policy_keeps(overrides, copies):
    """F2: offline, engines that slept before the next chunk are given the seed's weights again."""
    resolved = spec_of("8b-colocated", *overrides)
    assert resolved.copies == copies
    held = TrainerState(resolved, 0)
    assert held.copies == len(copies) * held.weights
    assert estimate(resolved, Channel()).devices[0].components["reference"] == len(copies) * 2 * PARAMETERS


def test_a_forward_of_an_engine_is_counted_as_the_engine_is_told(monkeypatch):
    """F2: max_num_batched_tokens stands in one place."""
    before = of_8b().devices[1].components["engine: forward"]
    monkeypatch.setattr(options, "BATCHED_TOKENS", 2 * options.BATCHED_TOKENS)
    assert of_8b().devices[1].components["engine: forward"] == 2 * before


def test_the_kv_cache_of_a_token():
    """8B in bf16: keys and values of 8 heads of 128 in 32 layers are 128 KiB; more ranks than heads hold one each."""
    assert kv_bytes_per_token(LLAMA_8B, 1, "bfloat16") == 128 << 10
    assert kv_bytes_per_token(LLAMA_8B, 8, "bfloat16") == kv_bytes_per_token(LLAMA_8B, 16, "bfloat16") == 16 << 10


LAYOUTS = st.fixed_dictionaries(
    {
        "tensor_parallel": st.sampled_from([1, 2, 4, 8]),
        "pipeline_parallel": st.sampled_from([1, 2, 4]),
        "data_parallel": st.sampled_from([1, 4]),
        "recompute": st.booleans(),
        "fused_lm_head": st.booleans(),
        "microbatch_tokens": st.sampled_from([4096, 8192]),
        "layers": st.sampled_from(["local", "transformer_engine"]),
    }
)


@settings(max_examples=60, deadline=None)
@given(LAYOUTS)
def test_any_layout_holds_the_model_once_and_less_of_it_takes_less(axes: dict[str, Any]):
    """Stages add up to the model on every tensor rank; recomputing, fewer tokens and more stages never take more."""

    def configured_with(**changes: Any) -> RunConfig:
        base = configured("8b-4x4", "inference.max_model_tokens=3072")
        return base.model_copy(update={"trainer": base.trainer.model_copy(update=axes | changes)})

    def step_of(stage: int, **changes: Any) -> Step:
        return Step(spec(configured_with(**changes), LLAMA_8B), stage)

    config = spec(configured_with(), LLAMA_8B)
    stages = range(axes["pipeline_parallel"])
    held = sum(TrainerState(config, stage).num_parameters for stage in stages) * axes["tensor_parallel"]
    assert PARAMETERS <= held <= 1.001 * PARAMETERS
    whole, again = (sum(step_of(0, recompute=recompute).fullest.values()) for recompute in (False, True))
    assert 0 < again < whole
    fewer = step_of(0, microbatch_tokens=axes["microbatch_tokens"] // 2)
    assert sum(fewer.fullest.values()) <= sum(step_of(0).fullest.values())
    in_flight = [step_of(stage).in_flight for stage in stages]
    assert in_flight == sorted(in_flight, reverse=True) and in_flight[-1] == 1


UNFUSED, FUSED = "trainer.fuse_gradient_accumulation=false", "trainer.fuse_gradient_accumulation=true"
NOT_HEAD = ("trainer.fused_lm_head=false",)


def test_what_stands_for_gradients_that_products_add_is_counted() -> None:
    """One bf16 tensor for each shape of a linear layer, kept, and of the output layer unless it has logits a few at a time."""
    layer = 2 * 4096 * (6144 + 4096 + 3 * 14336)
    for fused_head, head in ((False, VOCABULARY // 2 * 2), (True, 0)):
        asked = f"trainer.fused_lm_head={str(fused_head).lower()}"
        plain, fused = (Step(spec_of("8b-4x4", asked, fuses), 0) for fuses in (UNFUSED, FUSED))
        assert (plain.stand_ins, fused.stand_ins) == (0, layer + head)
    assert Step(spec_of("8b-4x4", FUSED), 0, on_gpu=False).stand_ins == 0, "freed at once there, as a gradient is"


def test_what_stands_for_gradients_stays_while_engines_sample() -> None:
    """Nothing frees it: both turns hold it, and a KV cache that takes what is left has so much less."""
    kept = 2 * (4096 * (6144 + 4096 + 3 * 14336) + 128256 * 4096)
    plain, fused = (spec_of("8b-colocated", *NOT_HEAD, asked) for asked in (UNFUSED, FUSED))
    for device in estimate(fused, Channel()).devices:
        assert device.components["gradient stand-ins"] == kept
    assert not any(device.components["gradient stand-ins"] for device in estimate(plain, Channel()).devices)
    assert fused.kv_cache is not None and plain.kv_cache is not None
    assert fused.kv_cache.beside_bytes - plain.kv_cache.beside_bytes == kept


def test_a_layers_backward_makes_no_gradient_of_a_weight_that_its_product_adds() -> None:
    """Of rows so short that without it the gradient of gate and up is the most that it makes: then 2F x H, and [T, F] of gate
    less one for the product that is gone; with it the feed-forward's product and factors, 2 [T, F]."""
    tokens, ffn, hidden = 1024, 14336, 4096

    def backward(asked: str) -> int:
        base = configured("8b-4x4", asked)
        short = base.model_copy(update={"trainer": base.trainer.model_copy(update={"microbatch_tokens": tokens})})
        return Step(spec(short, LLAMA_8B), 0)._layer_backward

    assert backward(UNFUSED) == 2 * (tokens * hidden + 2 * ffn * hidden - tokens * ffn)
    assert backward(FUSED) == 2 * (tokens * hidden + 2 * tokens * ffn)
