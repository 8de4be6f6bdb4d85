"""Athene's reward model as vLLM loads it: the Llama with a classification head, whose one tensor has another name in the
files. Which token it is read at is decided by whoever makes the tokens (engine/data/conversations.py).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.adapters import as_seq_cls_model
from vllm.model_executor.models.llama import LlamaForCausalLM

from engine.models.reward_head import ATHENE


class AtheneForSequenceClassification(as_seq_cls_model(LlamaForCausalLM)):  # type: ignore[misc]
    """vLLM's Llama for sequence classification, with `v_head` as its `score`."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads the checkpoint's tensors; the names of the parameters they went to."""
        renamed = (("score.weight" if name == "v_head.weight" else name, tensor) for name, tensor in weights)
        loaded: set[str] = super().load_weights(renamed)
        return loaded


def register() -> None:
    """Makes the class known to vLLM in this process."""
    ModelRegistry.register_model(ATHENE, AtheneForSequenceClassification)
