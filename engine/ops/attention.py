"""Attention on a CPU in one call, rotation included: csrc/attention. That of a packed row, as the trainer has it, makes no mask
and copies no prompt; what it keeps of a layer for the backward are its inputs, its output and a log-sum-exp for each query.
That of the tokens of a decoding iteration reads keys and values from an engine's cache, and has no backward.

Shape legend: T tokens of a packed row, or of an iteration, N heads of this rank, M of its key-value heads, D head dim, B
segments, R requests.
"""

from __future__ import annotations

from typing import Any

import torch


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    parents: torch.Tensor,
    *,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float,
) -> torch.Tensor:
    """What queries q [T, N, D] get of values v [T, M, D] by keys k [T, M, D]: [T, N, D], with gradients to all three.

    A token attends to its own segment between cu_seqlens [B + 1] (int32) up to itself, and to the whole segment parents [B]
    (int64) that its own goes on from, where that is not -1. q and k are first rotated by `rotary`, cosines and sines
    [T, D / 2] of their type. float32, bfloat16 or float16, summed in float32; tokens and heads may have any stride.
    Deterministic, whatever the number of threads. ValueError names argument, rule and value for a wrong shape or type, for
    boundaries that do not rise from 0 to T, and for a parent that comes later, has one itself, or whose segments do not
    follow one another.
    """
    output: torch.Tensor = _PackedAttention.apply(q, k, v, *(rotary or (None, None)), cu_seqlens, parents, scale)
    return output


def cached_attention(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    table: torch.Tensor,
    angles: torch.Tensor,
    cache: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """What the tokens of qkv [T, (N + 2 M) D] get, whose columns are queries, keys and values: [T, N D].

    Queries and keys are rotated by the angles [P, D] of positions [T] (int64), cosines in the first half of a row and sines in
    the second. Keys and values are written to slots [T] (int64) of the cache [blocks, M, places, 2 D], slot s being place
    s % places of block s // places; a block holds, for each head, keys as [D, places] and then values as [places, D]. Then a
    token attends to positions 0 to its own of its request, which are in the blocks of its row of the table [R, at least so
    many] (int32); request r has the tokens from starts[r] to starts[r + 1] (int32). All float32, on a CPU; D and places are
    multiples of 32.

    A token's output depends on its own request alone, not on other tokens or on threads. ValueError names argument, rule and
    value for a wrong shape or type, and for a position, slot or block that is not there.
    """
    out: torch.Tensor = torch.ops.semion.cached_attention.default(qkv, positions, slots, starts, table, angles, cache, scale)
    return out


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cosines: torch.Tensor | None,
        sines: torch.Tensor | None,
        cu_seqlens: torch.Tensor,
        parents: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        output: torch.Tensor
        output, sums = torch.ops.semion.packed_attention(q, k, v, cosines, sines, cu_seqlens, parents, scale)
        ctx.save_for_backward(q, k, v, cosines, sines, cu_seqlens, parents, output, sums)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        back = gradients[0] if gradients[0].stride(-1) == 1 else gradients[0].contiguous()
        found = torch.ops.semion.packed_attention_backward(back, *ctx.saved_tensors, ctx.scale)
        return *found, None, None, None, None, None
