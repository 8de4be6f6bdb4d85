"""RMSNorm and SwiGLU of an engine on a CPU by the trainer's own kernels (csrc/norm, csrc/activation), in vLLM's own way to
replace a layer: its CPU build computes them operator by operator. Trainer and engine then round alike here.
"""

from __future__ import annotations

import torch
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

from engine.ops import rms_norm, swiglu


class KernelRMSNorm(RMSNorm):  # type: ignore[misc]
    """Rows of hidden states or of heads [..., H]."""

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The norm of x; with a residual that of their sum, and the sum."""
        assert self.has_weight and self.variance_size_override is None, "a norm of Llama's"
        if residual is None:
            return rms_norm(x, self.weight, self.variance_epsilon)
        total = x + residual
        return rms_norm(total, self.weight, self.variance_epsilon), total


class KernelSiluAndMul(SiluAndMul):  # type: ignore[misc]
    """[..., 2 F] -> [..., F]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up."""
        return swiglu(x)


REPLACED = {RMSNorm.__name__: KernelRMSNorm, SiluAndMul.__name__: KernelSiluAndMul}


def register() -> None:
    """Has this vLLM process make these layers; any number of times."""
    for name, layer in REPLACED.items():
        if name not in op_registry_oot:
            CustomOp.register_oot(layer, name=name)
