"""Attention inside the sequences of a packed row, where samples of one prompt may share its tokens: every sample attends to
itself, causally, and to the whole of the prompt's segment that it goes on from. It lays out no row (packing.py) and builds no
model.

Two attentions of a sample, over its own tokens and over the prompt's, are merged exactly by their log-sum-exps; the backward of
each takes the merged output and log-sum-exp for its own, which makes its gradients those of the whole (as in ring attention,
Liu et al. 2023, arXiv 2310.01889). So no key is copied, no mask is made and nothing is padded: memory and work grow with the
tokens of the row.

Shape legend: T tokens of a packed row, N heads of this rank, M of its key-value heads, D head dim, L queries, S keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from engine.core.types import Microbatch

LARGEST_FLASH_HEAD = 256  # head dim of torch's flash attention on GPUs


class Shared:
    """The prompts of a row that several samples share, and the samples, which follow theirs."""

    def __init__(self, prompts: list[slice], samples: list[slice], num_tokens: int, device: torch.device) -> None:
        self._cuts: list[tuple[list[int], slice]] = []
        places = []
        for parts in (prompts, samples):
            ends = [0, *(end for part in parts for end in (part.start, part.stop)), num_tokens]
            self._cuts.append(([end - start for start, end in pairwise(ends)], slice(1, None, 2)))
            places.append(torch.cat([torch.arange(part.start, part.stop) for part in parts]).to(device))
        self.prompt_tokens, self.sample_tokens = places  # int64, of all prompts and of all samples

    def prompts(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each prompt's part of [1, N, T, ...]."""
        lengths, wanted = self._cuts[0]
        return x.split(lengths, 2)[wanted]

    def samples(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The part of [1, N, T, ...] that the samples of each prompt have together."""
        lengths, wanted = self._cuts[1]
        return x.split(lengths, 2)[wanted]


@dataclass
class Row(PackedSeqParams):
    """What layers are told of a packed row: megatron-core's bounds, and what attention and output layer need beside them."""

    lengths: list[int] = field(default_factory=list)  # of the segments, on the host
    shared: Shared | None = None  # None where every sequence has a prompt of its own
    target_positions: torch.Tensor | None = None  # int64, the positions whose log-probs somebody looks at
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None  # cosines and sines [T, 1, D / 2] of every token's position

    def segments(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each segment's part of [1, N, T, ...]."""
        return x.split(self.lengths, 2)


def row_of(microbatch: Microbatch, on_host: Microbatch) -> Row:
    """The row as layers take it: the microbatch on the device, and the same as it came, of which the host reads once a row what
    layers would otherwise ask the device for."""
    bounds, parents = on_host.cu_seqlens.tolist(), on_host.parents.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    prompts, samples = [], []
    for parent, family in groupby(range(len(parents)), key=parents.__getitem__):
        if parent >= 0:
            children = list(family)
            prompts.append(slice(bounds[parent], bounds[parent + 1]))
            samples.append(slice(bounds[children[0]], bounds[children[-1] + 1]))
    return Row(
        qkv_format="thd",
        cu_seqlens_q=microbatch.cu_seqlens,
        cu_seqlens_kv=microbatch.cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=lengths,
        shared=Shared(prompts, samples, bounds[-1], microbatch.cu_seqlens.device) if prompts else None,
        target_positions=microbatch.target_positions,
    )


def rotary_of(inverse_frequencies: torch.Tensor, position_ids: torch.Tensor, dtype: torch.dtype) -> Any:
    """(cosines, sines) [T, 1, D / 2] of tokens at `position_ids` [T], as megatron-core rounds them."""
    angles = torch.outer(position_ids.to(inverse_frequencies.dtype), inverse_frequencies.to(position_ids.device)).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class PackedAttention(MegatronModule):
    """Causal grouped-query attention inside each sequence of a packed row, rotary embedding included: [T, N, D] -> [T, N * D].

    A row where prompts are shared takes `_SharedPrompts`; any other torch's attention, sequence by sequence, which is the plain
    twin of it."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, packed_seq_params: Row, **__: Any
    ) -> torch.Tensor:
        """Attends within the segments of the row, and from samples to the prompts that they continue."""
        row = packed_seq_params
        assert row.rotary is not None, "the model gives every row its cosines and sines"
        query, key = _Rotated.apply(query, *row.rotary), _Rotated.apply(key, *row.rotary)
        if row.shared is not None:
            output: torch.Tensor = _SharedPrompts.apply(query, key, value, row, self.scale)
            return output.flatten(1)
        gqa = query.size(-2) != key.size(-2)
        # `split`, whose backward joins the parts: that of a slice is as long as the row, for every sequence of it.
        outputs = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=gqa)
            for q, k, v in zip(*(row.segments(_heads_first(x)) for x in (query, key, value)), strict=True)
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


class _SharedPrompts(torch.autograd.Function):
    """Attention [T, N, D] of a row with families; q [T, N, D], k and v [T, M, D], rotated."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: Row, scale: float | None) -> torch.Tensor:
        assert row.shared is not None
        kernel, shared = kernel_of(q), row.shared
        scale = q.size(-1) ** -0.5 if scale is None else scale
        heads_first = [_heads_first(x) for x in (q, k, v)]
        found = [kernel.forward(*parts, True, scale) for parts in zip(*map(row.segments, heads_first), strict=True)]
        output, sums = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
        of_prompts = [
            kernel.forward(*parts, False, scale)
            for parts in zip(shared.samples(heads_first[0]), *map(shared.prompts, heads_first[1:]), strict=True)
        ]
        more, more_sums = (torch.cat(parts, 2) for parts in zip(*of_prompts, strict=True))
        own_sums = sums.index_select(2, shared.sample_tokens)
        joined = torch.logaddexp(own_sums, more_sums)
        own_share, more_share = ((part - joined).exp().unsqueeze(-1) for part in (own_sums, more_sums))
        merged = output.index_select(2, shared.sample_tokens) * own_share + more * more_share
        output.index_copy_(2, shared.sample_tokens, merged.to(output.dtype))
        sums.index_copy_(2, shared.sample_tokens, joined)
        tokens_first = output.squeeze(0).transpose(0, 1).contiguous()
        ctx.save_for_backward(q, k, v, tokens_first, sums)
        ctx.row, ctx.scale = row, scale
        return tokens_first

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, output, sums = ctx.saved_tensors
        kernel, row, shared = kernel_of(q), ctx.row, ctx.row.shared
        back, q, k, v, output = map(_heads_first, (gradients[0].contiguous(), q, k, v, output))
        known = (back, q, k, v, output, sums)
        found = [kernel.backward(*parts, True, ctx.scale) for parts in zip(*map(row.segments, known), strict=True)]
        dq, dk, dv = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
        of_samples, of_keys = [shared.samples(x) for x in (back, q, output, sums)], [shared.prompts(x) for x in (k, v)]
        of_prompts = [
            kernel.backward(*parts, False, ctx.scale) for parts in zip(*of_samples[:2], *of_keys, *of_samples[2:], strict=True)
        ]
        places = (shared.sample_tokens, shared.prompt_tokens, shared.prompt_tokens)
        for whole, place, parts in zip((dq, dk, dv), places, zip(*of_prompts, strict=True), strict=True):
            whole.index_add_(2, place, torch.cat(parts, 2))
        return *(x.squeeze(0).transpose(0, 1) for x in (dq, dk, dv)), None, None


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """[T, N, D] as torch's kernels take it: [1, N, T, D]."""
    return x.transpose(0, 1).unsqueeze(0)


@dataclass(frozen=True)
class Kernel:
    """Attention of L queries [1, N, L, D] over S keys and values [1, M, S, D], causal where L = S, or whole.

    forward: (q, k, v, causal, scale) -> (output [1, N, L, D], log-sum-exps [1, N, L] in float32 or wider).
    backward: (gradient, q, k, v, output, log-sum-exps, causal, scale) -> gradients of q, k and v. Output and log-sum-exps
    may be those of an attention over more keys: the gradients are then this part's of it.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, ...]]


def kernel_of(q: torch.Tensor) -> Kernel:
    """torch's flash attention on CPUs, and on GPUs (never run so far) for half precision; otherwise the plain one."""
    if q.device.type == "cpu":
        return ON_CPU
    if q.device.type == "cuda" and q.dtype.itemsize == 2 and q.size(-1) % 8 == 0 and q.size(-1) <= LARGEST_FLASH_HEAD:
        return ON_CUDA
    return PLAIN


def _cpu_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    found: tuple[torch.Tensor, torch.Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, scale=scale
    )
    return found


def _cpu_backward(*tensors: torch.Tensor | Any) -> tuple[torch.Tensor, ...]:
    *known, causal, scale = tensors
    found: tuple[torch.Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *known, 0.0, causal, scale=scale
    )
    return found


def _cuda_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    output, sums, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return output, sums


def _cuda_backward(*tensors: torch.Tensor | Any) -> tuple[torch.Tensor, ...]:
    *known, sums, causal, scale = tensors
    bounds = (None, None, known[1].size(2), known[2].size(2))  # of equally long sequences none are named
    no_dropout = torch.zeros((), dtype=torch.int64, device=sums.device)  # seed and offset, which without dropout nobody reads
    found: tuple[torch.Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *known, sums.contiguous(), *bounds, 0.0, causal, no_dropout, no_dropout, scale=scale
    )
    return found


def _scores(q: torch.Tensor, k: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """Scaled scores [1, M, N / M, L, S] in float32 or wider, -inf where a key comes later."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = scale * (q.to(wide).unflatten(1, (k.size(1), -1)) @ k.to(wide).transpose(-1, -2).unsqueeze(2))
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, float("-inf")) if causal else scores


def _plain_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = _scores(q, k, causal, scale)
    sums = scores.logsumexp(-1)
    output = (scores - sums.unsqueeze(-1)).exp() @ v.to(scores.dtype).unsqueeze(2)
    return output.flatten(1, 2).to(q.dtype), sums.flatten(1, 2)


def _plain_backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    sums: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    scores = _scores(q, k, causal, scale)
    back, queries, known, totals = (
        x.to(scores.dtype).unflatten(1, (k.size(1), -1)) for x in (gradient, q, output, sums)
    )  # [1, M, N / M, L, ...]
    keys, values = (x.to(scores.dtype).unsqueeze(2) for x in (k, v))
    shares = (scores - totals.unsqueeze(-1)).exp()
    back_scores = scale * shares * (back @ values.transpose(-1, -2) - (back * known).sum(-1, keepdim=True))
    dq = (back_scores @ keys).flatten(1, 2)
    dk, dv = ((x.transpose(-1, -2) @ y).sum(2) for x, y in ((back_scores, queries), (shares, back)))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


PLAIN = Kernel(_plain_forward, _plain_backward)
ON_CPU = Kernel(_cpu_forward, _cpu_backward)
ON_CUDA = Kernel(_cuda_forward, _cuda_backward)
