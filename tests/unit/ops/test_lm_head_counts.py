"""The output layer's way on a GPU, counted on fake tensors of one: products, launches, bytes and waits of the host. The time
is the arithmetic of counted.py, each operator at the limit of memory or of the tensor cores, and no measurement.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.ops import lm_head
from tests.unit.ops.counted import Counted

LLAMA = 8192, 4096, 128_256  # tokens, hidden, vocabulary of a row of Llama 3.1 8B


def counted(shape, *, known):
    """One forward and backward: `known` coefficients are a tensor, or a function of the log-probs, or there are none."""
    num_tokens, hidden_size, width = shape
    head = lm_head._Head(0, None, None, None, 1.0, False)
    with FakeTensorMode(), torch.no_grad():
        hidden = torch.empty(num_tokens, hidden_size, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(width, hidden_size, device="cuda", dtype=torch.bfloat16)
        targets = torch.empty(num_tokens, device="cuda", dtype=torch.int64)
        gradient = torch.empty(num_tokens, device="cuda")
        coefficients = {"tensor": gradient, "function": lambda rows, log_probs: log_probs.neg(), None: None}[known]
        with Counted() as count:
            _, used, formed = head.run(hidden, weight, targets, coefficients)
            if known is None:
                _, _, formed = head.run(hidden, weight, targets, gradient)
            assert formed is not None
            factor = 1.0 if used is None else lm_head._factor(gradient, used)
            gradients = formed.scaled(factor, weight.dtype)
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 2
    assert [g.shape for g in gradients] == [hidden.shape, weight.shape]
    return count


@pytest.mark.parametrize("known", ["tensor", "function"])
def test_a_row_of_8b_takes_three_products_and_40_ms_by_count(known):
    """With coefficients, known beforehand or made in the chunk, the logits are computed once."""
    count = counted(LLAMA, known=known)
    num_tokens, hidden_size, width = LLAMA
    assert count.flops == 3 * 2 * num_tokens * hidden_size * width
    assert count.launches["aten::mm"] + count.launches["aten::addmm"] == 6, "three products, in two chunks"
    assert not count.host_waits
    assert sum(count.launches.values()) <= 40
    assert count.num_bytes <= 27e9
    assert count.seconds <= 0.036


def test_a_second_pass_over_the_logits_costs_a_fourth_product():
    count = counted(LLAMA, known=None)
    assert count.flops == 4 * 2 * LLAMA[0] * LLAMA[1] * LLAMA[2]
    assert not count.host_waits
    assert count.seconds <= 0.047


def counted_into_main_grad(shape, *, known, adds):
    """One forward and backward of the weight's gradient into megatron-core's float32 buffer: by the output layer itself, or by
    what megatron-core's hook adds afterwards."""
    num_tokens, hidden_size, width = shape
    head = lm_head._Head(0, None, None, None, 1.0, False, adds)
    with FakeTensorMode(), torch.no_grad():
        hidden = torch.empty(num_tokens, hidden_size, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(width, hidden_size, device="cuda", dtype=torch.bfloat16)
        main_grad = torch.empty(width, hidden_size, device="cuda")
        targets = torch.empty(num_tokens, device="cuda", dtype=torch.int64)
        gradient = torch.empty(num_tokens, device="cuda")
        with Counted() as count:
            _, used, formed = head.run(hidden, weight, targets, gradient if known else None)
            if not known:
                _, _, formed = head.run(hidden, weight, targets, gradient, main_grad if adds else None)
            assert formed is not None
            factor = 1.0 if used is None else lm_head._factor(gradient, used)
            if adds:
                formed.added(factor, main_grad)
                lm_head._stand_in(weight)
            else:
                main_grad.add_(formed.scaled(factor, weight.dtype)[1])
    assert not count.host_waits
    return count


@pytest.mark.parametrize("known", [True, False])
def test_a_gradient_added_to_main_grad_is_written_once_less(known):
    """Where the coefficients are known the sum is multiplied and added in one pass, without it in bf16; where they are not, the
    products add to the buffer, and there is no sum beside it."""
    separate, together = (counted_into_main_grad(LLAMA, known=known, adds=adds) for adds in (False, True))
    assert together.flops == separate.flops
    assert sum(together.launches.values()) <= sum(separate.launches.values())
    assert together.num_bytes <= (29.8e9 if known else 31.8e9)
    assert together.seconds <= (0.0357 if known else 0.0456)
    saved = separate.num_bytes - together.num_bytes
    assert saved >= (2.1e9 if known else 6.3e9), "the gradient in bf16, written and read; and the sum, read and added"


def test_a_chunk_that_is_all_needs_no_float32_gradient():
    """Of a shard of the vocabulary all rows go at once: the product itself rounds its float32 sums to the weight's type."""
    count = counted((8192, 4096, 128_256 // 8), known="tensor")
    assert count.launches["aten::mm"] + count.launches["aten::addmm_"] == 3
    assert not count.host_waits
    assert count.num_bytes <= 2.7e9


@pytest.mark.parametrize(
    ("num_tokens", "width", "element_bytes", "rows"),
    [(8192, 128_256, 2, 4096), (8300, 128_256, 2, 2816), (100, 128_256, 2, 128), (1, 10, 4, 128), (0, 10, 4, 128),
     (8192, 128_256, 4, 2048), (5000, 1 << 30, 2, 128)],
)  # fmt: skip
def test_rows_at_once_are_even_and_within_a_gibibyte(num_tokens, width, element_bytes, rows):
    assert lm_head.rows_at_once(num_tokens, width, element_bytes, on_gpu=True) == rows
    assert lm_head.rows_at_once(num_tokens, width, element_bytes, on_gpu=False) == 256


def test_wrong_coefficients_become_nan_where_the_host_must_not_wait():
    """The tensors of a GPU, by pretence: the factor is a tensor, and it is no number where nothing is the factor."""
    coefficients = torch.tensor([1.0, -2.0, 0.0])

    class OnGpu(torch.Tensor):
        is_cpu = False

    for gradient, wanted in ((-0.25 * coefficients, -0.25), (coefficients.square(), torch.nan), (0 * coefficients, 0.0)):
        factor = lm_head._factor(gradient.as_subclass(OnGpu), coefficients)
        assert isinstance(factor, torch.Tensor)
        torch.testing.assert_close(float(factor), wanted, equal_nan=True)
