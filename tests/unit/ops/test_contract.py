"""What token_log_probs promises beside its values: the precision at a real vocabulary, any row stride, the same bits at
every repetition and number of threads, no memory of row length, and errors that name argument, rule and value.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.core.errors import SemionError
from engine.core.types import IGNORED
from engine.ops import _library, sequence_log_probs, token_log_probs
from tests import reference_ops

ROOT = Path(__file__).resolve().parents[3]
VOCABULARY = 128256  # Llama 3's
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def with_entropy(logits, targets):
    log_probs, entropy = token_log_probs(logits, targets, with_entropy=True)
    assert entropy is not None
    return log_probs, entropy


@pytest.mark.parametrize("dtype", DTYPES)
def test_precision_at_a_real_vocabulary(dtype):
    """Log-probs and entropies within 2e-6 of float64 for logits of standard deviation 3: 1e-6 is half a place of 16."""
    torch.manual_seed(0)
    logits, targets = (3 * torch.randn(16, VOCABULARY)).to(dtype), torch.randint(0, VOCABULARY, (16,))
    log_probs, entropy = with_entropy(logits, targets)
    want = reference_ops.token_log_probs(logits.double(), targets)
    assert (log_probs - want[0]).abs().max() <= 2e-6
    assert (entropy - want[1]).abs().max() <= 2e-6


@given(
    st.integers(0, 3),
    st.integers(1, 5000),
    st.integers(0, 9),
    st.sampled_from(DTYPES),
    st.sampled_from([0.1, 3.0, 1e4]),
    st.integers(0, 2**32),
)
def test_any_row_stride_and_width_equals_the_reference(num_tokens, width, gap, dtype, scale, seed):
    """Widths around no power of two, rows with a gap between them, one dominating token at scale 1e4."""
    generator = torch.Generator().manual_seed(seed)
    before = (scale * torch.randn(num_tokens, width + gap, generator=generator)).clamp(-6e4, 6e4).to(dtype)
    room = before.clone().requires_grad_() * 1
    logits = room[:, :width]
    targets = torch.randint(0, width, (num_tokens,), generator=generator)
    weights = torch.randn(2, num_tokens, generator=generator)
    log_probs, entropy = with_entropy(logits, targets)
    exact = before[:, :width].double().requires_grad_()
    want = reference_ops.token_log_probs(exact, targets)
    bound = 2e-6 + 1e-6 * scale
    torch.testing.assert_close(log_probs.double(), want[0], atol=bound, rtol=2e-7)
    torch.testing.assert_close(entropy.double(), want[1], atol=bound, rtol=2e-7)
    (gradient,) = torch.autograd.grad((weights[0] * log_probs + weights[1] * entropy).sum(), logits)
    (slope,) = torch.autograd.grad((weights[0] * want[0] + weights[1] * want[1]).sum(), exact)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(gradient.double(), slope, atol=4 * bound, rtol=rounding)
    assert torch.equal(room[:, width:], before[:, width:]), "the gap belongs to somebody else"


def test_a_late_and_large_logit_moves_the_reference_without_loss():
    """The running reference of a row rises in later blocks: once a little, once by more than fp32's exponent holds."""
    logits = torch.zeros(2, 10_001)
    logits[:, 5000], logits[0, 9999], logits[1, 9999] = 9.0, 30.0, 500.0
    targets = torch.tensor([3, 9999])
    found = with_entropy(logits, targets)
    for mine, want in zip(found, reference_ops.token_log_probs(logits.double(), targets), strict=True):
        torch.testing.assert_close(mine.double(), want, atol=2e-6, rtol=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_logit_breaks_its_row_and_no_other(value):
    """A NaN or an infinity anywhere must reach the loss, where it is caught: silence would train on it."""
    logits = torch.randn(3, 3000)
    logits[1, 2999] = value
    log_probs, entropy = with_entropy(logits, torch.zeros(3, dtype=torch.int64))
    assert log_probs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]


def test_no_tokens_and_no_targets():
    empty, _ = token_log_probs(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert empty.shape == (0,)
    logits = torch.randn(2, 5, requires_grad=True) * 1
    log_probs, _ = token_log_probs(logits, torch.full((2,), IGNORED))
    assert log_probs.tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(log_probs.sum(), logits)
    assert torch.equal(gradient, torch.zeros(2, 5))


def test_the_same_bits_at_every_repetition_and_number_of_threads():
    torch.manual_seed(2)
    logits, targets = torch.randn(40, 4001), torch.randint(0, 4001, (40,))

    def run():
        x = logits.clone().requires_grad_() * 1
        log_probs, entropy = with_entropy(x, targets)
        return log_probs, entropy, *torch.autograd.grad((log_probs + entropy).sum(), x)

    threads, first = torch.get_num_threads(), run()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("width", [7, 4001])
def test_the_backward_that_overwrites_the_logits_says_so(width):
    """A retained graph and whatever else saved the logits are errors afterwards, and never a silently wrong gradient; what
    differentiated before it, or does not write, is right."""
    leaf, targets = torch.randn(5, width, requires_grad=True), torch.zeros(5).long()

    def used(inplace=True, view=False):
        logits = leaf * 1
        log_probs, _ = token_log_probs(logits[:, :] if view else logits, targets, inplace_backward=inplace)
        return logits, log_probs.sum()

    (wanted,) = torch.autograd.grad(used(inplace=False)[1], leaf)
    for view in (False, True):
        _, loss = used(view=view)
        assert torch.equal(torch.autograd.grad(loss, leaf, retain_graph=True)[0], wanted)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, leaf)
        logits, loss = used(view=view)
        other = logits.logsumexp(-1).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()
    logits = leaf * 1
    before = logits.logsumexp(-1).square().sum()  # its backward runs after the operator's
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (before + token_log_probs(logits, targets)[0].sum()).backward()
    logits, loss = used()
    (both,) = torch.autograd.grad(loss + logits.logsumexp(-1).sum(), leaf)  # made later, differentiated first
    torch.testing.assert_close(both, wanted + leaf.detach().softmax(-1), atol=1e-6, rtol=1e-5)


def test_leaves_are_not_overwritten():
    leaf, targets = torch.randn(5, 8, requires_grad=True), torch.zeros(5).long()
    for logits in (leaf, leaf[:, 2:]):
        with pytest.raises(ValueError, match=r"must be no leaf that requires a gradient.*pass inplace_backward=False"):
            token_log_probs(logits, targets)
        before = leaf.detach().clone()
        torch.autograd.grad(token_log_probs(logits, targets, inplace_backward=False)[0].sum(), leaf)
        assert torch.equal(leaf, before)
    with torch.no_grad():
        token_log_probs(leaf, targets)


@pytest.mark.parametrize("claim", ["token_log_probs", "lm_head_single_pass", "lm_head_recomputed"])
def test_memory_stays_within_what_is_claimed(claim):
    """Enforced by a limit on the address space of a fresh process: memory_limit.py."""
    command = [sys.executable, "-m", "tests.unit.ops.memory_limit", claim]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("logits", "targets", "options", "message"),
    [
        (torch.zeros(2), torch.zeros(2).long(), {}, r"logits must have shape \[T, V_local\]; found \[2\]"),
        (torch.zeros(2, 3).double(), torch.zeros(2).long(), {}, "logits must be float32 or .* found float64"),
        (torch.zeros(3, 2).t(), torch.zeros(2).long(), {}, "logits must have a column stride of 1; found 2"),
        (torch.zeros(2, 3), torch.zeros(3).long(), {}, r"targets must have shape \[T\] = \[2\]; found \[3\]"),
        (torch.zeros(2, 3), torch.zeros(2), {}, "targets must be int64; found float32"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), {}, r"targets\[1\] must be -100 or in \[0, 3\); found 3"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), {}, r"targets\[0\] must be -100 or in \[0, 3\); found -1"),
        (torch.zeros(2, 3), torch.tensor([0, 2]), {"num_valid": 2}, r"in \[0, 2\); found 2"),
        (torch.zeros(2, 3), torch.tensor([0, 6]), {"vocab_start": 6}, r"targets\[0\] must be -100 or in \[6, 9\)"),
        (torch.zeros(2, 3), torch.tensor([0, 0]), {"temperature": 0.0}, "temperature must be greater than 0; found 0"),
    ],
)
def test_wrong_arguments_are_named_with_rule_and_value(logits, targets, options, message):
    with pytest.raises(ValueError, match=message):
        token_log_probs(logits, targets, **options)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([1, 4], r"cu_seqlens\[0\] must be 0; found 1"),
        ([0, 3, 2, 4], r"cu_seqlens\[2\] must be at least cu_seqlens\[1\] = 3; found 2"),
        ([0, 3], r"cu_seqlens\[1\] must be the length of token_log_probs = 4; found 3"),
        ([], r"cu_seqlens must have shape \[parts \+ 1\]"),
    ],
)
def test_boundaries_that_do_not_rise_from_0_to_the_end_are_named(bounds, message):
    with pytest.raises(ValueError, match=message):
        sequence_log_probs(torch.zeros(4), torch.tensor(bounds, dtype=torch.int32))


def test_a_library_that_was_not_built_is_an_error_that_says_how(monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "_library.py"))
    with pytest.raises(SemionError, match=r"_semion_cpu.so must be built from csrc; found none: run tools/environment.sh"):
        _library.load()
