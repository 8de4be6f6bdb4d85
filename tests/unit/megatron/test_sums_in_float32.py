"""What a trainer's process tells torch of half-precision products before it joins the others."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from engine.config.options import Trainer
from engine.megatron import cpu_device
from engine.megatron.parallel_state import open_parallel_state


class Joining(Exception):
    """The rank has got as far as torch.distributed."""


def test_no_product_is_summed_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a product that cuBLAS splits are added in float32, in both half-precision types, before any work begins."""
    matmul = torch.backends.cuda.matmul

    def join(*_: object, **__: object) -> None:
        raise Joining

    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = True
    monkeypatch.setattr(cpu_device, "install", lambda: None)
    monkeypatch.setattr(dist, "init_process_group", join)
    with pytest.raises(Joining):
        open_parallel_state(Trainer(), rank=0, world_size=1, store=dist.HashStore(), timeout=timedelta(seconds=9))
    assert matmul.allow_bf16_reduced_precision_reduction is False
    assert matmul.allow_fp16_reduced_precision_reduction is False
