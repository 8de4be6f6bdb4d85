"""A replay of the training loop (run/loop.py) for any schedule: what the trainer, the engines and the rewards do when, step by
step, from the seconds that each part takes. Nothing is started; a clock goes on.
"""

from __future__ import annotations

from engine.config.schedules.base import Schedule
from engine.forecast.clocks import Apart, Clock, Costs, Sampling, Together
from engine.forecast.played import Played, Span, StepTimes

MOST_REQUESTS = 150_000  # of the intervals that are replayed, where one alone has no more
LEAST_STEPS = 20  # that count, where that is not too many requests
MOST_INTERVALS = 100


def window(schedule: Schedule, requests_per_step: int) -> tuple[int, int]:
    """(how many steps are replayed, the first that counts): whole intervals. Where a schedule opens intervals ahead, the first
    ones are not counted, since engines have a head start in them."""
    opened = schedule.opens(0)
    openings = [0]
    for step in range(1, schedule.num_steps):
        if schedule.opens(step) or (opened.stop > step and schedule.sync_due(step)):
            openings.append(step)
        if len(openings) > MOST_INTERVALS:
            break
    ahead = sum(0 < step < opened.stop for step in openings)
    skipped = min(2 * ahead, len(openings) - 1)
    ends = [*openings[1:], schedule.num_steps]
    last = skipped
    while (
        last + 1 < len(openings)
        and ends[last] - openings[skipped] < LEAST_STEPS
        and ends[last] * requests_per_step < MOST_REQUESTS
    ):
        last += 1
    return ends[last], openings[skipped]


def play(schedule: Schedule, num_steps: int, first: int, engines: Sampling | None, costs: Costs) -> Played:
    """Steps 0 to num_steps - 1 of a run, of which those from `first` on count. Without engines batches come from disk."""
    played = Played(first=first)
    clock: Clock
    if engines is None:
        clock = Clock(played.spans, costs)
    elif costs.cores is None:
        clock = Apart(played.spans, engines, costs)
    else:
        clock = Together(played.spans, engines, costs, costs.cores)
    busy_before = 0.0
    for step in range(num_steps):
        start = clock.now
        if step == first and engines is not None:
            engines.catch_up(start)
            busy_before = engines.busy_seconds
        finish = sync = waited = judged = train = 0.0
        share = 1.0  # of the step, that is left to train on
        if engines is not None and schedule.sync_due(step):
            ahead = schedule.in_flight(step)
            due = range(ahead.start, min(ahead.stop, _next_sync(schedule, step))) if schedule.updates_in_flight else ahead
            finish = clock.wait_sampled(due)
            if len(due) < len(ahead):
                engines.pause(clock.now, clock.now + costs.sync)
            sync = costs.sync
            played.spans.append(Span("sync", f"version {step}", clock.now, clock.now + sync))
            clock.now += sync
        if engines is not None:
            opened = schedule.opens(step)
            if schedule.updates_in_flight and schedule.sync_due(step):
                after = _next_sync(schedule, step)
                engines.aim(range(after if step else 0, _next_sync(schedule, after)))
            if opened:
                clock.open(opened)
            while costs.streams:
                wave = clock.wait_wave(step)
                waited += wave.waited
                if not wave.is_early:
                    break
                train += clock.train(step, wave.share)
                share -= wave.share
            more, judged = clock.wait_scored(step, opened if costs.colocated else range(0))
            waited += more
            if costs.colocated and opened:
                sync += costs.turn
                clock.now += costs.turn
        host = clock.work(costs.host(step), 1.0)
        train += clock.train(step, share)
        played.steps.append(StepTimes(start, sync, finish, waited, judged, host, train))
    if engines is not None:
        engines.catch_up(clock.now)
        played.engine_seconds = engines.busy_seconds - busy_before
    return played


def _next_sync(schedule: Schedule, step: int) -> int:
    """The step before which the next sync after that of `step` is."""
    return next((later for later in range(step + 1, schedule.num_steps) if schedule.sync_due(later)), schedule.num_steps)
