"""Llama's tensors. Sources: megatron-core 0.16.1 (transformer/attention.py, transformer/transformer_layer.py,
models/gpt/gpt_layer_specs.py) and vLLM 0.32 (models/llama.py).
"""

from __future__ import annotations

from engine.models.base import Row

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_HF, _MEGATRON = "model.layers.{}.", "decoder.layers.{}."
_TRAINER_QKV, _ENGINE_QKV = _MEGATRON + "self_attention.linear_qkv.weight", _HF + "self_attn.qkv_proj.weight"
_TRAINER_FC1, _ENGINE_FC1 = _MEGATRON + "mlp.linear_fc1.weight", _HF + "mlp.gate_up_proj.weight"
_TRAINER_PROJ, _ENGINE_PROJ = _MEGATRON + "self_attention.linear_proj.weight", _HF + "self_attn.o_proj.weight"
_TRAINER_FC2, _ENGINE_FC2 = _MEGATRON + "mlp.linear_fc2.weight", _HF + "mlp.down_proj.weight"
_NORM_1, _NORM_2 = _HF + "input_layernorm.weight", _HF + "post_attention_layernorm.weight"
TABLE = (
    Row(EMBEDDING, "vocabulary", "hidden", "vocabulary", "first", "embedding.word_embeddings.weight", EMBEDDING),
    Row(_HF + "self_attn.q_proj.weight", "heads", "hidden", "heads", "layer", _TRAINER_QKV, _ENGINE_QKV),
    Row(_HF + "self_attn.k_proj.weight", "kv_heads", "hidden", "heads", "layer", _TRAINER_QKV, _ENGINE_QKV),
    Row(_HF + "self_attn.v_proj.weight", "kv_heads", "hidden", "heads", "layer", _TRAINER_QKV, _ENGINE_QKV),
    Row(_HF + "self_attn.o_proj.weight", "hidden", "heads", "columns", "layer", _TRAINER_PROJ, _ENGINE_PROJ),
    Row(_HF + "mlp.gate_proj.weight", "ffn", "hidden", "rows", "layer", _TRAINER_FC1, _ENGINE_FC1),
    Row(_HF + "mlp.up_proj.weight", "ffn", "hidden", "rows", "layer", _TRAINER_FC1, _ENGINE_FC1),
    Row(_HF + "mlp.down_proj.weight", "hidden", "ffn", "columns", "layer", _TRAINER_FC2, _ENGINE_FC2),
    Row(_NORM_1, "hidden", "one", "whole", "layer", _MEGATRON + "input_layernorm.weight", _NORM_1),
    Row(_NORM_2, "hidden", "one", "whole", "layer", _MEGATRON + "pre_mlp_layernorm.weight", _NORM_2),
    Row("model.norm.weight", "hidden", "one", "whole", "last", "decoder.final_layernorm.weight", "model.norm.weight"),
    Row(HEAD, "vocabulary", "hidden", "vocabulary", "last", "output_layer.weight", HEAD),
)
TRANSFORMER_ENGINE_NAMES = {  # its linear layers hold the norm before them
    _MEGATRON + "input_layernorm.weight": _MEGATRON + "self_attention.linear_qkv.layer_norm_weight",
    _MEGATRON + "pre_mlp_layernorm.weight": _MEGATRON + "mlp.linear_fc1.layer_norm_weight",
}
