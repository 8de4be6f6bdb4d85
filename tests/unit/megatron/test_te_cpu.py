"""The kernels that stand in for Transformer Engine's on a CPU, against formulas and autograd. What its own Python code makes of
them is asked in tests/parallel/test_transformer_engine.py.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.te_cpu import adam, kernels, quantize
from tests.te_cpu.quantize import DType

E4M3, E5M2 = DType.kFloat8E4M3, DType.kFloat8E5M2


@pytest.mark.parametrize(("dtype", "bound", "mantissa"), [(E4M3, 448.0, 3), (E5M2, 57344.0, 2)])
def test_rounding_is_to_nearest_even_and_saturates(dtype: DType, bound: float, mantissa: int) -> None:
    place = 2.0**-mantissa
    given_ = torch.tensor([1 + place / 2, 1 + 1.5 * place, -1 - 0.6 * place, 1e9, -1e9, 0.0])
    wanted = torch.tensor([1.0, 1 + 2 * place, -1 - place, bound, -bound, 0.0])
    assert torch.equal(quantize.from_bytes(quantize.to_bytes(given_, dtype), dtype), wanted)


@given(st.floats(1e-30, 1e30), st.booleans())
def test_a_scale_brings_the_largest_to_the_end_of_the_range(amax: float, power_of_two: bool) -> None:
    found = float(quantize.scales(torch.tensor(amax), quantize.largest(E4M3), power_of_two, 0.0))
    assert found * amax <= 448 * (1 + 1e-6)
    assert found * amax > 448 * (0.5 if power_of_two else 1) * (1 - 1e-6)
    if power_of_two:
        assert math.frexp(found)[0] == 0.5


def test_zeros_and_infinities_are_left_unscaled() -> None:
    assert quantize.scales(torch.tensor([0.0, math.inf]), quantize.largest(E4M3), False, 0.0).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("shape", [(128, 256), (40, 200)])
def test_every_block_has_the_scale_of_its_own_largest(shape: tuple[int, int], square: bool) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.logspace(-6, 6, shape[1])
    data, inverse = quantize._blocks(matrix, E4M3, True, 0.0, square)
    height = quantize.BLOCK if square else 1
    rows, cols = torch.arange(shape[0]) // height, torch.arange(shape[1]) // quantize.BLOCK
    found = quantize.from_bytes(data, E4M3) * inverse[rows][:, cols]
    largest = torch.zeros_like(inverse)
    for row, col in torch.cartesian_prod(torch.arange(inverse.size(0)), torch.arange(inverse.size(1))).tolist():
        largest[row, col] = matrix[rows == row][:, cols == col].abs().max()
    bound = torch.maximum(matrix.abs() * 2**-4, largest[rows][:, cols] * 2**-15)  # half a place; the smallest steps
    assert ((found - matrix).abs() <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize("cuts", [(), (1000,), (130, 7000, 7001)])
def test_parts_of_a_matrix_are_cast_as_the_whole_is(cuts: tuple[int, ...]) -> None:
    """What ranks of the distributed optimizer hold of it: their maxima together, then their bytes side by side."""
    torch.manual_seed(0)
    matrix, wanted_shape = torch.randn(40, 200), (1, 2)
    wanted, inverse = quantize._blocks(matrix, E4M3, True, 0.0, True)
    parts = [p for p in matrix.flatten().tensor_split(cuts) if p.numel()]
    starts = [0, *cuts]
    maxima = [torch.full(wanted_shape, -1.0) for _ in parts]
    for part, amax, start in zip(parts, maxima, starts, strict=True):
        quantize.fp8_block_scaling_compute_partial_amax(part, amax, 40, 200, start, 128)
    amax, factors, found_inverse = torch.stack(maxima).amax(0), torch.empty(wanted_shape), torch.empty(wanted_shape)
    lists = [[amax], [factors], [found_inverse]]
    quantize.multi_tensor_compute_scale_and_scale_inv(0, torch.zeros(1), lists, quantize.largest(E4M3), True, 0.0)
    assert torch.equal(found_inverse, inverse)
    found = [torch.empty(part.shape, dtype=torch.uint8) for part in parts]
    for part, out, start in zip(parts, found, starts, strict=True):
        quantize.fp8_block_scaling_partial_cast(part, out, factors, 40, 200, start, 128, E4M3)
    assert torch.equal(torch.cat(found), wanted.flatten())


def test_products_are_those_of_matrices_that_count_columns_first() -> None:
    x, weight, gradient = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(2, 3, 5)
    tail = (None, None, None, None, False, None, False, torch.empty(0), 0)

    def product(a: torch.Tensor, t_a: bool, b: torch.Tensor, t_b: bool, out: torch.Tensor | None, add: bool) -> torch.Tensor:
        options = {"comm_overlap": None, "alpha": 1.0, "beta": None}
        return kernels.generic_gemm(a, t_a, b, t_b, out, *tail, add, False, **options)[0]  # type: ignore[misc, arg-type]

    torch.testing.assert_close(product(weight, True, x, False, None, False), x @ weight.t())
    torch.testing.assert_close(product(weight, False, gradient, False, None, False), gradient @ weight)
    total = torch.ones(5, 8)
    product(x, False, gradient, True, total, True)
    torch.testing.assert_close(total, 1 + torch.einsum("abn,abk->nk", gradient, x))


def test_norm_and_its_gradients() -> None:
    x, weight = torch.randn(7, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    wanted = torch.nn.functional.rms_norm(x, (16,), weight, 1e-5)
    gradient = torch.randn(7, 16)
    grad_x, grad_weight = torch.autograd.grad(wanted, (x, weight), gradient)
    with torch.no_grad():
        normed, _, inverse = kernels.rmsnorm_fwd(x, weight, 1e-5, None, None, DType.kFloat32, 0, False)
        found = kernels.rmsnorm_bwd(gradient, x, inverse, weight, 0, False)
    torch.testing.assert_close(normed, wanted)
    torch.testing.assert_close(found, (grad_x, grad_weight))


def rates(step: int) -> tuple[float | int, ...]:
    return (1e-2, 0.9, 0.95, 1e-8, step, 1, 1, 0.1)


def test_adamw_is_torchs() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(33))
    ours, first, second = weight.detach().clone(), torch.zeros(33), torch.zeros(33)
    theirs = torch.optim.AdamW([weight], 1e-2, (0.9, 0.95), 1e-8, 0.1)
    for step in range(1, 4):
        weight.grad = torch.randn(33)
        theirs.step()
        adam.multi_tensor_adam(0, torch.zeros(1), [[weight.grad], [ours], [first], [second]], *rates(step))
        torch.testing.assert_close(ours, weight.detach())


def test_the_lower_bits_and_bfloat16_are_together_the_float32_weights() -> None:
    """Bit for bit, over steps; and the bfloat16 ones are those weights, rounded (a tie up in magnitude)."""
    torch.manual_seed(0)
    narrow = torch.randn(4096).bfloat16()
    main, other = narrow.float(), narrow.clone()
    low = torch.zeros(4096, dtype=torch.int16)
    moments = [[torch.zeros(4096)] for _ in range(4)]
    for step in range(1, 6):
        gradient = torch.randn(4096)
        adam.multi_tensor_adam(0, torch.zeros(1), [[gradient], [narrow], *moments[:2], [main]], *rates(step))
        adam.multi_tensor_adam_param_remainder(0, torch.zeros(1), [[gradient], [other], *moments[2:], [low]], *rates(step))
        high = other.view(torch.int16).int() - (low < 0).int()
        assert torch.equal(((high << 16) | (low.int() & 0xFFFF)).view(torch.float32), main)
        tie = (main.view(torch.int32) & 0xFFFF) == 0x8000
        assert torch.equal(other[~tie], main.bfloat16()[~tie])


def test_what_has_no_stand_in_says_so() -> None:
    with pytest.raises(NotImplementedError, match="layernorm_fwd has no stand-in"):
        kernels.bindings()["layernorm_fwd"]()


def test_fused_rotation_is_megatrons_own_and_its_backward_the_gradient() -> None:
    """Of three packed sequences, the last of one token; megatron-core's own is the plain twin."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd

    torch.manual_seed(0)
    bounds = torch.tensor([0, 5, 12, 13], dtype=torch.int32)
    angles = torch.outer(torch.arange(7.0), 1e4 ** -(torch.arange(0, 8, 2) / 8)).repeat(1, 2)[:, None, None]
    x = torch.randn(13, 3, 8, requires_grad=True)
    arguments = (angles, None, kernels.bindings()["NVTE_QKV_Format"].NVTE_THD, False, bounds, 1, 0)
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    wanted = _apply_rotary_pos_emb_thd(x, bounds, angles, cp_group=one)
    torch.testing.assert_close(kernels.fused_rope_forward(x, *arguments), wanted, rtol=0, atol=1e-6)
    gradient = torch.randn_like(x)
    (known,) = torch.autograd.grad(wanted, x, gradient)
    torch.testing.assert_close(kernels.fused_rope_backward(gradient, *arguments), known, rtol=0, atol=1e-6)
