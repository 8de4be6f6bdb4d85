"""Llama 2 to 3.3, and whatever else is written down as model_type "llama". Sources: megatron-core 0.16.1
(transformer/attention.py, transformer/transformer_layer.py, models/gpt/gpt_layer_specs.py) and vLLM 0.32 (models/llama.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from engine.models.base import Family, TensorMapping

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
HF = "model.layers.{}."
MEGATRON = "decoder.layers.{}."
TRAINER_QKV = MEGATRON + "self_attention.linear_qkv.weight"
TRAINER_PROJ = MEGATRON + "self_attention.linear_proj.weight"
TRAINER_FC1 = MEGATRON + "mlp.linear_fc1.weight"
TRAINER_FC2 = MEGATRON + "mlp.linear_fc2.weight"
ENGINE_QKV = HF + "self_attn.qkv_proj.weight"
ENGINE_PROJ = HF + "self_attn.o_proj.weight"
ENGINE_FC1 = HF + "mlp.gate_up_proj.weight"
ENGINE_FC2 = HF + "mlp.down_proj.weight"
NORM_1 = HF + "input_layernorm.weight"
NORM_2 = HF + "post_attention_layernorm.weight"


class Llama(Family):
    """Norms, rotary grouped-query attention and SwiGLU, and nothing else: no bias, no window, no norm of queries and keys."""

    model_type = "llama"
    title = "a plain Llama"
    table = (
        TensorMapping(EMBEDDING, "vocabulary", "hidden", "vocabulary", "first", "embedding.word_embeddings.weight", EMBEDDING),
        TensorMapping(HF + "self_attn.q_proj.weight", "heads", "hidden", "heads", "layer", TRAINER_QKV, ENGINE_QKV),
        TensorMapping(HF + "self_attn.k_proj.weight", "kv_heads", "hidden", "heads", "layer", TRAINER_QKV, ENGINE_QKV),
        TensorMapping(HF + "self_attn.v_proj.weight", "kv_heads", "hidden", "heads", "layer", TRAINER_QKV, ENGINE_QKV),
        TensorMapping(HF + "self_attn.o_proj.weight", "hidden", "heads", "columns", "layer", TRAINER_PROJ, ENGINE_PROJ),
        TensorMapping(HF + "mlp.gate_proj.weight", "ffn", "hidden", "rows", "layer", TRAINER_FC1, ENGINE_FC1),
        TensorMapping(HF + "mlp.up_proj.weight", "ffn", "hidden", "rows", "layer", TRAINER_FC1, ENGINE_FC1),
        TensorMapping(HF + "mlp.down_proj.weight", "hidden", "ffn", "columns", "layer", TRAINER_FC2, ENGINE_FC2),
        TensorMapping(NORM_1, "hidden", "one", "whole", "layer", MEGATRON + "input_layernorm.weight", NORM_1),
        TensorMapping(NORM_2, "hidden", "one", "whole", "layer", MEGATRON + "pre_mlp_layernorm.weight", NORM_2),
        TensorMapping(
            "model.norm.weight", "hidden", "one", "whole", "last", "decoder.final_layernorm.weight", "model.norm.weight"
        ),
        TensorMapping(HEAD, "vocabulary", "hidden", "vocabulary", "last", "output_layer.weight", HEAD),
    )
    transformer_engine_names: ClassVar[Mapping[str, str]] = {  # its linear layers hold the norm before them
        MEGATRON + "input_layernorm.weight": MEGATRON + "self_attention.linear_qkv.layer_norm_weight",
        MEGATRON + "pre_mlp_layernorm.weight": MEGATRON + "mlp.linear_fc1.layer_norm_weight",
    }
    defaults: ClassVar[Mapping[str, Any]] = {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    plain_fields: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_interleaved": (False,),  # as SmolLM's files say
    }
    inert_fields = frozenset({"pretraining_tp"})  # slices of the same products, which transformers 5 no longer cuts
