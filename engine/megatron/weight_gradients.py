"""The product that adds a weight's gradient to megatron-core's buffer (`main_grad`), for layers that are megatron-core's own:
all of the local spec's, and the output layer of any spec. megatron-core calls an extension of apex for it, by the two names
below; here it is torch's product, whether apex is installed or not, so a run needs no apex and its numbers do not depend on it.
Transformer Engine's layers add by themselves, and the fused output layer too (engine/ops/lm_head.py).

Shape legend: T tokens, N outputs of a layer, K inputs.
"""

from __future__ import annotations

import sys
from typing import Any

import torch


def add_by_torch() -> None:
    """From now on, in this process, megatron-core's linear layers take the products of this file. They look for apex's
    extension as a name of their module, bound at import, and offer no argument."""
    from megatron.core.tensor_parallel import layers

    module: Any = layers
    module.fused_weight_gradient_mlp_cuda = sys.modules[__name__]
    module._grad_accum_fusion_available = True


def wgrad_gemm_accum_fp32(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad [N, K] (float32) += grad_output [T, N].T @ total_input [T, K], summed in float32 and not rounded."""
    left = grad_output.t()
    if total_input.dtype == main_grad.dtype:
        main_grad.addmm_(left, total_input)
    elif main_grad.is_cpu:  # which has no product that is wider than its factors
        main_grad.addmm_(left.float(), total_input.float())
    else:
        torch.addmm(main_grad, left, total_input, torch.float32, out=main_grad)


def wgrad_gemm_accum_fp16(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """The same into a main_grad of the factors' own half-precision type: summed in float32 and rounded once, with what was
    there already."""
    if main_grad.is_cpu:
        main_grad.copy_(main_grad.float().addmm_(grad_output.t().float(), total_input.float()))
    else:
        main_grad.addmm_(grad_output.t(), total_input)
