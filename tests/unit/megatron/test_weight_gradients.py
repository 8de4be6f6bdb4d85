"""The products that add weight gradients up, by both names that megatron-core calls: against float64, in the types of factors
and of the sum; and that a GPU's is one launch, with no copy of the sum."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import layers
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.megatron import weight_gradients
from tests.unit.ops.counted import Counted

T, N, K, MICROBATCHES = 33, 24, 40, 3


def rows(index: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(input [T, K], gradient of the output [T, N]) of a microbatch."""
    draw = torch.Generator().manual_seed(index)
    return torch.randn(T, K, generator=draw).to(dtype), torch.randn(T, N, generator=draw).to(dtype)


def exact(dtype: torch.dtype) -> torch.Tensor:
    return sum((y.double().t() @ x.double() for x, y in (rows(i, dtype) for i in range(MICROBATCHES))), torch.zeros(N, K))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_sum_in_float32_is_never_rounded_to_the_factors_type(dtype: torch.dtype) -> None:
    """Factors in half precision have exact products in float32, so only its sums round. The product that megatron-core makes
    without fusion is rounded to the factors' type first."""
    wanted, main_grad, plain = exact(dtype), torch.zeros(N, K), torch.zeros(N, K)
    for x, y in (rows(index, dtype) for index in range(MICROBATCHES)):
        weight_gradients.wgrad_gemm_accum_fp32(x, y, main_grad)
        plain.add_(y.t() @ x)
    assert error(main_grad, wanted) <= 3e-7
    if dtype != torch.float32:
        assert error(plain, wanted) > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sum_in_half_precision_is_rounded_once_a_microbatch(dtype: torch.dtype) -> None:
    """To the bit what float32 gives when it is rounded after each; without fusion every product is rounded too."""
    found, wanted = torch.zeros(N, K, dtype=dtype), torch.zeros(N, K, dtype=dtype)
    for x, y in (rows(index, dtype) for index in range(MICROBATCHES)):
        weight_gradients.wgrad_gemm_accum_fp16(x, y, found)
        wanted = torch.addmm(wanted.double(), y.double().t(), x.double()).float().to(dtype)
    differ = (found != wanted).double().mean()  # float32's sums may fall to the other side of a tie
    assert differ <= 0.01
    assert error(found, wanted.double()) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp16"])
def test_on_a_gpu_it_is_one_product(form: str, dtype: torch.dtype) -> None:
    """On fake tensors: nothing is copied, widened or waited for."""
    into = torch.float32 if form.endswith("fp32") else dtype
    with FakeTensorMode(), Counted() as count:
        x, y = torch.empty(T, K, dtype=dtype, device="cuda"), torch.empty(T, N, dtype=dtype, device="cuda")
        main_grad = torch.empty(N, K, dtype=into, device="cuda")
        getattr(weight_gradients, form)(x, y, main_grad)
    assert not count.host_waits and not count.copies
    products = {name: times for name, times in count.launches.items() if "mm" in name}
    assert sum(products.values()) == 1 and not {name for name in count.launches if "add_" in name and "mm" not in name}


def test_megatron_core_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its column-parallel layers look for apex's extension."""
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", None, raising=False)
    weight_gradients.add_by_torch()
    assert layers._grad_accum_fusion_available
    assert layers.fused_weight_gradient_mlp_cuda is weight_gradients
