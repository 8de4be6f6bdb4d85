"""What vLLM 0.25.1 would compile with nvcc while an engine starts, and how an engine does without: that compiler belongs to
CUDA's toolkit, which neither requirements/gpu.txt nor the image brings. What Triton, torch and CUTLASS's own language compile
needs no nvcc, and is no subject here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any, Final

# Off in every engine's process unless the environment says otherwise. FlashInfer's sampler draws for requests without a seed,
# which are vLLM's own at its start and none of ours; DeepGEMM multiplies FP8 weights with a scale a block, which no engine has.
SWITCHED_OFF: Final = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_DEEP_GEMM": "0"}
TOOLKIT: Final = "/usr/local/cuda"  # where FlashInfer looks last
FP8_TRITON: Final = (8, 9)  # compute capability from which Triton has FP8 numbers
Capability = tuple[int, int]  # a GPU's compute capability: its generation, and what comes after the dot


def find_nvcc() -> str | None:
    """The nvcc that FlashInfer would call: of the toolkit that the environment names, else in PATH, else in its usual place."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return shutil.which("nvcc", path=f"{named}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{TOOLKIT}/bin")


def attention_without_nvcc(capability: Capability, dtype: str, stored: str | None = None) -> str | None:
    """vLLM's name of an attention that needs no nvcc, for a GPU on which vLLM's first choice is FlashInfer, which does; None
    where its first choice is another one. `dtype`: of the model; `stored`: of the KV cache, where that is another one."""
    if dtype == "float32":
        return None  # FlashInfer has none
    if stored is not None and stored.startswith("fp8"):
        in_flash_attention = capability[0] == 9 and stored in ("fp8", "fp8_e4m3")
        return None if in_flash_attention or capability < FP8_TRITON else "TRITON_ATTN"
    return "FLASH_ATTN" if capability[0] == 10 else None


def without_nvcc(
    given: Mapping[str, Any], capability: Capability, *, dtype: str, stored: str | None = None, tensor_parallel: int
) -> dict[str, Any]:
    """Arguments for an engine on a machine without nvcc, beside those that were `given`, which win: another attention where
    FlashInfer's would be chosen, and with tensor parallelism no fusion of sums and norms, which is FlashInfer's too. None
    where there is an nvcc."""
    if find_nvcc() is not None:
        return {}
    added: dict[str, Any] = {}
    asked = given.get("attention_config")
    chosen = "attention_backend" in given or (isinstance(asked, Mapping) and "backend" in asked)
    if not chosen and (attention := attention_without_nvcc(capability, dtype, stored)):
        added["attention_backend"] = attention
    compilation = given.get("compilation_config", {})
    if tensor_parallel > 1 and capability[0] in (9, 10) and isinstance(compilation, Mapping):
        given_passes = compilation.get("pass_config")
        passes = {"fuse_allreduce_rms": False} | dict(given_passes if isinstance(given_passes, Mapping) else {})
        added["compilation_config"] = {**compilation, "pass_config": passes}
    return added
