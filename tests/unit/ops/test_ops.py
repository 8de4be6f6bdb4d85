"""Log-probs from vocab-parallel logits and sums per sequence, against float64 formulas: values and gradients, padding,
ignored rows, extreme logits, and a vocabulary cut over two real gloo ranks (threads of this process).
"""

import math
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given
from hypothesis import strategies as st

from engine.core.types import IGNORED
from engine.ops import sequence_log_probs, token_log_probs

EPS = torch.finfo(torch.float32).eps


def expected(logits, targets, num_valid, temperature, weights, entropy_weights):
    """Float64: (log-probs, entropies, gradient of sum(weights * log-prob + entropy_weights * entropy))."""
    x = logits.detach().double().requires_grad_()
    log_p = (x[:, :num_valid] / temperature).log_softmax(-1)
    counted = targets != IGNORED
    column = torch.where(counted, targets, 0)
    log_probs = torch.where(counted, log_p.gather(-1, column.unsqueeze(-1)).squeeze(-1), 0.0)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * torch.where(p > 0, log_p, 0.0), 0.0).sum(-1)
    (weights.double() * log_probs + entropy_weights.double() * entropy).sum().backward()
    return log_probs.detach(), entropy.detach(), x.grad


def tolerance(logits, temperature):
    """Eight units in the last place of the largest scaled logit (3.5 measured): what fp32 holds of a log-sum-exp."""
    finite = logits[logits.isfinite()].double().abs()
    return 8 * EPS * (1 + (float(finite.max()) / temperature if finite.numel() else 0.0))


def run(logits, targets, weights, entropy_weights, **options):
    """The op's (log-probs, entropies, gradient of the logits), and the logits after the backward."""
    leaf = logits.clone().requires_grad_()
    inner = leaf * 1  # the op may write over its input, which must not be a leaf
    log_probs, entropy = token_log_probs(inner, targets, with_entropy=True, **options)
    assert entropy is not None
    assert log_probs.dtype == entropy.dtype == torch.float32
    (weights * log_probs + entropy_weights * entropy).sum().backward()
    return log_probs.detach(), entropy.detach(), leaf.grad, inner.detach()


@st.composite
def problems(draw):
    """Logits [T, V], targets with ignored rows, number of valid columns, temperature, weights of the gradient."""
    num_tokens, num_columns = draw(st.integers(0, 6)), draw(st.integers(1, 40))
    num_valid = draw(st.integers(1, num_columns))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))
    logits = scale * (2 * torch.rand(num_tokens, num_columns, generator=generator) - 1)
    targets = torch.randint(0, num_valid, (num_tokens,), generator=generator)
    targets[torch.rand(num_tokens, generator=generator) < 0.3] = IGNORED
    if draw(st.booleans()):  # closed columns, never a row's target and never all of a row
        closed = torch.rand(num_tokens, num_columns, generator=generator) < 0.3
        closed[:, 0] = False
        closed[torch.arange(num_tokens), targets.clamp(min=0)] = False
        logits[closed] = -math.inf
    logits[:, num_valid:] = 1e30  # padding must not be looked at
    temperature = draw(st.sampled_from([1.0, 0.5, 1.7]))
    weights = torch.randn(2, num_tokens, generator=generator)
    return logits, targets, num_valid, temperature, weights[0], weights[1]


def check(logits, targets, num_valid, temperature, weights, entropy_weights, found):
    log_probs, entropy, gradient = found
    want = expected(logits, targets, num_valid, temperature, weights, entropy_weights)
    bound = tolerance(logits[:, :num_valid], temperature)
    torch.testing.assert_close(log_probs.double(), want[0], atol=bound, rtol=EPS)
    torch.testing.assert_close(entropy.double(), want[1], atol=bound, rtol=EPS)
    torch.testing.assert_close(gradient.double(), want[2], atol=2 * bound / temperature, rtol=EPS)
    assert (gradient[:, num_valid:] == 0).all()
    assert (log_probs[targets == IGNORED] == 0).all()
    assert (entropy > -bound).all()


@given(problems(), st.booleans())
def test_values_and_gradients_equal_float64_log_softmax(problem, inplace):
    logits, targets, num_valid, temperature, weights, entropy_weights = problem
    *found, after = run(
        logits,
        targets,
        weights,
        entropy_weights,
        num_valid=num_valid,
        temperature=temperature,
        inplace_backward=inplace,
    )
    check(logits, targets, num_valid, temperature, weights, entropy_weights, found)
    assert torch.equal(after, found[2] if inplace else logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_worked_on_in_float32(dtype):
    """The error of a value is fp32's; only the gradient, stored in the logits' dtype, is rounded to it."""
    torch.manual_seed(0)
    logits, targets, weights = (4 * torch.randn(7, 33)).to(dtype), torch.randint(0, 33, (7,)), torch.randn(2, 7)
    log_probs, entropy, gradient, _ = run(logits, targets, *weights)
    want = expected(logits, targets, 33, 1.0, *weights)
    torch.testing.assert_close(log_probs.double(), want[0], atol=tolerance(logits, 1.0), rtol=0)
    torch.testing.assert_close(entropy.double(), want[1], atol=tolerance(logits, 1.0), rtol=0)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), want[2], atol=1e-6, rtol=2 * torch.finfo(dtype).eps)


def test_gradients_equal_float64_differences():
    """Independent of any autograd: the slope along a random direction, by central differences of the plain formulas."""
    torch.manual_seed(1)
    logits, targets, weights = torch.randn(5, 11), torch.randint(0, 9, (5,)), torch.randn(2, 5)
    direction, h = torch.randn(5, 11).double(), 1e-5

    def value(x):
        p = (x[:, :9] / 0.7).softmax(-1)
        return (weights[0] * p[torch.arange(5), targets].log() - weights[1] * (p * p.log()).sum(-1)).sum()

    slope = (value(logits.double() + h * direction) - value(logits.double() - h * direction)) / (2 * h)
    gradient = run(logits, targets, *weights, num_valid=9, temperature=0.7)[2]
    assert float((gradient.double() * direction).sum()) == pytest.approx(float(slope), rel=1e-5)


def test_extreme_logits_stay_finite():
    """One column 20,000 above the others: log-probs 0 and -20,000, entropy 0, no NaN anywhere in the gradient."""
    logits = torch.full((3, 4), -1e4)
    logits[:, 1] = 1e4
    targets = torch.tensor([1, 2, IGNORED])
    log_probs, entropy, gradient, _ = run(logits, targets, torch.ones(3), torch.ones(3))
    assert log_probs.tolist() == [0.0, -20000.0, 0.0]
    assert entropy.tolist() == [0.0, 0.0, 0.0]
    assert gradient.tolist() == [[0, 0, 0, 0], [0, -1, 1, 0], [0, 0, 0, 0]]


def test_a_target_on_a_closed_column_has_log_prob_minus_infinity():
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    log_probs, entropy, gradient, _ = run(logits, torch.tensor([1]), torch.ones(1), torch.ones(1))
    assert log_probs.tolist() == [-math.inf]
    assert entropy.item() == pytest.approx(math.log(2))
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, 1.0, -0.5]]))


def test_entropy_comes_only_when_asked_for():
    logits, targets = torch.zeros(2, 3, requires_grad=True), torch.tensor([0, IGNORED])
    log_probs, entropy = token_log_probs(logits, targets, inplace_backward=False)
    assert entropy is None
    log_probs.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[2 / 3, -1 / 3, -1 / 3], [0, 0, 0]]))


@pytest.fixture(scope="module")
def two_ranks():
    """Runs work(rank, group) on two threads, each a member of one gloo group; their results in rank order."""
    store = dist.HashStore()

    def join(rank):
        group = dist.ProcessGroup(dist.PrefixStore("group", store), rank, 2)
        backend = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=30))
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        return group

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as threads:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        groups = list(threads.map(join, range(2)))
        yield lambda work: list(threads.map(lambda rank: work(rank, groups[rank]), range(2)))


# A rank of nothing but padding; a rank with all targets; closed columns: a row whose columns are all closed on one rank.
ALL_ON_RANK_1 = torch.tensor([[-math.inf] * 3 + [0.5, 2.0, 1e4], [1.0, -2.0, 0.0, 3.0, 0.0, 0.0]])


@given(problems())
@example((torch.randn(4, 8), torch.tensor([0, 1, 2, IGNORED]), 4, 1.0, torch.ones(4), torch.ones(4)))
@example((torch.randn(4, 8), torch.tensor([0, 1, 2, IGNORED]), 3, 0.5, torch.ones(4), torch.ones(4)))
@example((ALL_ON_RANK_1, torch.tensor([4, 0]), 6, 1.0, torch.ones(2), torch.ones(2)))
def test_two_ranks_equal_one(two_ranks, problem):
    """Each rank holds half of the columns; both get the whole's values, and their gradients joined are the whole's."""
    logits, targets, num_valid, temperature, weights, entropy_weights = problem
    logits = torch.nn.functional.pad(logits, (0, logits.size(1) % 2), value=1e30)
    half = logits.size(1) // 2

    def work(rank, group):
        return run(
            logits[:, rank * half : (rank + 1) * half],
            targets,
            weights,
            entropy_weights,
            vocab_start=rank * half,
            num_valid=num_valid,
            temperature=temperature,
            group=group,
        )

    first, second = two_ranks(work)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    found = (first[0], first[1], torch.cat([first[2], second[2]], -1))
    check(logits, targets, num_valid, temperature, weights, entropy_weights, found)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(0, 2**32))
def test_sequence_sums_and_their_gradient(lengths, seed):
    """Every sum is that of its own slice, an empty sequence sums to 0, and a token's gradient is its sequence's."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), generator=generator).requires_grad_()
    weights = torch.randn(len(lengths), generator=generator)
    sums = sequence_log_probs(values, bounds.int())
    want = [math.fsum(values[a:b].tolist()) for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
    assert sums.tolist() == pytest.approx(want, abs=1e-5)
    assert all(total == 0 for total, length in zip(sums.tolist(), lengths, strict=True) if length == 0)
    (sums * weights).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, weights.repeat_interleave(torch.tensor(lengths)))
