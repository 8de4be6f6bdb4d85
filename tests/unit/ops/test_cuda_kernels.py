"""The CUDA kernels of the log-probs on a machine without a GPU: the same .cu files, compiled as C++, run thread by thread
and are compared with float64 formulas. What only a GPU shows (races between blocks, speed) is tests/gpu's.
"""

import ctypes
import math
import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.types import IGNORED
from tests.unit.ops import simt

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def kernels():
    """The launchers, on a machine that runs the threads of a block one after another."""
    return simt.load()


class Problem:
    """Logits inside a larger block of NaN, so that whatever is read or written beside them shows."""

    def __init__(self, logits, targets, *, offset=0, gap=0, num_valid=None, temperature=1.0, vocab_start=0, ids=None):
        num_rows, num_columns = logits.shape
        self.logits, self.targets = logits, targets
        self.offset, self.stride = offset, num_columns + gap
        self.num_valid = num_columns if num_valid is None else num_valid
        self.temperature, self.vocab_start = temperature, vocab_start
        self.ids = ids or (vocab_start, vocab_start + self.num_valid)
        self.shape = (num_rows, num_columns)

    def placed(self, content=None, offset=None):
        """(block, view [T, V] of it at this problem's offset and stride)."""
        num_rows, num_columns = self.shape
        offset = self.offset if offset is None else offset
        block = torch.full((num_rows * self.stride + offset + 64,), torch.nan, dtype=self.logits.dtype)
        block = block[(-block.data_ptr() % 16) // block.element_size() :]  # offsets count from a 16 byte boundary
        view = block.as_strided((num_rows, num_columns), (self.stride, 1), block.storage_offset() + offset)
        if content is not None:
            view.copy_(content)
        return block, view

    def rows(self, view, every_row):
        element = simt.ELEMENTS.index(view.dtype)
        return simt.LogProbRows(
            simt.at(view), self.stride, simt.at(self.targets), self.shape[0], self.vocab_start, *self.ids,
            self.temperature, element, self.shape[1], self.num_valid, every_row,
        )  # fmt: skip


def parts_of(kernels, problem, every_row):
    _, view = problem.placed(problem.logits)
    rows = problem.rows(view, every_row)
    splits = kernels.semion_log_prob_splits(ctypes.byref(rows))
    parts, workspace = torch.full((4, view.size(0)), torch.nan), torch.full((3 * splits * view.size(0),), torch.nan)
    assert kernels.semion_log_prob_parts(ctypes.byref(rows), simt.at(parts), simt.at(workspace), None) == 0
    return parts


def join(kernels, parts, problem):
    num_rows = parts.size(2)
    outputs = torch.full((num_rows,), torch.nan), torch.full((num_rows,), torch.nan), torch.full((3, num_rows), torch.nan)
    error = kernels.semion_log_prob_join(
        simt.at(parts),
        simt.i64(parts.size(0)),
        simt.at(problem.targets),
        simt.i64(num_rows),
        simt.f32(problem.temperature),
        *map(simt.at, outputs),
        None,
    )
    assert error == 0
    return outputs


def beside(block, view):
    """The elements of the block that are not the view's."""
    outside = torch.ones_like(block, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset() - block.storage_offset()).fill_(False)
    return block[outside]


def backward(kernels, problem, totals, weights, entropy_weights, out_offset=None):
    """The gradient over the logits, or in another block; what lies beside it must stay."""
    block, view = problem.placed(problem.logits)
    out_block, out = (block, view) if out_offset is None else problem.placed(offset=out_offset)
    gradient = simt.LogProbGradient(simt.at(totals), simt.at(weights), simt.at(entropy_weights), simt.at(out), problem.stride)
    rows = problem.rows(view, False)
    assert kernels.semion_log_prob_backward(ctypes.byref(rows), ctypes.byref(gradient), None) == 0
    assert beside(out_block, out).isnan().all(), "written beside the gradient"
    return out


def expected(problem, weights, entropy_weights):
    """Float64, by formula: log-probs, entropies and the gradient of sum(weights * log-prob + entropy_weights * entropy).

    Autograd is no judge here: it has NaN for a column closed by -inf.
    """
    x = problem.logits[:, : problem.num_valid].double() / problem.temperature
    log_p = x.log_softmax(-1)
    p, counted = log_p.exp(), problem.targets != IGNORED
    onehot = torch.zeros_like(p)
    onehot[counted, problem.targets[counted] - problem.vocab_start] = 1
    surprise = torch.where(p > 0, log_p, 0.0)
    log_probs = torch.where(onehot > 0, log_p, 0.0).sum(-1)
    entropy = -(p * surprise).sum(-1)
    g, h = (weights.double() * counted).unsqueeze(-1), entropy_weights.double().unsqueeze(-1)
    gradient = torch.zeros(problem.shape, dtype=torch.float64)
    gradient[:, : problem.num_valid] = (onehot * g - p * (g + h * (surprise + entropy.unsqueeze(-1)))) / problem.temperature
    return log_probs, entropy, gradient


def check(kernels, problem, out_offset=None):
    """Forward with and without the entropy, and both backwards, in both orders of threads, against float64."""
    generator = torch.Generator().manual_seed(problem.logits.numel())
    weights, entropy_weights = torch.randn(2, problem.shape[0], generator=generator)
    want = expected(problem, weights, entropy_weights)

    def work():
        log_probs, entropy, totals = join(kernels, parts_of(kernels, problem, True).unsqueeze(0), problem)
        gradient = backward(kernels, problem, totals, weights, entropy_weights, out_offset)
        short_log_probs, _, short_totals = join(kernels, parts_of(kernels, problem, False).unsqueeze(0), problem)
        return (
            log_probs,
            entropy,
            gradient,
            short_log_probs,
            backward(kernels, problem, short_totals, weights, None, out_offset),
        )

    log_probs, entropy, gradient, short_log_probs, short_gradient = simt.in_both_orders(kernels, work)
    dtype = problem.logits.dtype
    rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 2 * EPS
    scale = 1 / problem.temperature
    for found in (log_probs, short_log_probs):
        torch.testing.assert_close(found.double(), want[0], atol=2e-6, rtol=EPS, equal_nan=True)
    torch.testing.assert_close(entropy.double(), want[1], atol=4e-6, rtol=EPS)
    atol = 8e-6 * scale + (1e-7 if dtype == torch.float16 else 0)  # below 2^-14 an fp16 is as coarse as 2^-24
    torch.testing.assert_close(gradient.double(), want[2], atol=atol, rtol=rounding)
    want_short = expected(problem, weights, torch.zeros_like(weights))[2]
    torch.testing.assert_close(short_gradient.double(), want_short, atol=atol, rtol=rounding)
    for found in (gradient, short_gradient):
        assert (found[:, problem.num_valid :] == 0).all()
    ignored = problem.targets == IGNORED
    assert (log_probs[ignored] == 0).all()
    assert (short_gradient[ignored] == 0).all()


def random_problem(num_rows, num_columns, dtype, *, seed=0, scale=4.0, closed=False, **placement):
    generator = torch.Generator().manual_seed(seed)
    num_valid = placement.get("num_valid", num_columns)
    logits = scale * (2 * torch.rand(num_rows, num_columns, generator=generator) - 1)
    targets = torch.randint(0, num_valid, (num_rows,), generator=generator)
    if closed:  # never a row's target, never all of a row
        shut = torch.rand(num_rows, num_columns, generator=generator) < 0.4
        shut[:, 0] = False
        shut[torch.arange(num_rows), targets] = False
        logits[shut] = -math.inf
    targets[torch.rand(num_rows, generator=generator) < 0.25] = IGNORED
    logits[:, num_valid:] = math.nan  # padding must not be looked at
    return Problem(logits.to(dtype), targets + placement.get("vocab_start", 0) * (targets != IGNORED), **placement)


@st.composite
def small_problems(draw):
    num_columns = draw(st.integers(1, 90))
    return random_problem(
        draw(st.integers(0, 3)),
        num_columns,
        draw(st.sampled_from(simt.ELEMENTS)),
        seed=draw(st.integers(0, 2**32)),
        scale=draw(st.sampled_from([0.0, 1.0, 20.0, 1e4])),
        closed=draw(st.booleans()),
        offset=draw(st.integers(0, 8)),
        gap=draw(st.integers(0, 9)),
        num_valid=draw(st.integers(1, num_columns)),
        temperature=draw(st.sampled_from([1.0, 0.5, 1.75])),
        vocab_start=draw(st.sampled_from([0, 1000])),
    )


@settings(max_examples=40, deadline=None)
@given(small_problems(), st.sampled_from([None, None, 0, 3]))
def test_log_probs_of_any_row_equal_float64(kernels, problem, out_offset):
    """Every dtype, stride, place beside a 16 byte boundary, padding, temperature, closed columns, T = 0; the gradient
    over the logits and elsewhere."""
    check(kernels, problem, out_offset)


@pytest.mark.parametrize("dtype", simt.ELEMENTS)
@pytest.mark.parametrize("num_columns", [8192 + 8 * 256 + 5, 40_003])
def test_log_probs_of_long_rows_equal_float64(kernels, dtype, num_columns):
    """Several rounds of a block over a row with a last round cut short; rows that several blocks share."""
    problem = random_problem(2, num_columns, dtype, gap=3, offset=1, num_valid=num_columns - 70)
    problem.targets = torch.tensor([num_columns - 71, 0])  # the last valid column, and the first
    rows = problem.rows(problem.placed()[1], False)
    assert (kernels.semion_log_prob_splits(ctypes.byref(rows)) > 1) == (num_columns > 16_384 or dtype == torch.float32)
    check(kernels, problem)


@pytest.mark.parametrize("dtype", simt.ELEMENTS)
def test_one_logit_above_all_others(kernels, dtype):
    """20,000 above: log-probs 0 and -20,000, no NaN from what vanishes; half precision holds 1e4 near enough."""
    logits = torch.full((3, 40), -1e4, dtype=dtype)
    logits[:, 17] = 1e4
    logits[2] = -math.inf
    logits[2, 5] = 3.0
    problem = Problem(logits, torch.tensor([17, 2, 6]))
    log_probs, entropy, _ = join(kernels, parts_of(kernels, problem, True).unsqueeze(0), problem)
    low, high = float(logits[0, 0]), float(logits[0, 17])
    assert log_probs.tolist() == [0.0, low - high, -math.inf]
    assert entropy.tolist() == [0.0, 0.0, 0.0]
    check(kernels, Problem(logits[:2].clone(), torch.tensor([17, IGNORED])))


def test_rows_more_than_two_to_the_31_elements_apart(kernels):
    """Memory of which only the rows themselves are ever touched: the bits are those of rows that lie close together."""
    stride, num_columns = (1 << 31) + 8, 40
    size = 2 * (2 * stride + num_columns)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # Linux' MAP_NORESERVE, which Python names since 3.12
    far = torch.frombuffer(mmap.mmap(-1, size, flags=private), dtype=torch.bfloat16).as_strided((3, num_columns), (stride, 1))
    close = random_problem(3, num_columns, torch.bfloat16, seed=9)
    close.targets = torch.tensor([3, IGNORED, 39])
    found = []
    for view, row_stride in ((far, stride), (close.logits.clone(), num_columns)):
        view.copy_(close.logits)
        close.stride = row_stride
        rows, parts = close.rows(view, True), torch.empty(4, 3)
        assert kernels.semion_log_prob_parts(ctypes.byref(rows), simt.at(parts), None, None) == 0
        _, _, totals = join(kernels, parts.unsqueeze(0), close)
        slopes = torch.ones(3)
        gradient = simt.LogProbGradient(simt.at(totals), simt.at(slopes), simt.at(slopes), simt.at(view), row_stride)
        assert kernels.semion_log_prob_backward(ctypes.byref(rows), ctypes.byref(gradient), None) == 0
        found.append((parts, view.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_row_without_gradient_is_cleared_unread_and_an_ignored_row_unread(kernels):
    """NaN logits in such rows leave no trace."""
    problem = random_problem(4, 33, torch.bfloat16, seed=3)
    problem.targets = torch.tensor([1, IGNORED, 5, IGNORED])
    problem.logits[1] = problem.logits[3] = math.nan
    parts = parts_of(kernels, problem, False)
    assert parts[:, 1].tolist() == [0, 1, 0, 0]
    totals = join(kernels, parts.unsqueeze(0), problem)[2]
    problem.logits[2] = math.nan
    gradient = backward(kernels, problem, totals, torch.tensor([1.0, 2.0, 0.0, 3.0]), None)
    assert (gradient[1:] == 0).all()
    assert gradient[0].isfinite().all()
    assert (gradient[0] != 0).any()


def test_what_is_broken_shows_as_nan(kernels):
    """A NaN among the logits, wherever it lies, and a target that no rank has."""
    for place in (0, 9, 32):
        problem = random_problem(2, 33, torch.float32, seed=4, offset=1)
        problem.targets = torch.tensor([3, 4])
        problem.logits[1, place] = math.nan
        log_probs, entropy, totals = join(kernels, parts_of(kernels, problem, True).unsqueeze(0), problem)
        assert log_probs.isnan().tolist() == entropy.isnan().tolist() == [False, True]
        assert backward(kernels, problem, totals, torch.ones(2), None)[1].isnan().all()
    problem = random_problem(3, 33, torch.float32, seed=4)
    problem.targets = torch.tensor([33, -1, 32])
    log_probs = join(kernels, parts_of(kernels, problem, False).unsqueeze(0), problem)[0]
    assert log_probs.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("cut", [40, 50])
def test_two_ranks_equal_one(kernels, cut):
    """A vocabulary of 40 cut after a column, the second time into everything and padding alone."""
    whole = random_problem(5, 60, torch.bfloat16, seed=5, num_valid=40, closed=True, temperature=0.5)
    ranks = []
    for begin, end in ((0, cut), (cut, 60)):
        ranks.append(
            Problem(
                whole.logits[:, begin:end].clone(),
                whole.targets,
                num_valid=min(max(0, 40 - begin), end - begin),
                vocab_start=begin,
                ids=(0, 40),
                temperature=0.5,
            )
        )
    weights, entropy_weights = torch.randn(2, 5, generator=torch.Generator().manual_seed(6))
    want = expected(whole, weights, entropy_weights)
    parts = torch.stack([parts_of(kernels, rank, True) for rank in ranks])
    log_probs, entropy, totals = join(kernels, parts, whole)
    torch.testing.assert_close(log_probs.double(), want[0], atol=2e-6, rtol=EPS)
    torch.testing.assert_close(entropy.double(), want[1], atol=4e-6, rtol=EPS)
    gradients = [backward(kernels, rank, totals, weights, entropy_weights) for rank in ranks]
    torch.testing.assert_close(torch.cat(gradients, 1).double(), want[2], atol=1e-5, rtol=2**-8)
