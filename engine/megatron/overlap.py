"""Transformer Engine's buffers for trainer.overlap_tensor_parallel: products and the tensor-parallel communication of their
operands in one kernel's time. The buffers are of one size, so every packed row is padded to trainer.microbatch_tokens. Never
run so far: it needs two GPUs of one node.
"""

from __future__ import annotations

import torch

from engine.config.options import Trainer


def open_buffers(trainer: Trainer, hidden: int, dtype: torch.dtype) -> None:
    """Allocates the buffers; nothing without the option. Collective over all trainer ranks, once in a process."""
    if not trainer.overlap_tensor_parallel:
        return
    from transformer_engine.pytorch.module import base

    modes = base.UserBufferQuantizationMode
    base.initialize_ub(
        shape=[trainer.microbatch_tokens, hidden],
        tp_size=trainer.tensor_parallel,
        quantization_modes=[modes.NONE if trainer.fp8 == "none" else modes.FP8],
        dtype=dtype,
        bootstrap_backend="nccl",
    )


def close_buffers(trainer: Trainer) -> None:
    """Lets the buffers go, before torch.distributed does."""
    if trainer.overlap_tensor_parallel:
        from transformer_engine.pytorch.module import base

        base.destroy_ub()
