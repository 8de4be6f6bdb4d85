"""FP8 as Transformer Engine's CUDA casts make it, in plain torch: a tensor's own scale (from past maxima, or its own largest),
or one a block of 128 or 128 x 128. Rounding is to nearest even and saturates; scales follow common/recipe in its sources.
What a GPU's fused kernels may quantize from float32, such as a norm's output, is rounded to the tensor's own type before.
"""

from __future__ import annotations

import enum
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

BLOCK = 128
FP8_SIDE = 16  # cuBLAS takes no others
FLOAT_MAX = torch.finfo(torch.float32).max


class DType(enum.IntEnum):
    """Transformer Engine's types."""

    kByte = 0
    kInt16 = 1
    kInt32 = 2
    kInt64 = 3
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat8E8M0 = 9
    kFloat4E2M1 = 10


TORCH_TYPES = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}


def largest(dtype: DType) -> float:
    """The largest number of an FP8 type."""
    return torch.finfo(TORCH_TYPES[dtype]).max


def to_bytes(scaled: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Rounded to FP8, what is out of range to its largest; the bytes."""
    bound = largest(dtype)
    return scaled.clamp(-bound, bound).to(TORCH_TYPES[dtype]).view(torch.uint8)


def from_bytes(data: torch.Tensor, dtype: DType) -> torch.Tensor:
    """FP8 bytes as float32."""
    return data.view(TORCH_TYPES[dtype]).float()


def scales(amax: torch.Tensor, bound: float, power_of_two: bool, epsilon: float) -> torch.Tensor:
    """What tensors or blocks with these largest magnitudes are multiplied by to reach at most `bound`; 1 for zeros and
    infinities."""
    amax = amax.clamp(min=epsilon)
    found = (bound / amax).clamp(max=FLOAT_MAX)
    if power_of_two:
        found = torch.ldexp(torch.ones_like(found), found.frexp().exponent - 1)
    return torch.where((amax == 0) | amax.isinf(), 1.0, found)


def quantize(tensor: torch.Tensor, quantizer: Any, output: Any = None, noop: torch.Tensor | None = None) -> Any:
    """The tensor in the quantizer's FP8, in a new tensor or in `output`; nothing happens where `noop` holds a 1."""
    from transformer_engine.pytorch.tensor import Float8BlockQuantizer

    if noop is not None and noop.numel() and float(noop) == 1:
        return output
    made = empty(tensor, quantizer) if output is None else output
    source = tensor.detach().float()
    if isinstance(quantizer, Float8BlockQuantizer):
        _fill_blocks(source, quantizer, made)
    else:
        _fill_tensor(source, quantizer, made)
    return made


def empty(tensor: torch.Tensor, quantizer: Any) -> Any:
    """A tensor of the quantizer's kind, without Python's cost of a torch.Tensor where it is internal."""
    made = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    if not quantizer.internal:
        return made
    from transformer_engine.pytorch.tensor import Float8BlockwiseQTensorStorage, Float8TensorStorage

    kind = Float8BlockwiseQTensorStorage if hasattr(made, "_rowwise_data") else Float8TensorStorage
    return kind(**made.get_metadata())


def _fill_tensor(source: torch.Tensor, quantizer: Any, made: Any) -> None:
    from transformer_engine.pytorch.tensor import Float8CurrentScalingQuantizer

    amax = source.abs().max() if source.numel() else torch.zeros(())
    if isinstance(quantizer, Float8CurrentScalingQuantizer):
        if not quantizer.use_existing_amax:
            quantizer.amax.copy_(amax)
        if quantizer.with_amax_reduction:
            dist.all_reduce(quantizer.amax, op=dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        options = (quantizer.force_pow_2_scales, quantizer.amax_epsilon)
        quantizer.scale.copy_(scales(quantizer.amax, largest(quantizer.dtype), *options))
    else:
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))  # the largest of all rows of the step
    data = to_bytes(source * quantizer.scale, quantizer.dtype)
    made._scale_inv.copy_(quantizer.scale.reciprocal())
    if made._data is not None:
        made._data.copy_(data.view(made._data.shape))
    if made._transpose is not None:
        made._transpose.copy_(fp8_transpose(data, quantizer.dtype).view(made._transpose.shape))
        made._transpose_invalid = False


def _fill_blocks(source: torch.Tensor, quantizer: Any, made: Any) -> None:
    rows = source.flatten(0, -2)
    options = (quantizer.dtype, quantizer.force_pow_2_scales, quantizer.amax_epsilon, quantizer.block_scaling_dim == 2)
    if made._rowwise_data is not None:
        data, inverse = _blocks(rows, *options)
        made._rowwise_data.copy_(data.view(made._rowwise_data.shape))
        _place_scales(made._rowwise_scale_inv, inverse, by_tile=quantizer.block_scaling_dim == 1)
    if made._columnwise_data is not None:
        data, inverse = _blocks(rows.t().contiguous(), *options)
        made._columnwise_data.copy_(data.view(made._columnwise_data.shape))
        _place_scales(made._columnwise_scale_inv, inverse, by_tile=quantizer.block_scaling_dim == 1)


def _blocks(
    matrix: torch.Tensor, dtype: DType, power_of_two: bool, epsilon: float, square: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes [M, K] and what each block is multiplied by to get it back: [M or M / 128, K / 128]."""
    height = BLOCK if square else 1
    num_rows, num_cols = matrix.shape
    tall, wide = math.ceil(num_rows / height), math.ceil(num_cols / BLOCK)
    padded = matrix.new_zeros(tall * height, wide * BLOCK)
    padded[:num_rows, :num_cols] = matrix
    tiles = padded.view(tall, height, wide, BLOCK)
    factor = scales(tiles.abs().amax((1, 3)), largest(dtype), power_of_two, epsilon)
    data = to_bytes((tiles * factor[:, None, :, None]).view(padded.shape), dtype)
    return data[:num_rows, :num_cols].contiguous(), factor.reciprocal()


def _place_scales(place: torch.Tensor, inverse: torch.Tensor, *, by_tile: bool) -> None:
    """Into the padded table: a row a tile of columns for blocks of one row, else as they lie. A GPU leaves the padding as it
    was allocated: here whoever reads it finds NaN."""
    inverse = inverse.t() if by_tile else inverse
    place.fill_(math.nan)
    place[: inverse.size(0), : inverse.size(1)] = inverse


def operand(tensor: Any, *, by_rows: bool) -> torch.Tensor:
    """A product's operand in float32, from the copy that the product reads."""
    if isinstance(tensor, torch.Tensor) and not hasattr(tensor, "_fp8_dtype"):
        return tensor.detach().float()
    if hasattr(tensor, "_rowwise_data"):
        return _block_operand(tensor, by_rows=by_rows)
    data = tensor._data if by_rows else tensor._transpose
    assert data is not None and (by_rows or not tensor._transpose_invalid), f"no FP8 copy {by_rows=} is there"
    inner = data.size(-1 if by_rows else 0)
    assert inner % FP8_SIDE == 0 and data.numel() // inner % FP8_SIDE == 0, f"a product of {tuple(data.shape)}"
    found = from_bytes(data, tensor._fp8_dtype) * tensor._scale_inv
    return found if by_rows else _back(found)


def _block_operand(tensor: Any, *, by_rows: bool) -> torch.Tensor:
    from transformer_engine.pytorch.tensor import Float8BlockwiseQTensorStorage

    metadata = tensor.get_metadata()
    other = "columnwise" if by_rows else "rowwise"
    assert metadata[f"{'rowwise' if by_rows else 'columnwise'}_data"] is not None, f"no FP8 copy {by_rows=} is there"
    one = Float8BlockwiseQTensorStorage(**(metadata | {f"{other}_data": None, f"{other}_scale_inv": None}))
    return one.dequantize(dtype=torch.float32)


def _back(transposed: torch.Tensor) -> torch.Tensor:
    """[K, ...] to [..., K]."""
    return transposed.movedim(0, -1).contiguous()


def dequantize(tensor: Any, dtype: DType) -> torch.Tensor:
    """A tensor of one scale in a wider type."""
    return (from_bytes(tensor._data, tensor._fp8_dtype) * tensor._scale_inv).to(TORCH_TYPES[dtype])


def fp8_transpose(data: torch.Tensor, dtype: DType, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """[..., K] to [K, ...]."""
    found = data.movedim(-1, 0).contiguous()
    return found if out is None else out.copy_(found.view(out.shape))


def bgrad_quantize(gradient: torch.Tensor, quantizer: Any) -> tuple[torch.Tensor, Any]:
    """(the bias's gradient, the gradient in FP8)."""
    return gradient.flatten(0, -2).sum(0), quantize(gradient, quantizer)


def compute_amax(tensor: torch.Tensor, amax: torch.Tensor) -> None:
    """The largest magnitude, into `amax`."""
    amax.copy_(tensor.detach().abs().max())


def multi_tensor_compute_scale_and_scale_inv(
    chunk: int, noop: torch.Tensor, lists: list[list[torch.Tensor]], bound: float, power_of_two: bool, epsilon: float
) -> None:
    """Scales and their reciprocals, of largest magnitudes."""
    for amax, factor, inverse in zip(*lists, strict=True):
        factor.copy_(scales(amax, bound, power_of_two, epsilon))
        inverse.copy_(factor.reciprocal())


def fp8_block_scaling_compute_partial_amax(
    part: torch.Tensor, amax: torch.Tensor, height: int, width: int, start: int, side: int
) -> None:
    """The largest magnitude in each square block of a matrix that is known from `start` on, as far as `part` goes; 0 where
    nothing of a block is."""
    whole = torch.zeros(height * width)
    whole[start : start + part.numel()] = part.detach().float().abs().flatten()
    rows, cols = -(-height // side), -(-width // side)
    padded = F.pad(whole.view(height, width), (0, cols * side - width, 0, rows * side - height))
    amax.zero_()
    amax[:rows, :cols] = padded.view(rows, side, cols, side).amax((1, 3))


def fp8_block_scaling_partial_cast(
    part: torch.Tensor, out: torch.Tensor, factors: torch.Tensor, height: int, width: int, start: int, side: int, dtype: DType
) -> None:
    """That part in FP8, each element by its block's scale."""
    at = torch.arange(start, start + part.numel())
    factor = factors[at // width // side, at % width // side]
    out.copy_(to_bytes(part.detach().float().flatten() * factor, dtype).view(out.shape))


def fused_amax_and_scale_update_after_reduction(
    reduced: torch.Tensor, histories: list[torch.Tensor], factors: list[torch.Tensor], algorithm: str, dtype: DType, margin: int
) -> None:
    """Delayed scaling's step: the largest of the past, and the scale from it. Transformer Engine's own unfused way."""
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch.quantization import _amax_and_scale_update

    recipe = DelayedScaling(margin=margin, amax_compute_algo=algorithm)
    for amax, history, factor in zip(reduced.split([h.size(1) for h in histories]), histories, factors, strict=True):
        history[0].copy_(amax)
        _amax_and_scale_update(history, factor, largest(dtype), recipe)


FUNCTIONS = (
    *(quantize, dequantize, fp8_transpose, bgrad_quantize, compute_amax),
    *(fp8_block_scaling_compute_partial_amax, fp8_block_scaling_partial_cast, multi_tensor_compute_scale_and_scale_inv),
    fused_amax_and_scale_update_after_reduction,
)
