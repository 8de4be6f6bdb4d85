"""What bounds GRPO's ratio and KL: clips of two sides, dual clip, and the clamp in log space, against the formulas in float64
whatever the layout, with and without the length; and which losses look at ratios at all.
"""

import math

import pytest
import torch

from engine.algorithms.advantages import advantages_of, grouped_advantages
from engine.algorithms.base import training_sequence
from engine.algorithms.group_dpo import GroupDpoOptions
from engine.algorithms.grpo import Grpo, PolicyGradientOptions
from engine.algorithms.registry import make_algorithm, make_loss
from engine.config.options import Trainer
from engine.core.arrays import LogProbs
from engine.core.errors import NumericsError
from engine.core.types import Rollout, RolloutGroup, Score
from engine.megatron.packing import make_batch
from engine.rollouts.batch import training_sequences
from tests.builders import algorithm_options, config
from tests.own_loss import __file__ as OWN_LOSS
from tests.rollouts import make_completion, make_prompt
from tests.unit.algorithms.steps import LAYOUTS, Step

CLOSE = 3e-5  # relative or absolute, of float32 sums
LIMIT, NUM_PROMPTS = 20.0, 7
LOW, HIGH, DUAL, KL = 0.1, 0.3, 1.5, 0.2


def loss_of(**options):
    return make_loss(algorithm_options({"loss": "grpo", "kl_weight": KL} | options))


def formula(step, *, by_length=False, dual=DUAL):
    """(loss, gradients by token, tokens a clip holds, tokens beyond the limit)."""
    loss, gradients, clipped, clamped = 0.0, [], 0, 0
    for sequence, policy, reference in zip(step.sequences, step.policy, step.reference, strict=True):
        a, share, slopes = sequence.advantage, 1 / len(policy) if by_length else 1.0, []
        for p, old, ref in zip(policy, sequence.rollout_log_probs, reference, strict=True):
            gap, d = p - old, ref - p
            ratio = math.exp(min(gap, LIMIT))
            kept = min(ratio, 1 + HIGH) if a >= 0 else min(max(ratio, 1 - LOW), dual)
            held = min(d, LIMIT)
            loss += share * (-kept * a + KL * (math.exp(held) - held - 1))
            slope = -ratio * a if kept == ratio and gap <= LIMIT else 0.0
            slopes.append(share * (slope + (KL * (1 - math.exp(d)) if d <= LIMIT else 0.0)))
            clipped += a != 0 and kept != ratio
            clamped += gap > LIMIT or d > LIMIT
        gradients.append(slopes)
    return loss, gradients, clipped, clamped


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("dual", [math.inf, DUAL])
def test_clips_have_two_sides_and_a_third(layout, by_length, dual):
    step = Step(11, num_pairs=12)
    options = {"clip_ratio_low": LOW, "clip_ratio_high": HIGH, "normalize_length": by_length}
    found = step.run(loss_of(**options, **({} if dual == math.inf else {"dual_clip": dual})), **layout)
    loss, gradients, clipped, _ = formula(step, by_length=by_length, dual=dual)
    assert found[0] == pytest.approx(loss / NUM_PROMPTS, rel=CLOSE, abs=CLOSE)
    assert found[1]["clipped_share"] == clipped > 5
    for mine, theirs in zip(found[2], gradients, strict=True):
        assert mine == pytest.approx([value / NUM_PROMPTS for value in theirs], rel=CLOSE, abs=CLOSE)


def test_one_clip_means_both_and_each_may_be_its_own():
    both = PolicyGradientOptions(loss="grpo", clip_ratio=0.3)
    assert both.clips == {"clip_low": 0.3, "clip_high": 0.3, "dual_clip": math.inf}
    higher = GroupDpoOptions(loss="group_dpo", alpha=0.1, clip_ratio_high=0.28, dual_clip=3.0)
    assert higher.clips == {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
    step = Step(3)
    assert step.run(loss_of()) == step.run(loss_of(clip_ratio=0.5, clip_ratio_low=0.2, clip_ratio_high=0.2))


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("away", [20.0, 21.0, 88.0, 99.0, 1000.0])
@pytest.mark.parametrize("side", ["reference", "rollout", "both"])
def test_one_token_far_from_what_sampled_it_does_not_end_a_run(by_length, away, side):
    """Loss and gradient stay finite; the token is counted once; the other tokens' gradients are what they would be."""
    step = Step(5, num_pairs=2)
    step.add(-1, False, -1.5)
    last = len(step.sequences) - 1
    step.policy[last][0] = -1.5  # float32 holds it, and what is 20 away
    plain, *_ = formula(step, by_length=by_length, dual=math.inf)
    if side == "reference":  # the policy has lost a token that the reference thinks well of
        step.policy[last][0] = step.reference[last][0] - away
    else:  # the policy has made likely what was hardly sampled
        sequence = step.sequences[last]
        object.__setattr__(
            sequence, "rollout_log_probs", LogProbs.of([step.policy[last][0] - away, *sequence.rollout_log_probs[1:]])
        )
        if side == "both":
            step.reference[last][0] = step.policy[last][0] + away
    loss, gradients, _, clamped = formula(step, by_length=by_length, dual=math.inf)
    options = {"clip_ratio_low": LOW, "clip_ratio_high": HIGH, "normalize_length": by_length}
    found, sums, slopes, _ = step.run(loss_of(**options))
    assert math.isfinite(loss) and loss > plain
    assert found == pytest.approx(loss / NUM_PROMPTS, rel=CLOSE)
    assert sums["clamped_tokens"] == clamped == float(away > LIMIT)
    assert all(math.isfinite(value) for value in sums.values())
    for mine, theirs in zip(slopes, gradients, strict=True):
        assert mine == pytest.approx([value / NUM_PROMPTS for value in theirs], rel=CLOSE, abs=CLOSE)


def test_which_losses_are_of_the_distribution_that_was_sampled():
    """Preference losses are of the model's own; what weighs ratios, and a user's own loss unless it says otherwise, is not."""
    told = {
        "dpo": ({}, False),
        "group_dpo": ({}, False),
        "group_dpo with GRPO": ({"alpha": 0.01}, True),
        "grpo": ({}, True),
        f"{OWN_LOSS}:Regression": ({}, True),
    }
    for name, (more, wanted) in told.items():
        assert algorithm_options({"loss": name.split(" ")[0]} | more).uses_ratios == wanted, name


def group_of(*rewards):
    prompt = make_prompt(id="p7", token_ids=(1,), problem="", answer="", solution="", source="")
    completions = [make_completion("p7", i, 0, 0, (1,), (-0.1,), "", "stop") for i in range(len(rewards))]
    rollouts = tuple(Rollout(c, Score(reward, "ok")) for c, reward in zip(completions, rewards, strict=True))
    return RolloutGroup(prompt, 3, rollouts)


@pytest.mark.parametrize("loss", ["grpo", "group_dpo", "cispo", f"{OWN_LOSS}:Regression"])
def test_advantages_are_finite_or_an_error_that_names_the_group(loss):
    """Near-equal rewards are no signal under mean_std; what no float32 holds is told with prompt and step."""
    options = algorithm_options({"loss": loss, "normalize_advantages": "mean_std"})
    made, _ = make_algorithm(options).sequences(group_of(0.3, 0.1 + 0.2), 0, 1)
    assert [sequence.advantage for sequence in made] == [0.0] * len(made)
    plain = make_algorithm(algorithm_options({"loss": loss}))
    with pytest.raises(NumericsError, match=r"step 3, prompt p7: .*at most 3.4e\+38; found 5e\+299: scale the rewards down"):
        plain.sequences(group_of(1e300, 0.0), 0, 1)
    with pytest.raises(NumericsError, match="step 3, prompt p7: the advantage of reward 0 must be finite"):
        plain.sequences(group_of(1.7e308, -1.7e308, -1.7e308), 0, 1)


@pytest.mark.parametrize(
    ("rewards", "found"),
    [((1e300, 0.0), "1e\\+300"), ((1.7e308, -1.7e308), "inf"), ((1e30, 0.0, 1.0), "1e\\+30"), ((0.0, 2e16), "2e")],
)
@pytest.mark.parametrize("beta", [1e-6, 1.0, 1e6])
def test_oapl_bounds_the_square_of_an_advantage(rewards, beta, found):
    oapl = make_algorithm(algorithm_options({"loss": "oapl", "value_beta": beta}))
    with pytest.raises(NumericsError, match=rf"step 3, prompt p7: advantages must be at most 1.8e\+16; found {found}"):
        oapl.sequences(group_of(*rewards), 0, 1)


def test_the_largest_advantages_of_oapl_have_a_finite_loss():
    oapl = make_algorithm(algorithm_options({"loss": "oapl"}))
    made, has_signal = oapl.sequences(group_of(*[1.8e16, 0.0] * 500), 0, 1)
    batch = make_batch(made, step=0, num_prompts=1, trainer=Trainer(), dp_rank=0)
    sums = [oapl(torch.zeros(m.targets.numel()), m, batch) for m in batch.microbatches]
    assert has_signal and all(math.isfinite(loss) and math.isfinite(told["residual_square_mean"]) for loss, told in sums)


def test_numbers_of_a_loss_of_the_users_own_are_finite_or_an_error_that_names_the_group(monkeypatch):
    """A loss that computes its advantages itself, as OAPL does, with nothing that bounds them."""
    made = config(algorithm={"loss": "grpo"})
    for name, more in (("advantage", {"advantage": -math.inf}), ("share", {"values": {"share": math.nan}})):
        sequence = training_sequence(group_of(1.0), group_of(1.0).rollouts[0], **more)
        monkeypatch.setattr(Grpo, "sequences", lambda *_, sequence=sequence: ([sequence], True))
        with pytest.raises(NumericsError, match=f"step 3, prompt p7: algorithm.loss = 'grpo' must .* whose {name} is a number"):
            training_sequences([group_of(1.0, 0.0)], made)


def test_a_function_of_the_users_own_is_bounded_too():
    with pytest.raises(NumericsError, match="prompt p7: reward 0"):
        advantages_of(grouped_advantages, group_of(math.inf, 0.0))
