"""A family that the engine does not have: Qwen2, whose queries, keys and values have biases. Named as a user names one, by this
file's path and `:Qwen2`; the tests of tests/unit/models and tests/parallel do, and nothing in engine/ knows of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from engine.models.base import Family, ModelShape, TensorMapping
from engine.models.llama import HF, MEGATRON, Llama

TRAINER_BIAS, ENGINE_BIAS = MEGATRON + "self_attention.linear_qkv.bias", HF + "self_attn.qkv_proj.bias"


class Qwen2(Family):
    """Llama's tensors and three biases a layer."""

    model_type = "qwen2"
    title = "a dense Qwen2"
    table = (
        *Llama.table[:4],
        TensorMapping(HF + "self_attn.q_proj.bias", "heads", "one", "heads", "layer", TRAINER_BIAS, ENGINE_BIAS),
        TensorMapping(HF + "self_attn.k_proj.bias", "kv_heads", "one", "heads", "layer", TRAINER_BIAS, ENGINE_BIAS),
        TensorMapping(HF + "self_attn.v_proj.bias", "kv_heads", "one", "heads", "layer", TRAINER_BIAS, ENGINE_BIAS),
        *Llama.table[4:],
    )
    transformer_engine_names = Llama.transformer_engine_names
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    plain_fields: ClassVar[Mapping[str, tuple[Any, ...]]] = {"use_sliding_window": (False,)}
    inert_fields = frozenset({"layer_types", "max_window_layers", "sliding_window"})
    rope_types = ("default",)

    @classmethod
    def megatron_options(cls, shape: ModelShape) -> dict[str, Any]:
        """The biases."""
        return {"add_qkv_bias": True}
