"""The output layer of an engine in float32, for a vLLM that has none of its own: 0.25.1 reads `head_dtype` for pooling models
only, later versions for those that sample too. It replaces vLLM's layer in vLLM's own way, and only where model.head asks for
it; which type a worker then multiplies in is asked of it after the start (`semion_head_dtype` in receiver.py).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from engine.ops import linear

OPTION = "head_dtype"  # of a model's config, as later versions of vLLM read it too


class Float32Head(LogitsProcessor):  # type: ignore[misc]
    """Hidden states [T, H] and the output weight [V, H], both as they are, to logits [T, V] that are float32 products summed in
    float32, as the trainer's fused output layer computes them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        model = get_current_vllm_config().model_config
        samples = model is not None and model.runner_type == "generate"
        wanted = getattr(model.hf_config, OPTION, None) if samples else None
        self.head_dtype = torch.float32 if wanted == "float32" else None

    def _get_logits(
        self, hidden_states: torch.Tensor, lm_head: Any, embedding_bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """vLLM's own but for the product. None on tensor-parallel ranks that vLLM does not gather to."""
        if self.head_dtype is None:
            return super()._get_logits(hidden_states, lm_head, embedding_bias)
        method = lm_head.quant_method
        assert isinstance(method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod), f"a plain weight, of {method}"
        logits = self._gather_logits(float32_product(hidden_states, lm_head.weight, embedding_bias))
        return None if logits is None else logits[..., : self.org_vocab_size]


def float32_product(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """hidden [T, H] times weight [V, H] in float32 [T, V]. On a GPU the product itself sums 16-bit factors in float32 and
    writes float32, so the weight is not widened; on a CPU, whose products do not, it is, at every call."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return logits if bias is None else logits + bias.float()
    return linear(hidden.float(), weight.float(), None if bias is None else bias.float())


def register() -> None:
    """Has this vLLM process make this layer where vLLM has no such head itself; any number of times."""
    own = hasattr(LogitsProcessor, "_apply_head")  # vLLM's, which multiplies in head_dtype
    if not own and LogitsProcessor.__name__ not in op_registry_oot:
        PluggableLayer.register_oot(Float32Head, name=LogitsProcessor.__name__)
