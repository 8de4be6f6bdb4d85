"""The stand-in for `transformer_engine_torch`, Transformer Engine 2.12's bindings to C++ and CUDA: what a Llama's layers, the
FP8 recipes and AdamW call, in plain torch and float32. Anything else raises by name. `quantize` and `adam` hold the longer
parts.

Shape legend: M rows, N and K columns, T tokens of a packed row, H heads, D head dim.
"""

from __future__ import annotations

import enum
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from tests.te_cpu import adam, device, quantize
from tests.te_cpu.quantize import TORCH_TYPES, DType

Quantizer = Any


def names(title: str, *members: str) -> type[enum.IntEnum]:
    """An enumeration of the bindings; only the names matter."""
    return enum.IntEnum(title, {name: value for value, name in enumerate(members)})  # type: ignore[return-value]


ENUMERATIONS = (
    names("NVTE_Fused_Attn_Backend", "NVTE_F16_max512_seqlen", "NVTE_F16_arbitrary_seqlen", "NVTE_FP8", "NVTE_No_Backend"),
    names("NVTE_Bias_Type", "NVTE_NO_BIAS", "NVTE_PRE_SCALE_BIAS", "NVTE_POST_SCALE_BIAS", "NVTE_ALIBI"),
    names(
        "NVTE_Mask_Type",
        *("NVTE_NO_MASK", "NVTE_PADDING_MASK", "NVTE_CAUSAL_MASK", "NVTE_PADDING_CAUSAL_MASK"),
        *("NVTE_CAUSAL_BOTTOM_RIGHT_MASK", "NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK"),
    ),
    names("NVTE_Softmax_Type", "NVTE_VANILLA_SOFTMAX", "NVTE_OFF_BY_ONE_SOFTMAX", "NVTE_LEARNABLE_SOFTMAX"),
    names(
        "NVTE_QKV_Format",
        *("NVTE_BSHD", "NVTE_SBHD", "NVTE_THD", "NVTE_SBHD_2BSHD", "NVTE_BSHD_2SBHD", "NVTE_THD_2BSHD", "NVTE_THD_2SBHD"),
    ),
    names(
        "NVTE_QKV_Layout",
        *(f"NVTE_{part}" for part in ("SB3HD", "SBH3D", "SBHD_SB2HD", "SBHD_SBH2D", "SBHD_SBHD_SBHD")),
        *(f"NVTE_{part}" for part in ("BS3HD", "BSH3D", "BSHD_BS2HD", "BSHD_BSH2D", "BSHD_BSHD_BSHD")),
        *(f"NVTE_{part}" for part in ("T3HD", "TH3D", "THD_T2HD", "THD_TH2D", "THD_THD_THD")),
        *(f"NVTE_{part}" for part in ("SBHD_BSHD_BSHD", "BSHD_SBHD_SBHD", "THD_BSHD_BSHD", "THD_SBHD_SBHD")),
        *(f"NVTE_Paged_KV_{q}_{kv}_{kv}" for q in ("BSHD", "SBHD", "THD") for kv in ("BSHD", "SBHD")),
    ),
    names("FP8FwdTensors", *(f"GEMM{i}_{part}" for i in (1, 2, 3) for part in ("INPUT", "WEIGHT", "OUTPUT"))),
    names("FP8BwdTensors", *(f"GRAD_{part}{i}" for i in (1, 2, 3) for part in ("OUTPUT", "INPUT"))),
    names("CommOverlapType", "RS", "AG"),
    names("CommOverlapAlgo", "BULK_OVERLAP_AG", "BULK_OVERLAP_RS"),
    names("Float8BlockScaleTensorFormat", "GEMM_READY", "COMPACT"),
)
BACKENDS, LAYOUTS = ENUMERATIONS[0], ENUMERATIONS[5]


class FP8TensorMeta:
    """The type that old interfaces name."""


class CommOverlap:
    """Communication inside products: it takes several GPUs."""


class CommOverlapP2P(CommOverlap):
    """The same from peer to peer."""


class CommOverlapHelper:
    """What sets the two up."""


def bindings() -> dict[str, Any]:
    """Everything of the module `transformer_engine_torch` that has a stand-in."""
    made = {kind.__name__: kind for kind in ENUMERATIONS}
    types_ = (DType, FP8TensorMeta, CommOverlap, CommOverlapP2P, CommOverlapHelper)
    functions = (
        *(generic_gemm, rmsnorm_fwd, rmsnorm_bwd, get_fused_attn_backend, fused_attn_fwd, fused_attn_bwd),
        *(fused_rope_forward, fused_rope_backward),
        *quantize.FUNCTIONS,
        *adam.FUNCTIONS,
    )
    constants = {"get_cudnn_version": lambda: device.CUDNN, "get_cublasLt_version": lambda: device.CUBLASLT}
    looked_up = {name: missing(name) for name in ("layernorm_fwd", "layernorm_bwd")}  # beside RMSNorm's, to choose from
    return made | constants | looked_up | {one.__name__: one for one in (*types_, *functions)}


def missing(name: str) -> Any:
    """What stands for a binding that has no stand-in: it may be looked up, and raises where it is called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def raises(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{name} has no stand-in")

    return raises


def generic_gemm(
    a: Any,
    transpose_a: bool,
    b: Any,
    transpose_b: bool,
    out: torch.Tensor | None,
    quantizer: Quantizer,
    out_dtype: DType | None,
    bias: torch.Tensor | None,
    bias_dtype: DType,
    gelu: bool,
    gelu_in: torch.Tensor | None,
    grad: bool,
    workspace: torch.Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: Any,
    alpha: float,
    beta: float | None,
    **_: Any,
) -> tuple[torch.Tensor, None, None, None]:
    """op(b) @ op(a), as cuBLAS does it with matrices that count columns first. An FP8 operand is read the way that a Hopper
    must read it: by rows where its rows are summed over, else from its transposed copy, which has to be there."""
    assert quantizer is None and not gelu and comm_overlap is None and (bias is None or not bias.numel()), "unused by Llama"
    assert alpha == 1 and (beta in (None, 0.0, 1.0)), (alpha, beta)
    left, right = quantize.operand(b, by_rows=not transpose_b), quantize.operand(a, by_rows=transpose_a)
    matrix = left.flatten(0, -2)
    product = (matrix.t() if transpose_b else matrix) @ (right.flatten(0, -2).t() if transpose_a else right.flatten(0, -2))
    if not transpose_b:
        product = product.view(*left.shape[:-1], product.size(-1))
    if out is not None:
        product = product.view(out.shape)
        out.copy_(out + product if accumulate else product)
        return out, None, None, None
    dtype = TORCH_TYPES[out_dtype] if out_dtype is not None else a.dtype
    return product.to(dtype), None, None, None


def fused_rope_forward(
    t: torch.Tensor,
    freqs: torch.Tensor,
    start_positions: None,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: torch.Tensor,
    cp_size: int,
    cp_rank: int,
) -> torch.Tensor:
    """Packed [T, N, D] turned by the angles [S, 1, 1, D] of each token's place in its sequence, in float32."""
    assert qkv_format.name == "NVTE_THD" and start_positions is None and not interleaved and cp_size == 1, qkv_format
    return _turned(t, freqs, cu_seqlens, 1.0)


def fused_rope_backward(gradient: torch.Tensor, freqs: torch.Tensor, *rest: Any) -> torch.Tensor:
    """The gradient, turned back."""
    return _turned(gradient, freqs, rest[3], -1.0)


def _turned(t: torch.Tensor, freqs: torch.Tensor, cu_seqlens: torch.Tensor, direction: float) -> torch.Tensor:
    places = torch.cat([torch.arange(int(length)) for length in cu_seqlens.diff()])
    angles = freqs.flatten(1)[places.to(freqs.device)].unsqueeze(1)  # [T, 1, D]
    wide = t.float()
    first, second = wide.chunk(2, -1)
    turned = wide * angles.cos() + direction * torch.cat([-second, first], -1) * angles.sin()
    return turned.to(t.dtype)


def rmsnorm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: Any,
    quantizer: Quantizer,
    out_dtype: DType,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Any, None, torch.Tensor]:
    """(normed rows [M, K], nothing, 1 / root mean square [M])."""
    assert not zero_centered
    inverse = torch.rsqrt(x.float().square().mean(-1) + eps)
    normed = (x.float() * inverse[:, None] * weight.float()).to(TORCH_TYPES[out_dtype])
    if quantizer is not None:
        return quantize.quantize(normed, quantizer, out), None, inverse
    if out is not None:
        normed = out.copy_(normed)
    return normed, None, inverse


def rmsnorm_bwd(
    gradient: torch.Tensor,
    x: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of the rows [M, K], of the weight [K])."""
    normed = x.float() * inverse[:, None]
    scaled = gradient.float() * weight.float()
    rows = inverse[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return rows.to(x.dtype), (gradient.float() * normed).sum(0).to(weight.dtype)


def get_fused_attn_backend(*arguments: Any) -> enum.IntEnum:
    """The one that takes any length, for 16-bit queries and keys."""
    half = {DType.kFloat16, DType.kBFloat16}
    chosen = "NVTE_F16_arbitrary_seqlen" if half & set(arguments[:4]) else "NVTE_No_Backend"
    return BACKENDS[chosen]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention [T, H, D] inside each sequence of a packed row, in float32."""
    outputs = []
    for start, end in pairwise(bounds.tolist()):
        one_q, one_k, one_v = (x[start:end].float().transpose(0, 1)[None] for x in (q, k, v))
        gqa = q.size(1) != k.size(1)
        outputs.append(F.scaled_dot_product_attention(one_q, one_k, one_v, is_causal=True, scale=scale, enable_gqa=gqa))
    rest = q.size(0) - int(bounds[-1])
    found = torch.cat([one[0].transpose(0, 1) for one in outputs])
    return F.pad(found, (0, 0, 0, 0, 0, rest))


def fused_attn_fwd(
    max_q: int, max_kv: int, is_training: bool, scale: float, dropout: float, zero_fill: bool, layout: Any, *arguments: Any
) -> list[torch.Tensor]:
    """[output [T, H, D], and what the backward is handed: nothing that this one needs]."""
    bias, mask, softmax, window, bottom_right, bounds_q, bounds_kv, q, k, v, _, padded_q, padded_kv, *_ = arguments
    found = (layout.name, bias.name, mask.name, softmax.name, dropout, tuple(window), bottom_right)
    wanted = ("NVTE_THD_THD_THD", "NVTE_NO_BIAS", "NVTE_PADDING_CAUSAL_MASK", "NVTE_VANILLA_SOFTMAX", 0.0, (-1, 0), False)
    assert found == wanted, found
    for other in (bounds_kv, padded_q, padded_kv):
        assert other is None or torch.equal(bounds_q, other), "sequences without gaps"
    assert max_q >= int(bounds_q.diff().max())
    output = _attend(q, k, v, bounds_q, scale).to(q.dtype)
    return [output, torch.zeros(1), torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_q: int, max_kv: int, scale: float, dropout: float, zero_fill: bool, layout: Any, *arguments: Any
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of q, k, v; none of a bias."""
    bounds_q = next(one for one in arguments if isinstance(one, torch.Tensor))
    at = next(i for i, one in enumerate(arguments) if one is bounds_q)
    q, k, v, _, gradient = arguments[at + 2 : at + 7]
    with torch.enable_grad():
        q_, k_, v_ = leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
        found = torch.autograd.grad(_attend(q_, k_, v_, bounds_q, scale), leaves, gradient.float())
    return (*(one.to(q.dtype) for one in found), None, None)
