"""Qwen3, the dense ones: Llama with queries and keys normalized head by head before they are rotated. Sources: transformers 5
(models/qwen3), megatron-core 0.16.1 (qk_layernorm in transformer/attention.py) and vLLM 0.32 (models/qwen3.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from engine.models.base import Family, ModelShape, TensorMapping
from engine.models.llama import HF, MEGATRON, Llama

Q_NORM = HF + "self_attn.q_norm.weight"
K_NORM = HF + "self_attn.k_norm.weight"


class Qwen3(Family):
    """Both specs of megatron-core call the two norms alike: no linear layer holds them."""

    model_type = "qwen3"
    title = "a dense Qwen3"
    table = (
        *Llama.table[:5],
        TensorMapping(Q_NORM, "head_dim", "one", "whole", "layer", MEGATRON + "self_attention.q_layernorm.weight", Q_NORM),
        TensorMapping(K_NORM, "head_dim", "one", "whole", "layer", MEGATRON + "self_attention.k_layernorm.weight", K_NORM),
        *Llama.table[5:],
    )
    transformer_engine_names = Llama.transformer_engine_names
    defaults: ClassVar[Mapping[str, Any]] = {
        "head_dim": 128,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    plain_fields: ClassVar[Mapping[str, tuple[Any, ...]]] = {"attention_bias": (False,), "use_sliding_window": (False,)}
    inert_fields = frozenset({"max_window_layers", "sliding_window"})  # without use_sliding_window
    rope_types = ("default",)

    @classmethod
    def megatron_options(cls, shape: ModelShape) -> dict[str, Any]:
        """The two norms."""
        return {"qk_layernorm": True}
