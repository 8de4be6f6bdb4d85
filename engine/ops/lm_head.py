"""The output layer and its log-probs together, without all logits: a few rows at a time go through the weight, the
kernels, and back. At no time do more than `chunk_rows` × V_local logits exist.

Where the processor has no products of half precision, or the logits are asked for in float32, the products are done in it,
the weight widened a block at a time.

Shape legend: T tokens, H hidden, V_local vocabulary columns of this rank, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from engine.ops.token_log_probs import Group, group_size, joined_parts, local_columns

ROWS = 256  # rows of logits that exist at once, unless asked otherwise
BLOCK = 4096  # vocabulary rows of a half-precision weight, or of its gradient, that exist in float32 at once


def lm_head_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_start: int = 0,
    num_valid: int | None = None,
    group: Group = None,
    coefficients: torch.Tensor | None = None,
    chunk_rows: int = ROWS,
    temperature: float = 1.0,
    float32_logits: bool = False,
) -> torch.Tensor:
    """Log-probs [T] (float32) of targets [T] under hidden [T, H] @ weight [V_local, H].T, with gradients to both.

    `vocab_start`, `num_valid`, `group`, `temperature` and the errors are token_log_probs'. The logits and their gradient have
    the type of hidden and weight, or with `float32_logits` are float32, as are all products; the gradients of hidden and weight
    are rounded to these at the end. Every rank of the group holds the same hidden
    states and gets their whole gradient (one all-reduce); the weight's gradient is that of its own rows, summed in
    float32. Without `coefficients` the backward computes the logits again. With them (float32 [T]: what the loss
    multiplies each log-prob by, up to one factor) both gradients are formed in the forward pass, from the logits it has
    anyway; the backward then only multiplies. It raises ValueError if what reaches it is no multiple of them. Fewer rows
    at a time take less memory and more time: the weight is read for each chunk anew.
    """
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1; found {chunk_rows}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.size(1) != weight.size(1) or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden [T, H] and weight [V_local, H] must agree in H and type; found {list(hidden.shape)} {hidden.dtype} "
            f"and {list(weight.shape)} {weight.dtype}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must have shape [T] = [{hidden.size(0)}]; found {list(targets.shape)}")
    if coefficients is not None and coefficients.shape != targets.shape:
        raise ValueError(f"coefficients must have shape [T] = [{hidden.size(0)}]; found {list(coefficients.shape)}")
    head = _Head(vocab_start, num_valid, group, chunk_rows, temperature, float32_logits)
    log_probs: torch.Tensor = _LmHeadLogProbs.apply(hidden, weight, targets, coefficients, head)
    return log_probs


class _Head:
    """One call's way through the chunks."""

    def __init__(
        self,
        vocab_start: int,
        num_valid: int | None,
        group: Group,
        chunk_rows: int,
        temperature: float,
        float32_logits: bool,
    ) -> None:
        self.vocab_start, self.num_valid, self.group, self.chunk_rows = vocab_start, num_valid, group, chunk_rows
        self.temperature, self.float32_logits = temperature, float32_logits

    def run(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, coefficients: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Log-probs [T] and, given the coefficients, the gradients of sum(coefficients * log-probs) [T, H], [V_local, H]."""
        num_tokens, width = hidden.size(0), weight.size(0)
        dtype = torch.float32 if self.float32_logits else _products_in(hidden)
        temperature = self.temperature
        log_probs = torch.empty(num_tokens, dtype=torch.float32, device=hidden.device)
        room = hidden.new_empty(min(self.chunk_rows, num_tokens), width, dtype=dtype)
        grad_hidden = grad_weight = None
        if coefficients is not None:
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.empty_like(weight, dtype=torch.float32)
        for first in range(0, num_tokens, self.chunk_rows):
            rows = slice(first, first + self.chunk_rows)
            x, chunk_targets = hidden[rows].to(dtype), targets[rows]
            logits = room[: x.size(0)]
            for block, part in _blocks(weight, dtype):
                torch.mm(x, part.t(), out=logits[:, block])
            columns = local_columns(logits, self.vocab_start, self.num_valid, self.group)
            log_probs[rows], _, totals = joined_parts(
                logits, chunk_targets, self.vocab_start, columns, self.group, temperature, False
            )
            if coefficients is None or grad_hidden is None or grad_weight is None:
                continue
            torch.ops.semion.log_prob_backward(
                logits, chunk_targets, totals, coefficients[rows], None, self.vocab_start, columns[0], temperature, logits
            )
            back = torch.empty_like(x)
            for block, part in _blocks(weight, dtype):
                back.addmm_(logits[:, block], part, beta=1 if block.start else 0)
            grad_hidden[rows] = back
            _add_product(grad_weight, logits, x, fresh=first == 0)
        if grad_weight is not None and num_tokens == 0:
            grad_weight.zero_()
        if grad_hidden is not None and group_size(self.group) > 1:
            dist.all_reduce(grad_hidden, group=self.group)
        return log_probs, grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)


class _LmHeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        coefficients: torch.Tensor | None,
        head: _Head,
    ) -> torch.Tensor:
        log_probs, grad_hidden, grad_weight = head.run(hidden, weight, targets, coefficients)
        ctx.head, ctx.single_pass = head, coefficients is not None
        ctx.save_for_backward(*((coefficients,) if ctx.single_pass else (hidden, weight, targets)))
        ctx.gradients = (grad_hidden, grad_weight)  # scaled in place: a copy would be as large as the weight
        return log_probs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = gradients[0].contiguous()
        if not ctx.single_pass:
            _, grad_hidden, grad_weight = ctx.head.run(*ctx.saved_tensors, gradient)
            return grad_hidden, grad_weight, None, None, None
        (coefficients,) = ctx.saved_tensors  # raises, as elsewhere in torch, when the backward runs a second time
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None
        factor = _factor(gradient, coefficients)
        if factor != 1:
            grad_hidden *= factor
            grad_weight *= factor
        return grad_hidden, grad_weight, None, None, None


def _products_in(hidden: torch.Tensor) -> torch.dtype:
    """The type to multiply in: hidden's own, but float32 on a processor that would only imitate it (four times slower)."""
    if hidden.is_cpu and hidden.dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    if hidden.is_cpu and hidden.dtype == torch.float16 and not torch.cpu._is_amx_fp16_supported():
        return torch.float32
    return hidden.dtype


def _blocks(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, weight of these rows in this type): the whole weight, or BLOCK rows after another in the same room."""
    if weight.dtype == dtype:
        yield slice(0, weight.size(0)), weight
        return
    room = weight.new_empty(min(BLOCK, weight.size(0)), weight.size(1), dtype=dtype)
    for first in range(0, weight.size(0), BLOCK):
        part = weight[first : first + BLOCK]
        yield slice(first, first + part.size(0)), room[: part.size(0)].copy_(part)


def _add_product(total: torch.Tensor, logits: torch.Tensor, x: torch.Tensor, *, fresh: bool) -> None:
    """total [V, H] (float32) += logits [C, V].T @ x [C, H], or = where it is fresh; blockwise if they are narrower."""
    if x.dtype == torch.float32:
        total.addmm_(logits.t(), x, beta=0 if fresh else 1)
        return
    for part, columns in zip(total.split(BLOCK), logits.split(BLOCK, 1), strict=True):
        product = columns.t() @ x
        part.copy_(product) if fresh else part.add_(product)


def _factor(gradient: torch.Tensor, coefficients: torch.Tensor) -> float:
    """What the coefficients must be multiplied by to be the gradient; ValueError if nothing does it."""
    g, c = gradient.double(), coefficients.double()
    square = float(c @ c)
    factor = float(g @ c) / square if square else 0.0
    worst = float((g - factor * c).abs().max()) if g.numel() else 0.0
    bound = 1e-5 * float(g.abs().max()) if g.numel() else 0.0
    if not worst <= bound:
        raise ValueError(
            f"the gradient of the log-probs must be a multiple of coefficients; found it {worst:.3g} off: give the "
            f"loss's own coefficients, or none"
        )
    return factor
