"""The layers of a Llama in float32 on a CPU, for the few tokens of a decoding iteration: each operator of a layer is called at
once, on the weights as they lie, and attention with its rotation and its cache is one of them (csrc/attention). vLLM's way
there is some hundred calls of Python a layer.

It takes the place of the `forward` of vLLM's LlamaModel where it knows everything that the layers do (`replace`), and passes
on what is not for it: more tokens than `MOST_ROWS`, as most prompts have, a pass without a cache, and what is not causal.
Norms, products and activation are the same kernels either way, so a token's numbers differ by the rounding of attention alone.
In its own way they follow from the token's request and from nothing that is computed beside it.

Shape legend: T tokens, H hidden size, N query heads, M key-value heads, D head size, B tokens of a block of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP, LlamaModel
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from engine.inference.cpu_layers import KernelRMSNorm, KernelSiluAndMul
from engine.ops import cached_attention, linear
from engine.ops.products import MOST_ROWS

ROTATIONS = (RotaryEmbedding, Llama3RotaryEmbedding)  # whose angles are a table by position
CACHE_FORM = "vec"  # vLLM's name of the form of the cache that csrc/attention/cached_attention.h tells
MULTIPLE = 32  # of D and B there


@dataclass(frozen=True, slots=True)
class Layer:
    """What a layer computes with: vLLM's own parameters, which a sync writes into."""

    name: str  # of its attention, in vLLM's context
    attention: Any
    input_norm: torch.Tensor  # [H]
    qkv: torch.Tensor  # [(N + 2 M) D, H]
    output: torch.Tensor  # [H, N D]
    feed_forward_norm: torch.Tensor  # [H]
    gate_up: torch.Tensor  # [2 F, H]
    down: torch.Tensor  # [H, F]
    angles: torch.Tensor  # [P, D]
    scale: float


class KernelDecoder:
    """The `forward` of a LlamaModel."""

    def __init__(self, model: LlamaModel) -> None:
        self._model, self._elsewhere = model, model.forward
        self._layers = [_layer(layer) for layer in model.layers]
        self._norm, self._epsilon = model.norm.weight.data, model.norm.variance_epsilon
        self.num_passes = 0  # that were not passed on

    def __call__(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Hidden states [T, H] after the last norm, of tokens [T] at positions [T] int64."""
        metadata = get_forward_context().attn_metadata
        other = intermediate_tensors is not None or inputs_embeds is not None or options
        if other or input_ids is None or not _is_for_us(metadata, self._layers[0].name, input_ids.numel()):
            return self._elsewhere(input_ids, positions, intermediate_tensors, inputs_embeds, **options)
        self.num_passes += 1
        operators = torch.ops.semion
        norm, product, swiglu = operators.rms_norm.default, operators.few_rows_product.default, operators.swiglu.default
        epsilon = self._epsilon
        hidden = self._model.embed_input_ids(input_ids)
        for layer in self._layers:
            at = metadata[layer.name]
            qkv = product(norm(hidden, layer.input_norm, epsilon)[0], layer.qkv)
            attended = cached_attention(
                qkv,
                positions,
                at.slot_mapping,
                at.query_start_loc,
                at.block_table,
                layer.angles,
                layer.attention.kv_cache,
                layer.scale,
            )
            hidden += product(attended, layer.output)
            gate_up = product(norm(hidden, layer.feed_forward_norm, epsilon)[0], layer.gate_up)
            hidden += product(swiglu(gate_up), layer.down)
        return norm(hidden, self._norm, epsilon)[0]


def _is_for_us(metadata: Any, name: str, num_tokens: int) -> bool:
    """Whether a pass is of few tokens, with a cache, each attending to those before it. All layers have one kind of cache."""
    if num_tokens > MOST_ROWS or type(metadata) is not dict or type(metadata[name]) is not CPUAttentionMetadata:
        return False
    at = metadata[name]
    return at.causal is True and at.dynamic_causal is None and at.num_actual_tokens == num_tokens


def _layer(layer: LlamaDecoderLayer) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        name=attention.attn.layer_name,
        attention=attention.attn,
        input_norm=layer.input_layernorm.weight.data,
        qkv=attention.qkv_proj.weight.data,
        output=attention.o_proj.weight.data,
        feed_forward_norm=layer.post_attention_layernorm.weight.data,
        gate_up=mlp.gate_up_proj.weight.data,
        down=mlp.down_proj.weight.data,
        angles=attention.rotary_emb.cos_sin_cache,
        scale=attention.attn.impl.scale,
    )


def is_known(model: Any) -> bool:
    """Whether the layers of vLLM's model do what ours do, on weights and a cache that ours read."""
    if type(model) is not LlamaForCausalLM or type(model.model) is not LlamaModel or model.model.aux_hidden_state_layers:
        return False
    return type(model.model.norm) is KernelRMSNorm and all(map(_is_known, model.model.layers))


def _is_known(layer: Any) -> bool:
    if type(layer) is not LlamaDecoderLayer or type(layer.self_attn) is not LlamaAttention or type(layer.mlp) is not LlamaMLP:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    kernel, rotation = attention.attn.impl, attention.rotary_emb
    products = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    return (
        all(type(norm) is KernelRMSNorm and norm.variance_epsilon == norms[0].variance_epsilon for norm in norms)
        and type(mlp.act_fn) is KernelSiluAndMul
        and all(_is_plain(product) for product in products)
        and type(rotation) in ROTATIONS
        and rotation.is_neox_style
        and rotation.rotary_dim == rotation.head_size == kernel.head_size
        and rotation.cos_sin_cache.dtype == torch.float32
        and type(kernel) is CPUAttentionBackendImpl
        and _is_causal_alone(attention.attn, kernel)
    )


def _is_plain(product: Any) -> bool:
    """A whole matrix in float32, as the plain loader leaves it, and no bias."""
    return (
        type(product.quant_method) is UnquantizedLinearMethod
        and getattr(product, "cpu_linear", None) is linear
        and product.tp_size == 1
        and product.bias is None
        and product.weight.dtype == torch.float32
        and product.weight.is_contiguous()
    )


def _is_causal_alone(layer: Any, kernel: CPUAttentionBackendImpl) -> bool:
    """Scaled products, softmax and nothing else, over a cache of float32 in the form that is known."""
    cache = layer.kv_cache
    return (
        kernel.attn_type == AttentionType.DECODER
        and kernel.kv_sharing_target_layer_name is None
        and layer.query_quant is None
        and kernel.alibi_slopes is None
        and kernel.sliding_window == -1
        and not kernel.logits_soft_cap
        and kernel.sinks is None
        and getattr(layer, "isa", getattr(kernel, "isa", None)) == CACHE_FORM
        and isinstance(cache, torch.Tensor)
        and cache.dtype == torch.float32
        and cache.is_contiguous()
        and cache.dim() == 4
        and cache.size(1) == kernel.num_kv_heads
        and cache.size(2) % MULTIPLE == 0
        and cache.size(3) == 2 * kernel.head_size
        and kernel.head_size % MULTIPLE == 0
    )


def replace(model: Any) -> bool:
    """Puts ours in the place of the model's, where it knows them; whether it did. Once the cache is there."""
    known = is_known(model)
    if known and not isinstance(model.model.forward, KernelDecoder):
        model.model.forward = KernelDecoder(model.model)
    return known


def told(model: Any) -> str:
    """What computes the layers of few tokens."""
    forward = getattr(getattr(model, "model", None), "forward", None)
    return type(forward).__name__ if isinstance(forward, KernelDecoder) else "vLLM's"
