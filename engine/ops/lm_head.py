"""The output layer and its log-probs together, without all logits: some rows at a time go through the weight, the
kernels, and back. At no time do more than `chunk_rows` × V_local logits exist.

Where the processor has no products of half precision, or the logits are asked for in float32, the products are done in it,
the weight widened a block at a time. On a GPU nothing waits for the device.

Shape legend: T tokens, H hidden, V_local vocabulary columns of this rank, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from engine.ops.token_log_probs import Group, group_size, joined_parts, local_columns

ROWS = 256  # rows of logits that exist at once on a CPU, unless asked otherwise: they stay near its caches
CHUNK_BYTES = 1 << 30  # of logits that exist at once on a GPU: every chunk reads the weight and its gradient once
ROW_TILE = 128  # rows of a GPU's chunk come in multiples of it, as its products do
BLOCK = 4096  # vocabulary rows of a half-precision weight, or of its gradient, that exist in float32 at once

Coefficients = torch.Tensor | Callable[[slice, torch.Tensor], torch.Tensor]


def rows_at_once(num_tokens: int, width: int, element_bytes: int, *, on_gpu: bool) -> int:
    """Rows C of a chunk of `num_tokens` rows of `width` logits: ROWS on a CPU; on a GPU chunks of one size, as few as
    CHUNK_BYTES allow, since the weight's gradient is read and written again for each."""
    if not on_gpu:
        return ROWS
    most = max(ROW_TILE, CHUNK_BYTES // max(1, width * element_bytes) // ROW_TILE * ROW_TILE)
    num_chunks = max(1, -(-num_tokens // most))
    return -(-num_tokens // num_chunks // ROW_TILE) * ROW_TILE or ROW_TILE


def lm_head_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_start: int = 0,
    num_valid: int | None = None,
    group: Group = None,
    coefficients: Coefficients | None = None,
    chunk_rows: int | None = None,
    temperature: float = 1.0,
    float32_logits: bool = False,
    into_main_grad: bool = False,
) -> torch.Tensor:
    """Log-probs [T] (float32) of targets [T] under hidden [T, H] @ weight [V_local, H].T, with gradients to both.

    `vocab_start`, `num_valid`, `group`, `temperature` and the errors are token_log_probs'. The logits and their gradient have
    the type of hidden and weight, or with `float32_logits` are float32, as are all products; the gradients of hidden and weight
    are rounded to these at the end. Every rank of the group holds the same hidden
    states and gets their whole gradient (one all-reduce); the weight's gradient is that of its own rows, summed in
    float32. Without `coefficients` the backward computes the logits again.

    With them both gradients are formed in the forward pass, from the logits it has anyway; the backward then only
    multiplies. They are float32 [T], what the loss multiplies each log-prob by, up to one factor; or a function of (rows of
    a chunk, their log-probs [C]) to float32 [C], the loss's derivative by these log-probs, up to one factor, where a token's
    depends on its own log-prob alone. If what reaches the backward is no multiple of them, a CPU raises ValueError; on a GPU,
    where to ask would make the host wait, the gradients become NaN, which no optimizer step accepts. `chunk_rows` are
    rows_at_once unless given: fewer take less memory and more time, because the weight is read for each chunk anew.

    `into_main_grad`: the backward adds the weight's gradient to `weight.main_grad`, in float32 and never rounded to the
    weight's type, and says so by `weight.grad_added_to_main_grad`, as megatron-core's layers do with
    gradient_accumulation_fusion. What autograd then gets for the weight's gradient are zeros if the weight has
    `zero_out_wgrad`, else undefined.
    """
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1; found {chunk_rows}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.size(1) != weight.size(1) or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden [T, H] and weight [V_local, H] must agree in H and type; found {list(hidden.shape)} {hidden.dtype} "
            f"and {list(weight.shape)} {weight.dtype}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must have shape [T] = [{hidden.size(0)}]; found {list(targets.shape)}")
    if isinstance(coefficients, torch.Tensor) and coefficients.shape != targets.shape:
        raise ValueError(f"coefficients must have shape [T] = [{hidden.size(0)}]; found {list(coefficients.shape)}")
    if into_main_grad and (found := getattr(getattr(weight, "main_grad", None), "dtype", "none")) != torch.float32:
        raise ValueError(f"weight.main_grad must be float32 with into_main_grad; found {found}")
    head = _Head(vocab_start, num_valid, group, chunk_rows, temperature, float32_logits, into_main_grad)
    log_probs: torch.Tensor = _LmHeadLogProbs.apply(hidden, weight, targets, coefficients, head)
    return log_probs


@dataclass(frozen=True)
class _Head:
    """One call's way through the chunks."""

    vocab_start: int
    num_valid: int | None
    group: Group
    chunk_rows: int | None
    temperature: float
    float32_logits: bool
    into_main_grad: bool = False

    def run(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        coefficients: Coefficients | None,
        main_grad: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, _Gradients | None]:
        """Log-probs [T] and, given the coefficients, these [T] and the gradients of sum(coefficients * log-probs), the weight's
        added to `main_grad` where there is one."""
        num_tokens, width = hidden.size(0), weight.size(0)
        dtype = torch.float32 if self.float32_logits else _products_in(hidden)
        at_once = self.chunk_rows or rows_at_once(num_tokens, width, dtype.itemsize, on_gpu=not hidden.is_cpu)
        log_probs: list[torch.Tensor] = []
        used: list[torch.Tensor] = []
        room = hidden.new_empty(min(at_once, num_tokens), width, dtype=dtype)
        gradients = None
        if coefficients is not None:
            rounds_once = num_tokens <= at_once and dtype == weight.dtype and not self.into_main_grad
            gradients = _Gradients.of(hidden, weight, weight.dtype if rounds_once else torch.float32, main_grad)
        for first in range(0, num_tokens, at_once):
            rows = slice(first, min(first + at_once, num_tokens))
            x, chunk_targets = _rows_of(hidden, rows).to(dtype), _rows_of(targets, rows)
            logits = room.narrow(0, 0, x.size(0))
            for block, part in _blocks(weight, dtype):
                torch.mm(x, part.t(), out=_columns_of(logits, block))
            columns = local_columns(logits, self.vocab_start, self.num_valid, self.group)
            found, _, totals = joined_parts(
                logits, chunk_targets, self.vocab_start, columns, self.group, self.temperature, False
            )
            log_probs.append(found)
            if coefficients is None or gradients is None:
                continue
            slopes = coefficients(rows, found) if callable(coefficients) else _rows_of(coefficients, rows)
            used.append(slopes)
            torch.ops.semion.log_prob_backward(
                logits, chunk_targets, totals, slopes, None, self.vocab_start, columns[0], self.temperature, logits
            )
            gradients.add(rows, logits, x, weight)
        if gradients is not None:
            if num_tokens == 0 and main_grad is None:
                gradients.weight.zero_()
            if group_size(self.group) > 1:
                dist.all_reduce(gradients.hidden, group=self.group)
        if not num_tokens:
            log_probs = used = [hidden.new_empty(0, dtype=torch.float32)]
        return torch.cat(log_probs), None if gradients is None else torch.cat(used), gradients


@dataclass(frozen=True)
class _Gradients:
    """Of hidden [T, H], in its type, and of the weight [V_local, H]: summed in float32, or in the weight's own type where one
    product makes it all, as what adds inside the product is float32 anyway."""

    hidden: torch.Tensor
    weight: torch.Tensor
    begun: bool  # whether `weight` holds a sum already, which is added to

    @staticmethod
    def of(hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, main_grad: torch.Tensor | None) -> _Gradients:
        """Room for both, undefined, the weight's in `dtype`; or for the weight's what `main_grad` holds."""
        room = torch.empty_like(weight, dtype=dtype) if main_grad is None else main_grad
        return _Gradients(torch.empty_like(hidden), room, main_grad is not None)

    def add(self, rows: slice, logits: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        """What the gradient `logits` [C, V_local] of these rows, whose hidden states are x [C, H], makes of both."""
        if weight.dtype == x.dtype == self.hidden.dtype:
            torch.mm(logits, weight, out=_rows_of(self.hidden, rows))
        else:
            back = torch.empty_like(x)
            for block, part in _blocks(weight, x.dtype):
                back.addmm_(_columns_of(logits, block), part, beta=1 if block.start else 0)
            _rows_of(self.hidden, rows).copy_(back)
        fresh = rows.start == 0 and not self.begun
        if x.dtype == self.weight.dtype:
            self.weight.addmm_(logits.t(), x, beta=0 if fresh else 1)
        elif x.is_cpu:  # which has no such product
            for part, columns in zip(self.weight.split(BLOCK), logits.split(BLOCK, 1), strict=True):
                product = columns.t() @ x
                part.copy_(product) if fresh else part.add_(product)
        else:  # the product's own sums are added, unrounded, by the product itself
            torch.addmm(self.weight, logits.t(), x, torch.float32, beta=0 if fresh else 1, out=self.weight)

    def scaled(self, factor: torch.Tensor | float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Both times a number, in `dtype`, the weight's gradient rounded once; in place where that is its type already."""
        hidden = self._scaled_hidden(factor)
        if self.weight.dtype == dtype:
            return hidden, self.weight if _is_one(factor) else self.weight.mul_(factor)
        weight = torch.empty_like(self.weight, dtype=dtype)
        if not weight.is_cpu:
            torch.mul(self.weight, factor, out=weight)
        else:  # which would make room for the whole product before it narrows it
            for part, out in zip(self.weight.split(BLOCK // 4), weight.split(BLOCK // 4), strict=True):
                out.copy_(part * factor)
        return hidden, weight

    def added(self, factor: torch.Tensor | float, main_grad: torch.Tensor) -> torch.Tensor:
        """The hidden states' gradient times a number; the weight's times the same number is added to `main_grad`, unless it was
        summed there."""
        if not self.begun:
            if isinstance(factor, float):
                main_grad.add_(self.weight, alpha=factor)
            else:
                main_grad.addcmul_(self.weight, factor.to(self.weight.dtype))
        return self._scaled_hidden(factor)

    def _scaled_hidden(self, factor: torch.Tensor | float) -> torch.Tensor:
        return self.hidden if _is_one(factor) else self.hidden.mul_(factor)


class _LmHeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        coefficients: Coefficients | None,
        head: _Head,
    ) -> torch.Tensor:
        log_probs, used, gradients = head.run(hidden, weight, targets, coefficients)
        ctx.head, ctx.dtype = head, weight.dtype
        ctx.save_for_backward(*((hidden, weight, targets) if used is None else (used,)))
        ctx.gradients = gradients  # scaled in place: a copy would be as large as the weight
        ctx.adds_to = weight if head.into_main_grad else None
        return log_probs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = gradients[0].contiguous()
        formed, saved = ctx.gradients, ctx.saved_tensors  # as elsewhere in torch, an error when it runs a second time
        ctx.gradients = None
        weight = ctx.adds_to
        factor: torch.Tensor | float = 1.0
        if formed is None:
            _, _, formed = ctx.head.run(*saved, gradient, None if weight is None else weight.main_grad)
        else:
            factor = _factor(gradient, *saved)
        if weight is None:
            return *formed.scaled(factor, ctx.dtype), None, None, None
        hidden = formed.added(factor, weight.main_grad)
        del formed  # so that its memory is there for what stands for the gradient
        return hidden, _stand_in(weight), None, None, None


def _stand_in(weight: Any) -> torch.Tensor:
    """What autograd gets for the gradient of a weight whose main_grad has it already: megatron-core's hook wants something that
    is there, and adds it only to a weight that is also the embedding of this stage, whose own gradient comes with it."""
    weight.grad_added_to_main_grad = True
    zeros = getattr(weight, "zero_out_wgrad", False)
    return torch.zeros_like(weight) if zeros else torch.empty_like(weight)


def _is_one(factor: torch.Tensor | float) -> bool:
    return isinstance(factor, float) and factor == 1


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


def _rows_of(tensor: torch.Tensor, rows: slice) -> torch.Tensor:
    return tensor.narrow(0, rows.start, rows.stop - rows.start)


def _columns_of(logits: torch.Tensor, columns: slice) -> torch.Tensor:
    return logits.narrow(1, columns.start, columns.stop - columns.start)


def _factor(gradient: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor | float:
    """What the coefficients must be multiplied by to be the gradient. Where nothing does it, ValueError on a CPU and NaN
    elsewhere and in a compiled graph; there the factor is a tensor, for nobody to wait for."""
    g, c = gradient.double(), coefficients.double()
    square = c.square().sum()
    factor = (g * c).sum() / square.where(square > 0, 1.0)
    if not g.numel():
        return 0.0
    worst, bound = (g - factor * c).abs().max(), 1e-5 * g.abs().max()
    if not g.is_cpu or torch.compiler.is_compiling():
        return factor.where(worst <= bound, torch.nan)
    if not worst <= bound:
        raise ValueError(
            f"the gradient of the log-probs must be a multiple of coefficients; found it {float(worst):.3g} off: give the "
            f"loss's own coefficients, or none"
        )
    return float(factor)
