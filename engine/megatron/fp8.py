"""What Transformer Engine remembers between steps when it scales FP8 by past maxima (trainer.fp8 = 'delayed'): kept apart
from scoring, and part of the trainer's state as plain tensors. Other recipes remember nothing. It computes in no FP8 itself.

Transformer Engine's own `_extra_state` is pickled bytes and is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

DIRECTIONS = ("scaling_fwd", "scaling_bwd")
MEMORIES = ("scale", "amax_history")  # [scaled tensors of the module], [AMAX_HISTORY, scaled tensors of the module]


class Fp8Memory:
    """The scales and past maxima of the layers of this rank's chunks, by module; empty unless trainer.fp8 = 'delayed'."""

    def __init__(self, config: TransformerConfig, models: list[GPTModel]) -> None:
        """Allocates them before the first forward, so that a state can be loaded at once."""
        self._models = models if config.fp8 else []
        self.tensors: dict[str, torch.Tensor] = {}
        if not config.fp8 or config.fp8_recipe != "delayed":
            return
        from megatron.core.fp8_utils import get_fp8_recipe
        from transformer_engine.pytorch import LayerNormLinear, Linear, fp8_autocast
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        FP8GlobalStateManager.reset()  # it lists the memories of every model made in this process, and would move them all
        recipe = get_fp8_recipe(config)
        for index, model in enumerate(models):
            for name, module in model.named_modules():
                if isinstance(module, (Linear, LayerNormLinear)):
                    module.fp8_meta |= {"num_gemms": 1, "recipe": recipe}
                    with fp8_autocast(enabled=False, fp8_recipe=recipe):  # where it looks the recipe up once more
                        module.init_fp8_meta_tensors(recipe)
                    for direction in DIRECTIONS:
                        state = module.fp8_meta[direction]
                        self.tensors |= {f"{index}.{name}.{direction}.{kind}": getattr(state, kind) for kind in MEMORIES}

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
