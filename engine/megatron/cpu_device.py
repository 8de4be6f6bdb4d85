"""Runs megatron-core on CPU: every "cuda" that megatron asks torch for comes to mean the CPU. Only device names, the
device synchronise, stream and random state are replaced; no arithmetic and no communication. Used where no GPU exists,
in trainer processes, and megatron must be called from the thread that installed it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from engine.megatron.importing import lean

CPU = torch.device("cpu")


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs) if kwargs else {}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)  # megatron's optimizers ask for the type by name
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


@functools.cache
def install() -> None:
    """Makes this process a CPU trainer; call once or more, before any megatron call and on the thread that trains."""
    assert not torch.cuda.is_available(), "the CPU stand-in on a machine with a GPU"
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.synchronize = lambda device=None: None
    cuda.current_stream = lambda device=None: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    with lean():
        from megatron.core.tensor_parallel import random

    state: Any = random
    state._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: torch.get_rng_state()
    state._set_cuda_rng_state = lambda new, device=-1, graph_safe=False: torch.set_rng_state(new)
    _CudaMeansCpu().__enter__()
