"""Sequence sums with a mask, grouped advantages, the policy-gradient loss and the LM head by chunks against their references
in float64: values, gradients, the same bits every time, errors.
"""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.core.errors import NumericsError
from engine.core.types import IGNORED
from engine.ops import (
    grouped_advantages,
    lm_head_log_probs,
    log_square_probs,
    policy_gradient_loss,
    policy_gradient_slopes,
    sequence_log_probs,
)
from engine.ops.policy_gradient import LOG_LIMIT, SUMS
from tests import reference_ops

LENGTHS = st.lists(st.integers(0, 40), max_size=6)


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@given(LENGTHS, st.integers(0, 2**32))
def test_masked_sequence_sums_equal_the_reference(lengths, seed):
    """Sums within one place of fp32, gradients exactly their sequence's, 0 under the mask."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), generator=generator).requires_grad_()
    mask = torch.rand(sum(lengths), generator=generator) < 0.6
    bounds, weights = bounds_of(lengths), torch.randn(len(lengths), generator=generator)
    sums = sequence_log_probs(values, bounds, mask)
    want = reference_ops.sequence_log_probs(values.detach().double(), bounds, mask)
    torch.testing.assert_close(sums.double(), want, atol=1e-12, rtol=torch.finfo(torch.float32).eps)
    (gradient,) = torch.autograd.grad((sums * weights).sum(), values)
    assert torch.equal(gradient, weights.repeat_interleave(bounds.diff().long()) * mask)


REWARDS = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-1e6, 1e6))


@given(st.lists(st.lists(REWARDS, max_size=8), max_size=5), st.sampled_from(["mean", "mean_std", "leave_one_out"]))
def test_advantages_of_groups_equal_the_reference(groups, normalize):
    """Empty groups and groups of one included."""
    rewards = torch.tensor([reward for group in groups for reward in group], dtype=torch.float64)
    bounds = bounds_of([len(group) for group in groups])
    advantages, no_signal = grouped_advantages(rewards, bounds, normalize=normalize)
    want, silent = reference_ops.grouped_advantages(rewards, bounds, normalize=normalize)
    assert no_signal.tolist() == silent.tolist()
    parts = (a.split(bounds.diff().tolist()) for a in (advantages, want))
    for group, none, mine, theirs in zip(groups, no_signal.tolist(), *parts, strict=True):
        largest, spread = max(map(abs, group), default=0.0), max(group, default=0.0) - min(group, default=0.0)
        small = normalize == "mean_std" and spread <= 1e-6 * largest  # not above the least deviation, which is no larger
        assert none or not (len(set(group)) < 2 or small)
        if none:
            assert mine.tolist() == [0.0] * len(group)
            assert len(set(group)) < 2 or (normalize == "mean_std" and spread <= 1e-5 * largest)
            continue
        bound = 1e-8 if normalize == "mean_std" else 1e-14 * largest + 1e-300
        torch.testing.assert_close(mine, theirs, atol=bound, rtol=1e-12)


def test_advantages_by_hand():
    rewards, bounds = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0]), bounds_of([3, 2])
    by_mode = {mode: grouped_advantages(rewards, bounds, normalize=mode)[0].tolist() for mode in ("mean", "leave_one_out")}
    assert by_mode["mean"] == pytest.approx([2 / 3, -1 / 3, -1 / 3, -1, 1])
    assert by_mode["leave_one_out"] == pytest.approx([1, -0.5, -0.5, -2, 2])
    root = math.sqrt(2) / 3
    found, _ = grouped_advantages(rewards, bounds, normalize="mean_std")
    assert found.tolist() == pytest.approx([2 / 3 / root, -1 / 3 / root, -1 / 3 / root, -1, 1])


@pytest.mark.parametrize("of", [grouped_advantages, reference_ops.grouped_advantages])
def test_mean_std_has_a_floor_relative_to_the_rewards(of):
    """Rewards equal but for rounding give no signal; those that differ do, however large or small they all are."""

    def mean_std(*rewards):
        advantages, no_signal = of(torch.tensor(rewards, dtype=torch.float64), bounds_of([len(rewards)]), normalize="mean_std")
        return advantages.tolist(), no_signal.tolist()

    for near in ([0.3, 0.1 + 0.2], [1e9, 1e9 + 1], [-2.0, -2.0000001, -2.0], [1e300, 1e300 * (1 + 1e-12)], [5e-324, 5e-324]):
        assert mean_std(*near) == ([0.0] * len(near), [True])
    for scale in (5e-324 * 2**60, 1e-200, 1e-3, 1.0, 1e9, 1e200, 1.7e308 / 3):
        advantages, no_signal = mean_std(scale, 0.0, 3 * scale, -2 * scale)
        assert advantages == pytest.approx(mean_std(1.0, 0.0, 3.0, -2.0)[0], rel=1e-12)
        assert sum(advantages) == pytest.approx(0.0, abs=1e-14)
        assert no_signal == [False]
    assert mean_std(1.0, 1.0 - 1e-5)[0] == pytest.approx([1.0, -1.0])


@pytest.mark.parametrize("normalize", ["mean", "leave_one_out"])
def test_advantages_of_huge_and_tiny_rewards_are_in_range(normalize):
    """Sums of rewards near the end of float64's range overflow no more; what no number holds is an error that names it."""
    for rewards in ([1.7e308] * 3 + [1.6e308], [1e-320, 3e-320, 2e-320], [1e308, -0.5e308]):
        group = torch.tensor(rewards, dtype=torch.float64), bounds_of([len(rewards)])
        found, _ = grouped_advantages(*group, normalize=normalize)
        want, _ = reference_ops.grouped_advantages(*group, normalize=normalize)
        torch.testing.assert_close(found, want, atol=1e-322, rtol=1e-12)
        assert found.isfinite().all()
    far = torch.tensor([0.0, 1.0, 1.7e308, -1.7e308, -1.7e308], dtype=torch.float64)
    with pytest.raises(NumericsError, match=r"the advantage of reward 2 must be finite; found the reward 1.7e\+308 in a group"):
        grouped_advantages(far, bounds_of([2, 3]), normalize=normalize)


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


CLIPS = st.sampled_from([(0.0, 0.0), (0.2, 0.2), (0.2, 0.28), (0.1, 5.0)])


@given(policy_problems(), CLIPS, st.sampled_from([math.inf, 1.05, 3.0]), st.sampled_from([0.0, 0.1]))
def test_policy_gradient_equals_the_reference(problem, clips, dual_clip, kl_weight):
    """Loss, sums and gradient. With equal log-probs the ratio is exactly 1 and lies within a clip of 0."""
    log_probs, old, reference, advantages, bounds, targets = problem
    options = {"clip_low": clips[0], "clip_high": clips[1], "dual_clip": dual_clip, "kl_weight": kl_weight}
    leaf = log_probs.clone().requires_grad_()
    loss, sums = policy_gradient_loss(leaf, old, reference, advantages, bounds, targets, **options)
    (gradient,) = torch.autograd.grad(2 * loss, leaf)
    # the ratio meets the clip in fp32: its bounds are rounded there, as are the inputs
    exact = log_probs.double().requires_grad_()
    wide = None if reference is None else reference.double()
    want, want_sums = reference_ops.policy_gradient_loss(
        exact, old.double(), wide, advantages.double(), bounds, targets, **options
    )
    (slope,) = torch.autograd.grad(2 * want, exact)
    scale = max(1.0, float(want_sums.abs().max()))
    torch.testing.assert_close(loss.double(), want, atol=2e-6 * scale, rtol=1e-6)
    torch.testing.assert_close(sums.double(), want_sums, atol=2e-6 * scale, rtol=1e-6)
    torch.testing.assert_close(gradient.double(), slope, atol=2e-6, rtol=6e-6)
    again = policy_gradient_loss(leaf, old, reference, advantages, bounds, targets, **options)
    assert torch.equal(loss, again[0])
    assert torch.equal(sums, again[1])


ONE, LIMIT = bounds_of([1]), LOG_LIMIT


def one_token(of, log_prob, old, reference, advantage, **options):
    """(loss, gradient, sums by name) of one token."""
    dtype = torch.float64 if of is reference_ops.policy_gradient_loss else torch.float32
    leaf = torch.tensor([log_prob], dtype=dtype, requires_grad=True)
    others = (torch.tensor([value], dtype=dtype) for value in (old, reference, advantage))
    fixed = {"clip_low": 0.2, "clip_high": 0.2, "kl_weight": 0.001} | options
    loss, sums = of(leaf, *others, ONE, torch.zeros(1).long(), **fixed)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.item(), gradient.item(), dict(zip(SUMS[1:], sums.tolist(), strict=True))


BOTH = pytest.mark.parametrize("of", [policy_gradient_loss, reference_ops.policy_gradient_loss])


@BOTH
@pytest.mark.parametrize("away", [-60.0, -21.0, -20.0, -1.0, 0.5, 19.5, 20.0, 20.5, 40.0, 90.0, 1000.0, math.inf])
def test_kl_is_held_in_log_space(of, away):
    """d = reference - policy = `away`, advantage 0: up to and at the limit k3 and its slope, beyond it a constant, counted."""
    loss, gradient, sums = one_token(of, -1.0 - away if away > 0 else -1.0, -1.0, -1.0 + min(away, 0.0), 0.0)
    d = min(away, LIMIT)
    assert sums["kl"] == pytest.approx(math.exp(d) - d - 1, rel=2e-6)
    assert loss == pytest.approx(0.001 * (math.exp(d) - d - 1), rel=2e-6)
    assert gradient == pytest.approx(0.001 * (1 - math.exp(d)) if away <= LIMIT else 0.0, rel=2e-6)
    assert sums["beyond"] == float(away > LIMIT)


@BOTH
@pytest.mark.parametrize("gap", [-1000.0, -200.0, -20.0, 19.5, 20.0, 20.5, 90.0, 1000.0])
def test_the_ratio_is_held_in_log_space(of, gap):
    """With an advantage below 0 nothing else bounds it from above; the gradient is the ratio up to the limit, then 0."""
    loss, gradient, sums = one_token(of, min(gap, 0.0), -max(gap, 0.0), min(gap, 0.0), -2.0)
    ratio = math.exp(min(gap, LIMIT))
    assert loss == pytest.approx(2 * max(ratio, 0.8), rel=2e-6)
    assert gradient == pytest.approx(2 * ratio if 0 <= gap <= LIMIT else 0.0, rel=2e-6)
    assert sums["beyond"] == float(gap > LIMIT)
    assert sums["ratio"] == pytest.approx(ratio, rel=2e-6)


@BOTH
def test_clips_are_of_their_own_side(of):
    """clip_high bounds what a positive advantage gains, clip_low what a negative one does; dual_clip what it may cost."""
    for advantage, ratio, options, kept in [
        (2.0, 1.25, {"clip_high": 0.28}, None),
        (2.0, 1.30, {"clip_high": 0.28}, 1.28),
        (2.0, 0.10, {"clip_high": 0.28, "dual_clip": 3.0}, None),
        (-2.0, 0.85, {"clip_low": 0.1}, 0.9),
        (-2.0, 0.85, {"clip_high": 0.01}, None),
        (-2.0, 50.0, {}, None),
        (-2.0, 50.0, {"dual_clip": 3.0}, 3.0),
        (-2.0, 2.9, {"dual_clip": 3.0}, None),
        (-2.0, math.exp(30), {"dual_clip": 3.0}, 3.0),
        (0.0, 50.0, {"dual_clip": 3.0}, None),
    ]:
        log = math.log(ratio)
        loss, gradient, sums = one_token(of, -40.0 + log, -40.0, -40.0, advantage, **options | {"kl_weight": 0.0})
        assert loss == pytest.approx(-advantage * (ratio if kept is None else kept), rel=1e-5)
        assert gradient == pytest.approx(-advantage * ratio if kept is None else 0.0, rel=1e-5)
        assert sums["clipped"] == float(kept is not None)


def test_one_broken_log_prob_reaches_the_loss_and_wrong_clips_are_named():
    """A clamp must not hide a NaN; the bounds of the clips are checked."""
    for now, old, reference in ((math.nan, -1.0, -1.0), (-1.0, math.nan, -1.0), (-1.0, -1.0, math.nan)):
        assert math.isnan(one_token(policy_gradient_loss, now, old, reference, 1.0)[0])
        assert math.isnan(one_token(policy_gradient_loss, now, old, reference, -1.0, dual_clip=3.0)[0])
    least, above = ("must be at least 0", -0.1), ("must be greater than 1, or infinity for none", 1.0)
    for name, (rule, value) in {"clip_low": least, "clip_high": least, "dual_clip": above}.items():
        with pytest.raises(ValueError, match=f"{name} {rule}; found {value:g}"):
            one_token(policy_gradient_loss, -1.0, -1.0, -1.0, 1.0, **{name: value})


def test_the_operators_sums_are_named_in_its_order():
    """As many as csrc/policy/row.h counts; each of another size, so that two of them cannot be mistaken for one another."""
    header = (Path(__file__).resolve().parents[3] / "csrc" / "policy" / "row.h").read_text("utf-8")
    found_in_header = re.search(r"num_policy_sums = (\d+);  // (.*)", header)
    assert found_in_header is not None
    number, words = found_in_header.groups()
    assert int(number) == len(SUMS)
    assert [word.split()[0] for word in words.split(", ")] == ["loss", "KL", "tokens", "ratio", "|log-prob", "tokens"]
    log_probs, old, reference = torch.full((3, 4), -1.0) - torch.tensor([[0.0], [0.5], [2.0]])
    targets, bounds = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 4], dtype=torch.int32)
    options = {"clip_low": 0.2, "clip_high": 0.2, "kl_weight": 0.1}
    _, sums = policy_gradient_loss(log_probs, old, reference, torch.ones(1), bounds, targets, **options)
    found = dict(zip(SUMS[1:], sums.tolist(), strict=True))
    kl = 4 * (math.exp(-2.0) + 2.0 - 1)
    assert found == pytest.approx({"kl": kl, "clipped": 4, "ratio": 4 * math.exp(0.5), "gap": 4 * 0.5, "beyond": 0}, rel=1e-6)


def test_a_broken_advantage_reaches_the_loss():
    arguments, targets = (torch.zeros(4), torch.zeros(4), None), torch.zeros(4).long()
    for broken in (math.inf, math.nan):
        row = *arguments, torch.tensor([broken]), bounds_of([4]), targets
        loss, _ = policy_gradient_loss(*row, clip_low=0.2, clip_high=0.2, kl_weight=0.0)
        assert not loss.isfinite()


HEAD_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # logits and gradients keep the dtype


@pytest.mark.parametrize("dtype", HEAD_TOLERANCE)
@pytest.mark.parametrize("single_pass", [True, False])
@pytest.mark.parametrize("chunk_rows", [1, 5, 64])
def test_lm_head_equals_the_reference(dtype, single_pass, chunk_rows):
    """Chunks that do not divide the rows; padding of the vocabulary gets no gradient; ignored rows neither."""
    torch.manual_seed(4)
    hidden, weight = torch.randn(13, 24).to(dtype).requires_grad_(), (0.3 * torch.randn(5001, 24)).to(dtype).requires_grad_()
    targets, coefficients = torch.randint(0, 4990, (13,)), torch.randn(13)
    targets[5] = IGNORED
    given_coefficients = coefficients if single_pass else None
    found = lm_head_log_probs(hidden, weight, targets, num_valid=4990, coefficients=given_coefficients, chunk_rows=chunk_rows)
    gradients = torch.autograd.grad(-0.25 * (coefficients * found).sum(), (hidden, weight))
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want = reference_ops.lm_head_log_probs(*exact, targets, num_valid=4990)
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
    want = reference_ops.lm_head_log_probs(*exact, targets)
    slopes = torch.autograd.grad(want.sum(), exact)
    assert (found - want).abs().max() <= (HEAD_TOLERANCE[dtype] if native else 5e-6)
    for mine, theirs in zip(gradients, slopes, strict=True):
        rounding = HEAD_TOLERANCE[dtype] if native else torch.finfo(dtype).eps
        assert (mine.double() - theirs).abs().max() <= rounding * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [3, 64])
def test_lm_head_with_slopes_of_its_own_log_probs_equals_recomputation(dtype, chunk_rows):
    """GRPO's clipped loss with its KL, whose coefficients are made in the chunk: the same bits of the loss, and gradients as
    near to float64's as those of a second pass over the logits."""
    torch.manual_seed(6)
    hidden, weight = torch.randn(13, 24).to(dtype).requires_grad_(), (0.3 * torch.randn(501, 24)).to(dtype).requires_grad_()
    targets, bounds = torch.randint(0, 501, (13,)), bounds_of([4, 0, 9])
    targets[5] = IGNORED
    before = reference_ops.lm_head_log_probs(hidden.detach().double(), weight.detach().double(), targets).float()
    old, reference = before + 0.4 * torch.randn(2, 13)
    advantages, options = torch.tensor([1.5, 0.3, -0.7]), dict[str, Any](clip_low=0.2, clip_high=0.3, kl_weight=0.1)
    each = advantages.repeat_interleave(bounds.diff())

    def slopes(rows, log_probs):
        given = old[rows], reference[rows], each[rows], targets[rows]
        return policy_gradient_slopes(log_probs, *given, **options)

    found = []
    for known in (slopes, None):
        log_probs = lm_head_log_probs(hidden, weight, targets, coefficients=known, chunk_rows=chunk_rows)
        loss, _ = policy_gradient_loss(log_probs, old, reference, advantages, bounds, targets, **options)
        found.append((loss, *torch.autograd.grad(loss / 7, (hidden, weight))))
    assert torch.equal(found[0][0], found[1][0])
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    row = reference_ops.lm_head_log_probs(*exact, targets), old, reference, advantages, bounds, targets
    want = torch.autograd.grad(reference_ops.policy_gradient_loss(*row, **options)[0] / 7, exact)
    for gradients in found:
        for mine, theirs in zip(gradients[1:], want, strict=True):
            assert (mine.double() - theirs).abs().max() <= HEAD_TOLERANCE[dtype] * theirs.abs().max()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "num_valid"), [(1, 1), (64, 40), (65, 37), (0, 40)])
def test_log_square_probs_equal_softmax_in_float64(dtype, num_tokens, num_valid):
    """Rows around a chunk's end, padding columns, large logits, a stride, a temperature; nothing is differentiated."""
    logits = 30 * torch.randn(num_tokens, 80, generator=torch.Generator().manual_seed(1)).to(dtype)[:, :40]
    found = log_square_probs(logits.requires_grad_(), num_valid=num_valid, temperature=0.6)
    wanted = (logits.detach().double()[:, :num_valid] / 0.6).softmax(-1).square().sum(-1).log()
    torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=2e-6)
    assert not found.requires_grad
