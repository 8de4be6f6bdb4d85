"""The loop with fakes that write down who was called: the exact order for every regime, what a resumed run does, which
weights every step trains on, and the means that records end with.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engine.config.schedules.base import Schedule
from engine.config.schedules.fairseq2 import Fairseq2
from engine.config.schedules.paper import Paper
from engine.config.schedules.pilot import Pilot
from engine.run.loop import _finished, fine_tune, train


class World:
    """Policy, source and publisher of a run in one, with the weights' versions; `log` tells what was called."""

    def __init__(self, *, colocated: bool = False) -> None:
        self.colocated = colocated
        self.log: list[str] = []
        self.windows: list[str] = []  # what the profile's window was told
        self.steps_done = 0
        self.serves: int | None = 0  # version in the pool
        self.held: int | None = None  # version that stands in for the policy's own weights
        self.paused: set[int] = set()  # opened steps that engines are not to complete before the next sync
        self.newest: dict[int, int] = {}  # opened step -> the newest version that sampled of it
        self.finished: set[int] = set()  # opened steps whose rollouts are sampled
        self.drained: set[int] = set()  # and those whose rollouts are judged too
        self.judged: dict[int, int] = {}  # step -> version that was evaluated
        self.sampled: dict[int, int] = {}  # step -> version that samples its rollouts
        self.staleness: dict[int, int] = {}
        self.schedule: Schedule | None = None  # of the run under way
        self.parts = self.left = 0  # of a step that come before its rest, and those left of this one
        self.pace: Callable[[int], float] = lambda step: 0.0  # how far the policy moves in a step, as a loss measures it

    def publish(self, version: int) -> dict[str, float]:
        assert version == (self.steps_done if self.held is None else self.held), "what is sent is what the policy holds"
        assert self.sampled.keys() <= self.finished | self.paused, "an engine refuses a sync with requests in flight"
        self.log.append(f"publish {version}")
        self.serves = version
        return {"sync_seconds": 0.5}

    def sleep(self) -> None:
        assert self.sampled.keys() <= self.drained, "an engine refuses to sleep with requests in flight"
        if self.serves is not None:
            self.log.append("sleep")
        self.serves = None

    def refresh_reference(self) -> None:
        self.log.append("reference")

    def open(self, steps: range, until: int) -> None:
        assert self.serves is not None, "engines that rest refuse requests"
        self.log.append(f"open {steps.start}-{steps.stop - 1}" if steps else "go on")
        self.sampled |= dict.fromkeys(steps, self.serves)
        for step in self.sampled:  # engines go on with what they paused, from the weights of now
            if step not in self.finished:
                self.newest[step] = self.serves
        paused = {step for step in self.sampled if step >= until}
        self.log += [f"pause {min(paused)}-{max(paused)}"] if paused else []
        self.paused = paused

    def finish(self, steps: range) -> None:
        assert set(steps) == self.sampled.keys() - self.paused, "what is in flight is what has been opened and not trained on"
        self.log.append(f"finish {len(steps)}")
        self.finished |= set(steps)

    def drain(self, steps: range) -> None:
        assert set(steps) == self.sampled.keys() - self.paused, "what is in flight is what has been opened and not trained on"
        self.log.append(f"drain {len(steps)}")
        self.drained |= set(steps)
        self.finished |= set(steps)

    @contextmanager
    def as_seed(self) -> Iterator[None]:
        self.held = 0
        yield
        self.held = None

    def early(self, step: int) -> str | None:
        if not self.left:
            return None
        self.left -= 1
        self.log.append(f"early {step}")
        return f"part of {step}"

    def next(self, step: int) -> tuple[Any, dict[str, float]]:
        self.log.append(f"next {step}")
        self.left = self.parts
        self.staleness[step] = self.steps_done - self.sampled.pop(step)
        return f"batch {step}", {"reward_mean": 0.25}

    def score(self, batch: Any) -> Any:
        time.sleep(0.01 * bool(self.parts))
        return f"scored {batch}"

    def add_gradient(self, batch: Any) -> None:
        self.log.append(f"add {batch}")

    def train_step(self, batch: Any) -> dict[str, float]:
        assert not self.colocated or self.serves is None, "engines have the trainer's devices"
        self.log.append(f"train {batch}")
        step, self.steps_done = self.steps_done, self.steps_done + 1
        return {"loss": 1.0, "log_prob_gap_mean": self.pace(step) * self.staleness.get(step, 0)}

    def step(self, step: int) -> None:
        self.windows.append(f"step {step}")

    def submitted(self, steps: range) -> None:
        self.windows.append(f"submitted {steps.start}-{steps.stop - 1}")

    def observe(self, record: dict[str, float]) -> dict[str, float]:
        assert self.log[-1] == f"train scored batch {record['step']:.0f}" and "checkpoint" not in self.log[-1]
        if self.schedule is None or self.schedule.measures is None:
            return {}
        return {"interval_steps": self.schedule.observe(int(record["step"]), record[self.schedule.measures])}

    def checkpoint(self, step: int) -> None:
        self.log.append(f"checkpoint {step}")

    def evaluate(self, step: int) -> None:
        self.log.append(f"evaluate {step}")
        assert self.serves is not None, "engines that rest refuse requests"
        assert self.sampled.keys() <= self.drained | self.paused, "the reward judges one thing at a time"
        self.judged[step] = self.serves

    def run(self, schedule: Schedule, start: int = 0, due: Callable[[int], bool] | None = None) -> list[dict[str, float]]:
        """Evaluates where `due` says; at every sync and at the end without it."""
        self.steps_done, self.schedule = start, schedule
        kept = schedule.in_flight(start)  # by the checkpoint
        self.sampled |= {step: schedule.version(step) for step in kept}
        self.paused = set(kept) - set(schedule.completes(start))
        self.finished |= set(kept) - self.paused
        self.drained |= set(kept) - self.paused
        world: Any = self
        steps = train(
            schedule,
            world,
            world,
            world,
            start=start,
            colocated=self.colocated,
            observe=self.observe,
            checkpoint=self.checkpoint,
            evaluation_due=due or (lambda step: schedule.sync_due(step) or step == schedule.num_steps),
            evaluate=self.evaluate,
            window=world,
        )
        return list(steps)


def step_of(step: int) -> list[str]:
    """The middle of every step."""
    return [f"next {step}", f"train scored batch {step}", f"checkpoint {step + 1}"]


def sync_of(step: int) -> list[str]:
    return [f"publish {step}", f"evaluate {step}"]


def test_online_syncs_before_every_step():
    world = World()
    records = world.run(Paper(1, "never", num_steps=2, offline_chunk=16))
    assert world.log == [
        *sync_of(0), "open 0-0", *step_of(0),
        *sync_of(1), "open 1-1", *step_of(1),
        *sync_of(2),
    ]  # fmt: skip
    assert world.windows == ["step 0", "submitted 0-0", "step 1", "submitted 1-1", "step 2"]
    assert [record["step"] for record in records] == [0, 1]
    assert all(record["loss"] == 1 and record["reward_mean"] == 0.25 and record["sync_seconds"] == 0.5 for record in records)


def test_parts_of_a_step_that_are_complete_early_are_added_before_its_rest():
    """The step's own seconds are those of all its parts (each scored for 10 ms here)."""
    world = World()
    world.parts = world.left = 2
    (record,) = world.run(Paper(1, "never", num_steps=1, offline_chunk=16))
    parts = ["early 0", "add scored part of 0"]
    assert world.log == [*sync_of(0), "open 0-0", *parts, *parts, *step_of(0), *sync_of(1)]
    assert record["score_seconds"] >= 0.03 and record["train_seconds"] >= record["score_seconds"]


def test_semi_online_opens_an_interval_after_its_sync_and_the_last_one_is_cut():
    """A checkpoint comes before the sync of the same step, the evaluation right after it."""
    world = World()
    records = world.run(Paper(2, "never", num_steps=3, offline_chunk=16))
    assert world.log == [
        *sync_of(0), "open 0-1", *step_of(0), *step_of(1),
        *sync_of(2), "open 2-2", *step_of(2),
        *sync_of(3),
    ]  # fmt: skip
    assert ["sync_seconds" in record for record in records] == [True, False, True]


def test_offline_syncs_once_and_opens_a_chunk_at_a_time():
    world = World()
    world.run(Paper("never", "never", num_steps=3, offline_chunk=2))
    assert world.log == [
        *sync_of(0), "open 0-1", *step_of(0), *step_of(1),
        "open 2-2", *step_of(2),
        *sync_of(3),
    ]  # fmt: skip


def test_a_following_reference_is_copied_after_each_sync_but_the_first():
    world = World()
    world.run(Paper(2, "follow", num_steps=4, offline_chunk=16))
    assert world.log == [
        *sync_of(0), "open 0-1", *step_of(0), *step_of(1),
        *sync_of(2), "reference", "open 2-3", *step_of(2), *step_of(3),
        *sync_of(4),
    ]  # fmt: skip


def test_a_reference_of_its_own_interval_is_copied_between_syncs():
    world = World()
    world.run(Paper(4, 3, num_steps=5, offline_chunk=16))
    assert world.log == [
        *sync_of(0), "open 0-3", *step_of(0), *step_of(1), *step_of(2),
        "reference", *step_of(3),
        *sync_of(4), "open 4-4", *step_of(4),
        *sync_of(5),
    ]  # fmt: skip


def test_a_resumed_run_syncs_first_and_then_goes_on():
    world = World()
    records = world.run(Paper(2, "follow", num_steps=3, offline_chunk=16), start=2)
    assert world.log == [*sync_of(2), "reference", "open 2-2", *step_of(2), *sync_of(3)]
    assert [record["step"] for record in records] == [2]


def test_an_offline_run_resumes_with_the_seed_weights():
    world = World()
    world.run(Paper("never", "never", num_steps=3, offline_chunk=2), start=2)
    assert world.log == ["open 2-2", *step_of(2), *sync_of(3)]


def test_resuming_a_finished_run_evaluates_its_weights_and_not_the_seeds():
    world = World()
    assert world.run(Paper(2, "never", num_steps=4, offline_chunk=16), start=4) == []
    assert world.log == sync_of(4)


def test_an_evaluation_between_syncs_waits_for_the_interval_and_takes_the_newest_weights():
    """The pool keeps them: nothing more is asked of it before the sync that ends the interval."""
    world = World()
    world.run(Paper(3, "never", num_steps=5, offline_chunk=16), due=lambda step: step in (2, 3, 4))
    assert world.log == [
        "publish 0", "open 0-2", *step_of(0), *step_of(1),
        "drain 1", "publish 2", "evaluate 2", *step_of(2),
        "publish 3", "evaluate 3", "open 3-4", *step_of(3),
        "drain 1", "publish 4", "evaluate 4", *step_of(4),
        "publish 5",
    ]  # fmt: skip
    assert world.judged == {2: 2, 3: 3, 4: 4}


def test_offline_the_seed_comes_back_after_an_evaluation():
    world = World()
    world.run(Paper("never", "never", num_steps=4, offline_chunk=2), due=lambda step: step in (0, 2, 3))
    assert world.log == [
        *sync_of(0), "open 0-1", *step_of(0), *step_of(1),
        "publish 2", "evaluate 2", "publish 0", "open 2-3", *step_of(2),
        "drain 1", "publish 3", "evaluate 3", *step_of(3),
        "publish 4",
    ]  # fmt: skip
    assert world.judged == {0: 0, 2: 2, 3: 3}


def test_ahead_of_the_trainer_engines_sample_the_next_interval():
    """Both first intervals are asked for at step 0. Before a sync the engines complete what they sample from older weights; the
    last interval asks for nothing."""
    world = World()
    records = world.run(Paper(2, "follow", num_steps=5, offline_chunk=16, lookahead=1))
    assert world.log == [
        *sync_of(0), "open 0-3", *step_of(0), *step_of(1),
        "finish 2", "publish 2", "drain 2", "evaluate 2", "reference", "open 4-4", *step_of(2), *step_of(3),
        "finish 1", "publish 4", "drain 1", "evaluate 4", "reference", *step_of(4),
        *sync_of(5),
    ]  # fmt: skip
    assert world.staleness == {0: 0, 1: 1, 2: 2, 3: 3, 4: 2}
    assert ["finish_seconds" in record for record in records] == [False, False, True, False, True]


def test_a_resumed_run_that_samples_ahead_has_its_next_interval():
    world = World()
    world.run(Paper(2, "never", num_steps=6, offline_chunk=16, lookahead=1), start=2, due=lambda step: step == 3)
    assert world.log == [
        "finish 2", "publish 2", "open 4-5", *step_of(2),
        "drain 3", "publish 3", "evaluate 3", *step_of(3),
        "finish 2", "publish 4", *step_of(4), *step_of(5),
        "publish 6",
    ]  # fmt: skip
    assert world.staleness == {2: 2, 3: 3, 4: 2, 5: 3}


def test_with_updates_in_flight_a_sync_waits_for_the_next_interval_alone():
    """What is open of later ones is paused behind it, and goes on from the new weights together with what is opened then."""
    world = World()
    schedule = Paper(2, "never", num_steps=9, offline_chunk=16, lookahead=2, updates_in_flight=True)
    world.run(schedule, due=lambda step: step == 3)
    assert world.log == [
        "publish 0", "open 0-5", "pause 4-5", *step_of(0), *step_of(1),
        "finish 2", "publish 2", "open 6-7", "pause 6-7", *step_of(2),
        "drain 3", "publish 3", "evaluate 3", *step_of(3),
        "finish 2", "publish 4", "open 8-8", "pause 8-8", *step_of(4), *step_of(5),
        "finish 2", "publish 6", "go on", *step_of(6), *step_of(7),
        "finish 1", "publish 8", *step_of(8),
        "publish 9",
    ]  # fmt: skip
    assert world.windows[1] == "submitted 0-3", "a profile of engines ends behind what they complete"
    assert {step: (step - world.staleness[step], world.newest[step]) for step in range(9)} == {
        step: (schedule.versions(step)[0], schedule.versions(step)[-1]) for step in range(9)
    }
    assert [schedule.versions(step) for step in range(9)] == [(0,)] * 4 + [(0, 2)] * 2 + [(2, 4)] * 2 + [(4, 6)]


def test_a_resumed_run_goes_on_with_what_was_paused():
    world = World()
    schedule = Paper(1, "never", num_steps=5, offline_chunk=16, lookahead=3, updates_in_flight=True)
    world.run(schedule, start=2, due=lambda step: False)
    assert world.log == [
        "finish 1", "publish 2", "go on", "pause 4-4", *step_of(2),
        "finish 1", "publish 3", "go on", *step_of(3),
        "finish 1", "publish 4", *step_of(4),
        "publish 5",
    ]  # fmt: skip
    assert world.newest == {3: 2, 4: 3}


def test_engines_on_the_trainers_devices_rest_while_it_trains():
    """They complete the whole interval first; the sync wakes them."""
    world = World(colocated=True)
    records = world.run(Paper(2, "follow", num_steps=3, offline_chunk=16))
    assert world.log == [
        *sync_of(0), "open 0-1", "drain 2", "sleep", *step_of(0), *step_of(1),
        *sync_of(2), "reference", "open 2-2", "drain 1", "sleep", *step_of(2),
        *sync_of(3),
    ]  # fmt: skip
    assert ["rollout_seconds" in record for record in records] == [True, False, True]


def test_engines_that_rest_wake_for_an_evaluation_and_rest_again():
    world = World(colocated=True)
    world.run(Paper(3, "never", num_steps=4, offline_chunk=16), due=lambda step: step in (1, 4))
    assert world.log == [
        "publish 0", "open 0-2", "drain 3", "sleep", *step_of(0),
        "drain 2", "publish 1", "evaluate 1", "sleep", *step_of(1), *step_of(2),
        "publish 3", "open 3-3", "drain 1", "sleep", *step_of(3),
        *sync_of(4),
    ]  # fmt: skip


def test_offline_engines_that_rest_get_the_seed_again_for_every_chunk():
    """Not for a step within it; after a resume they have just loaded it."""
    world, resumed = World(colocated=True), World(colocated=True)
    schedule = Paper("never", "never", num_steps=4, offline_chunk=2)
    world.run(schedule, due=lambda step: step == 3)
    assert world.log == [
        "publish 0", "open 0-1", "drain 2", "sleep", *step_of(0), *step_of(1),
        "publish 0", "open 2-3", "drain 2", "sleep", *step_of(2),
        "drain 1", "publish 3", "evaluate 3", "sleep", *step_of(3),
        "publish 4",
    ]  # fmt: skip
    resumed.run(schedule, start=2, due=lambda step: False)
    assert resumed.log == ["open 2-3", "drain 2", "sleep", *step_of(2), *step_of(3), "publish 4"]


regimes = st.one_of(st.just("never"), st.integers(1, 12))
kinds = st.sampled_from([Paper, Fairseq2])


@given(regimes, st.integers(1, 30), st.integers(1, 8), st.integers(1, 9), kinds, st.booleans(), st.integers(0, 3))
def test_evaluations_judge_the_newest_weights_and_change_nothing_else(
    interval, num_steps, chunk, every, kind, turns, lookahead
):
    """Whatever s and the lookahead are, and whether or not engines rest: the steps' calls and the versions that sample are
    those of a run that evaluates nothing on devices of its own."""
    lookahead = 0 if turns or interval == "never" else lookahead
    schedule = kind(interval, "never", num_steps, chunk, lookahead)
    plain, watched = World(), World(colocated=turns)
    plain.run(schedule, due=lambda step: False)
    records = watched.run(schedule, due=lambda step: step % every == 0)
    assert watched.judged == {step: step for step in range(0, num_steps + 1, every)}
    assert watched.staleness == plain.staleness == {step: schedule.staleness(step) for step in range(num_steps)}
    unwatched = ("publish", "drain", "finish", "evaluate", "sleep")
    assert [entry for entry in watched.log if not entry.startswith(unwatched)] == [
        entry for entry in plain.log if not entry.startswith(unwatched)
    ]
    assert [record["step"] for record in records if "sync_seconds" in record] == [
        step for step in range(num_steps) if schedule.sync_due(step)
    ], "weights that are lent for an evaluation are no sync"


def test_a_regime_that_measures_syncs_by_what_the_policy_reports():
    """With a bound of 1: where the policy moves by 0.3 a step, answers may be three steps old at the end of an interval, so
    s = 4. From step 7 on it moves by 1: the interval that begins there is not cut short, and the next ones are of two steps;
    then of more again when it hardly moves. A run that goes on from a checkpoint meets the same syncs."""

    def moves(step: int) -> float:
        return 0.3 if step < 7 else 1.0 if step < 12 else 0.01

    def told(record: dict[str, float]) -> tuple[float, ...]:
        return record["step"], record["interval_steps"], record["log_prob_gap_mean"], "sync_seconds" in record

    def piloted() -> Pilot:
        return Pilot(6, "follow", num_steps=30, offline_chunk=16, bound=1.0)

    world, schedule, kept = World(), piloted(), {}
    world.pace, written = moves, world.checkpoint

    def checkpoint(step: int) -> None:
        written(step)
        if schedule.resumable(step):
            kept[step] = schedule.state()

    world.checkpoint = checkpoint  # type: ignore[method-assign]
    records = world.run(schedule)
    syncs = [record["step"] for record in records if "sync_seconds" in record]
    assert syncs == [step for step in range(30) if schedule.sync_due(step)]
    assert syncs[:4] == [0, 1, 3, 7], "1 step, 2, 4: as growth allows, and no more than twice the last"
    lengths = [record["interval_steps"] for record in records]
    assert lengths == [1, *[2] * 2, *[4] * 4, *[4] * 4, *[2] * 8, *[4] * 4, *[6] * 7]
    assert max(world.staleness.values()) <= 5
    for done, state in kept.items():
        again, going_on = World(), piloted()
        again.pace = moves
        going_on.restore(state)
        assert list(map(told, again.run(going_on, start=done))) == list(map(told, records[done:])), done
    assert len(kept) > 4


def test_a_record_comes_before_the_steps_checkpoint():
    """So that what is checkpointed has been written down: nothing of the step is done by the reader's next question."""
    world: Any = World()
    schedule = Paper(1, "never", num_steps=2, offline_chunk=16)
    steps = train(
        *(schedule, world, world, world),
        start=0,
        colocated=False,
        observe=world.observe,
        checkpoint=world.checkpoint,
        evaluation_due=lambda step: True,
        evaluate=world.evaluate,
        window=world,
    )
    next(steps)
    assert world.log[-1] == "train scored batch 0"
    next(steps)
    assert "checkpoint 1" in world.log


@given(regimes, st.integers(1, 30), st.integers(1, 8), st.integers(0, 5), st.integers(0, 3))
def test_staleness_is_the_schedules_and_never_above_its_bound(interval, num_steps, chunk, resumed_at, lookahead):
    """Measured from the versions that sampled, for any regime, lookahead and length, and from any checkpoint."""
    lookahead = 0 if interval == "never" else lookahead
    world, schedule = World(), Paper(interval, "never", num_steps, chunk, lookahead)
    width = chunk if interval == "never" else interval
    start = min(resumed_at * width, num_steps)
    if start % width:
        start = 0
    world.run(schedule, start)
    ages = {step: step if interval == "never" else lookahead * interval + step % interval for step in range(start, num_steps)}
    expected = {step: min(age, step) for step, age in ages.items()}  # the seed model is the oldest there is
    assert world.staleness == expected == {step: schedule.staleness(step) for step in range(start, num_steps)}
    bound = num_steps if interval == "never" else (lookahead + 1) * interval
    assert max(world.staleness.values(), default=0) < bound
    assert world.sampled == {}, "nothing was sampled in vain"
    assert world.serves == num_steps


def test_supervised_training_asks_for_batches_and_trains():
    world: Any = World()
    world.sampled = {0: 0, 1: 0}
    records = list(fine_tune(world, world, num_steps=2, window=world))
    assert world.windows == ["step 0", "step 1", "step 2"]
    assert world.log == ["next 0", "train batch 0", "next 1", "train batch 1"]
    assert [(record["step"], record["loss"]) for record in records] == [(0, 1.0), (1, 1.0)]
    assert all(record["train_seconds"] == record["step_seconds"] >= 0 for record in records)


def test_tokens_and_seconds_become_rates():
    other = {"step": 3, "num_tokens": 30.0, "train_seconds": 1.5, "loss": 0.5}
    generation = {"generation_seconds": 2.0, "generation_tokens": 50.0}
    rates = {"training_tokens_per_second": 20.0, "generation_tokens_per_second": 25.0}
    finished = _finished(other | generation)
    assert abs(finished.pop("unix_seconds") - time.time()) < 60
    assert finished == other | generation | rates
    waited = {"step": 3, "train_seconds": 1.5, "wait_seconds": 0.5, "finish_seconds": 0.25, "step_seconds": 3.0}
    assert _finished(waited)["trainer_idle_share"] == 0.25
    idle = _finished({"step": 0, "train_seconds": 0.0, "generation_seconds": 0.0, "generation_tokens": 0.0})
    assert idle["training_tokens_per_second"] == 0
    assert math.isnan(idle["generation_tokens_per_second"])
    assert "generation_tokens_per_second" not in _finished({"step": 0, "train_seconds": 0.0})
