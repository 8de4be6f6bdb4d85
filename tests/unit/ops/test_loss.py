"""Sequence sums with a mask, grouped advantages, the policy-gradient loss and the LM head by chunks against their plain
twins in float64: values, gradients, the same bits every time, errors.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.core.errors import NumericsError
from engine.core.types import IGNORED
from engine.ops import grouped_advantages, lm_head_log_probs, plain, policy_gradient_loss, sequence_log_probs
from engine.ops.policy_gradient import SUMS

LENGTHS = st.lists(st.integers(0, 40), max_size=6)


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@given(LENGTHS, st.integers(0, 2**32))
def test_masked_sequence_sums_equal_the_plain_twin(lengths, seed):
    """Sums within one place of fp32, gradients exactly their sequence's, 0 under the mask."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), generator=generator).requires_grad_()
    mask = torch.rand(sum(lengths), generator=generator) < 0.6
    bounds, weights = bounds_of(lengths), torch.randn(len(lengths), generator=generator)
    sums = sequence_log_probs(values, bounds, mask)
    want = plain.sequence_log_probs(values.detach().double(), bounds, mask)
    torch.testing.assert_close(sums.double(), want, atol=1e-12, rtol=torch.finfo(torch.float32).eps)
    (gradient,) = torch.autograd.grad((sums * weights).sum(), values)
    assert torch.equal(gradient, weights.repeat_interleave(bounds.diff().long()) * mask)


REWARDS = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-1e6, 1e6))


@given(st.lists(st.lists(REWARDS, max_size=8), max_size=5), st.sampled_from(["mean", "mean_std", "leave_one_out"]))
def test_advantages_of_groups_equal_the_plain_twin(groups, normalize):
    """Empty groups and groups of one included. A spread below rounding is nobody's signal: left out of mean_std."""
    rewards = torch.tensor([reward for group in groups for reward in group], dtype=torch.float64)
    bounds = bounds_of([len(group) for group in groups])
    advantages, no_signal = grouped_advantages(rewards, bounds, normalize=normalize)
    want, silent = plain.grouped_advantages(rewards, bounds, normalize=normalize)
    assert no_signal.tolist() == silent.tolist() == [len(set(group)) < 2 for group in groups]
    for group, mine, theirs in zip(groups, *(a.split(bounds.diff().tolist()) for a in (advantages, want)), strict=True):
        if len(set(group)) < 2:
            assert mine.tolist() == [0.0] * len(group)
            continue
        spread = max(group) - min(group)
        if normalize != "mean_std" or spread > 1e-6 * max(map(abs, group)):
            bound = 1e-8 if normalize == "mean_std" else 1e-14 * max(map(abs, group)) + 1e-300
            torch.testing.assert_close(mine, theirs, atol=bound, rtol=1e-12)


def test_advantages_by_hand():
    rewards, bounds = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0]), bounds_of([3, 2])
    by_mode = {mode: grouped_advantages(rewards, bounds, normalize=mode)[0].tolist() for mode in ("mean", "leave_one_out")}
    assert by_mode["mean"] == pytest.approx([2 / 3, -1 / 3, -1 / 3, -1, 1])
    assert by_mode["leave_one_out"] == pytest.approx([1, -0.5, -0.5, -2, 2])
    root = math.sqrt(2) / 3
    found, _ = grouped_advantages(rewards, bounds, normalize="mean_std")
    assert found.tolist() == pytest.approx([2 / 3 / root, -1 / 3 / root, -1 / 3 / root, -1, 1])


def test_what_cannot_be_an_advantage_is_named():
    with pytest.raises(NumericsError, match="reward 3 of the group must be finite; found nan"):
        grouped_advantages(torch.tensor([0.0, 1.0, 2.0, math.nan]), bounds_of([2, 2]))
    with pytest.raises(ValueError, match=r"normalize must be one of mean, mean_std, leave_one_out; found 'std'"):
        grouped_advantages(torch.zeros(2), bounds_of([2]), normalize="std")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rewards must be float32 or float64; found int64"):
        grouped_advantages(torch.zeros(2).long(), bounds_of([2]))


@st.composite
def policy_problems(draw):
    lengths = draw(LENGTHS)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size = sum(lengths)
    spread = draw(st.sampled_from([0.0, 0.3, 5.0]))
    log_probs = -torch.rand(size, generator=generator)
    old, reference = (log_probs + spread * torch.randn(2, size, generator=generator)).unbind()
    targets = torch.where(torch.rand(size, generator=generator) < 0.3, IGNORED, 7)
    advantages = torch.randn(len(lengths), generator=generator) * draw(st.sampled_from([0.0, 1.0]))
    return log_probs, old, draw(st.sampled_from([None, reference])), advantages, bounds_of(lengths), targets


@given(policy_problems(), st.sampled_from([0.0, 0.2]), st.sampled_from([0.0, 0.1]))
def test_policy_gradient_equals_the_plain_twin(problem, clip_ratio, kl_weight):
    """Loss, sums and gradient. With equal log-probs the ratio is exactly 1 and lies within a clip of 0."""
    log_probs, old, reference, advantages, bounds, targets = problem
    options = {"clip_ratio": clip_ratio, "kl_weight": kl_weight}
    leaf = log_probs.clone().requires_grad_()
    loss, sums = policy_gradient_loss(leaf, old, reference, advantages, bounds, targets, **options)
    (gradient,) = torch.autograd.grad(2 * loss, leaf)
    # the ratio meets the clip in fp32: its bounds are rounded there, as are the inputs
    exact = log_probs.double().requires_grad_()
    wide = None if reference is None else reference.double()
    want, want_sums = plain.policy_gradient_loss(exact, old.double(), wide, advantages.double(), bounds, targets, **options)
    (slope,) = torch.autograd.grad(2 * want, exact)
    scale = max(1.0, float(want_sums.abs().max()))
    torch.testing.assert_close(loss.double(), want, atol=2e-6 * scale, rtol=1e-6)
    torch.testing.assert_close(sums.double(), want_sums, atol=2e-6 * scale, rtol=1e-6)
    torch.testing.assert_close(gradient.double(), slope, atol=2e-6, rtol=2e-6)
    again = policy_gradient_loss(leaf, old, reference, advantages, bounds, targets, **options)
    assert torch.equal(loss, again[0])
    assert torch.equal(sums, again[1])


def test_the_operators_sums_are_named_in_its_order():
    """As many as csrc/policy/row.h counts; each of another size, so that two of them cannot be mistaken for one another."""
    header = (Path(__file__).resolve().parents[3] / "csrc" / "policy" / "row.h").read_text("utf-8")
    found_in_header = re.search(r"num_policy_sums = (\d+);  // (.*)", header)
    assert found_in_header is not None
    number, words = found_in_header.groups()
    assert int(number) == len(SUMS)
    assert [word.split()[0] for word in words.split(", ")] == ["loss", "KL", "tokens", "ratio", "|log-prob"]
    log_probs, old, reference = torch.full((3, 4), -1.0) - torch.tensor([[0.0], [0.5], [2.0]])
    targets, bounds = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 4], dtype=torch.int32)
    options = {"clip_ratio": 0.2, "kl_weight": 0.1}
    _, sums = policy_gradient_loss(log_probs, old, reference, torch.ones(1), bounds, targets, **options)
    found = dict(zip(SUMS[1:], sums.tolist(), strict=True))
    kl = 4 * (math.exp(-2.0) + 2.0 - 1)
    assert found == pytest.approx({"kl": kl, "clipped": 4, "ratio": 4 * math.exp(0.5), "gap": 4 * 0.5}, rel=1e-6)


def test_a_broken_advantage_reaches_the_loss():
    arguments = torch.zeros(4), torch.zeros(4), None
    for broken in (math.inf, math.nan):
        loss, _ = policy_gradient_loss(
            *arguments, torch.tensor([broken]), bounds_of([4]), torch.zeros(4).long(), clip_ratio=0.2, kl_weight=0.0
        )
        assert not loss.isfinite()


HEAD_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # logits and gradients keep the dtype


@pytest.mark.parametrize("dtype", HEAD_TOLERANCE)
@pytest.mark.parametrize("single_pass", [True, False])
@pytest.mark.parametrize("chunk_rows", [1, 5, 64])
def test_lm_head_equals_the_plain_twin(dtype, single_pass, chunk_rows):
    """Chunks that do not divide the rows; padding of the vocabulary gets no gradient; ignored rows neither."""
    torch.manual_seed(4)
    hidden, weight = torch.randn(13, 24).to(dtype).requires_grad_(), (0.3 * torch.randn(5001, 24)).to(dtype).requires_grad_()
    targets, coefficients = torch.randint(0, 4990, (13,)), torch.randn(13)
    targets[5] = IGNORED
    given_coefficients = coefficients if single_pass else None
    found = lm_head_log_probs(hidden, weight, targets, num_valid=4990, coefficients=given_coefficients, chunk_rows=chunk_rows)
    gradients = torch.autograd.grad(-0.25 * (coefficients * found).sum(), (hidden, weight))
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want = plain.lm_head_log_probs(*exact, targets, num_valid=4990)
    slopes = torch.autograd.grad(-0.25 * (coefficients * want).sum(), exact)
    assert (found - want).abs().max() <= HEAD_TOLERANCE[dtype]
    for mine, theirs in zip(gradients, slopes, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - theirs).abs().max() <= HEAD_TOLERANCE[dtype] * theirs.abs().max()
    assert (gradients[1][4990:] == 0).all()
    assert (gradients[0][5] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("native", [True, False])
def test_lm_head_of_half_precision_with_and_without_the_processors_products(monkeypatch, dtype, native):
    """Whichever this processor has. In float32 the log-probs are float32's, and blocks of the weight leave no seam."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native)
    torch.manual_seed(5)
    hidden, weight = torch.randn(7, 24).to(dtype).requires_grad_(), (0.3 * torch.randn(5001, 24)).to(dtype).requires_grad_()
    targets = torch.tensor([0, 4095, 4096, 5000, 17, IGNORED, 4999])
    found = lm_head_log_probs(hidden, weight, targets, coefficients=torch.ones(7), chunk_rows=3)
    gradients = torch.autograd.grad(found.sum(), (hidden, weight))
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want = plain.lm_head_log_probs(*exact, targets)
    slopes = torch.autograd.grad(want.sum(), exact)
    assert (found - want).abs().max() <= (HEAD_TOLERANCE[dtype] if native else 5e-6)
    for mine, theirs in zip(gradients, slopes, strict=True):
        rounding = HEAD_TOLERANCE[dtype] if native else torch.finfo(dtype).eps
        assert (mine.double() - theirs).abs().max() <= rounding * theirs.abs().max()


def test_coefficients_that_are_not_the_losses_are_refused():
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    log_probs = lm_head_log_probs(hidden, weight, torch.zeros(4).long(), coefficients=torch.ones(4))
    with pytest.raises(ValueError, match=r"must be a multiple of coefficients; found it .* off"):
        log_probs.square().sum().backward()


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((4, 3), (9, 2), (4,)), {}, r"must agree in H and type; found \[4, 3\] .* \[9, 2\]"),
        (((4, 3), (9, 3), (5,)), {}, r"targets must have shape \[T\] = \[4\]; found \[5\]"),
        (((4, 3), (9, 3), (4,)), {"chunk_rows": 0}, "chunk_rows must be at least 1; found 0"),
        (((4, 3), (9, 3), (4,)), {"coefficients": torch.ones(3)}, r"coefficients must have shape \[T\] = \[4\]"),
    ],
)
def test_lm_head_names_wrong_arguments(shapes, options, message):
    hidden, weight, targets = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        lm_head_log_probs(hidden, weight, targets.long(), **options)
