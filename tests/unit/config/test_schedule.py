"""The regime as arithmetic, against the definitions of the paper's semi-online training: with s optimizer steps between
two syncs, rollouts of steps [k s, (k + 1) s) come from version k s, so staleness at step t is t - k s, at most s - 1.
"""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config.schedules.fairseq2 import Fairseq2
from engine.config.schedules.paper import Paper

intervals = st.integers(1, 40)
step_counts = st.integers(1, 200)
chunks = st.integers(1, 40)
references = st.one_of(st.sampled_from(["never", "follow"]), st.integers(1, 40))
kinds = st.sampled_from([Paper, Fairseq2])
fields = st.one_of(st.just("never"), intervals), references, step_counts, chunks
schedules = st.one_of(st.builds(Paper, *fields), st.builds(Fairseq2, *fields))
ahead = st.one_of(
    *(st.builds(kind, intervals, references, step_counts, chunks, st.integers(0, 3)) for kind in (Paper, Fairseq2))
)
in_flight = st.one_of(
    *(
        st.builds(kind, intervals, references, step_counts, chunks, st.integers(2, 4), st.just(True))
        for kind in (Paper, Fairseq2)
    )
)


@given(intervals, references, step_counts, chunks)
def test_staleness_is_the_distance_to_the_last_sync(s, reference, num_steps, chunk):
    schedule = Paper(s, reference, num_steps, chunk)
    for t in range(num_steps):
        k = t // s
        assert schedule.version(t) == k * s
        assert schedule.staleness(t) == t - k * s <= s - 1
        assert schedule.sync_due(t) == (t == k * s)


@given(references, step_counts, chunks)
def test_offline_syncs_once_and_keeps_the_seed_weights(reference, num_steps, chunk):
    schedule = Paper("never", reference, num_steps, chunk)
    assert [t for t in range(num_steps) if schedule.sync_due(t)] == [0]
    assert [schedule.version(t) for t in range(num_steps)] == [0] * num_steps
    assert [schedule.staleness(t) for t in range(num_steps)] == list(range(num_steps))


@given(intervals, references, step_counts, chunks)
def test_fairseq2_counts_steps_from_one(s, reference, num_steps, chunk):
    """Its code syncs before step n, counted from 1, when n % s == 0; and before the first step, which has no weights else."""
    schedule = Fairseq2(s, reference, num_steps, chunk)
    synced = 0
    for t in range(num_steps):
        n = t + 1
        if due := n % s == 0:
            synced = t
        assert schedule.sync_due(t) == (due or t == 0)
        assert schedule.version(t) == synced
        assert schedule.staleness(t) == t - synced <= s - 1
    syncs = [t for t in range(num_steps) if schedule.sync_due(t)]
    assert syncs[:4] == [t for t in ([0, 1, 2, 3] if s == 1 else [0, s - 1, 2 * s - 1, 3 * s - 1]) if t < num_steps]


@given(st.sampled_from([1, "never"]), references, step_counts, chunks)
def test_online_and_offline_both_counts_are_one(s, reference, num_steps, chunk):
    ours, theirs = (kind(s, reference, num_steps, chunk) for kind in (Paper, Fairseq2))
    for t in range(num_steps):
        assert ours.version(t) == theirs.version(t)
        assert ours.opens(t) == theirs.opens(t)
        assert ours.reference_due(t) == theirs.reference_due(t)


@given(schedules)
def test_the_bound_on_staleness_is_reached_and_never_passed(schedule):
    largest = max(schedule.staleness(t) for t in range(schedule.num_steps))
    if schedule.sync_interval != "never":
        assert largest < schedule.sync_interval
    if type(schedule) is Paper:
        bound = schedule.num_steps if schedule.sync_interval == "never" else min(schedule.sync_interval, schedule.num_steps)
        assert largest == bound - 1


@given(schedules, st.integers(1, 5))
def test_what_is_due_every_multiple_of_s_falls_on_syncs(schedule, times):
    """So that checkpoints stand where no rollouts are under way, and evaluations may stand with them."""
    width = schedule.offline_chunk if schedule.never_syncs else schedule.sync_interval
    assert all(schedule.opens(t) for t in range(1, schedule.num_steps) if schedule.falls_due(times * width, t))


@given(ahead)
def test_a_lookahead_is_what_a_simulation_of_it_does(schedule):
    """Step by step, as the option says it: at sync j the engines take the weights, and are then asked for interval j + L, at
    the first sync for all up to interval L. A queue of what was asked for; nothing of the class but when syncs are."""
    starts = [t for t in range(schedule.num_steps) if schedule.sync_due(t)]
    bounds = [*starts, *[schedule.num_steps] * (schedule.lookahead + 2)]
    asked: dict[int, int] = {}  # step -> version, of what was asked for and not trained on
    for t in range(schedule.num_steps):
        assert list(schedule.in_flight(t)) == list(asked)
        opened: list[int] = []
        if t in starts:
            sync = starts.index(t)
            for interval in [sync + schedule.lookahead] if sync else range(schedule.lookahead + 1):
                opened += range(bounds[interval], bounds[interval + 1])
            asked |= dict.fromkeys(opened, t)
        assert list(schedule.opens(t)) == opened
        assert schedule.resumable(t) is (t in starts)
        assert schedule.version(t) == asked[t]
        assert schedule.staleness(t) == t - asked.pop(t)
    assert asked == {}, "nothing is sampled in vain"
    assert not schedule.resumable(schedule.num_steps) and schedule.contradictions() == []
    assert list(schedule.in_flight(schedule.num_steps)) == []


@given(in_flight)
def test_updates_in_flight_are_what_a_simulation_of_them_does(schedule):
    """At sync j engines must have completed what interval j trains on, and nothing else; then they take the weights, go on with
    what they have begun of later intervals, and are asked for interval j + L. Every version that engines have between a
    step's opening and its completion is one of `versions`, and no other."""
    starts = [t for t in range(schedule.num_steps) if schedule.sync_due(t)]
    bounds = [*starts, *[schedule.num_steps] * (schedule.lookahead + 2)]
    serving: dict[int, list[int]] = {}  # step -> versions that may have sampled of it, of what is not trained on
    complete: set[int] = set()
    for t in range(schedule.num_steps):
        interval = max(i for i, start in enumerate(starts) if start <= t)
        assert list(schedule.in_flight(t)) == list(serving)
        assert set(schedule.completes(t)) == set(serving) & complete
        if t in starts:
            assert set(range(t, bounds[interval + 1])) & serving.keys() <= complete, "what is trained next is there"
            for versions in (versions for step, versions in serving.items() if step not in complete):
                versions.append(t)
            serving |= {step: [t] for step in schedule.opens(t)}
            due = {step for step in serving if step < bounds[interval + 2]} - complete
            assert set(schedule.samples(t)) == due
            complete |= due
        else:
            assert not schedule.samples(t)
        assert list(schedule.versions(t)) == serving.pop(t)
        assert schedule.version(t) == schedule.versions(t)[0] == t - schedule.staleness(t)
        plain = replace(schedule, updates_in_flight=False)
        assert (schedule.opens(t), schedule.in_flight(t)) == (plain.opens(t), plain.in_flight(t))
        assert schedule.version(t) == plain.version(t)
        assert plain.versions(t) == (plain.version(t),) and plain.completes(t) == plain.in_flight(t)
        assert plain.samples(t) == plain.opens(t)
    assert serving == {} and schedule.contradictions() == []


@given(ahead)
def test_with_a_lookahead_answers_are_an_interval_older_each(schedule):
    """Between L s and (L + 1) s - 1 steps once the first intervals are over; syncs, the reference and checkpoints stay."""
    plain, s = replace(schedule, lookahead=0), schedule.sync_interval
    for t in range(schedule.num_steps):
        assert schedule.staleness(t) < (schedule.lookahead + 1) * s
        if type(schedule) is Paper:
            assert schedule.staleness(t) == min(t, schedule.lookahead * s + t % s)
        assert (schedule.sync_due(t), schedule.reference_due(t)) == (plain.sync_due(t), plain.reference_due(t))
        assert schedule.reference_version(t) == plain.reference_version(t)
        assert schedule.checkpoint_due(s, t) == plain.checkpoint_due(s, t)


@given(schedules)
def test_what_is_in_flight_has_been_opened_and_not_trained_on(schedule):
    opened: set[int] = set()
    for t in range(schedule.num_steps):
        assert set(schedule.in_flight(t)) == opened
        opened |= set(schedule.opens(t))
        opened.discard(t)


@given(schedules)
def test_a_version_exists_when_it_is_sampled_from(schedule):
    """The weights that serve a step are those of the last sync at or before it."""
    served = None
    for t in range(schedule.num_steps):
        if schedule.sync_due(t):
            served = t
        assert schedule.version(t) == served


@given(schedules)
def test_every_step_is_opened_exactly_once_in_order_and_in_time(schedule):
    opened = []
    for t in range(schedule.num_steps):
        opened += schedule.opens(t)
        assert t in opened, "a step must be open before it trains"
    assert opened == list(range(schedule.num_steps))


@given(schedules)
def test_no_step_is_opened_before_its_own_weights_are_served(schedule):
    for t in range(schedule.num_steps):
        assert {schedule.version(opened) for opened in schedule.opens(t)} <= {schedule.version(t)}


@given(intervals, step_counts, kinds)
def test_a_following_reference_moves_with_every_sync_but_the_first(s, num_steps, kind):
    schedule = kind(s, "follow", num_steps, 1)
    moved = [t for t in range(num_steps) if schedule.reference_due(t)]
    assert moved == [t for t in range(1, num_steps) if schedule.sync_due(t)]


@given(schedules, st.integers(1, 40))
def test_a_reference_of_its_own_interval_ignores_the_syncs(schedule, every):
    own = replace(schedule, reference=every)
    shift = int(type(schedule) is Fairseq2 and schedule.sync_interval not in (1, "never"))
    due = [t for t in range(1, own.num_steps) if (t + shift) % every == 0]
    assert [t for t in range(own.num_steps) if own.reference_due(t)] == due


@pytest.mark.parametrize(("s", "reference"), [(1, "never"), (10, "never"), ("never", "never"), ("never", "follow")])
def test_a_reference_that_never_moves(s, reference):
    """Offline never syncs after step 0, so there is nothing to follow."""
    schedule = Paper(s, reference, 50, 8)
    assert not any(schedule.reference_due(t) for t in range(50))


def test_the_three_regimes_of_a_run_of_six_steps():
    """The worked example: what is read in the documentation, number by number."""
    shifted = Fairseq2(3, "follow", 9, 4)
    assert [shifted.staleness(t) for t in range(9)] == [0, 1, 0, 1, 2, 0, 1, 2, 0]
    assert [list(shifted.opens(t)) for t in range(9)] == [[0, 1], [], [2, 3, 4], [], [], [5, 6, 7], [], [], [8]]
    early = Paper(2, "follow", 6, 4, lookahead=1)
    assert [early.version(t) for t in range(6)] == [0, 0, 0, 0, 2, 2]
    assert [early.staleness(t) for t in range(6)] == [0, 1, 2, 3, 2, 3]
    assert [list(early.opens(t)) for t in range(6)] == [[0, 1, 2, 3], [], [4, 5], [], [], []]
    assert early.regime == "s = 2 (semi-online), sampled 1 interval ahead"
    online, semi, offline = (Paper(s, "follow", 6, 4) for s in (1, 3, "never"))
    assert [online.staleness(t) for t in range(6)] == [0, 0, 0, 0, 0, 0]
    assert [semi.staleness(t) for t in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [offline.staleness(t) for t in range(6)] == [0, 1, 2, 3, 4, 5]
    assert [list(semi.opens(t)) for t in range(6)] == [[0, 1, 2], [], [], [3, 4, 5], [], []]
    assert [list(offline.opens(t)) for t in range(6)] == [[0, 1, 2, 3], [], [], [], [4, 5], []]
