"""What Transformer Engine remembers between steps when it scales FP8 by past maxima (trainer.fp8 = 'delayed'): kept apart
from scoring, and part of the trainer's state as plain tensors. Other recipes remember nothing. It computes in no FP8 itself.

Transformer Engine's own `_extra_state` is pickled bytes and is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

DIRECTIONS = ("scaling_fwd", "scaling_bwd")
REGISTRY = ("global_amax_buffer", "global_amax_history_buffer", "global_scale_buffer")  # what it moves, by kind
MEMORIES = ("scale", "amax_history")  # [scaled tensors of the module], [AMAX_HISTORY, scaled tensors of the module]


class Fp8Memory:
    """The scales and past maxima of the layers of this rank's chunks, by module; empty unless trainer.fp8 = 'delayed'.

    They move once an optimizer step, in `advance`. Left to itself Transformer Engine moves them after every pass of a
    microbatch, with recomputation after every layer's too, and once more or less by what ran before in the process: a history
    would hold the microbatches of a step or two, ranks would meet in as many all-reduces, and a resumed run would differ.
    """

    def __init__(self, config: TransformerConfig, models: list[GPTModel]) -> None:
        """Allocates them before the first forward, so that a state can be loaded at once."""
        self._models = models if config.fp8 else []
        self.tensors: dict[str, torch.Tensor] = {}
        self._registry: dict[str, dict[str, Any]] = {}
        if not config.fp8 or config.fp8_recipe != "delayed":
            return
        from megatron.core.fp8_utils import get_fp8_context
        from transformer_engine.pytorch import DotProductAttention, LayerNormLinear, Linear
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        with torch.no_grad(), get_fp8_context(config), _registered({}) as self._registry:
            for index, model in enumerate(models):
                for name, module in model.named_modules():
                    if isinstance(module, DotProductAttention):  # computes in bfloat16: nothing to remember
                        module.fp8_meta[FP8GlobalStateManager.get_buffer_info()] = []
                    if isinstance(module, (Linear, LayerNormLinear)):
                        module.init_fp8_metadata()
                        FP8GlobalStateManager.add_fp8_tensors_to_global_buffer(module.fp8_meta)
                        for direction in DIRECTIONS:
                            state = module.fp8_meta[direction]
                            self.tensors |= {f"{index}.{name}.{direction}.{kind}": getattr(state, kind) for kind in MEMORIES}

    def advance(self) -> None:
        """Makes the next step's scales of the maxima of all microbatches since the last call, and of those that are remembered.

        Collective over the ranks that scale alike: tensor and data parallel.
        """
        if not self._registry:
            return
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        with torch.no_grad(), _registered(self._registry):
            for forward in (True, False):
                FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=forward)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Inside, forwards without gradients leave the memory as it was: they would add the reference's maxima to it. The
        chunks are in evaluation mode, or each would queue scales for a recomputation that never comes."""
        before = {name: tensor.clone() for name, tensor in self.tensors.items()}
        for model in self._models:
            model.eval()
        try:
            yield
        finally:
            for model in self._models:
                model.train()
            for name, tensor in self.tensors.items():
                tensor.copy_(before[name])


@contextmanager
def _registered(registry: dict[str, dict[str, Any]]) -> Iterator[dict[str, dict[str, Any]]]:
    """While entered, what is in `registry` is all that Transformer Engine moves; afterwards it moves nothing, and `registry`
    holds what modules have registered meanwhile."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    for name in REGISTRY:
        setattr(FP8GlobalStateManager, name, registry.setdefault(name, {}))
    try:
        yield registry
    finally:
        for name in REGISTRY:
            setattr(FP8GlobalStateManager, name, {})
