"""GroupDPO, its sum with GRPO, NLL and entropy, and GRPO's normalisations, against formulas written out in float64:
whatever the groups, the layout in rows and the reduction, and whether a group fits a row or is scored first. Gradients
by log-prob, by entropy and, through the log-probs' own operator, by logit.
"""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.advantages import grouped_advantages
from engine.algorithms.base import SumLoss
from engine.algorithms.dpo import Dpo
from engine.algorithms.entropy import EntropyBonus
from engine.algorithms.group_dpo import GroupDpo
from engine.algorithms.grpo import Grpo
from engine.algorithms.registry import make_loss
from engine.config.options import Trainer
from engine.megatron.packing import make_batch
from engine.ops import token_log_probs
from tests.builders import algorithm_options
from tests.unit.algorithms.steps import LAYOUTS, Step

CLOSE = 3e-5  # relative or absolute: fp32 sums of some dozens of terms of order 1
NUM_PROMPTS = 9  # skipped ones included
EPS, KL = 0.2, 0.3


def step_of(groups, seed=1):
    """A step of these groups of rewards: correct against wrong where there are both, and advantages."""
    step = Step(seed, num_pairs=0)
    for index, rewards in enumerate(groups):
        mixed = len({reward > 0 for reward in rewards}) == 2
        for reward in rewards:
            step.add(index if mixed else -1, mixed and reward > 0, reward - math.fsum(rewards) / len(rewards))
    return step


def loss_of(**options):
    return make_loss(algorithm_options(options))


def zeros(step):
    return [[0.0] * len(tokens) for tokens in step.policy]


def group_dpo(step, beta, nll_weight=0.0):
    """(loss, gradients): the mean over the pairs of a group of -log sigmoid(beta m) + nll_weight * NLL(chosen)."""
    loss, slopes = 0.0, [0.0] * len(step.sequences)
    for chosen, rejected, weight in step.pairs():
        gains = [sum(step.policy[i]) - sum(step.reference[i]) for i in (chosen, rejected)]
        margin = beta * (gains[0] - gains[1])
        loss += weight * (math.log1p(math.exp(-margin)) - nll_weight * sum(step.policy[chosen]))
        slope = weight * beta / (1 + math.exp(margin))
        slopes[chosen] -= slope + weight * nll_weight
        slopes[rejected] += slope
    return loss, [[slope] * len(tokens) for slope, tokens in zip(slopes, step.policy, strict=True)]


def grpo(step, kl_weight, by_length=False):
    """(loss, gradients): -min(r A, clip(r) A) + kl_weight * k3, over the response's length if asked for."""
    loss, gradients = 0.0, zeros(step)
    for i, sequence in enumerate(step.sequences):
        share, a = 1 / len(step.policy[i]) if by_length else 1.0, sequence.advantage
        for t, (p, old, ref) in enumerate(zip(step.policy[i], sequence.rollout_log_probs, step.reference[i], strict=True)):
            r, d = math.exp(p - old), ref - p
            kept = min(r, 1 + EPS) if a >= 0 else max(r, 1 - EPS)
            loss += share * (-kept * a + kl_weight * (math.exp(d) - d - 1))
            gradients[i][t] = share * ((-r * a if kept == r else 0.0) + kl_weight * (1 - math.exp(d)))
    return loss, gradients


def mean_entropies(step):
    """(sum over responses of their mean entropy, gradients by entropy)."""
    return sum(sum(e) / len(e) for e in step.entropy), [[1 / len(e)] * len(e) for e in step.entropy]


def divisor(step, reduction):
    groups = {s.group for s in step.sequences} - {-1}
    return max(1, {"prompts": NUM_PROMPTS, "pairs": len(groups), "tokens": step.num_tokens}[reduction])


def added(*parts):
    """The weighted sum of (weight, (loss, gradients))."""
    loss = sum(weight * value for weight, (value, _) in parts)
    lists = zip(*((gradients for _, (_, gradients) in parts)), strict=True)
    return loss, [
        [sum(w * g for (w, _), g in zip(parts, token, strict=True)) for token in zip(*sequence, strict=True)]
        for sequence in lists
    ]


def close(found, wanted, scale):
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx([value / scale for value in theirs], rel=CLOSE, abs=CLOSE)


MIXED = [[1.0, 0.0, 1.0, 0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
GROUPS = st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=5), max_size=4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["prompts", "pairs", "tokens"])
@pytest.mark.parametrize("nll_weight", [0.0, 0.4])
def test_group_dpo_is_equation_4(layout, reduction, nll_weight):
    """Groups of 6, 1 and 2 pairs, in one row, in several, and scored first where a group does not fit."""
    step = step_of(MIXED)
    algorithm = dict(loss="group_dpo", beta=0.6, nll_weight=nll_weight, reduction=reduction)
    loss, metrics, gradients, _ = step.run(loss_of(**algorithm), num_prompts=NUM_PROMPTS, **layout)
    wanted, slopes = group_dpo(step, 0.6, nll_weight)
    assert loss == pytest.approx(wanted / divisor(step, reduction), rel=CLOSE)
    close(gradients, slopes, divisor(step, reduction))
    pairs = step.pairs()
    margins = [
        0.6 * (sum(step.policy[c]) - sum(step.reference[c]) - sum(step.policy[r]) + sum(step.reference[r])) for c, r, _ in pairs
    ]
    assert metrics == pytest.approx(
        {
            "pairs": 9,
            "margin_mean": sum(margins),
            "preferred_share": sum(margin > 0 for margin in margins),
            "chosen_log_prob_mean": sum(sum(step.policy[c]) for c, _, _ in pairs),
            "rejected_log_prob_mean": sum(sum(step.policy[r]) for _, r, _ in pairs),
            **step.mismatch(),
        },
        rel=CLOSE,
        abs=CLOSE,
    )


def test_the_layouts_hold_every_case():
    """Groups that fit, groups that do not, both in one step, and pairs that are split."""
    step = step_of(MIXED)
    num_split = []
    for layout in LAYOUTS:
        trainer = Trainer.model_validate(layout)
        batches = [
            make_batch(step.sequences, step=0, num_prompts=NUM_PROMPTS, trainer=trainer, dp_rank=dp_rank)
            for dp_rank in range(trainer.data_parallel)
        ]
        rows = [row for batch in batches for row in batch.microbatches]
        split = {group for row in rows for group in row.groups[row.split].tolist()}
        whole = [pair for pair in step.pairs() if step.sequences[pair[0]].group not in split]
        assert sum(row.pairs.size(0) for row in rows) == len(whole)
        num_split.append(len(split))
    assert num_split[0] == 0
    assert 0 < num_split[1] < 3
    assert num_split[3] == 3


@given(GROUPS, st.sampled_from(LAYOUTS), st.sampled_from(["prompts", "pairs", "tokens"]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_everything_at_once_is_the_sum_of_its_parts(groups, layout, reduction, seed):
    """GroupDPO + NLL + alpha * GRPO + c * entropy over any groups, prompts without signal included."""
    step, alpha, nll, c = step_of(groups, seed), 0.3, 0.2, 0.05
    algorithm = dict(
        loss="group_dpo",
        beta=0.6,
        alpha=alpha,
        nll_weight=nll,
        entropy_weight=c,
        clip_ratio=EPS,
        kl_weight=KL,
        reduction=reduction,
    )
    loss, metrics, gradients, slopes = step.run(loss_of(**algorithm), num_prompts=NUM_PROMPTS, **layout)
    wanted, by_log_prob = added((1.0, group_dpo(step, 0.6, nll)), (alpha, grpo(step, KL)))
    entropies, by_entropy = mean_entropies(step)
    scale = divisor(step, reduction)
    assert loss == pytest.approx((wanted - c * entropies) / scale, rel=CLOSE, abs=CLOSE)
    close(gradients, by_log_prob, scale)
    close(slopes, [[-c * slope for slope in sequence] for sequence in by_entropy], scale)
    assert metrics["entropy_mean"] == pytest.approx(sum(map(sum, step.entropy)), rel=CLOSE, abs=CLOSE)
    gap = step.mismatch()["log_prob_gap_mean"]
    assert metrics["log_prob_gap_mean"] == pytest.approx(gap, rel=CLOSE, abs=CLOSE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kl_weight", [0.0, KL])
def test_grpo_by_length_divides_a_responses_sum_by_its_tokens(layout, kl_weight):
    """The KL metric stays a sum over tokens."""
    step = step_of(MIXED, 4)
    algorithm = dict(loss="grpo", clip_ratio=EPS, kl_weight=kl_weight, normalize_length=True)
    loss, metrics, gradients, _ = step.run(loss_of(**algorithm), num_prompts=NUM_PROMPTS, **layout)
    wanted, slopes = grpo(step, kl_weight, by_length=True)
    assert loss == pytest.approx(wanted / NUM_PROMPTS, rel=CLOSE, abs=CLOSE)
    close(gradients, slopes, NUM_PROMPTS)
    plain = step.run(loss_of(loss="grpo", clip_ratio=EPS, kl_weight=kl_weight), **layout)[1]
    assert metrics == pytest.approx(plain, rel=CLOSE, abs=CLOSE)


def test_grpo_as_deepseekmath_wrote_it_is_trls():
    """TRL, GRPOTrainer._compute_loss with loss_type="grpo": per_token = -min(r A, clip(r) A) + beta * k3, the mean
    over a response's tokens, then over the responses; there A is divided by the sample's deviation plus 1e-4, here, as in
    DeepSeekMath, by the group's root mean square. The mean over responses is ours over prompts, divided by their number
    of responses."""
    rewards = [1.0, 0.0, 0.0, 1.0, 0.0]
    step = step_of([rewards], 8)
    deviation = math.sqrt(math.fsum((r - 0.4) ** 2 for r in rewards) / 5)
    advantages = grouped_advantages(rewards, "mean_std")
    assert advantages == pytest.approx([(r - 0.4) / deviation for r in rewards])
    step = Step(8, num_pairs=0)
    for advantage in advantages:
        step.add(-1, False, advantage)
    per_response = []
    for sequence, policy, reference in zip(step.sequences, step.policy, step.reference, strict=True):
        logps, old, ref = (torch.tensor(v, dtype=torch.float64) for v in (policy, sequence.rollout_log_probs, reference))
        ratio = (logps - old).exp()
        surrogate = torch.min(ratio * sequence.advantage, ratio.clamp(1 - EPS, 1 + EPS) * sequence.advantage)
        per_token = -surrogate + KL * ((ref - logps).exp() - (ref - logps) - 1)
        per_response.append(per_token.sum() / per_token.numel())
    algorithm = dict(loss="grpo", clip_ratio=EPS, kl_weight=KL, normalize_length=True)
    loss = step.run(loss_of(**algorithm), num_prompts=1)[0]
    assert loss / len(rewards) == pytest.approx(torch.stack(per_response).mean().item(), rel=CLOSE)


def test_dpo_is_trls():
    """TRL, DPOTrainer.dpo_loss with loss_type="sigmoid", label_smoothing = 0: -logsigmoid(beta * (logratios -
    ref_logratios)), the mean over pairs."""
    step = Step(9, num_pairs=5)
    totals = [torch.tensor([sum(v) for v in values], dtype=torch.float64) for values in (step.policy, step.reference)]
    logratios, ref_logratios = (t[0::2] - t[1::2] for t in totals)
    wanted = -F.logsigmoid(0.1 * (logratios - ref_logratios)).mean().item()
    assert step.run(loss_of(reduction="pairs"))[0] == pytest.approx(wanted, rel=CLOSE)


def test_gradients_reach_the_logits_packed_as_sequence_by_sequence():
    """Rows of several sequences and padding through ops.token_log_probs, against log_softmax of each sequence alone in
    float64; GroupDPO + NLL + alpha * GRPO - c * entropy, groups scored first in the smaller rows."""
    step, vocab = step_of(MIXED, 2), 11
    alpha, nll, c, beta = 0.3, 0.2, 0.05, 0.6
    weights = {"beta": beta, "alpha": alpha, "nll_weight": nll, "entropy_weight": c, "clip_ratio": EPS, "kl_weight": KL}
    loss_function = loss_of(loss="group_dpo", **weights)
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(s.num_tokens, vocab, generator=generator) for s in step.sequences]

    leaves = [table.double().requires_grad_() for table in logits]
    wanted = torch.zeros((), dtype=torch.float64)
    log_probs = []
    for i, (sequence, leaf) in enumerate(zip(step.sequences, leaves, strict=True)):
        first = len(sequence.prompt_ids) - 1
        every = F.log_softmax(leaf[first:-1], -1)
        p = every.gather(-1, torch.tensor(sequence.completion_ids).unsqueeze(-1)).squeeze(-1)
        log_probs.append(p)
        wanted = wanted + c * (every.exp() * every).sum(-1).mean()
        r, d = (p - torch.tensor(sequence.rollout_log_probs)).exp(), torch.tensor(step.reference[i]) - p
        a = sequence.advantage
        wanted = wanted + alpha * (-torch.min(r * a, r.clamp(1 - EPS, 1 + EPS) * a) + KL * (d.exp() - d - 1)).sum()
    for chosen, rejected, weight in step.pairs():
        gains = [log_probs[i].sum() - sum(step.reference[i]) for i in (chosen, rejected)]
        wanted = wanted - weight * (F.logsigmoid(beta * (gains[0] - gains[1])) + nll * log_probs[chosen].sum())
    (wanted / NUM_PROMPTS).backward()

    for tokens in (400, 24, 10):
        trainer = Trainer(microbatch_tokens=tokens, sequence_parallel=True, tensor_parallel=2, share_prompts=False)
        batch = make_batch(step.sequences, step=0, num_prompts=NUM_PROMPTS, trainer=trainer, dp_rank=0)
        tables = [torch.cat([*(logits[i] for i in members(row)), torch.ones(8, vocab)]) for row in batch.microbatches]
        tables = [t[: row.targets.numel()].requires_grad_() for t, row in zip(tables, batch.microbatches, strict=True)]
        for row in batch.microbatches:
            row.reference_log_probs = step.lay_out(row, step.reference)[0]
        with torch.no_grad():
            own = [token_log_probs(t, row.targets)[0] for t, row in zip(tables, batch.microbatches, strict=True)]
        rows = list(batch.microbatches)
        precomputed = loss_function.precompute_split_groups(rows, own) if any(row.split.any() for row in rows) else rows
        loss = 0.0
        for table, row in zip(tables, precomputed, strict=True):
            values, entropy = token_log_probs(table, row.targets, with_entropy=True, inplace_backward=False)
            part, _ = loss_function(values, row, batch, entropy)
            part.backward()
            loss += part.item()
            for i, (start, end) in zip(members(row), pairwise(row.cu_seqlens.tolist()), strict=False):
                assert table.grad is not None
                torch.testing.assert_close(table.grad[start:end].double(), leaves[i].grad, atol=CLOSE, rtol=CLOSE)
        assert loss == pytest.approx(wanted.item() / NUM_PROMPTS, rel=CLOSE)


def members(row):
    """The sequences of a row, padding left out."""
    return [place for place in row.places.tolist() if place >= 0]


@pytest.mark.parametrize(
    ("options", "parts", "needs_reference", "needs_entropy"),
    [
        ({}, [(1.0, Dpo)], True, False),
        ({"loss": "group_dpo"}, [(1.0, GroupDpo)], True, False),
        ({"entropy_weight": 3e-4}, [(1.0, Dpo), (3e-4, EntropyBonus)], True, True),
        ({"loss": "grpo", "kl_weight": 0.0, "entropy_weight": 1e-4}, [(1.0, Grpo), (1e-4, EntropyBonus)], False, True),
    ],
)
def test_the_configuration_adds_up_the_parts(options, parts, needs_reference, needs_entropy):
    loss = loss_of(**options)
    found = loss.parts if isinstance(loss, SumLoss) else ((1.0, loss),)
    assert [(weight, type(part)) for weight, part in found] == parts
    assert (loss.needs_reference, loss.needs_entropy) == (needs_reference, needs_entropy)


def test_group_dpo_reports_grpos_metrics_where_it_is_part_of_it():
    """Each once, also the gap to the rollouts that both know."""
    names = [[metric.name for metric in loss_of(loss="group_dpo", alpha=alpha).metrics] for alpha in (0.0, 0.01)]
    assert "kl_mean" in names[1] and "kl_mean" not in names[0]
    assert all(len(set(found)) == len(found) for found in names)
