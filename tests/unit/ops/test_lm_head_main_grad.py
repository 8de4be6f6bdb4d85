"""The output layer adds its weight's gradient to megatron-core's float32 buffer itself: against float64, under megatron-core's
own hook, with and without an embedding that is the same parameter."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel

from engine.ops import lm_head_log_probs

TOKENS, HIDDEN, VOCABULARY, MICROBATCHES = 11, 16, 37, 2
SCALE = -0.25  # of the loss over its coefficients


def drawn(*sizes: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameter(value: torch.Tensor) -> Any:
    return torch.nn.Parameter(value)


class Hooked:
    """A parameter under the hook of megatron-core's DistributedDataParallel, which adds up what autograd finds."""

    def __init__(self, value: torch.Tensor, *, tied: bool) -> None:
        self.weight = parameter(value)
        self.weight.main_grad = torch.zeros_like(value, dtype=torch.float32)
        self.weight.grad_added_to_main_grad = False
        if tied:  # as megatron-core marks an embedding that is the output layer of the same stage
            self.weight.zero_out_wgrad = True
        self.num_ready = 0
        reducing = SimpleNamespace(overlap_grad_reduce=True)  # with which it insists on a gradient
        self._chunk: Any = SimpleNamespace(
            param_to_bucket_group={self.weight: self}, ddp_config=reducing, force_all_reduce=False
        )
        hook = DistributedDataParallel._make_backward_post_hook(self._chunk, self.weight)
        self._node = self.weight.expand_as(self.weight).grad_fn.next_functions[0][0]
        self._node.register_hook(hook)

    def register_grad_ready(self, *_: Any) -> None:
        self.num_ready += 1


def accumulated(dtype: torch.dtype, known: str | None, *, tied: bool, adds: bool, num_tokens: int = TOKENS) -> Hooked:
    """The gradients of some microbatches, as megatron-core adds them up."""
    hooked = Hooked(drawn(VOCABULARY, HIDDEN, seed=1, dtype=dtype), tied=tied)
    for index in range(MICROBATCHES):
        hidden, targets, slopes = made(index, hooked.weight, dtype, tied=tied, num_tokens=num_tokens)
        coefficients: Any = {"tensor": slopes, "function": lambda rows, _, own=slopes: own[rows], None: None}[known]
        log_probs = lm_head_log_probs(
            hidden,
            hooked.weight,
            targets,
            coefficients=coefficients,
            chunk_rows=4,
            float32_logits=True,
            into_main_grad=adds,
        )
        (SCALE * slopes * log_probs).sum().backward()
    assert hooked.num_ready == MICROBATCHES and hooked.weight.grad is None
    assert hooked.weight.grad_added_to_main_grad is adds
    return hooked


def made(
    index: int, weight: torch.Tensor, dtype: torch.dtype, *, tied: bool, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden states, targets, coefficients) of a microbatch; tied, the hidden states are embeddings times a number."""
    ids = torch.arange(num_tokens) * (index + 2) % VOCABULARY
    slopes = drawn(num_tokens, seed=20 + index, dtype=torch.float32)
    hidden = drawn(num_tokens, HIDDEN, seed=10 + index, dtype=torch.bfloat16).to(dtype)
    if tied:
        return torch.nn.functional.embedding(ids, weight) * hidden, (ids + 3) % VOCABULARY, slopes
    return hidden.requires_grad_(), (ids + 3) % VOCABULARY, slopes


def exact(dtype: torch.dtype, *, tied: bool) -> torch.Tensor:
    """The same sum in float64 by torch, of the same numbers."""
    weight = drawn(VOCABULARY, HIDDEN, seed=1, dtype=dtype).double().requires_grad_()
    for index in range(MICROBATCHES):
        hidden, targets, slopes = made(index, weight, torch.float64, tied=tied, num_tokens=TOKENS)
        log_probs = (hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        (SCALE * slopes * log_probs).sum().backward()
    assert weight.grad is not None
    return weight.grad


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("known", ["tensor", "function", None])
def test_the_gradient_is_that_of_float64_and_never_rounded(known: str | None) -> None:
    """Of a weight in bfloat16, whose gradient else is rounded to it in every microbatch."""
    wanted = exact(torch.bfloat16, tied=False)
    added = error(accumulated(torch.bfloat16, known, tied=False, adds=True).weight.main_grad, wanted)
    rounded = error(accumulated(torch.bfloat16, known, tied=False, adds=False).weight.main_grad, wanted)
    assert added <= 1e-6 < 1e-4 < rounded


@pytest.mark.parametrize("known", ["tensor", "function", None])
def test_an_embedding_that_is_the_weight_adds_its_own_gradient(known: str | None) -> None:
    """Once each, and nothing of what stands for the output layer's."""
    wanted = exact(torch.float32, tied=True)
    assert error(accumulated(torch.float32, known, tied=True, adds=True).weight.main_grad, wanted) <= 1e-6


@pytest.mark.parametrize("known", ["tensor", None])
def test_a_row_without_tokens_adds_nothing(known: str | None) -> None:
    assert not accumulated(torch.bfloat16, known, tied=False, adds=True, num_tokens=0).weight.main_grad.any()


def test_only_a_buffer_in_float32_is_added_to() -> None:
    hooked = Hooked(drawn(VOCABULARY, HIDDEN, seed=1, dtype=torch.bfloat16), tied=False)
    hooked.weight.main_grad = hooked.weight.main_grad.bfloat16()
    hidden, targets, _ = made(0, hooked.weight, torch.bfloat16, tied=False, num_tokens=TOKENS)
    with pytest.raises(ValueError, match=r"main_grad must be float32 with into_main_grad; found torch\.bfloat16"):
        lm_head_log_probs(hidden, hooked.weight, targets, into_main_grad=True)
