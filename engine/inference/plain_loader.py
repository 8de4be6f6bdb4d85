"""A way for vLLM to load weights on a CPU that leaves them as ordinary tensors, so that a sync can write into them."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from engine.ops import linear

PLAIN_FORMAT = "semion_plain"


class PlainLoader(DefaultModelLoader):
    """vLLM's own loader, with the weights of linear layers and of the output left as ordinary tensors on a CPU."""

    def __init__(self, load_config: Any) -> None:
        load_config.load_format = "auto"
        super().__init__(load_config)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Takes from every layer the step that would pack its weight after loading, then loads as usual."""
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod):
                method.process_weights_after_loading = leave_plain
        super().load_weights(model, model_config)


def leave_plain(layer: Any) -> None:
    """In place of vLLM's packing: the layer multiplies by its `.weight`, whatever is written there."""
    layer.cpu_linear = linear
