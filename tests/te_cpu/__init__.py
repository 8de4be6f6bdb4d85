"""Runs Transformer Engine's own Python code where there is no GPU: its layers, recipes, quantized tensors, optimizer and amax
bookkeeping are the real ones, from the package that tools/environment.sh puts beside the environment. What it calls in C++
and CUDA is replaced by `kernels`, in plain torch with the same rounding to FP8; `device` answers for the GPU.

So a test of the trainer's GPU options runs on a CPU as it runs on a GPU. Speed, memory and the order of sums are not a GPU's.
"""

from __future__ import annotations

import os
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

SITE = Path(sys.prefix) / "transformer_engine"

# Exports to ONNX, and Triton's kernels for experts and padded scales: they would import packages that nothing else here needs.
UNUSED = [
    f"transformer_engine.pytorch.{name}"
    for name in ("onnx_extensions", "triton", "triton.pad", "triton.permutation", "triton.cross_entropy")
]


@cache
def install() -> None:
    """Makes `transformer_engine` importable in this process; before megatron-core is imported, which looks for it."""
    assert "megatron.core" not in sys.modules, "megatron-core has looked for Transformer Engine already"
    assert (SITE / "transformer_engine").is_dir(), f"{SITE} holds no transformer_engine: run tools/environment.sh"
    sys.path.append(str(SITE))
    # No shared libraries are loaded, and a first import is content without its bindings.
    os.environ |= {"NVTE_PROJECT_BUILDING": "1", "NVTE_FRAMEWORK": "none", "NVTE_TORCH_COMPILE": "0"}
    import torch._dynamo
    import transformer_engine.common

    from tests.te_cpu import device, kernels

    for name in ("transformer_engine_torch", *UNUSED):
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name])["__getattr__"] = kernels.missing
    vars(sys.modules["transformer_engine_torch"]).update(kernels.bindings())
    transformer_engine.common.load_framework_extension = lambda framework: None
    torch._dynamo.config.disable = True  # megatron's fused SwiGLU would be compiled
    device.answer_for_a_gpu()
    import transformer_engine.pytorch

    device.allow_fp8_blocks()
    device.count_as_the_cpu()
    base: Any = transformer_engine.pytorch.module.base.TransformerEngineBaseModule
    attention: Any = transformer_engine.pytorch.DotProductAttention
    for owner, name in ((base, "__init__"), (base, "prepare_forward"), (attention, "forward")):  # they assert a GPU
        setattr(owner, name, device.as_on_a_gpu(getattr(owner, name)))
    from engine.megatron import policy

    engine: Any = policy
    device.gather_one_by_one()
    engine.check_libraries = lambda trainer, optimizer: None  # it would miss the GPU
