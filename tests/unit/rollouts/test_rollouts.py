"""From prompts to training sequences with a real pool of fake engines and a reward that looks at a number: versions,
seeds, pairs, advantages, skipped prompts, metrics worked out by hand, the ledger, and who waits for whom.
"""

import json
import math
import threading
import time
from collections.abc import Sequence as Many
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config.load import RunConfig
from engine.core.arrays import LogProbs, TokenIds
from engine.core.errors import DataError, InferenceError
from engine.core.types import Rollout, RolloutGroup, Score
from engine.data.mixture import Mixture
from engine.data.prompts import PromptOrder, PromptSet
from engine.inference.pool import Pool, Usage
from engine.rewards.arrivals import Arrivals
from engine.rewards.base import Answer, Reward
from engine.rollouts.ahead import AHEAD, Ahead, read_ahead
from engine.rollouts.batch import compared_tokens, training_sequences
from engine.rollouts.ledger import ledger_rows
from engine.rollouts.metrics import num_with_ends_inside, percentile, rollout_metrics, warn_of_endings
from engine.rollouts.source import RolloutSource
from engine.rollouts.writer import RolloutFile, RolloutWriter
from tests import builders
from tests.rollouts import make_completion, make_prompt
from tests.unit.inference.test_pool import FakeEngine

TABLES: dict[str, dict[str, Any]] = {
    "run": {"steps": 12, "seed": 3},
    "data": {"prompts_per_step": 4},
    "algorithm": {"samples_per_prompt": 6},
    "sync": {"sync_interval": 2},
}


def run_config(**changes: dict[str, Any]) -> RunConfig:
    return builders.config(**builders.merged(TABLES, changes))


PROMPTS = PromptSet(tuple(make_prompt(f"p{i}", (i + 1, 50), f"problem {i}", "1", "", "") for i in range(9)), 0, 0)


class Parity(Reward):
    """Rewards even seeds; the text of a fake completion is its seed. Waits for `allowed` first."""

    def __init__(self) -> None:
        self.begun, self.allowed = threading.Event(), threading.Event()
        self.allowed.set()

    def score(self, answers: Many[Answer]) -> list[Score]:
        self.begun.set()
        assert self.allowed.wait(10)
        return [Score(float(int(answer.completion) % 2 == 0), "ok") for answer in answers]

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
def open_source():
    """Makes sources that are closed at the end."""
    sources: list[RolloutSource] = []

    def make(
        config: RunConfig,
        *engines: FakeEngine,
        reward: Parity | None = None,
        records: RolloutWriter | None = None,
        ahead: Ahead | None = None,
    ):
        pool = Pool(engines or (FakeEngine(),), 5.0)
        prompts = Mixture(config.data.sources, (PROMPTS,), config.run.seed)
        sources.append(RolloutSource(config, prompts, pool, reward or Parity(), records, ahead=ahead))
        return sources[-1]

    yield make
    for source in sources:
        source.close()


def test_a_step_holds_the_prompts_of_the_order_and_pairs_of_right_and_wrong(open_source, tmp_path):
    config, records = run_config(), RolloutWriter(RolloutFile(tmp_path / "rollouts.jsonl"))
    source = open_source(config, FakeEngine(), FakeEngine(), records=records)
    source.open(range(0, 2))
    for step in (0, 1):
        data = source.next(step)
        prompts = [PROMPTS.prompts[i] for i in PromptOrder(9, 3).at(step, 4)]
        assert data.num_prompts == 4
        records.settle()
        rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()][step * 24 :]
        assert [(row["step"], row["version"]) for row in rows] == [(step, 0)] * 24
        assert [(row["prompt_id"], row["sample_index"]) for row in rows] == [(p.id, n) for p in prompts for n in range(6)]
        assert [row["reward"] for row in rows] == [float(row["seed"] % 2 == 0) for row in rows]
        mixed = [p for i, p in enumerate(prompts) if len({row["reward"] for row in rows[6 * i : 6 * i + 6]}) == 2]
        assert data.metrics["skipped_prompts"] == 4 - len(mixed)
        assert data.metrics["staleness"] == step
        assert [s.prompt_ids for s in data.sequences] == [p.token_ids for p in mixed for _ in range(2)]
        assert [(s.group, s.chosen) for s in data.sequences] == [(i, c) for i in range(len(mixed)) for c in (True, False)]
        assert all((s.completion_ids[0] % 2 == 0) is s.chosen for s in data.sequences)
        assert all(s.rollout_log_probs == LogProbs.of([-0.5]) and s.advantage == 0 for s in data.sequences)


def test_seeds_are_distinct_and_depend_on_the_step_but_not_on_the_engines(open_source):
    def seeds(*engines: FakeEngine) -> list[list[int]]:
        source = open_source(run_config(algorithm={"loss": "grpo", "samples_per_prompt": 6}), *engines)
        source.open(range(0, 2))
        return [[s.completion_ids[0] for s in source.next(step).sequences] for step in (0, 1)]

    alone = seeds(FakeEngine())
    assert len(alone[0]) == 24
    assert len(set(alone[0]) | set(alone[1])) == 48
    assert seeds(FakeEngine(), FakeEngine(), FakeEngine()) == alone


def test_rollouts_of_another_version_than_the_schedules_are_refused(open_source):
    source = open_source(run_config(), FakeEngine(version=2))
    source.open(range(0, 2))
    with pytest.raises(AssertionError, match=r"step 1 must train on rollouts of version 0, found \{2\}"):
        source.next(1)
    source = open_source(run_config(), FakeEngine(version=2))
    source.open(range(2, 4))
    assert source.next(3).metrics["staleness"] == 1


def test_opening_waits_for_nobody_and_next_waits_for_the_reward(open_source):
    reward = Parity()
    reward.allowed.clear()
    source = open_source(run_config(), reward=reward)
    source.open(range(0, 2))  # would hang for good if it waited
    threading.Timer(0.2, reward.allowed.set).start()
    metrics = source.next(0).metrics
    assert metrics["wait_seconds"] >= metrics["reward_seconds"] > 0.1
    assert source.next(1).metrics["wait_seconds"] < 0.1


def test_what_was_sampled_ahead_goes_on_from_its_file_as_if_nothing_had_happened(open_source, tmp_path):
    """Versions, log-probs, rewards, metrics and the ledger: one source reads what another wrote."""
    config = run_config(sync={"sync_interval": 2, "lookahead": 1})
    records, rest = (RolloutWriter(RolloutFile(tmp_path / name)) for name in ("whole.jsonl", "resumed.jsonl"))
    whole = open_source(config, records=records)
    whole.open(range(0, 4))
    whole.finish(3)
    whole.drain(2)
    whole.drain(3)
    whole.ahead(range(2, 4)).write(tmp_path)
    mixture = Mixture(config.data.sources, (PROMPTS,), config.run.seed)
    read = read_ahead(tmp_path / AHEAD, mixture, config)
    for other, said in (
        (
            {"sampling": {"temperature": 0.5}, "algorithm": {"loss": "grpo"}},
            r"step 2: log-probs must be of temperature 0\.5, .*1\.0",
        ),
        (
            {"run": {"seed": 7}},
            r"step 2: must hold the samples that this run asks for.* with seed \d+ .* set run\.seed, data and",
        ),
    ):
        with pytest.raises(DataError, match=said):
            read_ahead(tmp_path / AHEAD, mixture, run_config(sync={"sync_interval": 2, "lookahead": 1}, **other))
    resumed = open_source(config, FakeEngine(version=2), records=rest, ahead=read)
    resumed.open(range(4, 6))
    for step in range(6):
        expected = whole.next(step) if step < 4 else None
        if step >= 2:
            found = resumed.next(step)
            assert found.metrics["staleness"] == (step if step < 4 else step - 2)
            assert expected is None or found.sequences == expected.sequences
            told = expected.metrics if expected is not None else {}
            untimed = {"wait_seconds", "reward_seconds", "engines_idle_share"}
            assert {name: found.metrics[name] for name in told if name not in untimed} == {
                name: value for name, value in told.items() if name not in untimed
            }
    records.settle()
    rest.settle()
    rows = (tmp_path / "whole.jsonl").read_text().splitlines()
    assert (tmp_path / "resumed.jsonl").read_text().splitlines()[:48] == rows[48:]
    whole.ahead(range(0)).write(tmp_path / "nothing")  # writes no file, and asks for no folder


def test_engines_may_have_finished_a_step_that_is_still_judged(open_source):
    """A weight sync waits for the first, an evaluation for the second."""
    reward = Parity()
    reward.allowed.clear()
    source = open_source(run_config(), reward=reward)
    source.open(range(0, 2))
    source.finish(1)
    threading.Timer(0.2, reward.allowed.set).start()
    started = time.monotonic()
    source.drain(1)
    assert time.monotonic() - started > 0.1


def test_the_engines_idle_share_is_told_with_the_step_that_asks_for_more(open_source):
    source = open_source(run_config(sync={"sync_interval": 4}), FakeEngine(seconds=0.0))
    source.open(range(0, 2))
    told = [source.next(step).metrics for step in range(2)]
    source.open(range(2, 4))
    told += [source.next(step).metrics for step in range(2, 4)]
    assert [metrics.get("engines_idle_share") for metrics in told] == [None, None, 1.0, None]


def test_what_an_engine_raises_is_raised_by_next(open_source):
    source = open_source(run_config(), FakeEngine(), FakeEngine(failing={"collect": TimeoutError()}))
    source.open(range(0, 2))
    with pytest.raises(InferenceError, match="engine 1 did not answer 'collect'"):
        source.next(0)


class Holding(FakeEngine):
    """Keeps what it hands over last, of every step, until `allowed`."""

    def __init__(self, allowed: threading.Event) -> None:
        super().__init__()
        self.allowed = allowed

    def call(self, method: str, *arguments: Any) -> Any:
        answer = super().call(method, *arguments)
        if method != "collect" or arguments[1]:
            return answer

        class Held:
            def result(_, timeout_seconds: float) -> Any:
                if not self.allowed.wait(timeout_seconds):
                    raise TimeoutError
                return answer.value

        return Held()


class OneByOne(Parity):
    """Judges what has arrived at once, and lets engines go on when it has judged so many answers."""

    begins_early = True

    def __init__(self, enough: int) -> None:
        super().__init__()
        self.enough, self.judged, self.stopped = enough, 0, threading.Event()
        self.engines_go_on = threading.Event()

    def score_as_they_arrive(self, answers: Arrivals[Answer]) -> list[Score]:
        found: dict[int, Score] = {}
        try:
            while (new := answers.take()) is not None:
                found |= dict(zip(new, self.score(list(new.values())), strict=True))
                self.judged += len(new)
                if self.judged >= self.enough:
                    self.engines_go_on.set()
        except CancelledError:
            self.stopped.set()
            raise
        return [found[place] for place in sorted(found)]


def test_rewards_judge_while_engines_sample(open_source):
    """Of 24 samples two engines hand over 6, 3, 2 and 1 each, the last ones when all others are judged; and the step is the one
    that is judged together."""
    reward = OneByOne(enough=22)
    engines = [Holding(reward.engines_go_on) for _ in range(2)]
    found = []
    for source in (open_source(run_config(), *engines, reward=reward), open_source(run_config(), FakeEngine(), FakeEngine())):
        source.open(range(0, 1))
        source.drain(0)
        found.append(source.ahead(range(0, 1)).steps[0])
    assert found[0] == found[1]
    assert reward.judged == 24


def test_a_source_that_is_closed_waits_for_no_engine(open_source):
    reward = OneByOne(enough=25)
    source = open_source(run_config(), Holding(reward.engines_go_on), reward=reward)
    source.open(range(0, 2))
    assert reward.begun.wait(10)
    started = time.monotonic()
    source.close()
    assert reward.stopped.is_set() and time.monotonic() - started < 4, "the engine is late after 5 seconds"
    assert reward.judged <= 23
    reward.engines_go_on.set()


def group(
    rewards: Many[float],
    prompt: int = 0,
    statuses: Many[str] | None = None,
    reward: str = "math",
    cut_off: Many[int] = (),
) -> RolloutGroup:
    """One rollout a reward; rollout i has i + 1 tokens with log-prob -(i + 1) / 2 each, and is cut off when in `cut_off`."""
    rollouts = [
        Rollout(
            make_completion(
                prompt_id=f"p{prompt}",
                sample_index=i,
                seed=100 * prompt + i,
                version=0,
                token_ids=tuple(range(i + 1)),
                log_probs=(-(i + 1) / 2,) * (i + 1),
                text=f"answer {i}",
                finish_reason="length" if i in cut_off else "stop",
            ),
            Score(value, statuses[i] if statuses else "ok"),  # type: ignore[arg-type]
        )
        for i, value in enumerate(rewards)
    ]
    return RolloutGroup(replace(PROMPTS.prompts[prompt], reward=reward, verifiable=reward == "math"), 5, tuple(rollouts))


def test_metrics_of_a_step_worked_out_by_hand():
    """Lengths 1, 2, 3, 1, 2; rewards 1, -, -, 1, 0, where "-" could not be judged.

    Minus log-probs 1*0.5 + 2*1 + 3*1.5 + 1*0.5 + 2*1 = 9.5.
    """
    groups = [group([1, 0, 0], 0, ["ok", "timeout", "died"], cut_off=[1]), group([1, 0], 1, cut_off=[1])]
    metrics = rollout_metrics(groups, Usage(num_tokens=9, busy_seconds=2.5))
    assert metrics == pytest.approx(
        {
            "reward_mean": 2 / 3,
            "accuracy": 2 / 3,
            "rollout_entropy": 9.5 / 9,
            "prompt_tokens_mean": sum(len(one.prompt.token_ids) for one in groups) / 2,
            "completion_tokens_mean": 1.8,
            "completion_tokens_p50": 2.0,
            "completion_tokens_p90": 3.0,
            "completion_tokens_p99": 3.0,
            "completion_tokens_max": 3.0,
            "correct_tokens_mean": 1.0,
            "incorrect_tokens_mean": 2.0,
            "truncated": 0.4,
            "end_tokens_inside": 0.0,
            "reward_timeouts": 1.0,
            "reward_failures": 1.0,
            "reward_too_long": 0.0,
            "unjudged_share": 0.4,
            "generation_tokens": 9.0,
            "generation_seconds": 2.5,
        }
    )
    assert math.isnan(rollout_metrics([group([1, 1])], Usage(3, 1.0))["incorrect_tokens_mean"])


def test_end_tokens_inside_and_steps_without_an_end_are_counted_and_told(caplog):
    """Rollout i has the tokens 0 .. i; the last one may be an end token."""
    groups = [group([1, 0, 0], 0, cut_off=[0, 1, 2])]
    metrics = rollout_metrics(groups, None, end_ids=(1, 2))
    assert (metrics["end_tokens_inside"], metrics["truncated"]) == (1.0, 1.0)
    warn_of_endings(metrics, 96)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "did not stop at every end token" in caplog.text and "cut off at sampling.max_tokens = 96" in caplog.text
    caplog.clear()
    warn_of_endings(rollout_metrics([group([1, 0, 0], 0, cut_off=[0, 1])], None, end_ids=(2,)), 96)
    assert caplog.records == []


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=8), st.sets(st.integers(0, 5)))
def test_a_row_counts_once_that_holds_an_end_token_before_its_last(rows, end_ids):
    wanted = sum(not end_ids.isdisjoint(row[:-1]) for row in rows)
    assert num_with_ends_inside([TokenIds.of(row) for row in rows], end_ids) == wanted


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 100))
def test_a_percentile_is_the_smallest_length_that_reaches_its_share(lengths, percent):
    found = percentile(lengths, percent)
    assert found in lengths
    shares = {length: sum(other <= length for other in lengths) / len(lengths) for length in lengths}
    assert found == min(length for length, share in shares.items() if share >= percent / 100 - 1e-12)


def test_lengths_of_what_a_loss_compares():
    """Sequences of no group are in no comparison, as GRPO's beside pairs."""
    sequences, _ = training_sequences(MIXED, run_config())
    alone = replace(sequences[0], group=-1, completion_ids=TokenIds.of([1] * 40))
    by_hand = {c: [len(s.completion_ids) for s in sequences if s.chosen is c] for c in (True, False)}
    found = compared_tokens([*sequences, alone])
    assert found == {
        "chosen_tokens_mean": sum(by_hand[True]) / 2,
        "rejected_tokens_mean": sum(by_hand[False]) / 2,
    }
    assert math.isnan(compared_tokens([alone])["chosen_tokens_mean"])


def test_a_step_says_which_share_it_skipped_and_compared_lengths_where_there_are_any(open_source):
    for loss in ("dpo", "grpo"):
        source = open_source(run_config(algorithm={"loss": loss, "samples_per_prompt": 6}))
        source.open(range(0, 2))
        source.drain(0)
        source.drain(1)  # in any number and order; both steps are still handed out
        metrics = [source.next(step).metrics for step in (0, 1)]
        assert all(m["skipped_share"] == m["skipped_prompts"] / 4 for m in metrics)
        assert all(("chosen_tokens_mean" in m) is (loss == "dpo") for m in metrics)


def test_rewards_are_not_accuracies():
    """A reward model's scores have a mean; nothing of theirs is right or wrong, in a step of their own or beside problems."""
    chat = group([2.5, -1.5, 0.0], 0, ["ok", "ok", "too_long"], "model")
    alone = rollout_metrics([chat], Usage(6, 1.0))
    assert (alone["reward_mean"], alone["reward_too_long"], alone["reward_failures"]) == (0.5, 1.0, 0.0)
    assert not {"accuracy", "correct_tokens_mean", "incorrect_tokens_mean", "reward_mean_model"} & alone.keys()
    both = rollout_metrics([chat, group([1, 0, 0], 1)], Usage(12, 1.0))
    assert (both["reward_mean"], both["reward_mean_model"], both["reward_mean_math"]) == (0.4, 0.5, pytest.approx(1 / 3))
    assert (both["accuracy"], both["correct_tokens_mean"], both["incorrect_tokens_mean"]) == (pytest.approx(1 / 3), 1.0, 2.5)
    invalid = rollout_metrics([group([1, 0], 0, ["ok", "invalid"], "model")], Usage(3, 1.0))
    assert (invalid["reward_mean"], invalid["reward_failures"]) == (1.0, 1.0)


@pytest.mark.parametrize("reward", ["model", "function"])
def test_prompts_that_no_verifier_judges_pair_their_extremes_beside_those_that_one_does(reward):
    """Whatever the pairing of the others, and whatever the signs; all positive is not all correct. Lengths 1, 2, 3, 4."""
    groups = [group([3, 1, 2, 4], 0, reward=reward), group([1, 1], 1), group([-3, -1], 2, reward=reward), group([0, 1], 3)]
    groups.append(group([2, 2], 4, reward=reward))
    for pairing in ("random", "length_matched"):
        sequences, counts = training_sequences(groups, run_config(algorithm={"pairing": pairing}))
        found = [(s.prompt_ids[0], s.group, s.chosen, len(s.completion_ids)) for s in sequences]
        assert found[:2] == [(1, 0, True, 4), (1, 0, False, 2)]
        assert found[2:4] == [(3, 1, True, 2), (3, 1, False, 1)]
        assert found[4:] == [(4, 2, True, 2), (4, 2, False, 1)]
        assert {name: count for name, count in counts.items() if count} == {"skipped_prompts": 2, "all_correct_prompts": 1}


def test_group_dpo_compares_above_and_below_the_mean_where_nothing_is_right_or_wrong():
    """Mean 3 of what could be judged; a reward equal to it stands with those below. GRPO beside it agrees in sign."""
    chat = group([6, 3, 9, 2, 1], 0, ["ok", "ok", "too_long", "ok", "ok"], "model")
    sequences, _ = training_sequences([chat], run_config(algorithm={"loss": "group_dpo"}))
    assert [(len(s.completion_ids), s.group, s.chosen) for s in sequences] == [
        *((1, 0, True), (2, 0, False), (4, 0, False), (5, 0, False)),
    ]
    assert [s.advantage for s in sequences] == [3.0, 0.0, -1.0, -2.0]


MIXED = [group([1, 1], 0), group([1, 0, 0, 0], 1), group([0, 0], 2), group([0, 1], 3)]


@pytest.mark.parametrize("kl_weight", [0.0, 0.001])
def test_advantages_may_be_scaled_by_the_steps_own_deviation(kl_weight):
    """By the root mean square over all judged rollouts, also of prompts that are dropped; 0 where nothing differs."""
    late = group([1, 0, 5], 4, ["ok", "ok", "timeout"])
    algorithm = {"loss": "grpo", "kl_weight": kl_weight, "normalize_advantages": "batch_std"}
    sequences, counts = training_sequences([*MIXED, late], run_config(algorithm=algorithm))
    root = math.sqrt((0.75**2 + 3 * 0.25**2 + 2 * 0.5**2 + 2 * 0.5**2) / 12)
    plain, others = training_sequences([*MIXED, late], run_config(algorithm=algorithm | {"normalize_advantages": "mean"}))
    assert counts == others
    assert [s.advantage for s in sequences] == pytest.approx([s.advantage / root for s in plain])
    assert [replace(s, advantage=0) for s in sequences] == [replace(s, advantage=0) for s in plain]
    equal, _ = training_sequences([MIXED[0]], run_config(algorithm=algorithm))
    assert [s.advantage for s in equal] == [0.0] * (2 if kl_weight else 0)


def test_what_could_not_be_judged_is_no_evidence():
    """A timeout is neither rejected nor part of the group's mean."""
    late = group([1, 0, 0], 0, ["ok", "timeout", "ok"])
    sequences, counts = training_sequences([late], run_config())
    assert set(counts.values()) == {0}
    assert [len(s.completion_ids) for s in sequences] == [1, 3]
    grpo, _ = training_sequences([late], run_config(algorithm={"loss": "grpo"}))
    assert [(len(s.completion_ids), s.advantage) for s in grpo] == [(1, 0.5), (3, -0.5)]
    nothing = group([0, 0], 0, ["timeout", "died"])
    for algorithm in ({}, {"pairing": "best_worst"}, {"loss": "grpo"}, {"loss": "group_dpo"}):
        sequences, counts = training_sequences([nothing], run_config(algorithm=algorithm))
        assert sequences == []
        assert {name: count for name, count in counts.items() if count} == {"skipped_prompts": 1, "unjudged_prompts": 1}


def test_dpo_skips_prompts_without_a_pair_and_numbers_the_others():
    sequences, counts = training_sequences(MIXED, run_config())
    assert counts == {
        "skipped_prompts": 2,
        "all_correct_prompts": 1,
        "all_wrong_prompts": 1,
        "unjudged_prompts": 0,
        "tied_prompts": 1,
    }
    found = [(s.prompt_ids[0], s.group, s.chosen) for s in sequences]
    assert found == [(2, 0, True), (2, 0, False), (4, 1, True), (4, 1, False)]
    assert [len(s.completion_ids) for s in sequences if s.chosen] == [1, 2]
    assert all(list(s.rollout_log_probs) == [-len(s.completion_ids) / 2] * len(s.completion_ids) for s in sequences)


@pytest.mark.parametrize(("kl_weight", "kept"), [(0.001, [1, 2, 3, 4]), (0.0, [2, 4])])
def test_grpo_keeps_prompts_without_signal_only_for_its_kl(kl_weight, kept):
    sequences, counts = training_sequences(MIXED, run_config(algorithm={"loss": "grpo", "kl_weight": kl_weight}))
    assert counts["skipped_prompts"] == 2
    assert list(dict.fromkeys(s.prompt_ids[0] for s in sequences)) == kept
    advantages = {i: [s.advantage for s in sequences if s.prompt_ids[0] == i] for i in kept}
    assert advantages[2] == [0.75, -0.25, -0.25, -0.25]
    assert advantages[4] == [-0.5, 0.5]
    assert all(advantages[i] == [0.0, 0.0] for i in kept if i in (1, 3))
    assert all(s.group == -1 and not s.chosen for s in sequences)


@pytest.mark.parametrize(
    ("options", "kept", "skipped"),
    [({}, [2, 4], 2), ({"alpha": 0.1, "kl_weight": 0.0}, [2, 4], 2), ({"alpha": 0.1}, [1, 2, 3, 4], 2)],
)
def test_group_dpo_compares_all_rollouts_of_a_prompt(options, kept, skipped):
    """A prompt without pairs stays only for the KL of GRPO beside it, and is in no group."""
    sequences, counts = training_sequences(MIXED, run_config(algorithm={"loss": "group_dpo"} | options))
    assert counts["skipped_prompts"] == skipped
    assert list(dict.fromkeys(s.prompt_ids[0] for s in sequences)) == kept
    found = {i: [(s.group, s.chosen) for s in sequences if s.prompt_ids[0] == i] for i in kept}
    assert found[2] == [(0, True), (0, False), (0, False), (0, False)]
    assert found[4] == [(1, False), (1, True)]
    assert all(found[i] == [(-1, False)] * 2 for i in kept if i in (1, 3))
    assert [s.advantage for s in sequences if s.prompt_ids[0] == 2] == [0.75, -0.25, -0.25, -0.25]


def test_advantages_without_a_pair_are_a_signal_to_grpo_alone():
    """All rewards positive: nothing to compare, something to credit; and the normalisation is the one asked for."""
    options = {"alpha": 0.1, "kl_weight": 0.0, "normalize_advantages": "mean_std"}
    sequences, counts = training_sequences([group([1, 3])], run_config(algorithm={"loss": "group_dpo"} | options))
    assert [(s.advantage, s.group) for s in sequences] == [(-1.0, -1), (1.0, -1)]
    assert counts["skipped_prompts"] == 0
    assert training_sequences([group([1, 3])], run_config(algorithm={"loss": "group_dpo"}))[1]["skipped_prompts"] == 1


def test_the_pairing_is_the_one_asked_for():
    """Best and worst of rewards that are all positive; the nearer of two wrong ones. Lengths 1, 2, 3."""
    best, _ = training_sequences([group([2, 3, 1])], run_config(algorithm={"pairing": "best_worst"}))
    assert [(len(s.completion_ids), s.chosen) for s in best] == [(2, True), (3, False)]
    near, _ = training_sequences([group([1, 0, 0])], run_config(algorithm={"pairing": "length_matched"}))
    assert [(len(s.completion_ids), s.chosen) for s in near] == [(1, True), (2, False)]


def test_completions_are_scored_against_their_own_prompt(open_source):
    asked: list[tuple[str, str]] = []

    class Recording(Parity):
        def score(self, answers):
            asked.extend((answer.prompt.id, answer.completion) for answer in answers)
            return super().score(answers)

    source = open_source(run_config(), FakeEngine(), FakeEngine(), reward=Recording())
    source.open(range(0, 1))
    source.drain(0)
    groups = source.ahead(range(0, 1)).steps[0][0]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert [(group.step, len(group.rollouts)) for group in groups] == [(0, 6)] * 4
    assert asked == [(r.completion.prompt_id, str(r.completion.seed)) for r in rollouts], "in the order of the step"
    assert {(group.prompt.id, r.completion.prompt_id) for group in groups for r in group.rollouts} == {
        (group.prompt.id, group.prompt.id) for group in groups
    }
    assert [r.score.value for r in rollouts] == [float(r.completion.seed % 2 == 0) for r in rollouts]


def test_a_row_of_the_ledger_tells_the_temperature_of_its_log_probs_where_it_is_not_1():
    made = group([1, 0])
    completions = [replace(rollout.completion, temperature=0.7) for rollout in made.rollouts]
    tempered = replace(made, rollouts=tuple(map(Rollout, completions, (rollout.score for rollout in made.rollouts))))
    assert [row.pop("temperature") for row in ledger_rows(tempered)] == [0.7, 0.7]
    assert [{**row, "temperature": 0.7} for row in ledger_rows(made)] == ledger_rows(tempered)


def test_a_row_of_the_ledger_tells_everything_of_a_rollout():
    assert ledger_rows(group([1, 0], 2, ["ok", "unparsable"], cut_off=[1]))[1] == {
        "step": 5,
        "version": 0,
        "prompt_id": "p2",
        "prompt_tokens": "14148a1d94b68801",  # SHA-256 of "3,50"
        "sample_index": 1,
        "seed": 201,
        "reward": 0,
        "status": "unparsable",
        "finish_reason": "length",
        "num_tokens": 2,
        "text": "answer 1",
        "token_ids": [0, 1],
        "log_probs": [-1.0, -1.0],
    }


def test_a_source_is_closed_when_nothing_judges_any_more(open_source):
    """What the reward judges is waited for; what engines still sample is not, and is not judged afterwards."""
    reward = Parity()
    reward.allowed.clear()
    source = open_source(run_config(), reward=reward)
    source.open(range(0, 2))
    assert reward.begun.wait(10)
    closed = threading.Thread(target=source.close)
    closed.start()
    closed.join(0.1)
    assert closed.is_alive()
    reward.allowed.set()
    closed.join(10)
    assert not closed.is_alive()
    assert (source._coming[0].done(), source._coming[1].cancelled()) == (True, True)
