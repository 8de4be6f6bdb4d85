"""DPO, GRPO and NLL against the paper's formulas written out in float64 over lists of numbers: values, gradients with
respect to every token's log-prob, metrics, and that microbatches and ranks add up to the step. Advantages and pairs.
"""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.algorithms.advantages import grouped_advantages
from engine.algorithms.dpo import Dpo
from engine.algorithms.grpo import Grpo
from engine.algorithms.nll import NllLoss
from engine.algorithms.pairs import all_pairs, better_and_worse, correct_and_wrong, preference_pair
from engine.algorithms.registry import make_loss
from engine.core.arrays import LogProbs
from engine.core.errors import NumericsError
from engine.core.types import Rollout, RolloutGroup, Score
from tests.builders import algorithm_options
from tests.rollouts import make_completion, make_prompt
from tests.unit.algorithms.steps import LAYOUTS, Step

NUM_PROMPTS = 7  # of the step, skipped ones included
CLOSE = 2e-5  # relative or absolute: fp32 sums of some dozens of terms of order 1


def loss_of(**options):
    return make_loss(algorithm_options(options))


def check(found, loss, metrics, gradients):
    assert found[0] == pytest.approx(loss, rel=CLOSE, abs=CLOSE)
    assert found[1] == pytest.approx(metrics, rel=CLOSE, abs=CLOSE)
    for mine, want in zip(found[2], gradients, strict=True):
        assert mine == pytest.approx(want, rel=CLOSE, abs=CLOSE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("reduction", "divisor"), [("prompts", NUM_PROMPTS), ("pairs", 4), ("tokens", None)])
@pytest.mark.parametrize("nll_weight", [0.0, 0.3])
def test_dpo_is_the_papers(layout, reduction, divisor, nll_weight):
    """-log sigmoid(beta * m) + nll_weight * NLL(chosen), m of sums over the response, divided by the step's own count.

    d/dl(chosen token) = -beta * sigmoid(-beta * m) - nll_weight; rejected: + beta * sigmoid(-beta * m).
    """
    step, beta = Step(3), 0.7
    algorithm = dict(beta=beta, nll_weight=nll_weight, reduction=reduction)
    loss, gradients = 0.0, [[0.0]] * 8
    divisor = divisor or step.num_tokens
    names = ("margin_mean", "preferred_share", "chosen_log_prob_mean", "rejected_log_prob_mean")
    sums = {"pairs": 4.0, **dict.fromkeys(names, 0.0)}
    for chosen, rejected, _ in step.pairs():
        gain = sum(step.policy[chosen]) - sum(step.reference[chosen])
        margin = beta * (gain - (sum(step.policy[rejected]) - sum(step.reference[rejected])))
        loss += math.log(1 + math.exp(-margin)) - nll_weight * sum(step.policy[chosen])
        slope = beta / (1 + math.exp(margin))
        gradients[chosen] = [(-slope - nll_weight) / divisor] * len(step.policy[chosen])
        gradients[rejected] = [slope / divisor] * len(step.policy[rejected])
        sums["margin_mean"] += margin
        sums["preferred_share"] += margin > 0
        sums["chosen_log_prob_mean"] += sum(step.policy[chosen])
        sums["rejected_log_prob_mean"] += sum(step.policy[rejected])
    check(step.run(loss_of(**algorithm), **layout), loss / divisor, sums | step.mismatch(), gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("reduction", "divisor"), [("prompts", NUM_PROMPTS), ("tokens", None)])
@pytest.mark.parametrize("kl_weight", [0.0, 0.25])
def test_grpo_is_the_papers(layout, reduction, divisor, kl_weight):
    """-min(r A, clip(r) A) + kl_weight * (exp(d) - d - 1) summed over tokens, d = reference - policy.

    d/dl = -r A where the clip does not bind (A >= 0 and r <= 1 + eps, or A < 0 and r >= 1 - eps), and kl (1 - exp d).
    """
    step, eps = Step(5, num_pairs=8), 0.2
    algorithm = dict(loss="grpo", clip_ratio=eps, kl_weight=kl_weight, reduction=reduction)
    divisor = divisor or step.num_tokens
    loss, gradients = 0.0, []
    with_signal = float(sum(s.advantage != 0 for s in step.sequences))
    sums = {"with_signal": with_signal, "kl_mean": 0.0, "clipped_share": 0.0, "ratio_mean": 0.0, "clamped_tokens": 0.0}
    bound = 0
    for sequence, policy, reference in zip(step.sequences, step.policy, step.reference, strict=True):
        a, slopes = sequence.advantage, []
        for p, old, ref in zip(policy, sequence.rollout_log_probs, reference, strict=True):
            r, d = math.exp(p - old), ref - p
            loss -= min(r, 1 + eps) * a if a >= 0 else max(r, 1 - eps) * a
            binds = r > 1 + eps if a >= 0 else r < 1 - eps
            bound += binds and a != 0
            slopes.append(((0 if binds else -r * a) + kl_weight * (1 - math.exp(d))) / divisor)
            if kl_weight:
                loss += kl_weight * (math.exp(d) - d - 1)
                sums["kl_mean"] += math.exp(d) - d - 1
            sums["clipped_share"] += binds and a != 0
            sums["ratio_mean"] += r
        gradients.append(slopes)
    assert bound > 2, "the clip must bind somewhere for the test to mean anything"
    check(step.run(loss_of(**algorithm), **layout), loss / divisor, sums | step.mismatch(), gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nll_is_the_mean_over_the_steps_target_tokens(layout):
    step = Step(7)
    nll = -sum(map(sum, step.policy))
    gradients = [[-1 / step.num_tokens] * len(policy) for policy in step.policy]
    metrics = {"tokens": float(step.num_tokens), "nll_mean": nll}
    check(step.run(NllLoss(), **layout), nll / step.num_tokens, metrics, gradients)


def test_strictly_on_policy_grpo_is_the_policy_gradient():
    """With rollout log-probs equal to the policy's the ratio is 1, nothing is clipped and the gradient is -A."""
    step = Step(11)
    step.sequences = [replace(s, rollout_log_probs=LogProbs.of(p)) for s, p in zip(step.sequences, step.policy, strict=True)]
    _, sums, gradients, _ = step.run(loss_of(loss="grpo", kl_weight=0.0))
    assert sums["ratio_mean"] == pytest.approx(step.num_tokens)
    assert sums["clipped_share"] == sums["log_prob_gap_mean"] == 0
    for sequence, gradient in zip(step.sequences, gradients, strict=True):
        assert gradient == pytest.approx([-sequence.advantage / NUM_PROMPTS] * len(gradient), abs=1e-6)


@pytest.mark.parametrize("loss_function", [loss_of(), loss_of(loss="grpo"), NllLoss()])
def test_a_step_without_sequences_has_loss_0_and_can_be_differentiated(loss_function):
    step = Step(0, num_pairs=0)
    loss, sums, *_ = step.run(loss_function)
    assert loss == 0
    assert set(sums.values()) == {0.0}


@pytest.mark.parametrize(
    ("algorithm", "kind", "needs_reference"),
    [
        ({}, Dpo, True),
        ({"loss": "grpo"}, Grpo, True),
        ({"loss": "grpo", "kl_weight": 0.0}, Grpo, False),
    ],
)
def test_the_configuration_names_the_loss(algorithm, kind, needs_reference):
    loss_function = loss_of(**algorithm)
    assert type(loss_function) is kind
    assert loss_function.needs_reference is needs_reference


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=16))
def test_advantages_are_rewards_minus_their_mean_and_nothing_more(rewards):
    """Not divided by the standard deviation: differences between advantages are differences between rewards."""
    advantages = grouped_advantages(rewards)
    assert math.fsum(advantages) == pytest.approx(0, abs=1e-8)
    assert [a - advantages[0] for a in advantages] == pytest.approx([r - rewards[0] for r in rewards], abs=1e-8)


@given(st.floats(-1e6, 1e6), st.integers(1, 16))
def test_equal_rewards_give_advantages_of_exactly_0(reward, count):
    """Whatever the rounding of their mean: 0 is how a prompt without signal is told."""
    assert grouped_advantages([reward] * count) == [0.0] * count


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_named(broken):
    with pytest.raises(NumericsError, match=f"reward 2 of the group must be finite; found {broken}"):
        grouped_advantages([0.0, 1.0, broken])


def group(rewards, prompt_id="p", step=0):
    rollouts = tuple(
        Rollout(make_completion(prompt_id, i, i, 0, (i,), (-1.0,), "", "stop"), Score(reward, "ok"))
        for i, reward in enumerate(rewards)
    )
    return RolloutGroup(make_prompt(prompt_id, (1,), "", "", "", ""), step, rollouts)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=8), st.integers(0, 99), st.integers(0, 99))
def test_a_pair_is_one_correct_and_one_wrong_rollout_or_none(rewards, step, run_seed):
    drawn = preference_pair(group(rewards, step=step), "random", run_seed)
    assert (drawn is None) is (len(set(rewards)) == 1)
    if drawn is not None:
        assert [rollout.score.value for rollout in drawn] == [1.0, 0.0]
    assert drawn == preference_pair(group(rewards, step=step), "random", run_seed), "a pure function of its arguments"


def test_a_pair_depends_on_run_seed_step_and_prompt_and_reaches_every_rollout_alike():
    rewards = [1.0] * 4 + [0.0] * 4
    draws = {
        (seed, step, prompt): preference_pair(group(rewards, prompt, step), "random", seed)
        for seed in range(8)
        for step in range(8)
        for prompt in "abcdefgh"
    }
    counts = [0] * 8
    for drawn in draws.values():
        assert drawn is not None
        for rollout in drawn:
            counts[rollout.completion.sample_index] += 1
    assert all(abs(count - 128) < 5 * math.sqrt(128 * 3 / 4) for count in counts), counts  # 512 draws of one in four
    for fixed in range(3):  # with the other two held, each of the three changes the draw
        varied = [pair for key, pair in draws.items() if all(key[i] == (0, 0, "a")[i] for i in range(3) if i != fixed)]
        assert len({tuple(r.completion.sample_index for r in pair) for pair in varied if pair}) > 2


REWARDS = st.one_of(st.sampled_from([0.0, 1.0]), st.sampled_from([-2.5, -1.0, 0.25, 0.5, 3.0]))


@given(st.lists(REWARDS, min_size=2, max_size=8), st.integers(0, 99))
def test_the_best_and_the_worst_are_those_of_extreme_rewards(rewards, run_seed):
    """None where all are equal; signs do not matter."""
    drawn = preference_pair(group(rewards), "best_worst", run_seed)
    assert (drawn is None) is (len(set(rewards)) == 1)
    if drawn is not None:
        assert [rollout.score.value for rollout in drawn] == [max(rewards), min(rewards)]


@given(st.lists(st.tuples(REWARDS, st.integers(1, 6)), min_size=2, max_size=8), st.integers(0, 99))
def test_length_matched_is_the_nearest_correct_and_wrong(samples, run_seed):
    rollouts = group([reward for reward, _ in samples])
    lengths = [length for _, length in samples]
    rollouts = replace(
        rollouts,
        rollouts=tuple(
            replace(r, completion=replace(r.completion, token_ids=(7,) * n))
            for r, n in zip(rollouts.rollouts, lengths, strict=True)
        ),
    )
    drawn = preference_pair(rollouts, "length_matched", run_seed)
    distances = [abs(n - m) for reward, n in samples for other, m in samples if reward > 0 >= other]
    assert (drawn is None) is (not distances)
    if drawn is not None:
        assert drawn[0].score.value > 0 >= drawn[1].score.value
        assert abs(len(drawn[0].completion.token_ids) - len(drawn[1].completion.token_ids)) == min(distances)


@pytest.mark.parametrize("pairing", ["best_worst", "length_matched"])
def test_ties_are_drawn_and_reach_every_rollout_alike(pairing):
    """Two best of four, two worst: over 256 prompts each is drawn about half of the time, and again the same."""
    rewards = [1.0, 0.0, 1.0, 0.0]
    draws = [preference_pair(group(rewards, f"p{i}"), pairing, 3) for i in range(256)]
    assert draws == [preference_pair(group(rewards, f"p{i}"), pairing, 3) for i in range(256)]
    drawn = [rollout.completion.sample_index for pair in draws if pair for rollout in pair]
    assert all(abs(drawn.count(i) - 128) < 5 * math.sqrt(256 / 4) for i in range(4))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_without_a_verifier_better_is_above_the_groups_mean_and_equal_rewards_have_no_two_sides(rewards):
    """Each rollout is on one side; whatever the rounding of the mean, no worse one has a higher reward than a better one."""
    chat = group(rewards)
    chat = replace(chat, prompt=replace(chat.prompt, reward="model", verifiable=False))
    better, worse = ([rollout.completion.sample_index for rollout in side] for side in better_and_worse(chat))
    assert sorted(better + worse) == list(range(len(rewards)))
    assert all(rewards[b] > rewards[w] for b in better for w in worse)
    assert (bool(better) and bool(worse)) <= (len(set(rewards)) > 1)
    if max(rewards) - min(rewards) > 1e-3:
        assert better and worse


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=8).filter(lambda rewards: len(set(rewards)) == 2))
def test_of_rewards_0_and_1_the_sides_are_correct_and_wrong_with_a_verifier_or_without(rewards):
    verified = group(rewards)
    chat = replace(verified, prompt=replace(verified.prompt, reward="model", verifiable=False))
    assert better_and_worse(verified) == better_and_worse(chat) == correct_and_wrong(verified)


@pytest.mark.parametrize("pairing", ["random", "best_worst", "length_matched"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_in_no_pair(pairing, broken):
    with pytest.raises(NumericsError, match=f"reward of sample 1 of prompt p must be finite; found {broken}"):
        preference_pair(group([1.0, broken, 0.0]), pairing, 0)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=4), max_size=4), st.randoms())
def test_all_pairs_are_every_chosen_with_every_rejected_of_the_group(groups, draw):
    """In whatever order the sequences stand; the weights of a group sum to 1; a group of -1 has no pairs."""
    marked = [(index - 1, chosen) for index, members in enumerate(groups) for chosen in members]
    draw.shuffle(marked)
    pairs, weights = all_pairs([g for g, _ in marked], [c for _, c in marked])
    found = [tuple(pair) for pair in pairs.tolist()]
    places = range(len(marked))
    wanted = {(c, r) for c in places for r in places if marked[c][0] == marked[r][0] >= 0 and marked[c][1] and not marked[r][1]}
    assert len(found) == len(wanted)
    assert set(found) == wanted
    for index in {marked[c][0] for c, _ in found}:
        total = sum(weight for (c, _), weight in zip(found, weights.tolist(), strict=True) if marked[c][0] == index)
        assert total == pytest.approx(1)
