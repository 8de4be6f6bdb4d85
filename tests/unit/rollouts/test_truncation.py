"""Responses that were cut off or come close: what each option makes of a group, that none is chosen in a pair unless asked
for, and that a ledger replayed under an option trains on what the run under it did.
"""

import json
import math

import pytest
from pydantic import ValidationError

from engine.algorithms.pairs import better_and_worse, preference_pair
from engine.core.types import RolloutGroup
from engine.rollouts.batch import step_data, training_sequences
from engine.rollouts.ledger import LedgerRow, ledger_rows
from engine.rollouts.truncation import treated
from tests.unit.rollouts.test_rollouts import group, run_config


def values(groups: list[RolloutGroup]) -> list[list[float | None]]:
    """Rewards as they are trained on; None for a rollout that is left out."""
    return [[r.score.value if r.score.status == "ok" else None for r in one.rollouts] for one in groups]


def sampling(**options):
    return run_config(sampling={"max_tokens": 6} | options).sampling


def test_by_default_nothing_is_changed_and_what_is_right_although_cut_off_is_counted():
    groups = [group([1, 0, 1], cut_off=[0, 1]), group([5, 1], 1, reward="model", cut_off=[0])]
    same, metrics = treated(groups, sampling())
    assert all(one is other for one, other in zip(same, groups, strict=True))
    assert metrics == {"truncated_correct": 1.0}


def test_wrong_is_the_groups_lowest_reward_and_of_a_verifiable_prompt_at_most_0():
    groups = [
        group([1, 0, 1], cut_off=[0, 1]),
        group([1, -1, 1], 1, cut_off=[0]),
        group([5, 2, 3], 2, reward="model", cut_off=[0, 1]),
        group([1, 1], 3, ["timeout", "ok"], cut_off=[0]),
    ]
    found, metrics = treated(groups, sampling(truncated="wrong"))
    assert values(found) == [[0, 0, 1], [-1, -1, 1], [2, 2, 3], [None, 1]]
    assert metrics == {"truncated_correct": 2.0, "truncated_changed": 3.0}
    assert not found[0].rollouts[0].score.correct
    sequences, counts = training_sequences(found[:1], run_config())
    assert counts["skipped_prompts"] == 0 and (sequences[0].chosen, len(sequences[0].completion_ids)) == (True, 3)


def test_left_out_is_in_no_pair_mean_or_advantage():
    groups = [group([1, 0, 0, 1], cut_off=[0]), group([1, 0], 1, cut_off=[0, 1])]
    found, metrics = treated(groups, sampling(truncated="leave_out"))
    assert values(found) == [[None, 0, 0, 1], [None, None]]
    assert metrics == {"truncated_correct": 2.0, "truncated_changed": 3.0}
    grpo, counts = training_sequences(found, run_config(algorithm={"loss": "grpo"}))
    assert [s.advantage for s in grpo] == pytest.approx([-1 / 3, -1 / 3, 2 / 3])
    assert counts["unjudged_prompts"] == 1


def test_the_overlong_penalty_is_dapos_and_leaves_right_right():
    """max_tokens 6, buffer 4: nothing up to 2 tokens, then a quarter of the penalty each, all of it at 6."""
    groups = [group([1] * 6, cut_off=[5])]
    found, metrics = treated(groups, sampling(overlong_buffer=4, overlong_penalty=2.0))
    assert values(found) == [[1, 1, 0.5, 0, -0.5, -1]]
    assert all(rollout.score.correct for rollout in found[0].rollouts)
    assert metrics["overlong_penalty_mean"] == pytest.approx(5 / 6)
    chat = [group([1.0, 0.5, 1.25], reward="model")]
    lowered, _ = treated(chat, sampling(overlong_buffer=6))
    assert values(lowered) == [pytest.approx([1 - 1 / 6, 0.5 - 2 / 6, 1.25 - 3 / 6])]
    late = [group([1, 1, 1], statuses=["timeout"] * 3)]
    assert math.isnan(treated(late, sampling(overlong_buffer=4))[1]["overlong_penalty_mean"])


def test_what_was_cut_off_is_wrong_first_and_penalised_then():
    found, _ = treated([group([1, 1, 1], cut_off=[2])], sampling(max_tokens=3, truncated="wrong", overlong_buffer=2))
    assert values(found) == [[1, 0.5, -1]]


def test_a_buffer_longer_than_the_response_is_refused():
    with pytest.raises(ValidationError, match="must not exceed it; found 9 and 6: lower it"):
        sampling(overlong_buffer=9)
    with pytest.raises(ValidationError, match=r"needs sampling\.overlong_buffer.*found 2.0 and 0"):
        sampling(overlong_penalty=2.0)


@pytest.mark.parametrize("pairing", ["random", "best_worst", "length_matched"])
@pytest.mark.parametrize("reward", ["math", "model"])
def test_a_cut_off_response_is_never_chosen_but_may_be_rejected(pairing, reward):
    """Unless asked for. Rollout 0 is right and cut off, 1 right, 2 wrong and cut off."""
    three = group([1.0, 0.5, 0.0], reward=reward, cut_off=[0, 2])
    for seed in range(20):
        pair = preference_pair(three, pairing, seed)
        assert pair is not None
        assert [rollout.completion.sample_index for rollout in pair] == [1, 2]
    asked = {preference_pair(three, pairing, seed, True)[0].completion.sample_index for seed in range(20)}  # type: ignore[index]
    assert 0 in asked or (pairing, reward) == ("length_matched", "math")  # there 1 is nearer to 2
    only = group([1.0, 0.0, 0.0], reward=reward, cut_off=[0])
    assert preference_pair(only, pairing, 0) is None
    assert preference_pair(only, pairing, 0, True) is not None
    assert preference_pair(group([2.0, 1.0], reward=reward, cut_off=[0]), "best_worst", 0) is None, "no other reward is lower"


def test_group_dpo_has_no_cut_off_response_on_its_better_side():
    """It stays for GRPO beside the pairs, in no group."""
    three = group([1, 1, 0], cut_off=[0])
    assert [[r.completion.sample_index for r in side] for side in better_and_worse(three)] == [[1], [2]]
    alone, _ = training_sequences([three], run_config(algorithm={"loss": "group_dpo"}))
    assert [(s.group, s.chosen) for s in alone] == [(0, True), (0, False)]
    beside, _ = training_sequences([three], run_config(algorithm={"loss": "group_dpo", "alpha": 0.1}))
    assert [(s.group, s.chosen) for s in beside] == [(-1, False), (0, True), (0, False)]
    asked, _ = training_sequences([three], run_config(algorithm={"loss": "group_dpo", "choose_truncated": True}))
    assert [(s.group, s.chosen) for s in asked] == [(0, True), (0, True), (0, False)]


@pytest.mark.parametrize("truncated", ["judge", "wrong", "leave_out"])
@pytest.mark.parametrize("loss", ["dpo", "group_dpo", "grpo"])
def test_a_ledger_replayed_under_an_option_gives_what_the_run_under_it_trained_on(truncated, loss):
    """The ledger keeps what was judged."""
    config = run_config(algorithm={"loss": loss}, sampling={"max_tokens": 6, "truncated": truncated, "overlong_buffer": 3})
    groups = [group([1, 0, 1, 0, 1, 1], i, cut_off=[4, 5]) for i in range(3)]
    rows = [LedgerRow.model_validate_json(json.dumps(row)) for one in groups for row in ledger_rows(one)]
    back = [
        RolloutGroup(one.prompt, one.step, tuple(row.rollout() for row in rows[6 * i : 6 * i + 6]))
        for i, one in enumerate(groups)
    ]
    first, again = (step_data(each, [(3, 3)], {}, config) for each in (groups, back))
    assert first.sequences == again.sequences and first.metrics == pytest.approx(again.metrics, nan_ok=True)
