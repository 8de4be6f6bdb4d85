"""The loop, replayed with engines that take what they are told: waits, overlap and turns by hand."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from engine.config.schedules.base import Schedule
from engine.config.schedules.paper import Paper
from engine.forecast.batching import Engine, Request
from engine.forecast.clocks import Cores, Costs
from engine.forecast.decoding import Engines
from engine.forecast.lengths import StepWork
from engine.forecast.replay import play, window
from engine.forecast.seconds import Regime
from engine.forecast.speed import Speed
from tests import builders
from tools.bench_streaming import CASES, COSTS, cut, drawn
from tools.scale_balance import PROMPT


@dataclass
class Steady:
    """Engines that sample a step's responses in `seconds`, one step after another."""

    seconds: float
    free: float = 0.0
    ready: dict[int, float] = field(default_factory=dict)
    busy_seconds: float = 0.0

    def open(self, now: float, steps: range) -> None:
        self.free = max(self.free, now)
        for step in steps:
            self.free += self.seconds
            self.ready[step] = self.free
            self.busy_seconds += self.seconds

    def sampled(self, step: int) -> float:
        return self.ready[step]

    def handed_over(self, step: int) -> list[tuple[float, float]]:
        """Half of them after half of the time, the others at the end."""
        return [(self.ready[step] - self.seconds / 2, 0.5), (self.ready[step], 0.5)]

    def waves(self, step: int) -> list[tuple[float, float]]:
        """The same halves."""
        return self.handed_over(step)

    def catch_up(self, now: float, slow: float = 1.0) -> None:
        pass

    def pause(self, now: float, until: float) -> None:
        self.free += until - now
        self.ready = {step: ready + (until - now if ready > now else 0.0) for step, ready in self.ready.items()}

    def aim(self, steps: range) -> None:
        pass

    @property
    def num_working(self) -> int:
        raise NotImplementedError

    def lacks(self, step: int) -> bool:
        raise NotImplementedError


def costs(train: float, *, judge: float = 0.0, host: float = 0.0, sync: float = 0.0, **more: object) -> Costs:
    return Costs(lambda step: train, lambda step: judge, lambda step: host, sync, **more)  # type: ignore[arg-type]


def test_online_nothing_overlaps():
    schedule = Paper(1, "never", 4, 16)
    played = play(schedule, 4, 0, Steady(3.0), costs(2.0, judge=0.5, host=0.25, sync=1.0))
    assert played.step_seconds == 1 + 3 + 0.5 + 0.25 + 2
    assert [(s.sync, s.waited, s.judged, s.host, s.train) for s in played.steps] == [(1.0, 3.5, 0.5, 0.25, 2.0)] * 4
    assert played.engine_seconds == 12.0


def test_semi_online_engines_sample_while_the_trainer_trains():
    """Steps of 3 s to sample and 2 s to train, s = 4: wait 3, then 1 each: 3 + 3 * 3 + 2 = 14 s for four."""
    played = play(Paper(4, "never", 8, 16), 8, 0, Steady(3.0), costs(2.0))
    assert played.step_seconds == 14 / 4
    assert [step.waited for step in played.steps] == [3, 1, 1, 1] * 2
    faster = play(Paper(4, "never", 8, 16), 8, 0, Steady(1.0), costs(2.0))
    assert faster.step_seconds == (1 + 4 * 2) / 4


def test_rewards_are_given_in_order_by_one_thread():
    """Two steps sampled at 1 and 2, each judged in 3: done at 4 and 7."""
    played = play(Paper(2, "never", 2, 16), 2, 0, Steady(1.0), costs(0.5, judge=3.0))
    assert [step.end for step in played.steps] == [4.5, 7.5]


@pytest.mark.parametrize(("judge", "left"), [(0.5, 0.25), (3.0, 1.5), (4.0, 2.5)])
def test_one_by_one_the_first_answers_are_judged_while_the_last_are_sampled(judge, left):
    """Half of a step's answers are there after 1.5 s of 3, so that so much of the judging is left at the end."""
    played = play(Paper(1, "never", 2, 16), 2, 0, Steady(3.0), costs(2.0, judge=judge, together=1))
    assert [(s.waited, s.judged) for s in played.steps] == [(3.0 + left, left)] * 2


@pytest.mark.parametrize(("judge", "seconds"), [(0.0, 4.0), (0.5, 4.25), (4.0, 6.5)])
def test_streaming_half_of_a_step_is_trained_on_while_the_other_half_is_sampled(judge, seconds):
    """Halves at 1.5 and 3 s, judged in half of the judging each, trained on in 1 s each: the first by 2.5 s at the soonest."""
    played = play(Paper(1, "never", 3, 16), 3, 0, Steady(3.0), costs(2.0, judge=judge, streams=True))
    assert [step.seconds for step in played.steps] == pytest.approx([seconds] * 3)
    assert [step.train for step in played.steps] == [2.0] * 3
    assert play(Paper(1, "never", 3, 16), 3, 0, Steady(3.0), costs(2.0)).step_seconds == 5.0


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[4], CASES[8]], ids=str)
def test_streaming_is_worth_what_the_arithmetic_of_the_waves_says(case):
    """tools/bench_streaming.py knows lengths and a clock alone, in which a decoding step takes as long whatever it decodes."""
    draw, num_steps, size = random.Random(5), 5, case.size
    steps = [drawn(case, draw) for _ in range(num_steps)]
    prompts = (PROMPT,) * case.num_prompts
    works = [StepWork(prompts, tuple(tuple(s[i : i + size]) for i in range(0, len(s), size)), ()) for s in steps]
    longest = [max(lengths) for lengths in steps]
    for cost in COSTS:
        expected = sum(most * cut(lengths, case).step_time(cost) for most, lengths in zip(longest, steps, strict=True))
        made = builders.config(
            data={"prompts_per_step": case.num_prompts},
            algorithm={"samples_per_prompt": size, "loss": "grpo"},
            inference={"engines": case.num_engines, "max_concurrent": 1000},
            sync={"streaming": True},
        )
        engines = Engines(made, SECOND, 10**9, works)
        trains = [cost * most for most in longest]
        taken = Costs(trains.__getitem__, lambda step: 0.0, lambda step: 0.0, 0.0, streams=True)
        played = play(Paper(1, "never", num_steps, 16), num_steps, 0, engines, taken)
        assert played.duration == pytest.approx(expected, rel=0.005)


def test_on_shared_cores_streaming_hides_no_more_than_cores_are_left():
    """Two threads of work for two cores overlap as on devices of their own; on one core nothing is gained."""
    found = {}
    for cores in (1.0, 2.0):
        for streams in (False, True):
            made = builders.config(
                data={"prompts_per_step": 4},
                algorithm={"samples_per_prompt": 2, "loss": "grpo"},
                sync={"streaming": streams},
            )
            works = [StepWork((1,) * 4, ((2, 3), (4, 5), (6, 20), (7, 40)), ())]
            shared = Cores(cores, trainer=1.0, engine=1.0, rewards=0.0)
            taken = costs(10.0, cores=shared, streams=streams)
            found[cores, streams] = play(
                Paper(1, "never", 3, 16), 3, 0, Engines(made, SECOND, 10**9, works), taken
            ).step_seconds
    assert found[2.0, False] == pytest.approx(50, rel=0.02) and found[2.0, True] < 47
    assert found[1.0, True] == pytest.approx(found[1.0, False], rel=0.03)


def test_groups_are_judged_once_they_are_complete():
    """Half of a step's answers are there after 1.5 s of 3, and of its groups of four a sixteenth."""
    played = play(Paper(1, "never", 2, 16), 2, 0, Steady(3.0), costs(2.0, judge=1.6, together=4))
    assert [s.waited for s in played.steps] == pytest.approx([4.5] * 2)
    assert [s.judged for s in played.steps] == pytest.approx([1.5] * 2)


def test_who_takes_turns_waits_for_the_whole_interval():
    played = play(Paper(2, "never", 2, 16), 2, 0, Steady(3.0), costs(2.0, turn=0.5, colocated=True))
    assert played.steps[-1].end == 3 * 2 + 2 * 2 + 0.5


def test_offline_chunks_follow_each_other_without_a_sync():
    played = play(Paper("never", "never", 4, 2), 4, 0, Steady(1.0), costs(0.5, sync=9.0))
    assert [step.sync for step in played.steps] == [9.0, 0, 0, 0]
    assert [step.waited for step in played.steps] == [1, 0.5, 1, 0.5]


@pytest.mark.parametrize("interval", [1, 3, 10, "never"])
@pytest.mark.parametrize("train", [0.1, 1.0, 5.0])
def test_parts_add_up_and_nothing_is_faster_than_its_parts(interval, train):
    played = play(Paper(interval, "never", 30, 10), 30, 0, Steady(0.7), costs(train, judge=0.1, sync=0.2))
    assert played.steps[-1].end == pytest.approx(sum(step.seconds for step in played.steps))
    assert played.duration >= max(30 * train, 30 * 0.7)


def test_a_larger_interval_is_never_slower():
    found = [play(Paper(s, "never", 40, 10), 40, 0, Steady(0.7), costs(0.5, sync=0.2)).duration for s in (1, 2, 4, 8, 20)]
    assert found == sorted(found, reverse=True)


@dataclass(frozen=True)
class Ahead(Schedule):
    """Opens an interval of 4 before the one that it belongs to is trained."""

    def sync_due(self, step: int) -> bool:
        return step % 4 == 0

    def opens(self, step: int) -> range:
        if step == 0:
            return range(8)
        return range(min(step + 4, self.num_steps), min(step + 8, self.num_steps)) if step % 4 == 0 else range(0)

    def in_flight(self, step: int) -> range:
        return range(step, min(step + 4, self.num_steps)) if step and step % 4 == 0 else range(0)


def test_a_schedule_that_samples_ahead_overlaps_everything():
    """Sampling 3 s and training 2 s a step: a step takes 3 s, where the strict schedule takes 3.5."""
    schedule = Ahead(4, "never", 80, 16)
    num_steps, first = window(schedule, 10)
    assert first >= 4, "the head start does not count"
    played = play(schedule, num_steps, first, Steady(3.0), costs(2.0))
    assert played.step_seconds == pytest.approx(3.0)


def test_windows_are_whole_intervals():
    assert window(Paper(10, "never", 4000, 16), 512) == (20, 0)
    assert window(Paper(100, "never", 4000, 16), 512) == (100, 0)
    assert window(Paper(1, "never", 5, 16), 512) == (5, 0)
    assert window(Paper(100, "never", 4000, 16), 65_536) == (100, 0), "an interval is not cut"
    assert window(Paper("never", "never", 4000, 16), 512) == (32, 0)


# -- new weights while responses are under way

SECOND = Speed(1.0, 0, 0, 0, 0, 0)


def two_intervals_ahead(*, in_flight: bool) -> list[float]:
    """Seconds of steps of 1 s to train with s = 1, L = 2, while a step's one response takes 8 iterations of 0.5 s."""
    engines = one_engine([8], slots=3)
    played = play(Paper(1, "never", 12, 16, 2, in_flight), 12, 0, engines, costs(1.0))
    return [step.end - step.start for step in played.steps]


def one_engine(lengths: list[int], slots: int, *, num_engines: int = 1, second: float = 0.5) -> Engines:
    """Engines of `second` s an iteration, whose steps have a prompt with a response of each length."""
    work = StepWork((1,) * len(lengths), tuple((length,) for length in lengths), ())
    config = builders.config(inference={"engines": num_engines, "max_concurrent": slots})
    return Engines(config, Speed(second, 0, 0, 0, 0, 0), 1000, [work])


def test_a_sync_in_flight_waits_for_the_interval_that_is_due_alone():
    """Without, every sync waits until all that is under way is sampled, a whole response: 4 s a step. In flight two responses
    are begun side by side; engines rest once the due one is complete. Equal ones get complete in pairs: 4 s for the first of
    a pair, 1 s, which is training alone, for the other."""
    whole, flying = two_intervals_ahead(in_flight=False), two_intervals_ahead(in_flight=True)
    assert whole[2:10] == [4.0] * 8
    assert sorted(flying[2:10]) == [1.0] * 4 + [4.0] * 4


def test_an_engine_rests_once_it_has_what_is_due():
    """Of two responses of 3 and 9 iterations, aimed at the first: it stops after 3, and goes on with the other one then."""
    engine = Engine(SECOND, slots=2, room=100, aim=range(1))
    engine.submit(0.0, [Request(0, (0, 0), 1, 3), Request(1, (1, 0), 1, 9)])
    engine.submit(20.0, [])
    assert (engine.done(0, 0.0), engine.works, engine.busy) == (3.0, False, 3.0)
    engine.pause(21.0)
    engine.aim = range(1, 2)
    assert engine.done(1, 0.0) == 21 + 6 and engine.busy == 9


def test_no_engine_rests_before_the_last_has_what_is_due():
    """Two engines with two responses each, of 2 and 9 and of 6 and 9 iterations; the first ones are due. Both have decoded 6
    when the longest is in, at 6, and go on at 10 with 3 left of each."""
    engines = one_engine([1], slots=2, num_engines=2, second=1.0)
    for engine, first in zip(engines.engines, (2, 6), strict=True):
        engine.submit(0.0, [Request(0, (0, 0), 1, first), Request(1, (1, 0), 1, 9)])
    engines.aim(range(1))
    assert [engine.done(0, 0.0) for engine in engines.engines] == [2.0, 6.0]
    engines.pause(8.0, 10.0)
    assert [engine.busy for engine in engines.engines] == [6.0, 6.0]
    engines.aim(range(1, 2))
    assert [engine.done(1, 0.0) for engine in engines.engines] == [13.0, 13.0]


def test_what_is_paused_keeps_its_tokens_and_computes_its_prefix_again():
    """A prompt of 4 tokens of 0.25 s each, 1 s an iteration: 3 of 5 tokens at 4, a pause until 10, then 7 tokens of prefix."""
    engine = Engine(Speed(1.0, 0, 0, 0, 0, prompt=0.25), slots=2, room=100)
    engine.submit(0.0, [Request(0, (0, 0), 4, 5)])
    engine.submit(4.0, [])
    engine.pause(10.0)
    assert engine.done(0, 0.0) == 10 + 7 * 0.25 + 2 and engine.preempted == 0


# -- cores that all compute on


def sharing(cores: float, **more: float) -> Costs:
    return costs(1.0, cores=Cores(cores, trainer=1.0, engine=1.0, rewards=1.0), **more)


def test_with_cores_for_all_nothing_is_slower():
    """Two engines, a trainer, rewards: four cores are as good as devices of their own, to a slice of the replay."""
    schedule = Paper(4, "never", 8, 16)
    apart = play(schedule, 8, 0, one_engine([3, 5], 8, num_engines=2), costs(1.0, judge=0.3)).duration
    together = play(schedule, 8, 0, one_engine([3, 5], 8, num_engines=2), sharing(4.0, judge=0.3)).duration
    assert together == pytest.approx(apart, rel=0.03)


def test_on_one_core_everything_follows_everything():
    """A trainer of 1 s a step and an engine that is busy 1.5 s a step, never two at once: 2.5 s a step, whatever overlaps."""
    played = play(Paper(4, "never", 8, 16), 8, 0, one_engine([3], 1), sharing(1.0))
    assert played.step_seconds == pytest.approx(2.5, rel=0.05)
    lookahead = play(Paper(1, "never", 8, 16, 1), 8, 0, one_engine([3], 1), sharing(1.0))
    assert lookahead.step_seconds == pytest.approx(2.5, rel=0.2), "the first interval is sampled before any step"


def test_two_engines_on_one_core_take_twice_as_long():
    one = play(Paper(1, "never", 4, 16), 4, 0, one_engine([4, 4], 8, num_engines=2), sharing(1.0))
    assert one.mean("waited") == pytest.approx(2 * 4 * 0.5, rel=0.05)


def test_rewards_take_their_core_too():
    """Online nothing overlaps: 0.5 s to judge beside nobody; with s = 2 the second step's are judged while the first trains."""
    online = play(Paper(1, "never", 4, 16), 4, 0, one_engine([2], 8), sharing(1.0, judge=0.5))
    assert online.mean("judged") == pytest.approx(0.5, rel=0.05)
    pair = play(Paper(2, "never", 2, 16), 2, 0, one_engine([2], 8), sharing(1.0, judge=0.5))
    assert pair.duration == pytest.approx(2 * (1 + 0.5) + 1, rel=0.05), "both steps' answers come in 1 s of one batch"


def test_rewards_judge_one_by_one_on_a_core_of_their_own_while_others_are_sampled():
    """Requests of 2, 4, 6 and 8 iterations of 0.5 s: two are handed over at 2 s, one at 3 and one at 4. Of 2 s of judging half
    is done at 3, a quarter at 3.5 and the last, from 4 on, at 4.5; and the same on devices apart."""
    for cores in (Cores(4.0, trainer=1.0, engine=1.0, rewards=1.0), None):
        step = costs(1.0, judge=2.0, together=1, cores=cores)
        played = play(Paper(1, "never", 2, 16), 2, 0, one_engine([2, 4, 6, 8], 8), step)
        assert played.mean("judged") == pytest.approx(0.5, rel=0.1)
        assert played.mean("waited") == pytest.approx(4.5, rel=0.02)


def test_a_step_of_which_no_engine_that_is_replayed_has_a_part_is_judged_whole(monkeypatch):
    """Fewer responses than engines, and not all engines are replayed."""
    engines = one_engine([4], slots=1)
    monkeypatch.setattr(engines, "handed_over", lambda step: [])
    played = play(Paper(1, "never", 2, 16), 2, 0, engines, costs(1.0, judge=0.5, together=1))
    assert [step.judged for step in played.steps] == [0.5, 0.5]


def test_another_regime_of_a_run_has_updates_in_flight_where_it_says_so():
    """As in the plan's table of intervals."""
    asked = Paper(10, "never", 100, 16, 2, True)
    found = [Regime(5, ahead, in_flight).of(asked) for ahead, in_flight in ((0, False), (1, False), (2, True), (3, False))]
    assert [(one.lookahead, one.updates_in_flight) for one in found] == [(0, False), (1, False), (2, True), (3, False)]
    assert Regime(10, 2, in_flight=True).of(asked) is asked
    for one in found:
        play(one, 40, 0, one_engine([8], slots=3), costs(1.0))


def test_in_turns_only_what_is_judged_after_the_intervals_last_response_is_a_wait_for_rewards():
    """Four steps sampled by 3, 6, 9 and 12 s; nobody trains before 12, and the last one's rewards take half a second more."""
    played = play(Paper(4, "never", 4, 16), 4, 0, Steady(3.0), costs(2.0, judge=0.5, colocated=True))
    assert [step.waited for step in played.steps] == [12.5, 0, 0, 0]
    assert [step.judged for step in played.steps] == [0.5, 0, 0, 0]
