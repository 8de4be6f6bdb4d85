"""What torch.cuda says to Transformer Engine where there is no GPU: that it is a Hopper. It computes nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

CAPABILITY = (9, 0)
CUDNN = 91300  # as cuDNN encodes its version
CUBLASLT = 130000


def answer_for_a_gpu() -> None:
    """From now on this process is asked on what GPU it runs, and answers. `torch.cuda.is_available` stays false."""
    cuda: Any = torch.cuda
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="stand-in", total_memory=139 << 30)
    cuda.current_device = lambda: torch.device("cpu")  # as the engine's own stand-in says
    cuda.get_device_properties = lambda device=None: properties
    cuda.get_device_capability = lambda device=None: CAPABILITY
    cuda.is_current_stream_capturing = lambda: False


def allow_fp8_blocks() -> None:
    """Has Transformer Engine find a CUDA that is new enough for them; it remembers what it found."""
    from transformer_engine.pytorch import quantization

    with patch.object(torch.version, "cuda", "13.0"):
        assert quantization.check_fp8_block_scaling_support()[0]


def count_as_the_cpu() -> None:
    """Recomputation keeps the CPU's random state in place of a GPU's, and its backward goes on to find the CPU."""
    from transformer_engine.pytorch import distributed

    names: Any = distributed
    names._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=True: torch.get_rng_state()
    names._set_cuda_rng_state = lambda state, device=-1, graph_safe=True: torch.set_rng_state(state)
    autograd: Any = torch.autograd
    autograd.backward = _backward


def gather_one_by_one() -> None:
    """A group of buckets is gathered one after another: gloo would make one message of bytes and of bfloat16, and neither
    comes out of it as it went in. NCCL gives each its own type."""
    from megatron.core.distributed import param_and_grad_buffer

    buffers: Any = param_and_grad_buffer
    buffers._coalescing_manager = lambda *groups, **options: nullcontext()


_ask_modes = torch.autograd.backward


def _backward(tensors: Any, *arguments: Any, **options: Any) -> None:
    """torch.autograd.backward without asking torch-function modes: one that handles a call is left meanwhile, and in the
    backward of a recomputation, which gives a list of tensors and one of gradients, "cuda" would mean a GPU again."""
    if options or len(arguments) != 1:  # megatron's schedules
        _ask_modes(tensors, *arguments, **options)
        return
    (gradients,) = arguments
    run = torch.autograd.Variable._execution_engine.run_backward
    run(tuple(tensors), tuple(gradients), False, False, (), allow_unreachable=True, accumulate_grad=True)


class _OnGpu(TorchFunctionMode):
    """Every tensor says that it is on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        return func(*args, **(kwargs or {}))


def as_on_a_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which finds a GPU available and all tensors on it."""

    @wraps(function)
    def called(*arguments: Any, **options: Any) -> Any:
        with patch.object(torch.cuda, "is_available", return_value=True), _OnGpu():
            return function(*arguments, **options)

    return called
