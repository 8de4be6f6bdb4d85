"""Which models of vLLM have their layers computed by ours: those of which everything is known, and no others. What ours then
compute is in tests/unit/ops/test_cached_attention.py, and beside vLLM's own layers in tests/e2e/test_engine_options.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP, LlamaModel
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from engine.inference import cpu_decoder
from engine.inference.cpu_decoder import KernelDecoder, is_known
from engine.inference.cpu_layers import KernelRMSNorm, KernelSiluAndMul
from engine.ops import linear
from tests import reference_ops

H, N, M, D, F, T = 48, 4, 2, 32, 40, 5
NAME = "model.layers.0.self_attn.attn"


def made(kind: Any, **fields: Any) -> Any:
    """An object of vLLM's class with these fields, made without a configuration of vLLM's."""
    one = kind.__new__(kind)
    if isinstance(one, torch.nn.Module):
        torch.nn.Module.__init__(one)
    for name, value in fields.items():
        object.__setattr__(one, name, value)
    return one


def product(rows: int, columns: int) -> SimpleNamespace:
    method = made(UnquantizedLinearMethod)
    weight = torch.nn.Parameter(torch.randn(rows, columns) / columns**0.5, requires_grad=False)
    return SimpleNamespace(quant_method=method, cpu_linear=linear, tp_size=1, bias=None, weight=weight)


def norm() -> KernelRMSNorm:
    return made(KernelRMSNorm, weight=torch.nn.Parameter(torch.rand(H), requires_grad=False), variance_epsilon=1e-5)


@pytest.fixture
def model() -> Any:
    """A Llama of one layer, with the parts that count."""
    torch.manual_seed(0)
    fields = {"num_heads": N, "num_kv_heads": M, "head_size": D, "scale": D**-0.5, "attn_type": "decoder", "isa": "vec"}
    fields |= {"kv_sharing_target_layer_name": None, "alibi_slopes": None, "sliding_window": -1, "logits_soft_cap": 0}
    kernel = made(CPUAttentionBackendImpl, sinks=None, **fields)
    attn = SimpleNamespace(impl=kernel, layer_name=NAME, query_quant=None, kv_cache=torch.zeros(4, M, 32, 2 * D))
    angles = torch.randn(64, D)
    rotation = made(RotaryEmbedding, is_neox_style=True, rotary_dim=D, head_size=D, cos_sin_cache=angles)
    attention = made(LlamaAttention, attn=attn, rotary_emb=rotation, qkv_proj=product((N + 2 * M) * D, H))
    object.__setattr__(attention, "o_proj", product(H, N * D))
    mlp = made(LlamaMLP, gate_up_proj=product(2 * F, H), down_proj=product(H, F), act_fn=made(KernelSiluAndMul))
    norms = {"input_layernorm": norm(), "post_attention_layernorm": norm()}
    layer = made(LlamaDecoderLayer, self_attn=attention, mlp=mlp, **norms)
    embedding = torch.randn(10, H)
    inner = made(
        LlamaModel, layers=[layer], norm=norm(), aux_hidden_state_layers=(), embed_input_ids=lambda ids: embedding[ids]
    )
    object.__setattr__(inner, "forward", lambda *given, **options: ("vLLM's", given))
    return made(LlamaForCausalLM, model=inner)


UNKNOWN: dict[str, tuple[str, Any]] = {
    "another model": ("model", SimpleNamespace()),
    "hidden states of layers": ("model.aux_hidden_state_layers", (1,)),
    "another layer": ("model.layers", [SimpleNamespace()]),
    "another last norm": ("model.norm", SimpleNamespace()),
    "another norm": ("layer.input_layernorm", SimpleNamespace()),
    "another epsilon": ("layer.post_attention_layernorm.variance_epsilon", 1e-6),
    "another activation": ("layer.mlp.act_fn", SimpleNamespace()),
    "a bias": ("layer.self_attn.qkv_proj.bias", torch.zeros(3)),
    "packed weights": ("layer.mlp.down_proj.cpu_linear", torch.nn.functional.linear),
    "half precision": ("layer.mlp.down_proj.weight", torch.zeros(H, F, dtype=torch.bfloat16)),
    "quantized weights": ("layer.self_attn.o_proj.quant_method", SimpleNamespace()),
    "tensor parallel": ("layer.self_attn.o_proj.tp_size", 2),
    "another rotation": ("layer.self_attn.rotary_emb", SimpleNamespace()),
    "neighbours turned": ("layer.self_attn.rotary_emb.is_neox_style", False),
    "part of a head turned": ("layer.self_attn.rotary_emb.rotary_dim", 16),
    "a window": ("layer.self_attn.attn.impl.sliding_window", 128),
    "capped scores": ("layer.self_attn.attn.impl.logits_soft_cap", 30.0),
    "slopes": ("layer.self_attn.attn.impl.alibi_slopes", torch.ones(N)),
    "sinks": ("layer.self_attn.attn.impl.sinks", torch.ones(N)),
    "a shared cache": ("layer.self_attn.attn.impl.kv_sharing_target_layer_name", "model.layers.1"),
    "no causal attention": ("layer.self_attn.attn.impl.attn_type", "encoder"),
    "another form of cache": ("layer.self_attn.attn.impl.isa", "vec16"),
    "another kernel": ("layer.self_attn.attn.impl", SimpleNamespace(head_size=D)),
    "a cache in bytes": ("layer.self_attn.attn.kv_cache", torch.zeros(4, M, 32, 2 * D, dtype=torch.uint8)),
    "another block": ("layer.self_attn.attn.kv_cache", torch.zeros(4, M, 16, 2 * D)),
}


@pytest.mark.parametrize(("path", "value"), UNKNOWN.values(), ids=list(UNKNOWN))
def test_what_is_not_known_is_left_alone(model: Any, path: str, value: Any) -> None:
    assert is_known(model)
    *owners, name = path.split(".")
    owner = model
    for one in owners:
        owner = owner.model.layers[0] if one == "layer" else getattr(owner, one)
    object.__setattr__(owner, name, value)
    assert not is_known(model) and not cpu_decoder.replace(model)
    assert not isinstance(getattr(model.model, "forward", None), KernelDecoder)


def context(**fields: Any) -> SimpleNamespace:
    """vLLM's, of two requests with 2 and 3 new tokens, the second with 4 cached already."""
    found = {
        "num_actual_tokens": T,
        "max_query_len": 3,
        "query_start_loc": torch.tensor([0, 2, 5], dtype=torch.int32),
        "max_seq_len": 7,
        "seq_lens": torch.tensor([2, 7], dtype=torch.int32),
        "block_table": torch.tensor([[3], [1]], dtype=torch.int32),
        "slot_mapping": torch.tensor([96, 97, 36, 37, 38]),
        "scheduler_metadata": None,
    }
    return SimpleNamespace(attn_metadata={NAME: CPUAttentionMetadata(**(found | fields))})


POSITIONS = torch.tensor([0, 1, 4, 5, 6])


def test_it_is_the_layer_s_definition(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = model.model.layers[0]
    cache = layer.self_attn.attn.kv_cache
    earlier = torch.randn(2, 4, M, D)
    for position in range(4):
        keys, values = (
            part.unflatten(-1, form) for part, form in zip(cache.flatten(2).chunk(2, -1), ((D, 32), (32, D)), strict=True)
        )
        keys[1, :, :, position], values[1, :, position] = earlier[0, position], earlier[1, position]
    monkeypatch.setattr(cpu_decoder, "get_forward_context", context)
    assert cpu_decoder.told(model) == "vLLM's"
    assert cpu_decoder.replace(model) and cpu_decoder.replace(model) and cpu_decoder.told(model) == "KernelDecoder"
    ids = torch.tensor([1, 2, 3, 4, 5])
    with torch.inference_mode():
        found = model.model.forward(ids, POSITIONS)
    assert model.model.forward.num_passes == 1

    hidden = model.model.embed_input_ids(ids).double()
    weights = {name: part.weight.double() for name, part in vars(layer.self_attn).items() if name.endswith("proj")}
    qkv = reference_ops.rms_norm(hidden, layer.input_layernorm.weight.double(), 1e-5) @ weights["qkv_proj"].t()
    angles, none = layer.self_attn.rotary_emb.cos_sin_cache.double(), torch.zeros(2, 0, M, D).double()
    attended = [
        reference_ops.cached_attention(qkv[rows], POSITIONS[rows], angles, before[0], before[1], D**-0.5)
        for rows, before in ((slice(0, 2), none), (slice(2, 5), earlier.double()))
    ]
    hidden = hidden + torch.cat(attended) @ weights["o_proj"].t()
    normed = reference_ops.rms_norm(hidden, layer.post_attention_layernorm.weight.double(), 1e-5)
    inner = reference_ops.swiglu(normed @ layer.mlp.gate_up_proj.weight.double().t())
    hidden = hidden + inner @ layer.mlp.down_proj.weight.double().t()
    wanted = reference_ops.rms_norm(hidden, model.model.norm.weight.double(), 1e-5)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [{"causal": False}, {"dynamic_causal": torch.ones(2)}, {"num_actual_tokens": 4}],
    ids=["not causal", "by row", "padded"],
)
def test_other_attention_is_vllm_s(model: Any, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]) -> None:
    monkeypatch.setattr(cpu_decoder, "get_forward_context", lambda: context(**fields))
    assert cpu_decoder.replace(model)
    assert model.model.forward(torch.arange(T), POSITIONS)[0] == "vLLM's" and model.model.forward.num_passes == 0


def test_passes_of_another_kind_are_vllm_s(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_decoder.replace(model)
    forward, ids = model.model.forward, torch.arange(T)
    monkeypatch.setattr(cpu_decoder, "get_forward_context", context)
    given = object()
    assert forward(ids, POSITIONS, given) == ("vLLM's", (ids, POSITIONS, given, None))
    assert forward(None, POSITIONS, None, given)[0] == "vLLM's"
    many = torch.zeros(cpu_decoder.MOST_ROWS + 1, dtype=torch.int64)
    monkeypatch.setattr(cpu_decoder, "get_forward_context", lambda: context(num_actual_tokens=len(many)))
    assert forward(many, many)[0] == "vLLM's"
    monkeypatch.setattr(cpu_decoder, "get_forward_context", lambda: SimpleNamespace(attn_metadata=None))  # as vLLM warms up
    assert forward(ids, POSITIONS)[0] == "vLLM's" and forward.num_passes == 0
