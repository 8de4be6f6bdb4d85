"""The regime that decides its own intervals: the rule as a function of what was measured, what a schedule makes of it step by
step, and which options it goes with.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config.load import load_config
from engine.config.options import Sync
from engine.config.schedules.pilot import REMEMBERED, Pilot, drift, next_length
from engine.core.errors import ConfigError
from engine.forecast.seconds import Regime
from engine.run.checkpoint import recall_schedule
from tests.builders import LEAST, config, merged

drifts = st.floats(0, 1) | st.none()
intervals = st.lists(st.lists(drifts, min_size=1, max_size=6), min_size=1, max_size=REMEMBERED)
bounds, mosts = st.floats(1e-3, 1), st.integers(1, 32)
values = st.lists(st.floats(0, 0.2) | st.just(math.nan), min_size=40, max_size=40)
metrics = st.sampled_from(["log_prob_gap_mean", "ess_share"])


def pilot(num_steps: int = 40, bound: float = 0.03, most: int = 8, metric: str = "log_prob_gap_mean") -> Pilot:
    return Pilot(most, "follow", num_steps, 16, metric=metric, bound=bound)  # type: ignore[arg-type]


@given(intervals, bounds, mosts)
def test_a_length_is_within_its_bounds(known, bound, most):
    assert 1 <= next_length(known, bound, most) <= min(most, 2 * len(known[-1]))


@given(intervals, bounds, mosts, st.data())
def test_more_drift_never_makes_an_interval_longer_nor_a_wider_bound_a_shorter_one(known, bound, most, data):
    """Drift after the first step of an interval, for drift at a sync is no growth; and more of that alone may only end at 1."""
    length = next_length(known, bound, most)
    more = [[v if v is None or age == 0 else v + data.draw(st.floats(0, 1)) for age, v in enumerate(of)] for of in known]
    assert next_length(more, bound, most) <= length
    assert next_length(known, bound + data.draw(st.floats(0, 1)), most) >= length


@pytest.mark.parametrize(
    ("known", "bound", "most", "length"),
    [
        ([[0.010, 0.014, 0.018]], 0.0301, 16, 6),  # the example that the file opens with
        ([[0.010, 0.014, 0.018]], 0.0301, 4, 4),  # no longer than the most
        ([[0.010, 0.050]], 0.03, 16, 1),  # crossed: 0.04 a step
        ([[0.010, 0.014], [0.010]], 0.0301, 16, 2),  # growth is known from the interval before; twice the last one
        ([[0.010]], 0.03, 16, 2),  # growth is not known: tried
        ([[0.031]], 0.03, 16, 1),  # drift at a sync alone is beyond the bound
        ([[0.020, 0.010]], 0.03, 16, 4),  # no growth
        ([[None, None, None]], 0.03, 16, 3),  # nothing known
        ([[None, 0.010]], 0.0301, 16, 4),  # without one at a sync, that is taken for 0
    ],
)
def test_the_longest_interval_at_whose_end_the_drift_expected_keeps_the_bound(known, bound, most, length):
    assert next_length(known, bound, most) == length


def test_drift_is_the_gap_or_what_the_effective_sample_size_lacks():
    assert drift("log_prob_gap_mean", 0.25) == 0.25 and drift("ess_share", 0.75) == 0.25
    assert drift("ess_share", math.nan) is drift("ess_share", None) is drift("log_prob_gap_mean", math.inf) is None


@given(values, st.floats(1e-3, 0.2), mosts, metrics, st.integers(0, 40))
def test_every_step_is_of_the_version_of_the_sync_before_it_and_a_resumed_run_decides_the_same(seen, bound, most, metric, cut):
    """Syncs as a plain simulation finds them. A schedule that goes on from what another kept, as JSON, is the same."""
    seen = [1 - value for value in seen] if metric == "ess_share" else seen
    bound = 1 - bound if metric == "ess_share" else bound
    schedule, resumed = pilot(bound=bound, most=most, metric=metric), pilot(bound=bound, most=most, metric=metric)
    begin, length, syncs, lengths = 0, 1, list[int](), list[int]()
    known: list[list[float | None]] = [[]]
    for step, value in enumerate(seen):
        if step == begin + length:
            longest = 1 - bound if metric == "ess_share" else bound
            begin, length = step, next_length(known[-REMEMBERED:], longest, most)
            known.append([])
        syncs += [step] * (step == begin)
        assert schedule.sync_due(step) == schedule.resumable(step) == (step == begin)
        assert schedule.version(step) == schedule.reference_version(step) == begin
        assert schedule.staleness(step) == step - begin < most
        assert schedule.opens(step) == (range(begin, min(40, begin + length)) if step == begin else range(0))
        assert schedule.last_resumable(step) == begin and list(schedule.completes(step)) == list(
            range(step, min(40, begin + length)) if step > begin else ()
        )
        if step == cut:
            resumed.restore(json.loads(json.dumps(schedule.state())))
        lengths.append(schedule.observe(step, value))
        if step >= cut:
            assert resumed.observe(step, value) == lengths[-1] == length
        known[-1].append(drift(metric, value))
    assert [step for step in range(40) if replace(schedule).sync_due(step)] == [0, *range(1, 40, most)], "nothing decided yet"
    assert [step for step in range(40) if schedule.sync_due(step)] == syncs
    assert not schedule.contradictions()


def test_a_checkpoint_is_due_at_the_first_sync_from_there_on():
    schedule = pilot(num_steps=12, bound=1.0, most=3)
    for step in range(12):
        schedule.observe(step, 0.0)
    assert [step for step in range(12) if schedule.sync_due(step)] == [0, 1, 3, 6, 9]
    assert [step for step in range(12) if schedule.checkpoint_due(4, step)] == [6, 9]


def test_a_step_out_of_its_order_is_no_step():
    schedule = pilot()
    schedule.observe(0, 0.0)
    with pytest.raises(AssertionError, match="step 0 observed, in the interval of steps 1 to 2"):
        schedule.observe(0, 0.0)


AUTO = {"sync_interval": "auto", "auto_bound": 0.05}


def written(sync: Mapping[str, Any]) -> str:
    """A configuration as TOML with these options of [sync], those of None left out."""
    tables = merged(LEAST, {"sync": {name: value for name, value in sync.items() if value is not None}})
    return "\n".join(
        line for name, table in tables.items() for line in (f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in table.items()))
    )


def test_before_a_run_and_in_a_forecast_every_interval_is_taken_for_the_most():
    made = config(run={"steps": 20}, sync=AUTO | {"auto_most": 5}, checkpoint={"every": 3})
    assert max(map(made.schedule.staleness, range(20))) == 4
    assert made.schedule.planned.sync_interval == 5
    assert made.schedule.planned.regime == "s = auto, taken for its most: s = 5 (semi-online)"
    assert made.schedule.regime == "s = auto (log_prob_gap_mean at most 0.05, s at most 5)"
    assert Regime.asked(made).of(made.schedule) == made.schedule.planned
    assert Regime(1).of(made.schedule).regime == "s = 1 (online)", "another s is taken for nothing"


def test_a_configuration_has_one_schedule_that_grows_and_its_copies_their_own():
    made = config(sync=AUTO)
    assert made.schedule is made.schedule and made == config(sync=AUTO)
    made.schedule.observe(0, 0.0)
    copied = made.model_copy(update={"run": made.run.model_copy(update={"steps": 9})})
    assert copied.schedule.num_steps == 9 and copied.schedule.state()["syncs"] == [0, 1]
    assert "schedule" not in made.model_dump() and "schedule" not in json.loads(made.model_dump_json())
    recall_schedule(copied, {"records": {"schedule": made.schedule.state()}})
    assert copied.schedule.state() == made.schedule.state() != config(sync=AUTO).schedule.state()
    fixed = config(sync={"sync_interval": 2})
    recall_schedule(fixed, {"records": {"schedule": made.schedule.state()}})  # as of a run that was forked off an auto one
    assert fixed.schedule.state() == {}


def test_the_reference_of_a_run_comes_from_one_place_whatever_is_decided():
    """Where all intervals happen to be of one step, it is still a pass: the copy of the weights was made when the run began."""
    made = config(sync=AUTO | {"auto_bound": 1e-9, "reference": "follow"})
    for step in range(4):
        made.schedule.observe(step, 1.0)
    assert all(made.schedule.sync_due(step) for step in range(4)) and made.reference_source == "pass"


@pytest.mark.parametrize(
    ("sync", "words"),
    [
        ({"auto_bound": None}, "sync.sync_interval = 'auto' needs sync.auto_bound.*found none: set it to a few times"),
        ({"auto_bound": None, "auto_metric": "ess_share"}, "found none: set it to the least share, as 0.9"),
        ({"auto_bound": 1.5, "auto_metric": "ess_share"}, "sync.auto_bound must be below 1.*found 1.5: lower it"),
        ({"auto_bound": 0.0}, "sync.auto_bound.*greater than 0; found 0.0"),
        ({"auto_metric": "ratio_max"}, "sync.auto_metric.*found 'ratio_max'"),
        ({"semantics": "fairseq2"}, "so would sync.semantics; found 'fairseq2': set it to 'paper'"),
        ({"lookahead": 1}, "sync.lookahead must be 0 and sync.in_flight false; found 1 and false: set them so"),
        ({"lookahead": 2, "in_flight": True}, "found 2 and true: set them so"),
    ],
)
def test_what_it_cannot_go_with_is_refused(tmp_path, sync, words):
    file = tmp_path / "run.toml"
    file.write_text(written(AUTO | sync))
    with pytest.raises(ConfigError, match=words):
        load_config(file)


@pytest.mark.parametrize(("name", "value"), [("auto_bound", 0.1), ("auto_metric", "ess_share"), ("auto_most", 3)])
def test_what_steers_it_is_refused_without_it(tmp_path, name, value):
    file = tmp_path / "run.toml"
    file.write_text(written({"sync_interval": 5, name: value}))
    words = (
        rf"^sync\.{name} needs sync\.sync_interval = 'auto', which decides by it; found {value!r} with 5: set that, or remove"
    )
    with pytest.raises(ConfigError, match=words):
        load_config(file)
    assert load_config(file, [f"sync.{name}="]).sync.sync_interval == 5
    assert {option for option in Sync.model_fields if option.startswith("auto_")} == {"auto_bound", "auto_metric", "auto_most"}


def test_the_best_checkpoint_is_only_chosen_where_each_is_judged(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(written(AUTO))
    judged = ["data.held_out=held_out.jsonl", "checkpoint.best_by=reward", "checkpoint.every=4"]
    with pytest.raises(
        ConfigError, match=r"checkpoint.best_by needs every checkpoint to be judged.*found evaluation.every = 4"
    ):
        load_config(file, [*judged, "evaluation.every=4"])
    assert load_config(file, [*judged, "evaluation.every=1"]).checkpoint.best_by == "reward"


def test_a_replay_and_a_loss_without_the_metric_are_refused(tmp_path):
    file, own = tmp_path / "run.toml", tmp_path / "own.py"
    own.write_text(
        "from engine.algorithms.base import Algorithm\nclass Mine(Algorithm):\n"
        "    def sequences(self, group, index, run_seed):\n        return [], False\n"
        "    def __call__(self, log_probs, microbatch, batch, entropy):\n        return log_probs.sum(), {}\n"
    )
    file.write_text(written(AUTO))
    with pytest.raises(ConfigError, match=r"needs a loss that reports sync.auto_metric; found 'log_prob_gap_mean' with"):
        load_config(file, [f"algorithm.loss={own}:Mine"])
    with pytest.raises(ConfigError, match=r"data.replay needs sync.sync_interval = 'never'.*found auto"):
        load_config(file, ["data.replay=rollouts.jsonl"])
    for loss in ("dpo", "group_dpo", "grpo", "cispo", "oapl"):
        assert load_config(file, [f"algorithm.loss={loss}", "sync.auto_metric=ess_share", "sync.auto_bound=0.9"]).sync.auto_most
