"""The smaller CUDA kernels on a machine without a GPU, run thread by thread against the references in float64; that the
machine itself finds mistakes; and that nvcc compiles every kernel for every GPU generation without a spill.
"""

import ctypes
import importlib.util
import math
import subprocess
from pathlib import Path

import pytest
import torch

from engine.core.types import IGNORED
from tests import reference_ops
from tests.unit.ops import simt

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def kernels():
    """The launchers, on a machine that runs the threads of a block one after another."""
    return simt.load()


def test_sequence_sums_and_their_gradient(kernels):
    """Empty, single-token and long sequences, with and without a mask; sums of 1e8 and -1e8 lose nothing."""
    cu_seqlens = torch.tensor([0, 0, 1, 700, 700, 1500], dtype=torch.int32)
    values = torch.randn(1500, generator=torch.Generator().manual_seed(0))
    values[5], values[600] = 1e8, -1e8
    mask = torch.rand(1500, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[[5, 600]] = True
    for chosen in (None, mask):

        def work(chosen=chosen):
            sums, gradient, grad_sums = torch.full((5,), torch.nan), torch.full((1500,), torch.nan), torch.arange(5.0) + 1
            sizes = simt.i32(1500), simt.i32(5)
            assert (
                kernels.semion_sequence_sums(simt.at(values), simt.at(cu_seqlens), simt.at(chosen), *sizes, simt.at(sums), None)
                == 0
            )
            arguments = simt.at(grad_sums), simt.at(cu_seqlens), simt.at(chosen), *sizes, simt.at(gradient), None
            assert kernels.semion_sequence_sums_backward(*arguments) == 0
            return sums, gradient

        sums, gradient = simt.in_both_orders(kernels, work)
        want = reference_ops.sequence_log_probs(values.double(), cu_seqlens, chosen)
        torch.testing.assert_close(sums.double(), want, atol=1e-7, rtol=EPS)
        counted = torch.ones(1500) if chosen is None else chosen.float()
        assert torch.equal(gradient, counted * torch.repeat_interleave(torch.arange(5.0) + 1, cu_seqlens.diff().long()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grouped_advantages(kernels, dtype):
    """Groups empty, of one, of equal rewards, of 5 and of 70 (more than a warp); and rewards that are not finite."""
    cu_groups = torch.tensor([0, 0, 1, 4, 9, 79], dtype=torch.int32)
    rewards = torch.randn(79, generator=torch.Generator().manual_seed(0), dtype=dtype)
    rewards[1:4] = 0.1

    def run(rewards, mode):
        advantages, no_signal = torch.full((79,), torch.nan, dtype=dtype), torch.zeros(5, dtype=torch.bool)
        broken = torch.zeros(1, dtype=torch.int64)
        arguments = simt.at(rewards), dtype == torch.float64, simt.at(cu_groups), simt.i32(79), simt.i32(5), mode
        assert (
            kernels.semion_grouped_advantages(*arguments, simt.at(advantages), simt.at(no_signal), simt.at(broken), None) == 0
        )
        return advantages, no_signal, broken

    for mode, normalize in enumerate(("mean", "mean_std", "leave_one_out")):
        advantages, no_signal, broken = simt.in_both_orders(kernels, lambda mode=mode: run(rewards, mode))
        want = reference_ops.grouped_advantages(rewards.double(), cu_groups, normalize=normalize)
        torch.testing.assert_close(advantages.double(), want[0], atol=0, rtol=2 * EPS if dtype == torch.float32 else 1e-13)
        assert (advantages[:4] == 0).all()
        assert torch.equal(no_signal, want[1])
        assert broken.item() == -1
    spread = rewards.clone()
    spread[4:9] = torch.tensor([0.3, 0.3, 0.3, 0.3, 0.1 + 0.2], dtype=dtype) if dtype == torch.float64 else 0.3
    scale = 1e-200 if dtype == torch.float64 else 1e-30
    spread[9:] *= scale
    advantages, no_signal, broken = run(spread, 1)
    want = reference_ops.grouped_advantages(spread.double(), cu_groups, normalize="mean_std")
    torch.testing.assert_close(advantages.double(), want[0], atol=1e-13, rtol=2 * EPS)
    assert no_signal.tolist() == want[1].tolist() == [True, True, True, True, False]
    assert broken.item() == -1
    end = torch.finfo(dtype).max
    spread[4:9] = torch.tensor([0.9 * end, *[-0.9 * end] * 4], dtype=dtype)
    assert run(spread, 0)[2].item() == 4
    spoiled = rewards.clone()
    spoiled[[70, 33, 8]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    assert run(spoiled, 0)[2].item() == 8


@pytest.mark.parametrize("cu", [[0], [0, 0], [2, 5, 5], [0, 1, 2, 3, 4, 5, 6, 7], [0, 7], [0, 3, 9, 12]])
def test_policy_gradient_whatever_the_boundaries(kernels, cu):
    """Tokens before the first and after the last sequence, and boundaries beyond the tokens, have no gradient and no loss of
    their own; none, one and a token a sequence."""
    cu_seqlens, num_sequences = torch.tensor(cu, dtype=torch.int32), len(cu) - 1
    log_probs, old = torch.linspace(-1, -0.2, 7), torch.full((7,), -0.6)
    advantages, targets = 0.5 + torch.arange(float(max(1, num_sequences))), torch.ones(7, dtype=torch.int64)
    inputs = map(simt.at, (log_probs, old, None, advantages, cu_seqlens, targets))
    row = simt.PolicyGradientRow(*inputs, 7, num_sequences, 9.0, 9.0, math.inf, 0.0)
    workspace, sums, gradient = torch.full((6,), torch.nan).double(), torch.empty(6), torch.full((7,), torch.nan)
    assert kernels.semion_policy_gradient(ctypes.byref(row), simt.at(workspace), simt.at(sums), simt.at(gradient), None) == 0
    each = torch.zeros(7)
    for sequence in range(num_sequences):
        each[cu[sequence] : cu[sequence + 1]] = advantages[sequence]
    want = -(log_probs - old).exp() * each
    torch.testing.assert_close(gradient, want)
    torch.testing.assert_close(sums[0], want.sum())


@pytest.mark.parametrize("dual_clip", [math.inf, 1.5])
@pytest.mark.parametrize("with_reference", [False, True])
def test_policy_gradient(kernels, with_reference, dual_clip):
    """Every side of the clips, both signs of the advantage, log-ratios that no float's exponential holds, ignored tokens, an
    empty sequence; gradient against autograd."""
    generator = torch.Generator().manual_seed(0)
    cu_seqlens = torch.tensor([0, 600, 600, 601, 1000], dtype=torch.int32)
    log_probs, old, reference = -torch.rand(3, 1000, generator=generator)
    advantages = torch.tensor([1.5, 9.0, 0.0, -0.5])
    targets = torch.where(torch.rand(1000, generator=generator) < 0.2, IGNORED, 7)
    old[5::50] -= 99
    log_probs[9::50] -= 99
    old[targets == IGNORED] = math.nan  # what an ignored token holds is nobody's business
    chosen = reference if with_reference else None
    row = simt.PolicyGradientRow(
        simt.at(log_probs),
        simt.at(old),
        simt.at(chosen),
        simt.at(advantages),
        simt.at(cu_seqlens),
        simt.at(targets),
        1000,
        4,
        0.2,
        0.3,
        dual_clip,
        0.05,
    )

    def work():
        size = kernels.semion_policy_gradient_workspace(simt.i32(1000))
        assert size == 6 * 4, "a thread a token"
        workspace, sums, gradient = torch.full((size,), torch.nan).double(), torch.empty(6), torch.full((1000,), torch.nan)
        assert (
            kernels.semion_policy_gradient(ctypes.byref(row), simt.at(workspace), simt.at(sums), simt.at(gradient), None) == 0
        )
        return sums, gradient

    sums, gradient = simt.in_both_orders(kernels, work)
    leaf = log_probs.double().requires_grad_()
    reference64 = None if chosen is None else chosen.double()
    row64 = leaf, old.nan_to_num().double(), reference64, advantages.double(), cu_seqlens, targets
    loss, want = reference_ops.policy_gradient_loss(*row64, clip_low=0.2, clip_high=0.3, dual_clip=dual_clip, kl_weight=0.05)
    loss.backward()
    torch.testing.assert_close(sums.double(), torch.cat([loss.detach().view(1), want]), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(gradient.double(), leaf.grad, atol=1e-6, rtol=2e-6)
    assert sums[5] > 5


def test_the_machine_finds_mistakes(kernels):
    """A barrier that half the block reaches, a vector beside its boundary, and a missing barrier, each found."""
    assert kernels.simt_half_the_block_waits() == 719
    aligned = torch.zeros(64, dtype=torch.uint8)
    assert kernels.simt_loads_beside_a_boundary(simt.at(aligned[-aligned.data_ptr() % 16 :])) == 716

    def pass_around(with_barrier):
        out = torch.full((64,), -2, dtype=torch.int32)
        assert kernels.simt_passes_around(with_barrier, simt.at(out)) == 0
        return (out,)

    (out,) = simt.in_both_orders(kernels, lambda: pass_around(1))
    assert torch.equal(out.long(), (torch.arange(64) + 1) % 64)
    with pytest.raises(AssertionError, match="threads do not wait"):
        simt.in_both_orders(kernels, lambda: pass_around(0))
    kernels.simt_set_backwards(0)


def test_the_machine_has_a_gpus_limits(kernels):
    """Shared memory holds nothing that a block before left there; grids end where a GPU's do."""
    out = torch.zeros(2, dtype=torch.int32)
    assert kernels.simt_reads_before_it_writes(simt.at(out)) == 0
    assert out.tolist() == [-1, -1]
    for grid, error in (((1, 65_535), 0), ((1, 65_536), 1), ((0, 1), 1), ((1 << 31, 1), 1)):
        assert kernels.simt_grid_of(*map(simt.i64, grid)) == error


@pytest.mark.parametrize(
    ("num_rows", "most", "at_once", "splits"),
    [
        (8192, 15, 528, 1),  # fifteen waves and a half
        (528, 15, 528, 1),  # one, full
        (530, 15, 528, 9),  # one and two blocks were two waves, half empty
        (300, 15, 528, 5),  # 1,500 blocks are 2.84 waves; two parts were 1.14
        (3, 15, 528, 15),  # what no split fills gets as many as a row has rounds for
        (1, 1, 528, 1),
        (0, 15, 528, 1),
        (8192, 0, 592, 1),  # a row shorter than a round
    ],
)
def test_rows_are_split_until_waves_are_full(kernels, num_rows, most, at_once, splits):
    assert kernels.simt_splits_of(*map(simt.i64, (num_rows, most, at_once))) == splits


def test_half_precision_of_the_machine_is_torchs(kernels):
    """Every fp16 value, and roundings of random, halfway and extreme floats to both types."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    finite = halves[halves.isfinite()][::37]
    for half in finite:
        bits = int(half.view(torch.uint16))
        assert kernels.simt_from_float16(bits) == float(half)
        assert kernels.simt_to_float16(float(half)) == bits
    values = torch.cat([torch.randn(300) * 10.0 ** torch.randint(-9, 6, (300,)), (finite[:-1] + finite[1:]).float() / 2])
    values = torch.cat([values, torch.tensor([0.0, -0.0, 65519.0, 65520.0, 1e30, 2.0**-25, 2.0**-24, math.inf])])
    for name, dtype in (("simt_to_float16", torch.float16), ("simt_to_bfloat16", torch.bfloat16)):
        found = [getattr(kernels, name)(float(x)) for x in values]
        assert found == values.to(dtype).view(torch.uint16).tolist()


def load_check_cuda():
    spec = importlib.util.spec_from_file_location("check_cuda", simt.ROOT / "tools/check_cuda.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nvcc_compiles_every_kernel_for_every_generation_without_a_spill():
    check_cuda = load_check_cuda()
    nvcc = check_cuda.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on this machine: the CUDA toolkit compiles the kernels where there is one")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    stamp = simt.ROOT / "build/simt" / f"no-spill-{simt.digest(version, Path(check_cuda.__file__).read_text())}"
    if stamp.exists():
        return
    usages, wrong = check_cuda.check(nvcc, [])
    assert not wrong, "\n".join([*wrong, check_cuda.table(usages)])
    assert {usage.architecture for usage in usages} == {"sm_80", "sm_90", "sm_100"}
    some = {"parts_kernel<1, false>", "backward_kernel<1, true>", "digest_kernel<uint16, 8>"}
    assert some <= {usage.kernel for usage in usages}
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(check_cuda.table(usages))
