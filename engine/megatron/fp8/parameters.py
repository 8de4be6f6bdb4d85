"""Weights that are kept in FP8 alone (trainer.fp8_parameters): looked up in bfloat16, copied, and saved and loaded bit for bit.
How they follow the optimizer's fp32 weights, and how their bytes are gathered, is megatron-core's and Transformer Engine's.

Shape legend: a matrix [M, K] of bytes has one scale [1], or one for each BLOCK x BLOCK of it [M / BLOCK, K / BLOCK or more].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

BLOCK = 128


class Weights(Mapping[str, torch.Tensor]):
    """A read-only view of a set of weights in the model's dtype, by name. One in FP8 is dequantized to a new tensor at each
    access, with exactly the values that a product uses."""

    def __init__(self, kept: Mapping[str, torch.Tensor]) -> None:
        """`kept` as they are."""
        self.kept = kept

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: Any = self.kept[name]
        if not in_fp8(tensor):
            return tensor  # type: ignore[no-any-return]
        made: torch.Tensor = tensor.detach().dequantize()
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


def in_fp8(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of Transformer Engine's in FP8, of either kind."""
    return hasattr(tensor, "_fp8_dtype")


def scale(tensor: Any) -> torch.Tensor:
    """What an FP8 tensor's bytes are multiplied by, float32."""
    found: torch.Tensor = tensor._rowwise_scale_inv if _in_blocks(tensor) else tensor._scale_inv
    return found


def forget_initial(parameters: Iterable[Any]) -> None:
    """Lets the host's copies go that FP8 parameters were filled from. megatron-core drops those that its optimizer took a part
    of; with data parallelism a rank's optimizer takes none of some parameters."""
    for parameter in parameters:
        if hasattr(parameter, "clear_high_precision_init_val"):
            parameter.clear_high_precision_init_val()


def fill(tensor: Any, values: torch.Tensor) -> None:
    """Quantizes `values` into an FP8 tensor. Its table of scales is wider than its blocks; what lies beside them, which nobody
    multiplies by, is made 1, as megatron-core's cast after a step has it, or two equal states could differ."""
    tensor.quantize_(values.to(tensor.device))
    if _in_blocks(tensor):
        scale(tensor)[:, -(-tensor.shape[1] // BLOCK) :] = 1.0


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a weight for forwards alone. Transformer Engine's own of a tensor in blocks would share the scales, which move
    at the next step, and would hold the transposed matrix too, which only a backward reads."""
    if not in_fp8(tensor):
        return tensor.detach().clone()
    made: Any = tensor.detach()
    if _in_blocks(made):
        made._rowwise_data, made._rowwise_scale_inv = made._rowwise_data.clone(), made._rowwise_scale_inv.clone()
    else:
        made._data, made._scale_inv = made._data.clone(), made._scale_inv.clone()
    _drop_transposed(made)
    return made  # type: ignore[no-any-return]


def behind(parameter: Any) -> torch.Tensor:
    """The tensor to restore as `parameter.data` after a swap: of an FP8 parameter Transformer Engine may return the parameter
    itself as its `data`."""
    if not in_fp8(parameter):
        return parameter.data  # type: ignore[no-any-return]
    held: Any = parameter.detach()
    if not _in_blocks(held):  # detached, any transposed copy that is there passes for a valid one
        held._transpose_invalid = parameter._transpose_invalid
    return held  # type: ignore[no-any-return]


@torch.no_grad()
def load(tensor: Any, saved: torch.Tensor, saved_scale: torch.Tensor | None) -> None:
    """Fills a weight with a saved one. In FP8, dividing by the saved scale recovers the exact bytes: rounding to bfloat16 moves
    a value by at most 1/8 of half an FP8 step. Without scales, from a state with bfloat16 weights, it is quantized as at the
    start."""
    if not in_fp8(tensor):
        tensor.data.copy_(saved)
        return
    if saved_scale is None:
        fill(tensor, saved)
    else:
        own = scale(tensor)
        own.copy_(saved_scale)
        exact = saved.to(own.device).float() / _spread(own, saved.shape)
        _bytes(tensor).copy_(exact.to(torch.float8_e4m3fn).view(torch.uint8))
    _drop_transposed(tensor)


def _in_blocks(tensor: Any) -> bool:
    return hasattr(tensor, "_rowwise_data")


def _bytes(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor._rowwise_data if _in_blocks(tensor) else tensor._data
    return found


def _drop_transposed(tensor: Any) -> None:
    """The next pass that needs the transposed copy makes it."""
    if _in_blocks(tensor):
        tensor._columnwise_data = tensor._columnwise_scale_inv = None
    else:
        tensor._transpose, tensor._transpose_invalid = None, True


def _spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Every element's scale [M, K], or the one of all."""
    if scales.numel() == 1:
        return scales
    return scales.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]
