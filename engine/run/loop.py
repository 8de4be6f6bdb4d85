"""The training loop, one for every regime and every algorithm. It sees protocols only: a policy, a source of batches, a
publisher, and a few things to do on the way. Every trainer rank runs it in step with the others.

Consumes: the batch of each step. Produces: one record a step, yielded as soon as the step is done. Waits for: the
rollouts of the step (`source.next`, and with sync.streaming first for groups that are complete before others, `source.early`),
before a sync for the engines to complete what they sample ahead (`source.finish`, with sync.lookahead; with sync.in_flight what
is trained next, and to pause the rest), at a sync for every engine to verify the new weights (`publisher.publish`), and where
engines and trainer share devices for the engines to sleep (`publisher.sleep`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from engine.config.schedules.base import Schedule
from engine.core.types import Batch
from engine.megatron.metrics import NUM_TOKENS
from engine.observe.profiling.phases import Phase, phase
from engine.observe.telling import activity
from engine.rollouts.metrics import GENERATED, GENERATING, WAITED
from engine.run.metrics import (
    EVALUATION_SECONDS,
    FINISH_SECONDS,
    GENERATION_TOKENS_PER_SECOND,
    ROLLOUT_SECONDS,
    SCORE_SECONDS,
    STEP,
    STEP_SECONDS,
    TRAIN_SECONDS,
    TRAINER_IDLE_SHARE,
    TRAINING_TOKENS_PER_SECOND,
    UNIX_SECONDS,
)

Record = dict[str, float]


class Policy(Protocol):
    """The model being trained."""

    def score(self, batch: Batch) -> Batch:
        """Fills in what the loss needs of the reference; done when it returns."""
        ...

    def add_gradient(self, batch: Batch) -> None:
        """Adds the gradient of a part of the step, which others follow."""
        ...

    def train_step(self, batch: Batch) -> Record:
        """One optimizer step, of all that was added and this; metrics equal on every rank."""
        ...

    def refresh_reference(self) -> None:
        """Copies the policy into the reference, or mixes it in."""
        ...

    def as_seed(self) -> AbstractContextManager[None]:
        """While entered, the weights are the seed model's; only offline, where the generator keeps them."""
        ...


class Source(Protocol):
    """Where batches come from."""

    def open(self, steps: range, until: int) -> None:
        """Lets the rollouts of `steps` be sampled from the weights that the pool now serves, behind what is paused. Engines
        complete those of all steps before `until`, and then pause what they have begun of the others."""
        ...

    def finish(self, steps: range) -> None:
        """Waits until engines have sampled the rollouts of these opened steps, which may still be judged, and have paused those
        of later ones; `next` still hands them out."""
        ...

    def drain(self, steps: range) -> None:
        """Waits until the rollouts of these opened steps are complete, and those of later ones paused; `next` still hands them
        out."""
        ...

    def early(self, step: int) -> Batch | None:
        """With sync.streaming: this rank's part of the groups that are complete next, while engines sample the rest. None where
        what is left is `next`'s, as always without."""
        ...

    def next(self, step: int) -> tuple[Batch, Record]:
        """This rank's batch, less what `early` has handed out, and on rank 0 what is known of all its rollouts."""
        ...


class Publisher(Protocol):
    """The way from the policy to the pool."""

    serves: int | None  # the version that the engines serve; None while they sleep

    def publish(self, version: int) -> Record:
        """Returns when every engine serves `version`, woken where it slept; says what it cost."""
        ...

    def sleep(self) -> None:
        """Lets the engines sleep, with nothing in flight, until the next `publish`; nothing where they do already."""
        ...


class Window(Protocol):
    """Who profiles some steps."""

    def step(self, step: int) -> None:
        """`step` begins; the number of steps in all is the end."""
        ...

    def submitted(self, steps: range) -> None:
        """The rollouts of `steps` have been asked for."""
        ...


def train(
    schedule: Schedule,
    policy: Policy,
    source: Source,
    publisher: Publisher,
    *,
    start: int,
    colocated: bool,
    observe: Callable[[Record], Record],
    checkpoint: Callable[[int], None],
    evaluation_due: Callable[[int], bool],
    evaluate: Callable[[int], None],
    window: Window,
) -> Iterator[Record]:
    """Runs steps start .. schedule.num_steps - 1 and yields a record for each.

    `colocated`: engines stand on the trainer's devices, so they finish what they were asked for and sleep before it trains.

    `observe(record)` hears of every step once it is trained and returns what more is to be written of it: a regime may decide
    there when the next sync is.

    The others are called with the number of steps done so far; `checkpoint(step)` decides for itself whether anything is
    due. A checkpoint comes before the sync of the same step. `evaluate(step)` judges the newest weights, which are in the
    pool after a sync and are published to it at any other step.
    """
    for step in range(start, schedule.num_steps):
        window.step(step)
        started = time.monotonic()
        record: Record = {STEP.name: step}
        ahead = schedule.completes(step)
        if schedule.sync_due(step):
            record |= _finish_ahead(ahead, source)
            with phase(Phase.PUBLISH):
                record |= publisher.publish(step)
        if evaluation_due(step):
            paused = time.monotonic()
            with phase(Phase.EVALUATION):
                _drain(ahead, source)
                if not schedule.sync_due(step):
                    with phase(Phase.PUBLISH):
                        publisher.publish(step)
                evaluate(step)
            record[EVALUATION_SECONDS.name] = time.monotonic() - paused
            started += record[EVALUATION_SECONDS.name]  # an evaluation is no part of a step's time
        if schedule.reference_due(step):
            policy.refresh_reference()
        steps, sampled = schedule.opens(step), schedule.samples(step)
        if sampled:
            # Offline newer weights were judged, or the engines rest.
            if steps and publisher.serves != schedule.version(steps.start):
                with policy.as_seed(), phase(Phase.PUBLISH):
                    publisher.publish(0)
            source.open(steps, sampled.stop)
            window.submitted(sampled)
        with phase(Phase.WAIT):
            if colocated:
                record |= _drain_and_sleep(steps, source, publisher)
            batch, rollouts = _next(step, source)
        before: Record = {}
        while rollouts is None:
            before = _learn(policy.add_gradient, policy, batch, before)
            with phase(Phase.WAIT):
                batch, rollouts = _next(step, source)
        record |= rollouts | _learn(policy.train_step, policy, batch, before)
        record |= observe(record)
        record[STEP_SECONDS.name] = time.monotonic() - started
        yield _finished(record)
        with phase(Phase.CHECKPOINT):
            checkpoint(step + 1)
    window.step(schedule.num_steps)
    with activity("last sync"):
        publisher.publish(schedule.num_steps)
    if evaluation_due(schedule.num_steps):
        evaluate(schedule.num_steps)


def _next(step: int, source: Source) -> tuple[Batch, Record | None]:
    """The next part of the step, and with the last part what is known of its rollouts."""
    early = source.early(step)
    return (early, None) if early is not None else source.next(step)


def _learn(learn: Callable[[Batch], Record | None], policy: Policy, batch: Batch, before: Record) -> Record:
    """Scores the batch and has the policy `learn` it; with the seconds of the step's parts `before` it."""
    started = time.monotonic()
    with phase(Phase.SCORE):
        batch = policy.score(batch)
    scored = time.monotonic()
    with phase(Phase.TRAIN):
        record = learn(batch) or {}
    took = {SCORE_SECONDS.name: scored - started, TRAIN_SECONDS.name: time.monotonic() - started}
    return record | {name: before.get(name, 0.0) + seconds for name, seconds in took.items()}


def _finish_ahead(ahead: range, source: Source) -> Record:
    """Before a sync the engines complete what they sample from older weights, or with sync.in_flight what is trained next; with
    lookahead 0 there is nothing."""
    if not ahead:
        return {}
    started = time.monotonic()
    with phase(Phase.WAIT):
        source.finish(ahead)
    return {FINISH_SECONDS.name: time.monotonic() - started}


def _drain(ahead: range, source: Source) -> None:
    """Before an evaluation nothing is sampled or judged any more, so that no rollout changes by it: those of steps opened are
    complete, or paused until the next sync, and the next ones are asked for after the sync that ends the interval, or offline
    after the seed's weights are back."""
    if ahead:
        with phase(Phase.WAIT):
            source.drain(ahead)


def _drain_and_sleep(opened: range, source: Source, publisher: Publisher) -> Record:
    """The engines complete the rollouts of the steps just opened and give their memory back."""
    started = time.monotonic()
    if opened:
        source.drain(opened)
    publisher.sleep()
    return {ROLLOUT_SECONDS.name: time.monotonic() - started} if opened else {}


def fine_tune(policy: Policy, source: Source, *, num_steps: int, window: Window) -> Iterator[Record]:
    """The supervised loop: no rollouts, no sync, no reference."""
    for step in range(num_steps):
        window.step(step)
        started = time.monotonic()
        with phase(Phase.WAIT):
            batch, known = source.next(step)
        with phase(Phase.TRAIN):
            record: Record = {STEP.name: step} | known | policy.train_step(batch)
        record["train_seconds"] = record[STEP_SECONDS.name] = time.monotonic() - started
        yield _finished(record)
    window.step(num_steps)


def _finished(record: Record) -> Record:
    """The record with its rates and the time of day."""
    record[UNIX_SECONDS.name] = time.time()
    record[TRAINING_TOKENS_PER_SECOND.name] = record.get(NUM_TOKENS.name, 0.0) / max(record[TRAIN_SECONDS.name], 1e-9)
    if GENERATING.name in record:
        seconds, tokens = record[GENERATING.name], record[GENERATED.name]
        record[GENERATION_TOKENS_PER_SECOND.name] = tokens / seconds if tokens else math.nan
    if WAITED.name in record and STEP_SECONDS.name in record:
        waited = record[WAITED.name] + record.get(FINISH_SECONDS.name, 0.0) + record.get(ROLLOUT_SECONDS.name, 0.0)
        record[TRAINER_IDLE_SHARE.name] = min(1.0, waited / max(record[STEP_SECONDS.name], 1e-9))
    return record
