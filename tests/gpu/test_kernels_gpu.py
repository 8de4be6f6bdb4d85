"""The operators of torch.ops.semion on a real GPU, through their public functions: against float64, against the CPU's own
kernels, repeatable bit for bit, in the memory they promise, at the sizes where only a GPU shows a race. Never run so far:
no machine with a GPU was at hand.

    python -m pytest tests/gpu/test_kernels_gpu.py          needs engine/ops/_semion_cuda.so: tools/environment.sh
"""

import pytest
import torch

from engine.core.errors import NumericsError
from engine.core.types import IGNORED
from engine.ops import grouped_advantages, lm_head_log_probs, policy_gradient_loss, sequence_log_probs, token_log_probs
from tests import reference_ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="torch sees no GPU; tests/unit/ops/test_cuda_kernels.py runs the same kernels"
    ),
]
# Llama 3's vocabulary (rows that one block reads, and few rows that several blocks share), a small one, an odd one.
SIZES = [(600, 128_256), (3, 128_256), (64, 320), (33, 5_003), (1, 1), (0, 128)]


def problem(num_tokens, num_columns, dtype, gap=0):
    torch.manual_seed(num_tokens + num_columns)
    logits = 4 * torch.randn(num_tokens, num_columns + gap, device="cuda", dtype=torch.float32).to(dtype)[:, :num_columns]
    targets = torch.randint(0, num_columns, (num_tokens,), device="cuda")
    targets[torch.rand(num_tokens, device="cuda") < 0.2] = IGNORED
    return logits, targets, torch.randn(2, num_tokens, device="cuda")


def run(logits, targets, weights, with_entropy, inplace=True):
    leaf = logits.clone(memory_format=torch.preserve_format).requires_grad_()
    log_probs, entropy = token_log_probs(leaf * 1, targets, with_entropy=with_entropy, inplace_backward=inplace)
    loss = (weights[0] * log_probs).sum()
    if entropy is not None:
        loss = loss + (weights[1] * entropy).sum()
    loss.backward()
    assert leaf.grad is not None
    return log_probs.detach(), None if entropy is None else entropy.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("num_tokens", "num_columns"), SIZES)
def test_token_log_probs_equal_float64_and_repeat(num_tokens, num_columns, dtype):
    logits, targets, weights = problem(num_tokens, num_columns, dtype)
    exact = logits.double().requires_grad_()
    want = reference_ops.token_log_probs(exact, targets)
    (weights[0] * want[0] + weights[1] * want[1]).sum().backward()
    log_probs, entropy, gradient = run(logits, targets, weights, True)
    again = run(logits, targets, weights, True)
    assert entropy is not None
    assert torch.equal(log_probs, again[0])
    assert torch.equal(entropy, again[1])
    assert torch.equal(gradient, again[2])
    torch.testing.assert_close(log_probs.double(), want[0].detach(), atol=2e-6, rtol=2e-7)
    torch.testing.assert_close(entropy.double(), want[1].detach(), atol=5e-6, rtol=2e-7)
    torch.testing.assert_close(gradient.double(), exact.grad, atol=1e-5, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("gap", [1, 8])
def test_rows_beside_a_boundary(gap):
    """The kernel itself on a strided view: a stride that is odd, and one of whole vectors."""
    logits, targets, _ = problem(65, 5_003, torch.bfloat16, gap)
    log_probs, _ = token_log_probs(logits, targets)
    on_cpu, _ = token_log_probs(logits.cpu(), targets.cpu())
    torch.testing.assert_close(log_probs.cpu(), on_cpu, atol=4e-6, rtol=4e-7)


def test_memory_is_that_of_the_logits_alone():
    """Forward and backward of 1 GB of logits take less than 2 MB beside them."""
    logits, targets, weights = problem(4096, 128_256, torch.bfloat16)
    inner = logits.requires_grad_() * 1  # the op writes over its input, which autograd would copy of a leaf
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    log_probs, entropy = token_log_probs(inner, targets, with_entropy=True)
    assert entropy is not None
    (gradient,) = torch.autograd.grad([log_probs, entropy], [inner], [weights[0], weights[1]])
    assert gradient.data_ptr() == inner.data_ptr()
    assert torch.cuda.max_memory_allocated() - before < 2 << 20


def test_lm_head_in_a_single_pass_equals_recomputation():
    torch.manual_seed(0)
    hidden = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(32_000, 256, device="cuda") / 16).to(torch.bfloat16)
    targets, coefficients = torch.randint(0, 32_000, (300,), device="cuda"), torch.randn(300, device="cuda")
    found = []
    for known in (None, coefficients):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        log_probs = lm_head_log_probs(*leaves, targets, coefficients=known)
        (coefficients * log_probs).sum().backward()
        found.append((log_probs.detach(), leaves[0].grad, leaves[1].grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=2**-7)


def test_small_operators_equal_the_cpus():
    torch.manual_seed(0)
    cu = torch.tensor([0, 0, 5000, 5001, 16_384], dtype=torch.int32)
    log_probs, old, reference = -torch.rand(3, 16_384)
    advantages = torch.randn(4)
    targets = torch.where(torch.rand(16_384) < 0.2, IGNORED, 1)
    found = []
    for device in ("cpu", "cuda"):
        leaf = log_probs.to(device).requires_grad_()
        others = [x.to(device) for x in (old, reference, advantages, cu, targets)]
        loss, sums = policy_gradient_loss(leaf, *others, clip_low=0.2, clip_high=0.2, kl_weight=0.1)
        (loss + sequence_log_probs(leaf, others[3]).square().sum() * 1e-6).backward()
        rewards = torch.arange(16.0, device=device).square()
        groups = torch.tensor([0, 8, 8, 16], dtype=torch.int32, device=device)
        found.append((loss.detach(), sums, leaf.grad, *grouped_advantages(rewards, groups, normalize="mean_std")))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b.cpu(), atol=1e-5, rtol=1e-5)


def test_mistakes_are_named():
    rewards = torch.tensor([1.0, 2.0, 3.0, torch.nan], device="cuda")
    cu_groups = torch.tensor([0, 4], dtype=torch.int32, device="cuda")
    with pytest.raises(NumericsError, match="reward 3"):
        grouped_advantages(rewards, cu_groups)
    logits = torch.zeros(2, 8, device="cuda")
    with pytest.raises(ValueError, match="targets must be on the device of logits"):
        token_log_probs(logits, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"targets must have shape \[T\]"):
        token_log_probs(logits, torch.zeros(3, dtype=torch.long, device="cuda"))
    assert token_log_probs(logits, torch.tensor([0, 8], device="cuda"))[0].isnan().tolist() == [False, True]
