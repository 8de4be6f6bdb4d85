"""Lets megatron-core's hybrid optimizer run where there is no GPU: tensors count as the GPU's until they are moved to the
host, streams do nothing. Its copies, its AdamW and its bookkeeping are the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch.overrides import TorchFunctionMode

KEEPS_PLACE = {torch.Tensor.detach, torch.Tensor.clone, torch.Tensor.float, torch.Tensor.pin_memory}


class _Places(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return not hasattr(args[0], "on_host")
        found = func(*args, **(kwargs or {}))
        if func is torch.Tensor.cpu or (func in KEEPS_PLACE and hasattr(args[0], "on_host")):
            found.on_host = True
        return found


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """For a trainer on the CPU stand-in that offloads."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    cut = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def cut_by_place(self: Any, share: float) -> Any:
        with _Places():
            return cut(self, share)

    with (
        patch.object(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", cut_by_place),
        patch.object(torch.cuda, "current_stream", lambda device=None: MagicMock()),
        patch.object(torch.cuda, "stream", lambda stream: nullcontext()),
        patch("engine.megatron.policy.check_libraries"),
        patch("megatron.core.optimizer.optimizer_config.is_te_min_version", lambda version: True),
    ):
        yield
