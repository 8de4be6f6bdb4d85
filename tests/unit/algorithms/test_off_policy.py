"""What stale data does to the losses that look at ratios: corrections of every level and kind, GSPO's ratio, CISPO and OAPL,
the variants of DPO, against plain formulas in float64 whose gradients torch takes; the metrics of the mismatch; and segments
without a target, which no loss may see.
"""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from engine.algorithms.base import ESS, MISMATCH, Loss
from engine.algorithms.oapl import SHARE, optimal_advantages
from engine.algorithms.registry import make_algorithm, make_loss
from engine.config.load import CHECKED, RunConfig
from engine.core.arrays import LogProbs
from engine.core.metrics import part_reductions
from engine.core.types import IGNORED
from tests.builders import LEAST, algorithm_options, merged
from tests.unit.algorithms.steps import LAYOUTS, Step
from tests.unit.algorithms.test_ratios import group_of

CLOSE = 3e-5  # relative or absolute, of float32 sums
LIMIT, NUM_PROMPTS, KL = 20.0, 7, 0.2
LOW, HIGH = 0.8, 1.25
LEVELS, KINDS = ("token", "sequence", "geometric"), ("truncate", "mask")


def loss_of(**options):
    return make_loss(algorithm_options(options))


def broken_rules(**algorithm):
    return RunConfig.model_validate(merged(LEAST, {"algorithm": algorithm}), context=CHECKED).broken_rules


def stale_step(seed=11, num_pairs=10):
    """A step whose first response is far from what sampled it: one token by more than LIMIT."""
    step = Step(seed, num_pairs=num_pairs)
    first = step.sequences[0]
    step.sequences[0] = replace(first, rollout_log_probs=LogProbs.of([step.policy[0][0] - 25.0, *first.rollout_log_probs[1:]]))
    return step


def tensors(step):
    """Of each response (policy leaf, rollout, reference, advantage) in float64."""
    rows = zip(step.sequences, step.policy, step.reference, strict=True)
    return [
        (
            torch.tensor(policy, dtype=torch.float64, requires_grad=True),
            torch.tensor(sequence.rollout_log_probs, dtype=torch.float64),
            torch.tensor(reference, dtype=torch.float64),
            sequence.advantage,
        )
        for sequence, policy, reference in rows
    ]


def level_of(gap, level):
    """The log of the ratio at each token."""
    if level == "token":
        return gap
    return (gap.sum() if level == "sequence" else gap.mean()).expand(len(gap))


def kl_of(policy, reference):
    d = (reference - policy).clamp(max=LIMIT)
    return KL * (d.exp() - d - 1)


def check(step, made, per_response, divisor=NUM_PROMPTS, **layout):
    """Runs the step and holds loss and gradients against the sum of `per_response(policy, rollout, reference, advantage)`."""
    rows = tensors(step)
    wanted = torch.stack([per_response(*row) for row in rows]).sum() / divisor
    wanted.backward()
    loss, sums, gradients, _ = step.run(made, **layout)
    assert loss == pytest.approx(wanted.item(), rel=CLOSE, abs=CLOSE)
    for found, (policy, *_) in zip(gradients, rows, strict=True):
        assert found == pytest.approx(policy.grad.tolist(), rel=CLOSE, abs=CLOSE)
    return sums


@pytest.mark.parametrize("layout", LAYOUTS[1:3])
@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize(("kind", "level", "low"), product(KINDS, LEVELS, (None, LOW)))
def test_corrections_are_their_formulas(kind, level, low, by_length, layout):
    """The gradient of a token is minus its weight times its advantage; what is outside is counted; no weight has one."""
    step, outside, weights = stale_step(), 0, 0.0

    def per_response(policy, rollout, reference, advantage):
        nonlocal outside, weights
        ratio = level_of(policy.detach() - rollout, level).clamp(max=LIMIT).exp()
        beyond = (ratio > HIGH) | (ratio < (low or 0.0))
        weight = ratio.clamp(low, HIGH) if kind == "truncate" else torch.where(beyond, 0.0, ratio)
        outside, weights = outside + int(beyond.sum()), weights + float(weight.sum())
        terms = -weight * advantage * (policy - policy.detach()).exp() + kl_of(policy, reference)
        return terms.mean() if by_length else terms.sum()

    options = {"correction": kind, "correction_level": level, "correction_low": low, "correction_high": HIGH}
    made = loss_of(loss="grpo", kl_weight=KL, normalize_length=by_length, **options)
    sums = check(step, made, per_response, **layout)
    assert sums["outside_share"] == outside > 1
    assert sums["weight_mean"] == pytest.approx(weights, rel=CLOSE)
    assert sums["clamped_tokens"] == 1
    assert "clipped_share" not in sums and sums["with_signal"] == sum(s.advantage != 0 for s in step.sequences)


def test_corrections_of_group_dpos_grpo_are_grpos():
    """And without a correction nothing of GRPO's numbers has changed its path: the kernel's sums stand."""
    step, correction = stale_step(), {"correction": "truncate", "correction_high": 2.0}
    alone = step.run(loss_of(loss="grpo", kl_weight=KL, **correction))
    pairs = step.run(loss_of(loss="group_dpo"))
    both = step.run(loss_of(loss="group_dpo", alpha=0.5, kl_weight=KL, **correction))
    assert both[0] == pytest.approx(pairs[0] + 0.5 * alone[0], rel=CLOSE)
    assert both[1]["weight_mean"] == alone[1]["weight_mean"]


@pytest.mark.parametrize("layout", LAYOUTS[1:3])
@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("dual", [math.inf, 1.05])
def test_a_ratio_of_the_response_is_gspos(dual, by_length, layout):
    """One term a response, -min(s A, clip(s) A), which counts as often as the response has tokens unless it is divided by them;
    torch differentiates s, the geometric mean, itself."""
    low, high, held = 0.04, 0.06, 0

    def per_response(policy, rollout, reference, advantage):
        nonlocal held
        s = (policy - rollout).mean().clamp(max=LIMIT).exp()
        kept = s.clamp(max=1 + high) if advantage >= 0 else s.clamp(1 - low, dual)
        held += len(policy) * int(advantage != 0 and kept.item() != s.item())
        count = 1 if by_length else len(policy)
        kl = kl_of(policy, reference)
        return -count * kept * advantage + (kl.mean() if by_length else kl.sum())

    clips = {"clip_ratio_low": low, "clip_ratio_high": high, **({} if dual == math.inf else {"dual_clip": dual})}
    made = loss_of(loss="grpo", ratio_level="geometric", kl_weight=KL, normalize_length=by_length, **clips)
    step = Step(11, num_pairs=10)
    far = replace(step.sequences[1], advantage=-0.5)  # every token by 21, more than LIMIT
    step.sequences[1] = replace(far, rollout_log_probs=LogProbs.of(p - 21.0 for p in step.policy[1]))
    sums = check(step, made, per_response, **layout)
    assert sums["clipped_share"] == held > 5


@pytest.mark.parametrize("layout", LAYOUTS[1:3])
@pytest.mark.parametrize("low", [None, 0.9])
def test_cispo_clips_the_weight_and_keeps_the_gradient(low, layout):
    def per_response(policy, rollout, reference, advantage):
        weight = (policy.detach() - rollout).clamp(max=LIMIT).exp().clamp(low, HIGH)
        return (-weight * advantage * policy + kl_of(policy, reference)).sum()

    step = stale_step()
    made = loss_of(loss="cispo", kl_weight=KL, weight_low=low, weight_high=HIGH, reduction="tokens")
    check(step, made, per_response, divisor=step.num_tokens, **layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_oapl_is_a_regression_on_the_optimal_advantage(layout):
    """Groups of 3, 1 and 2, equal rewards among them, against equations 2 and 3; nothing couples its rows."""
    value_beta, ratio_beta = 0.5, 0.3
    algorithm = make_algorithm(algorithm_options({"loss": "oapl", "value_beta": value_beta, "ratio_beta": ratio_beta}))
    step, rewards, residuals = Step(4, num_pairs=0), [[1.0, 0.0, 0.25], [0.7], [1.0, 1.0]], 0.0
    for group in rewards:
        made, has_signal = algorithm.sequences(group_of(*group), 0, 1)
        assert has_signal == (len(set(group)) > 1) and all(s.group == -1 for s in made)
        for sequence in made:
            step.add(-1, False, sequence.advantage)
            step.sequences[-1] = replace(step.sequences[-1], values=sequence.values)
    counts = [len(group) for group in rewards for _ in group]
    values = [
        value_beta * math.log(math.fsum(math.exp(r / value_beta) for r in group) / len(group))
        for group in rewards
        for _ in group
    ]
    targets = iter(zip(counts, values, [r for group in rewards for r in group], strict=True))

    def per_response(policy, rollout, reference, advantage):
        nonlocal residuals
        count, value, reward = next(targets)
        square = (ratio_beta * (policy.sum() - rollout.sum()) - (reward - value)).square()
        residuals += square.item()
        return square / count

    sums = check(step, algorithm, per_response, **layout)
    assert sums["residual_square_mean"] == pytest.approx(residuals, rel=CLOSE)
    assert sums["with_signal"] == 3 and sums["num_responses"] == 6
    assert optimal_advantages([3.3] * 4, 0.7) == [0.0] * 4 and optimal_advantages([], 1.0) == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", ["dpo", "group_dpo"])
@pytest.mark.parametrize(
    "options",
    [
        {"preference_loss": "ipo"},
        {"preference_loss": "ipo", "average_log_probs": True},
        {"label_smoothing": 0.2},
        {"average_log_probs": True, "nll_weight": 0.3},
        {"weight_pairs": True, "nll_weight": 0.3},
    ],
    ids=str,
)
def test_variants_of_dpo_are_their_formulas(options, loss, layout):
    """Also where a group is larger than a row and its loss is differentiated before."""
    step, beta = Step(5, num_pairs=0), 0.6
    for group, count in enumerate((5, 2, 3) if loss == "group_dpo" else (2, 2, 2)):
        for member in range(count):
            step.add(group, member % 2 == 0, 0.0)
    leaves = [row[0] for row in tensors(step)]
    step.squares = [[-0.1 - 0.2 * (i + t) for t in range(len(row))] for i, row in enumerate(step.policy)]
    averaged, smoothing = options.get("average_log_probs", False), options.get("label_smoothing", 0.0)

    def gain(i):
        ratio = leaves[i].sum() - sum(step.reference[i])
        return ratio / len(leaves[i]) if averaged else ratio

    def alignment(i):
        if "weight_pairs" not in options:
            return 1.0
        return math.exp(math.fsum(p - q for p, q in zip(step.policy[i], step.squares[i], strict=True)) / len(step.policy[i]))

    wanted, margins, aligned = torch.zeros((), dtype=torch.float64), 0.0, 0.0
    for chosen, rejected, weight in step.pairs():
        h = gain(chosen) - gain(rejected)
        sigmoid = (1 - smoothing) * (1 + (-beta * h).exp()).log() + smoothing * (1 + (beta * h).exp()).log()
        term = (h - 1 / (2 * beta)) ** 2 if "preference_loss" in options else sigmoid
        nll = -options.get("nll_weight", 0.0) * leaves[chosen].sum()
        aligned += alignment(chosen) * alignment(rejected)
        wanted = wanted + weight * (alignment(chosen) * alignment(rejected) * term + nll)
        margins += beta * h.item()
    (wanted / NUM_PROMPTS).backward()
    found, sums, gradients, _ = step.run(loss_of(loss=loss, beta=beta, **options), **layout)
    assert found == pytest.approx(wanted.item() / NUM_PROMPTS, rel=CLOSE)
    assert sums["margin_mean"] == pytest.approx(margins, rel=CLOSE, abs=CLOSE)
    if "weight_pairs" in options:
        assert sums["pair_weight_mean"] == pytest.approx(aligned, rel=CLOSE)
    for mine, leaf in zip(gradients, leaves, strict=True):
        assert mine == pytest.approx(leaf.grad.tolist(), rel=CLOSE, abs=CLOSE)


def test_the_effective_sample_size_falls_with_the_spread_of_the_ratios():
    """By the definition, over the whole step; 1 where policy and rollouts agree; NaN without a response."""
    step = Step(6)
    _, sums, _, _ = step.run(loss_of(loss="cispo", kl_weight=0.0), **LAYOUTS[2])
    ratios = [math.exp(math.fsum(p) - math.fsum(s.rollout_log_probs)) for p, s in zip(step.policy, step.sequences, strict=True)]
    wanted = math.fsum(ratios) ** 2 / (len(ratios) * math.fsum(r * r for r in ratios))
    assert 0.1 < wanted < 0.95
    assert ESS.value(sums[ESS.name], sums) == pytest.approx(wanted, rel=CLOSE)
    step.policy = [list(s.rollout_log_probs) for s in step.sequences]
    _, sums, _, _ = step.run(loss_of(loss="cispo", kl_weight=0.0))
    assert ESS.value(sums[ESS.name], sums) == pytest.approx(1.0)
    assert math.isnan(ESS.value(0.0, dict.fromkeys(part_reductions(MISMATCH), 0.0)))


class Prefixed(Loss):
    """A loss that sees rows with such a segment at their head."""

    def __init__(self, loss):
        self.loss, self.metrics = loss, loss.metrics

    def __call__(self, log_probs, microbatch, batch, entropy=None):
        def token(values, fill):
            return torch.cat([torch.full((5,), fill, dtype=values.dtype), values])

        def sequence(values, fill):
            return torch.cat([torch.full((1,), fill, dtype=values.dtype), values])

        wide = replace(
            microbatch,
            token_ids=token(microbatch.token_ids, 3),
            targets=token(microbatch.targets, IGNORED),
            position_ids=token(microbatch.position_ids, 0),
            cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int32), microbatch.cu_seqlens + 5]),
            rollout_log_probs=token(microbatch.rollout_log_probs, 0.0),
            reference_log_probs=token(microbatch.reference_log_probs, 0.0),
            advantages=sequence(microbatch.advantages, 0.0),
            rewards=sequence(microbatch.rewards, 0.0),
            groups=sequence(microbatch.groups, -1),
            places=sequence(microbatch.places, -1),
            split=sequence(microbatch.split, False),
            chosen=sequence(microbatch.chosen, False),
            pairs=microbatch.pairs + 1,
            values={name: sequence(values, 0.0) for name, values in microbatch.values.items()},
        )
        return self.loss(token(log_probs, 0.0), wide, batch, entropy)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "grpo", "correction": "truncate", "correction_high": HIGH},
        {"loss": "grpo", "correction": "mask", "correction_level": "sequence", "correction_high": HIGH},
        {"loss": "grpo", "correction": "mask", "correction_level": "geometric", "correction_low": 0.5},
        {"loss": "grpo", "ratio_level": "geometric", "normalize_length": True},
        {"loss": "cispo"},
        {"loss": "oapl"},
        {"loss": "dpo", "average_log_probs": True},
        {"loss": "dpo", "preference_loss": "ipo"},
    ],
    ids=str,
)
def test_segments_without_a_target_change_nothing(options):
    """A prompt that stands by itself before its responses, as padding does: no target, advantage 0, in no group."""
    step, made = Step(8), loss_of(**options)
    step.sequences = [replace(s, values={SHARE: 0.25}) for s in step.sequences]
    plain = step.run(made)
    found = step.run(Prefixed(made))
    assert found[0] == pytest.approx(plain[0], rel=1e-6)
    assert found[1] == pytest.approx(plain[1], rel=1e-6)
    assert found[2] == plain[2]


@pytest.mark.parametrize(
    ("algorithm", "sentence"),
    [
        ({"correction_high": 2.0}, "correction_level need algorithm.correction; found None, 2.0"),
        ({"correction_level": "sequence"}, "need algorithm.correction; found None, None and 'sequence'"),
        ({"correction": "truncate"}, "needs algorithm.correction_high, the largest weight; found none"),
        ({"correction": "mask"}, "the largest weight, or correction_low; found none"),
        ({"correction": "mask", "correction_low": 2.0, "correction_high": 1.0}, "must be less than algorithm.correction_high"),
        ({"correction": "mask", "correction_high": 2.0, "clip_ratio": 0.3}, "never acts; found clip_ratio = 0.3"),
        ({"correction": "mask", "correction_high": 2.0, "ratio_level": "geometric"}, "and ratio_level = 'geometric'"),
        ({"loss": "group_dpo", "ratio_level": "geometric"}, "are GRPO's; found 'none' and 'geometric'"),
        ({"loss": "cispo", "weight_low": 5.0}, "must be less than algorithm.weight_high; found 5.0 and 5.0"),
        ({"loss": "cispo", "reduction": "pairs"}, "needs algorithm.loss with pairs; found 'cispo'"),
        ({"loss": "oapl", "reduction": "pairs"}, "needs algorithm.loss with pairs; found 'oapl'"),
        ({"loss": "dpo", "label_smoothing": 0.1, "preference_loss": "ipo"}, "needs algorithm.preference_loss = 'sigmoid'"),
    ],
)
def test_a_table_that_contradicts_itself_is_told(algorithm, sentence):
    assert any(sentence in rule for rule in broken_rules(**{"loss": "grpo"} | algorithm))


def test_tables_that_say_something_are_not_told():
    for algorithm in (
        {"correction": "mask", "correction_low": 0.5},
        {"correction": "truncate", "correction_high": 2.0, "correction_level": "sequence"},
        {"loss": "group_dpo", "alpha": 0.1, "correction": "truncate", "correction_high": 2.0},
        {"ratio_level": "geometric", "clip_ratio_high": 4e-4, "dual_clip": 3.0},
    ):
        assert broken_rules(**{"loss": "grpo"} | algorithm) == []
