"""Attention inside the sequences of a packed row, where samples of one prompt may share its tokens: every sample attends to
itself, causally, and to the whole of the prompt's segment that it goes on from. It lays out no row (packing.py) and builds no
model.

On a CPU a sample has one softmax over the prompt's tokens and its own (engine/ops). Elsewhere it has two attentions, over its
own tokens and over the prompt's, merged exactly by their log-sum-exps; the backward of each takes the merged output and
log-sum-exp for its own, which makes its gradients those of the whole (as in ring attention, Liu et al. 2023, arXiv 2310.01889).
So no mask is made and no key is copied for a sample: memory and work grow with the tokens of the row (but for the float32 sums
of a GPU's flash attention, which pads each segment to 128 tokens in its backward).

Shape legend: T tokens of a packed row, N heads of this rank, M of its key-value heads, D head dim, L queries, S keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from engine.capacity.memory import takes_flash
from engine.core.types import Microbatch
from engine.ops import packed_attention


@dataclass(frozen=True)
class Pieces:
    """Which queries attend to which keys: those of one piece to those of the same one. Bounds [B + 1] int32, on the device."""

    of_queries: torch.Tensor
    of_keys: torch.Tensor
    query_lengths: list[int]  # on the host
    key_lengths: list[int]


@dataclass(frozen=True)
class Shared:
    """The prompts of a row that several samples share, and the samples, which follow theirs."""

    prompt_tokens: torch.Tensor  # int64, places of all prompts and of all samples in the row
    sample_tokens: torch.Tensor
    pieces: Pieces  # the samples of a prompt together, and the prompt

    def tensors(self) -> list[torch.Tensor]:
        """All that it has."""
        return [self.prompt_tokens, self.sample_tokens, self.pieces.of_queries, self.pieces.of_keys]

    def of(self, tensors: list[torch.Tensor]) -> Shared:
        """The same with other `tensors`, as on another device."""
        prompts, samples, of_queries, of_keys = tensors
        return Shared(prompts, samples, Pieces(of_queries, of_keys, self.pieces.query_lengths, self.pieces.key_lengths))


@dataclass(frozen=True)
class Layout:
    """Where the segments of a row lie."""

    lengths: list[int]  # of the segments, on the host
    shared: Shared | None  # None where every sequence has a prompt of its own


@dataclass
class Row(PackedSeqParams):
    """What layers are told of a packed row: megatron-core's bounds, and what attention and output layer need beside them."""

    lengths: list[int] = field(default_factory=list)  # of the segments, on the host
    parents: torch.Tensor | None = None  # int64 [B]: the segment that one goes on from, or -1
    shared: Shared | None = None  # None where every sequence has a prompt of its own
    target_positions: torch.Tensor | None = None  # int64, the positions whose log-probs somebody looks at
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None  # cosines and sines [T, 1, D / 2] of every token's position

    def segments(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each segment's part of [T, ...]."""
        return x.split(self.lengths)

    def own(self) -> Pieces:
        """Every segment and itself."""
        return Pieces(self.cu_seqlens_q, self.cu_seqlens_kv, self.lengths, self.lengths)


def layout_of(on_host: Microbatch) -> Layout:
    """Of a row on the host, which is read there once, where layers would otherwise ask the device. Its tensors are on the host
    too."""
    assert on_host.cu_seqlens.is_cpu, "the host would wait for a row's segments on the device"
    bounds, parents = on_host.cu_seqlens.tolist(), on_host.parents.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    prompts, samples = [], []
    for parent, family in groupby(range(len(parents)), key=parents.__getitem__):
        if parent >= 0:
            children = list(family)
            prompts.append(slice(bounds[parent], bounds[parent + 1]))
            samples.append(slice(bounds[children[0]], bounds[children[-1] + 1]))
    return Layout(lengths, _shared(prompts, samples) if prompts else None)


def row_of(microbatch: Microbatch, layout: Layout) -> Row:
    """The row as layers take it; `microbatch` and the tensors of its layout are on the device."""
    longest = max(layout.lengths)
    return Row(
        qkv_format="thd",
        cu_seqlens_q=microbatch.cu_seqlens,
        cu_seqlens_kv=microbatch.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=layout.lengths,
        parents=microbatch.parents,
        shared=layout.shared,
        target_positions=microbatch.target_positions,
    )


def _shared(prompts: list[slice], samples: list[slice]) -> Shared:
    def places(parts: list[slice]) -> torch.Tensor:
        return torch.cat([torch.arange(part.start, part.stop) for part in parts])

    def bounds(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

    of_samples, of_prompts = ([part.stop - part.start for part in parts] for parts in (samples, prompts))
    pieces = Pieces(bounds(of_samples), bounds(of_prompts), of_samples, of_prompts)
    return Shared(places(prompts), places(samples), pieces)


def rotary_of(inverse_frequencies: torch.Tensor, position_ids: torch.Tensor, dtype: torch.dtype) -> Any:
    """(cosines, sines) [T, 1, D / 2] of tokens at `position_ids` [T], as megatron-core rounds them."""
    angles = torch.outer(position_ids.to(inverse_frequencies.dtype), inverse_frequencies.to(position_ids.device)).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class PackedAttention(MegatronModule):
    """Causal grouped-query attention inside each sequence of a packed row, rotary embedding included: [T, N, D] -> [T, N * D].

    On a CPU it is one kernel of ours. On a GPU in half precision it is torch's flash attention over all segments at once
    (never run so far), and what is left, such as float64, takes the plain kernel for rows where prompts are shared, any other
    row torch's attention, sequence by sequence."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, packed_seq_params: Row, **__: Any
    ) -> torch.Tensor:
        """Attends within the segments of the row, and from samples to the prompts that they continue."""
        row, scale = packed_seq_params, self.scale or query.size(-1) ** -0.5
        assert row.rotary is not None, "the model gives every row its cosines and sines"
        if on_cpu(query):
            assert row.parents is not None
            cosines, sines = (x.squeeze(1) for x in row.rotary)
            output = packed_attention(query, key, value, row.cu_seqlens_q, row.parents, rotary=(cosines, sines), scale=scale)
            return output.flatten(1)
        query, key = _Rotated.apply(query, *row.rotary), _Rotated.apply(key, *row.rotary)
        kernel = kernel_of(query)
        if row.shared is not None or kernel is FLASH:
            output = _Joined.apply(query, key, value, row, kernel, scale)
            return output.flatten(1)
        gqa = query.size(-2) != key.size(-2)
        # `split`, whose backward joins the parts: that of a slice is as long as the row, for every sequence of it.
        outputs = [
            F.scaled_dot_product_attention(
                _heads_first(q), _heads_first(k), _heads_first(v), is_causal=True, scale=scale, enable_gqa=gqa
            )
            for q, k, v in zip(*map(row.segments, (query, key, value)), strict=True)
        ]
        return torch.cat(outputs, 2)[0].transpose(0, 1).flatten(1)


class _Rotated(torch.autograd.Function):
    """x * cosines + rotate_half(x) * sines, megatron-core's arithmetic to the bit, without keeping x for the backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosines, sines)
        return _rotated(x, cosines, sines)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cosines, sines = ctx.saved_tensors
        return _rotated(gradients[0], cosines, -sines), None, None


def _rotated(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), -1)


class _Joined(torch.autograd.Function):
    """Attention [T, N, D] of a row, of families too; q [T, N, D], k and v [T, M, D], rotated."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: Row, kernel: Kernel, scale: float
    ) -> torch.Tensor:
        shared = row.shared
        output, sums = kernel.forward(q, k, v, row.own(), True, scale)
        if shared is not None:
            queries, keys, values = q[shared.sample_tokens], k[shared.prompt_tokens], v[shared.prompt_tokens]
            more, more_sums = kernel.forward(queries, keys, values, shared.pieces, False, scale)
            own_sums = sums[:, shared.sample_tokens]
            joined = torch.logaddexp(own_sums, more_sums)
            own_share, more_share = ((part - joined).exp().t().unsqueeze(-1) for part in (own_sums, more_sums))
            merged = output[shared.sample_tokens] * own_share + more * more_share
            output.index_copy_(0, shared.sample_tokens, merged.to(output.dtype))
            sums.index_copy_(1, shared.sample_tokens, joined)
        ctx.save_for_backward(q, k, v, output, sums)
        ctx.row, ctx.kernel, ctx.scale = row, kernel, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, output, sums = ctx.saved_tensors
        kernel, shared, back = ctx.kernel, ctx.row.shared, gradients[0].contiguous()
        found = kernel.backward(back, q, k, v, output, sums, ctx.row.own(), True, ctx.scale)
        if shared is not None:
            of_samples, of_prompts = shared.sample_tokens, shared.prompt_tokens
            more = kernel.backward(
                *(back[of_samples], q[of_samples], k[of_prompts], v[of_prompts], output[of_samples], sums[:, of_samples]),
                *(shared.pieces, False, ctx.scale),
            )
            for whole, place, part in zip(found, (of_samples, of_prompts, of_prompts), more, strict=True):
                whole.index_add_(0, place, part)
        return *found, None, None, None


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """[T, N, D] as torch's attention takes it: [1, N, T, D]."""
    return x.transpose(0, 1).unsqueeze(0)


@dataclass(frozen=True)
class Kernel:
    """Attention of queries [T, N, D] over keys and values [S, M, D], each piece of queries over its piece of keys: causal
    where both are as long, or whole.

    forward: (q, k, v, pieces, causal, scale) -> (output [T, N, D], log-sum-exps [N, T] in float32 or wider).
    backward: (gradient, q, k, v, output, log-sum-exps, pieces, causal, scale) -> gradients of q, k and v. Output and
    log-sum-exps may be those of an attention over more keys: the gradients are then this part's of it.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, ...]]


def on_cpu(q: torch.Tensor) -> bool:
    """Whether our kernel of CPUs takes it."""
    return q.is_cpu and q.dtype in (torch.float32, torch.bfloat16, torch.float16)


def kernel_of(q: torch.Tensor) -> Kernel:
    """torch's flash attention on GPUs (never run so far) for half precision; otherwise the plain one."""
    return FLASH if q.device.type == "cuda" and takes_flash(q.dtype.itemsize, q.size(-1)) else PLAIN


def _flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: Pieces, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(pieces.query_lengths), max(pieces.key_lengths)
    output, sums, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, pieces.of_queries, pieces.of_keys, *longest, 0.0, causal, False, scale=scale
    )
    return output, sums


def _flash_backward(*known: Any) -> tuple[torch.Tensor, ...]:
    *tensors, pieces, causal, scale = known
    longest = max(pieces.query_lengths), max(pieces.key_lengths)
    no_dropout = torch.zeros((), dtype=torch.int64, device=tensors[0].device)  # seed and offset, which nobody reads then
    found: tuple[torch.Tensor, ...] = torch.ops.aten._flash_attention_backward(
        *(x.contiguous() for x in tensors),
        *(pieces.of_queries, pieces.of_keys, *longest, 0.0, causal, no_dropout, no_dropout),
        scale=scale,
    )
    return found


def _scores(q: torch.Tensor, k: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """Scaled scores [M, N / M, L, S] in float32 or wider, -inf where a key comes later."""
    scores = scale * (_by_group(q, k.size(1)) @ _by_group(k, k.size(1)).transpose(-1, -2))
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, float("-inf")) if causal else scores


def _by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[L, N, D] as [M, N / M, L, D] in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).transpose(0, 1).unflatten(0, (groups, -1))


def _each(pieces: Pieces, of_queries: tuple[torch.Tensor, ...], of_keys: tuple[torch.Tensor, ...]) -> Iterator[Any]:
    """The parts of all tensors, piece by piece."""
    parts = [x.split(pieces.query_lengths) for x in of_queries] + [x.split(pieces.key_lengths) for x in of_keys]
    return zip(*parts, strict=True)


def _plain_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: Pieces, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs, all_sums = [], []
    for queries, keys, values in _each(pieces, (q,), (k, v)):
        scores = _scores(queries, keys, causal, scale)
        sums = scores.logsumexp(-1)
        output = (scores - sums.unsqueeze(-1)).exp() @ _by_group(values, k.size(1))
        outputs.append(output.flatten(0, 1).transpose(0, 1).to(q.dtype))
        all_sums.append(sums.flatten(0, 1))
    return torch.cat(outputs), torch.cat(all_sums, 1)


def _plain_backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    sums: torch.Tensor,
    pieces: Pieces,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    found: tuple[list[torch.Tensor], ...] = ([], [], [])
    groups = k.size(1)
    for back, queries, known, totals, keys, values in _each(pieces, (gradient, q, output, sums.t()), (k, v)):
        scores = _scores(queries, keys, causal, scale)
        shares = (scores - totals.t().unflatten(0, (groups, -1)).unsqueeze(-1)).exp()
        wide_back, wide_keys = _by_group(back, groups), _by_group(keys, groups)
        inner = (wide_back * _by_group(known, groups)).sum(-1, keepdim=True)
        back_scores = scale * shares * (wide_back @ _by_group(values, groups).transpose(-1, -2) - inner)
        found[0].append((back_scores @ wide_keys).flatten(0, 1))
        found[1].append((back_scores.transpose(-1, -2) @ _by_group(queries, groups)).sum(1))
        found[2].append((shares.transpose(-1, -2) @ wide_back).sum(1))
    return tuple(torch.cat(parts, 1).transpose(0, 1).to(q.dtype) for parts in found)


PLAIN = Kernel(_plain_forward, _plain_backward)
FLASH = Kernel(_flash_forward, _flash_backward)
