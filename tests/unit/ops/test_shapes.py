"""The operators without values: their shapes and types are those of the kernels, torch.compile takes them without a break, and
fake tensors of a GPU, of any size, pass through them.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.ops import (
    _shapes,
    block_digests,
    column_weights,
    grouped_advantages,
    lm_head_log_probs,
    policy_gradient_loss,
    sequence_log_probs,
    token_log_probs,
)

T, V = 6, 40
TARGETS, BOUNDS = torch.tensor([3, -100, 0, 39, 5, 7]), torch.tensor([0, 2, 6], dtype=torch.int32)
TOKENS = torch.linspace(-1, 0, T)


def cached_attention_arguments():
    """Two requests' four tokens, at two heads over one of keys."""
    qkv, cache = torch.linspace(-1, 1, 4 * 4 * 32).view(4, 128), torch.zeros(3, 1, 32, 64)
    positions, slots = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 64, 65])
    starts, table = torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([[0], [2]], dtype=torch.int32)
    return qkv, positions, slots, starts, table, torch.ones(5, 32), cache, 0.3


def arguments(name):
    """Small and valid ones."""
    logits = torch.linspace(-3, 3, T * V).view(T, V)
    parts = torch.ops.semion.log_prob_parts(logits, TARGETS, 0, V, 0, V, 1.0, True)
    _, _, totals = torch.ops.semion.log_prob_join(parts[None], TARGETS, 1.0)
    backward = logits, TARGETS, totals, TOKENS, TOKENS, 0, V, 1.0
    heads = torch.linspace(-2, 2, T * 4 * 6).view(T, 4, 6)
    attention = heads, heads[:, :2], heads[:, 2:], torch.ones(T, 3), torch.zeros(T, 3), BOUNDS, torch.tensor([-1, 0])
    output, sums = torch.ops.semion.packed_attention(*attention, 0.4)
    policy = TOKENS, TOKENS, TOKENS, torch.ones(2), BOUNDS, TARGETS, 0.2, 0.2, 2.0, 0.1
    return {
        "log_prob_parts": (logits.bfloat16(), TARGETS, 0, V, 0, V, 0.7, True),
        "log_prob_join": (parts[None], TARGETS, 1.0),
        "log_prob_backward": (*backward, torch.empty_like(logits)),
        "sequence_sums": (TOKENS, BOUNDS, TARGETS > 0),
        "sequence_sums_backward": (torch.ones(2), BOUNDS, None, T),
        "grouped_advantages": (TOKENS.double(), BOUNDS, 1),
        "policy_gradient": policy,
        "packed_attention": (*attention, 0.4),
        "packed_attention_backward": (heads, *attention, output, sums, 0.4),
        "cached_attention": cached_attention_arguments(),
        "swiglu": (logits,),
        "swiglu_backward": (logits[:, : V // 2].contiguous(), logits),
        "rms_norm": (logits, logits[0].contiguous(), 1e-5),
        "rms_norm_backward": (logits, logits, logits[0].contiguous(), TOKENS[: logits.size(0)].contiguous()),
        "few_rows_product": (logits, logits[:3].contiguous()),
        "sample_tokens": (logits, torch.ones(T), TARGETS, True),
        "block_digests": ([logits, logits[2:, :8]], column_weights(V, "cpu"), [0, 2], [0, 0], [7, 7]),
    }[name]


@pytest.mark.parametrize("name", sorted(_shapes._FAKES))
def test_shapes_are_the_kernels_own(name):
    """Types, shapes, devices and what is written, by torch's own check of an operator."""
    checks = torch.library.opcheck(getattr(torch.ops.semion, name), arguments(name))
    assert set(checks.values()) == {"SUCCESS"}


def test_every_operator_has_one():
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("semion::")}
    assert names == set(_shapes._FAKES)


@pytest.mark.parametrize("head", ["logits", "logits_in_place", "hidden_in_one_pass", "hidden"])
def test_losses_compile_without_a_break(head):
    """GRPO's loss and sums per sequence over log-probs, forward and backward: the bits of the plain run."""
    generator = torch.Generator().manual_seed(0)
    weight, leaf = torch.randn(V, 8, generator=generator), torch.randn(T, 8, generator=generator)

    def loss(hidden):
        if head.startswith("logits"):
            log_probs, _ = token_log_probs(hidden @ weight.t(), TARGETS, inplace_backward=head == "logits_in_place")
        else:
            known = 2 * torch.ones(T) if head == "hidden_in_one_pass" else None
            log_probs = lm_head_log_probs(hidden, weight, TARGETS, coefficients=known)
        if head == "hidden_in_one_pass":
            return log_probs.sum()
        policy, _ = policy_gradient_loss(
            log_probs, TOKENS, None, torch.ones(2), BOUNDS, TARGETS, clip_low=0.2, clip_high=0.2, kl_weight=0.0
        )
        return policy + sequence_log_probs(log_probs, BOUNDS).sum()

    found = []
    for work in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        hidden = leaf.clone().requires_grad_()
        value = work(hidden)
        found.append((value.detach(), *torch.autograd.grad(value, hidden)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_fake_tensors_of_a_gpu_pass_through_at_any_size():
    with FakeTensorMode(), torch.no_grad():
        logits = torch.empty(16_745, 128_256, device="cuda", dtype=torch.bfloat16)
        log_probs, entropy = token_log_probs(logits, torch.empty(16_745, device="cuda", dtype=torch.int64), with_entropy=True)
        assert entropy is not None
        assert log_probs.shape == entropy.shape == (16_745,)
        assert log_probs.device.type == "cuda" and log_probs.dtype == torch.float32
        block = torch.empty(4096, 4096, device="cuda", dtype=torch.bfloat16)
        columns = torch.empty(4096, device="cuda", dtype=torch.int64)
        digests = block_digests([block], rows=[0], cols=[0], seeds=[1], columns=columns)
        assert digests.shape == (1,) and digests.device.type == "cuda"
        rewards = torch.empty(8, device="cuda"), torch.empty(3, device="cuda", dtype=torch.int32)
        advantages, no_signal, _ = torch.ops.semion.grouped_advantages(*rewards, 0)
        assert advantages.shape == (8,) and no_signal.shape == (2,)


def test_a_reward_that_is_no_number_needs_its_value():
    """grouped_advantages looks at the rewards to name the broken one, so it is no part of a compiled graph."""
    advantages, _ = torch.compile(grouped_advantages, backend="aot_eager")(TOKENS, BOUNDS)
    assert torch.equal(advantages, grouped_advantages(TOKENS, BOUNDS)[0])
