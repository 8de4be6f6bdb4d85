"""The operators of torch.ops.semion on a real GPU, through their public functions: against float64, against the CPU's own
kernels, repeatable bit for bit, in the memory they promise, at the sizes where only a GPU shows a race. Never run so far:
no machine with a GPU was at hand.

    python -m pytest tests/gpu/test_kernels_gpu.py          needs engine/ops/_semion_cuda.so: tools/environment.sh
"""

from typing import Any

import pytest
import torch

from engine.core.errors import NumericsError
from engine.core.types import IGNORED
from engine.ops import (
    block_digest,
    block_digests,
    column_weights,
    grouped_advantages,
    lm_head_log_probs,
    policy_gradient_loss,
    policy_gradient_slopes,
    sequence_log_probs,
    token_log_probs,
)
from engine.ops.lm_head import CHUNK_BYTES
from tests import reference_ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="torch sees no GPU; tests/unit/ops/test_cuda_kernels.py runs the same kernels"
    ),
]
# Llama 3's vocabulary (rows that one block reads, and few rows that several blocks share), a small one, an odd one.
SIZES = [(600, 128_256), (3, 128_256), (64, 320), (33, 5_003), (1, 1), (0, 128)]
GIGABYTE, BEYOND = (4096, 128_256), (16_745, 128_256)  # logits of 1 GB in bf16, and of 2^31 elements
assert BEYOND[0] * BEYOND[1] > 2**31
HEAD = (8192, 4096, 128_256)  # tokens, hidden, vocabulary
ROWS = 32_000  # of a smaller vocabulary
DIGESTED = 1 << 21  # rows of 1024 bytes


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
    logits, targets, weights = problem(*GIGABYTE, torch.bfloat16)
    inner = logits.requires_grad_() * 1  # the op writes over its input, which autograd would copy of a leaf
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    log_probs, entropy = token_log_probs(inner, targets, with_entropy=True)
    assert entropy is not None
    (gradient,) = torch.autograd.grad([log_probs, entropy], [inner], [weights[0], weights[1]])
    assert gradient.data_ptr() == inner.data_ptr()
    assert torch.cuda.max_memory_allocated() - before < 2 << 20


@pytest.mark.parametrize("known", ["tensor", "function", None])
@pytest.mark.parametrize("chunk_rows", [128, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lm_head_equals_float64(dtype, chunk_rows, known):
    """Several chunks, whose products add to a float32 gradient, and one; coefficients given, made in the chunk, or none."""
    torch.manual_seed(0)
    hidden = torch.randn(300, 256, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(ROWS, 256, device="cuda") / 16).to(dtype).requires_grad_()
    targets, old = torch.randint(0, ROWS, (300,), device="cuda"), -10 + torch.rand(300, device="cuda")
    targets[::7] = IGNORED
    bounds, advantages = torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda"), torch.tensor([1.5, -0.5], device="cuda")
    each, clips = advantages.repeat_interleave(bounds.diff()), dict[str, Any](clip_low=9.0, clip_high=1e9, kl_weight=0.0)

    def slopes(rows, log_probs):
        return policy_gradient_slopes(log_probs, old[rows], None, each[rows], targets[rows], **clips)

    given = {"tensor": each, "function": slopes, None: None}[known]
    found = lm_head_log_probs(hidden, weight, targets, coefficients=given, chunk_rows=chunk_rows)
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want = reference_ops.lm_head_log_probs(*exact, targets)
    if known == "tensor":
        losses = (each * found).sum(), (each * want).sum()
    else:
        mine = policy_gradient_loss(found, old, None, advantages, bounds, targets, **clips)
        theirs = reference_ops.policy_gradient_loss(want, old, None, advantages, bounds, targets, **clips)
        losses = mine[0], theirs[0]
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}[dtype]
    assert (found - want).abs().max() <= tolerance
    pairs = zip(torch.autograd.grad(losses[0], (hidden, weight)), torch.autograd.grad(losses[1], exact), strict=True)
    for gradient, slope in pairs:
        assert gradient.dtype == dtype
        assert (gradient.double() - slope).abs().max() <= tolerance * slope.abs().max()


def test_lm_head_never_waits_and_refuses_wrong_coefficients_by_nan():
    """torch's own guard: whatever would make the host wait is an error inside."""
    hidden = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(500, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(64, dtype=torch.long, device="cuda")
    for power, broken in ((1, False), (2, True)):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            log_probs = lm_head_log_probs(hidden, weight, targets, coefficients=torch.ones_like(targets, dtype=torch.float32))
            gradients = torch.autograd.grad(log_probs.pow(power).sum(), (hidden, weight))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(bool(gradient.isnan().any()) == broken for gradient in gradients)


def test_lm_head_of_8b_holds_a_gibibyte_of_logits():
    """[8192 x 4096 -> 128256]: beside the gradients no more than one chunk and the float32 gradient."""
    tokens, width, vocabulary = HEAD
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16) / 64).requires_grad_()
    targets, ones = torch.randint(0, vocabulary, (tokens,), device="cuda"), torch.ones(tokens, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(lm_head_log_probs(hidden, weight, targets, coefficients=ones).sum(), (hidden, weight))
    room = CHUNK_BYTES + 4 * weight.numel() + 2 * weight.numel() + hidden.nbytes
    assert torch.cuda.max_memory_allocated() - before < room + (256 << 20)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_digests_equal_the_cpus(dtype):
    """Aligned and not, wide and narrow, more matrices than a launch takes, one larger than 2^31 bytes of rows away."""
    generator = torch.Generator().manual_seed(0)
    blocks = []
    shapes = [(65, 48, 0), (70, 33, 15), (3, 4816, 0), (5, 3, 13), (4096, 1, 0), (700, 4096, 8)]
    for i, (rows, columns, gap) in enumerate(shapes * 10):
        room = torch.randint(0, 256, (rows * (columns + gap) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        blocks.append(room.view(dtype).view(rows, columns + gap)[:, :columns][i % 2 :])
    places = {"rows": list(range(60)), "cols": [i % 3 for i in range(60)], "seeds": [1 << i for i in range(60)]}
    found = []
    for device in ("cpu", "cuda"):
        weights = column_weights(5000, device)
        found.append(block_digests([block.to(device) for block in blocks], columns=weights, **places).cpu())
    assert torch.equal(*found)
    whole = torch.randint(0, 256, (DIGESTED, 1024), device="cuda", dtype=torch.uint8)  # 2 GiB
    middle = DIGESTED // 2
    parts = [block_digest(half, row=i * middle, col=0, seed=3) for i, half in enumerate((whole[:middle], whole[middle:]))]
    assert torch.equal(block_digest(whole, row=0, col=0, seed=3), parts[0] + parts[1])


def test_rows_beyond_two_to_the_31_elements():
    """16,745 rows of 128,256 columns are 2^31 and more: the last rows alone give the same bits, values and gradients."""
    num_tokens, num_columns = BEYOND
    logits = torch.empty(num_tokens, num_columns, device="cuda", dtype=torch.bfloat16).normal_()
    targets, weights = torch.randint(0, num_columns, (num_tokens,), device="cuda"), torch.randn(num_tokens, device="cuda")
    last = logits[-64:].clone()
    found = run_in_place(logits, targets, weights)
    alone = run_in_place(last, targets[-64:], weights[-64:])
    torch.testing.assert_close(found[0][-64:], alone[0], atol=2e-6, rtol=2e-7)  # a few rows are shared among blocks
    torch.testing.assert_close(found[1][-64:], alone[1], atol=1e-6, rtol=2**-8)


def run_in_place(logits, targets, weights):
    """Log-probs and the gradient over the logits, by the operators alone."""
    kernels, width = torch.ops.semion, logits.size(1)
    parts = kernels.log_prob_parts(logits, targets, 0, width, 0, width, 1.0, False)
    log_probs, _, totals = kernels.log_prob_join(parts[None], targets, 1.0)
    kernels.log_prob_backward(logits, targets, totals, weights, None, 0, width, 1.0, logits)
    return log_probs, logits


def test_on_another_stream_and_in_a_graph():
    """Work is queued on torch's current stream, and captured with it: a replay on other values gives theirs."""
    logits, targets, weights = problem(64, 5_003, torch.bfloat16)
    want = run_in_place(logits.clone(), targets, weights[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = torch.empty_like(logits)
        late.copy_(logits)
        found = run_in_place(late, targets, weights[0])
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(logits)
    columns, block = column_weights(64, "cuda"), torch.zeros(5, 64, device="cuda")
    bounds = torch.tensor([0, 10, 64], dtype=torch.int32, device="cuda")
    with torch.cuda.graph(graph):
        captured = run_in_place(static, targets, weights[0])
        digest = block_digest(block, row=0, col=0, seed=1, columns=columns)
        sums = sequence_log_probs(captured[0], bounds)
    static.copy_(logits)
    block.fill_(2.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))
    assert torch.equal(digest, block_digest(block, row=0, col=0, seed=1))
    torch.testing.assert_close(sums, torch.stack([want[0][:10].sum(), want[0][10:].sum()]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_tensors_device_whichever_is_current():
    logits, targets, weights = problem(64, 5_003, torch.bfloat16)
    want = run_in_place(logits.clone(), targets, weights[0])
    there = [x.to("cuda:1") for x in (logits, targets, weights[0])]
    found = run_in_place(*there)
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, want, strict=True))
    with pytest.raises(ValueError, match="targets must be on the device of logits"):
        token_log_probs(there[0], targets)


def test_one_long_response_is_not_one_blocks():
    """16,384 tokens of one sequence: the policy loss equals the CPU's."""
    torch.manual_seed(0)
    log_probs, old = -torch.rand(2, 16_384)
    bounds, targets = torch.tensor([0, 16_384], dtype=torch.int32), torch.ones(16_384, dtype=torch.long)
    row = log_probs, old, None, torch.tensor([0.7]), bounds, targets
    clips = dict[str, Any](clip_low=0.2, clip_high=0.2, kl_weight=0.0)
    want = policy_gradient_loss(*row, **clips)
    moved: list[Any] = [x if x is None else x.cuda() for x in row]
    found = policy_gradient_loss(*moved, **clips)
    torch.testing.assert_close(found[0].cpu(), want[0], atol=1e-3, rtol=1e-6)
    torch.testing.assert_close(found[1].cpu(), want[1], atol=1e-3, rtol=1e-6)


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
