"""From prompts to training sequences: asks the pool for an interval's rollouts at once, has them scored, makes pairs or
advantages, and hands every rollout over to be written down. It trains nothing and touches no process group.

With sync.in_flight engines pause what they are not to complete yet. It is held here, and goes on at the next opening, before
what is new.

With sync.streaming groups are judged, and handed out by `early`, in waves (waves.py); without, a step is one wave.

Waiting: `open` never waits. One helper thread gathers the opened steps in order while the trainer trains, another one has each
of them scored, in order too, and a reward that judges answers one by one begins while a step is still being gathered; `next`
waits for both, and the first for the engines, whose own deadline it passes on.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from collections.abc import Sequence as Many
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from threading import Lock
from typing import TypeVar

from engine.config.load import RunConfig
from engine.core.types import Completion, Prompt, Rollout, RolloutGroup, Score
from engine.data.mixture import Mixture
from engine.inference.pool import Pool, Ticket, Usage
from engine.inference.sampling import SampleRequest
from engine.observe.profiling.phases import Phase, phase
from engine.rewards.base import Reward, answer_of
from engine.rollouts.ahead import Ahead
from engine.rollouts.base import HEARTBEAT_SECONDS, StepData, Waiting, nothing
from engine.rollouts.batch import step_data, wave_data
from engine.rollouts.metrics import ENGINES_IDLE_SHARE, JUDGED, WAITED, rollout_metrics, staleness_metrics, warn_of_endings
from engine.rollouts.paused import Pending, pending
from engine.rollouts.waves import COMPLETE_SHARES, Streamed, Wave, Waves, least_groups
from engine.rollouts.writer import RolloutWriter

Result = TypeVar("Result")


class RolloutSource:
    """The rollouts of a run, step by step."""

    def __init__(
        self,
        config: RunConfig,
        prompts: Mixture,
        pool: Pool,
        reward: Reward,
        records: RolloutWriter | None,
        end_ids: Collection[int] = (),
        ahead: Ahead | None = None,
    ) -> None:
        """`end_ids`: the tokens that end a response, which are looked for inside rollouts. `ahead`: what a checkpoint kept,
        which need not be opened again."""
        self._end_ids = end_ids
        self._config, self._prompts, self._pool, self._reward, self._records = config, prompts, pool, reward, records
        self._gathering = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._pausing = ThreadPoolExecutor(1, thread_name_prefix="pauses")  # beside what engines complete before
        self._judging = ThreadPoolExecutor(1, thread_name_prefix="rewards")  # a sync waits for engines alone (`finish`)
        self._scoring = Lock()  # held while the reward judges, or waits for something to judge
        self._closed = False
        self._arriving: dict[int, Waves] = {}  # what is to be judged, of steps that are not scored yet
        self._streamed: dict[int, Streamed] = {}
        self._sampling: dict[int, Future[tuple[list[Completion], Usage]]] = {}
        self._coming: dict[int, Future[tuple[list[RolloutGroup], Usage]]] = {}
        self._idle: dict[str, float] = {}  # what is known of the engines since the last opening
        self._held = _done(dict(ahead.paused) if ahead is not None else {})  # what engines have paused, by step
        for step, known in (ahead.steps if ahead is not None else {}).items():
            self._sampling[step], self._coming[step] = _done(([], known[1])), _done(known)

    def open(self, steps: range, until: int | None = None) -> None:
        """Submits every prompt of `steps`; they all may be sampled from now on, behind what is paused, which goes on. Engines
        complete what comes before step `until`, all where that is not said, and pause the rest. With anything paused, what
        engines were to complete before must have been waited for (`finish`)."""
        samples = self._held.result(timeout=0) | {step: pending(step, self._prompts, self._config) for step in steps}
        completed = [step for step in samples if until is None or step < until]
        if (idle := self._pool.idle_share()) is not None:
            self._idle = {ENGINES_IDLE_SHARE.name: idle}
        batches = [of_step.unfinished for of_step in samples.values()]
        tickets, paused = self._pool.submit_and_pause(batches, len(completed))
        for step, ticket in zip(completed, tickets, strict=True):
            own = samples.pop(step)
            size, shares = len(own.parts) // len(own.prompts), COMPLETE_SHARES if self._config.sync.streaming else ()
            waves = self._arriving[step] = Waves(len(own.prompts), size, shares, least_groups(self._config))
            streamed = self._streamed[step] = Streamed()
            here: dict[int, Completion] = {}
            sampling = self._sampling[step] = self._gathering.submit(self._completions, ticket, own, waves, here, streamed)
            self._coming[step] = self._judging.submit(self._groups, step, own.prompts, sampling, waves, here, streamed)
        self._held = self._pausing.submit(self._paused, paused, samples) if paused is not None else _done({})

    def finish(self, step: int, waiting: Waiting = nothing) -> None:
        """Waits until engines have sampled the step, which may still be judged, and have paused what they are to pause."""
        _awaited(self._sampling[step], waiting)
        _awaited(self._held, waiting)

    def drain(self, step: int, waiting: Waiting = nothing) -> None:
        """Waits as `next` does, which still hands the step out, and until engines have paused what they are to pause."""
        _awaited(self._coming[step], waiting)
        _awaited(self._held, waiting)

    def ahead(self, steps: range) -> Ahead:
        """What stands ready for these steps, all that engines complete of which are drained, and what is paused of them."""
        ready = {step: self._coming[step].result(timeout=0) for step in steps if step in self._coming}
        held = self._held.result(timeout=0)
        paused = {step: held[step] for step in steps if step not in ready}
        return Ahead(ready, paused, self._config.log_prob_temperature)

    def early(self, step: int, waiting: Waiting = nothing) -> StepData | None:
        """The next wave of `step` with anything to train on; waits until it is scored. None where the rest is for `next`, which
        raises what an engine or the reward raised."""
        streamed = self._streamed[step]
        while (groups := streamed.next(waiting)) is not None:
            self._check_versions(step, groups)
            data = wave_data(groups, self._config)
            if data.sequences:
                streamed.take(groups, data)
                return data
        return None

    def next(self, step: int, waiting: Waiting = nothing) -> StepData:
        """Waits until the groups of `step` are complete and scored. Raises what an engine or the reward raised."""
        started = time.monotonic()
        streamed = self._streamed.pop(step, Streamed())
        streamed.trained()
        _awaited(self._sampling.pop(step), waiting)
        sampled = time.monotonic()
        with phase(Phase.REWARDS):
            groups, usage = _awaited(self._coming.pop(step), waiting)
        self._arriving.pop(step, None)  # steps that a checkpoint kept never arrived
        now = time.monotonic()
        timed = {WAITED.name: streamed.waited_seconds + now - started, JUDGED.name: streamed.judged_seconds + now - sampled}
        metrics = timed | rollout_metrics(groups, usage, self._end_ids) | self._idle
        self._idle = {}
        warn_of_endings(metrics, self._config.sampling.max_tokens)
        self._check_versions(step, groups)
        metrics |= staleness_metrics(groups)
        data = step_data(groups, self._prompts.shares, metrics, self._config)
        if self._config.sync.streaming:
            rest = wave_data(streamed.rest(groups), self._config)
            data = replace(rest, metrics=data.metrics | streamed.metrics(rest))
        if self._records is not None:
            self._records.append(step, groups)
        return data

    def close(self) -> None:
        """Stops the helper threads; what was under way is dropped. When it returns nothing judges any more, so that the reward
        may be closed; engines are not waited for."""
        self._closed = True
        for thread in (self._gathering, self._pausing, self._judging):
            thread.shutdown(wait=False, cancel_futures=True)
        for waves in self._arriving.values():
            waves.abandon()
        with self._scoring:  # whoever judged has stopped
            pass

    def _check_versions(self, step: int, groups: Many[RolloutGroup]) -> None:
        """That the weights which sampled the step's tokens are those that the schedule says, in their order."""
        allowed = self._config.schedule.versions(step)
        spans = [[version for version, _ in r.completion.by_version] for group in groups for r in group.rollouts]
        found = {version for versions in spans for version in versions}
        wanted = " or ".join(map(str, allowed))
        assert found <= set(allowed), f"step {step} must train on rollouts of version {wanted}, found {found}"
        assert all(versions == sorted(versions) for versions in spans), f"step {step}: versions must rise, found {spans}"

    def _completions(
        self, ticket: Ticket, samples: Pending, waves: Waves, here: dict[int, Completion], streamed: Streamed
    ) -> tuple[list[Completion], Usage]:
        """What engines complete, behind what was complete when they last paused; each is put into `here`, and among the waves'
        answers, when it arrives."""
        size = len(samples.parts) // len(samples.prompts)

        def arrived(completions: dict[int, Completion]) -> None:
            here.update(completions)
            waves.put(
                {
                    place: answer_of(samples.prompts[place // size], one, place // size, size)
                    for place, one in completions.items()
                }
            )

        unfinished = [place for place, part in enumerate(samples.parts) if isinstance(part, SampleRequest)]
        with waves:
            arrived({place: part for place, part in enumerate(samples.parts) if isinstance(part, Completion)})
            found, usage = self._pool.gather(
                ticket, lambda ended: arrived({unfinished[i]: one for i, one in ended.items()}), waves.turn
            )
            streamed.sampled_at = time.monotonic()
        before = sum(len(part.token_ids) for part in samples.parts if isinstance(part, Completion))  # complete when paused
        completions = [part for part in samples.with_found(found).parts if isinstance(part, Completion)]
        return completions, replace(usage, num_tokens=usage.num_tokens + before)

    def _paused(self, ticket: Ticket, samples: dict[int, Pending]) -> dict[int, Pending]:
        found = iter(self._pool.paused(ticket, lambda: self._closed))
        return {step: of_step.with_found(found) for step, of_step in samples.items()}

    def _groups(
        self,
        step: int,
        prompts: Many[Prompt],
        sampling: Future[tuple[list[Completion], Usage]],
        waves: Waves,
        here: dict[int, Completion],
        streamed: Streamed,
    ) -> tuple[list[RolloutGroup], Usage]:
        """A step's groups in the order of its prompts; those of waves before the last are put into `streamed` on the way."""
        groups: dict[int, RolloutGroup] = {}
        with self._scoring:
            try:
                if self._closed:
                    raise CancelledError
                for wave in waves:
                    if wave.is_last:
                        streamed.judged.put(None)
                    scores = self._reward.score_as_they_arrive(wave.answers)
                    judged = self._wave_groups(step, prompts, wave, here, scores)
                    groups |= zip(wave.groups, judged, strict=True)
                    if not wave.is_last:
                        streamed.judged.put(judged)
            except CancelledError:
                if not self._closed:
                    sampling.result()  # raises what the engines raised
                raise
            finally:
                streamed.judged.put(None)
        _, usage = sampling.result()
        return [groups[number] for number in sorted(groups)], usage

    def _wave_groups(
        self, step: int, prompts: Many[Prompt], wave: Wave, here: dict[int, Completion], scores: Many[Score]
    ) -> list[RolloutGroup]:
        size = self._config.algorithm.samples_per_prompt
        completions = [here[number * size + i] for number in wave.groups for i in range(size)]
        groups = groups_of(step, [prompts[number] for number in wave.groups], completions, scores)
        return [replace(group, wave=wave.number) for group in groups] if self._config.sync.streaming else groups


def _done(result: Result) -> Future[Result]:
    future: Future[Result] = Future()
    future.set_result(result)
    return future


def _awaited(future: Future[Result], waiting: Waiting) -> Result:
    """Its result; `waiting` is called every HEARTBEAT_SECONDS meanwhile. Engines and rewards have deadlines of their own."""
    while not wait([future], HEARTBEAT_SECONDS).done:
        waiting()
    return future.result()


def groups_of(step: int, prompts: Many[Prompt], completions: Many[Completion], scores: Many[Score]) -> list[RolloutGroup]:
    """Groups of consecutive completions (equally many a prompt, in prompt order) with their rewards."""
    size = len(completions) // len(prompts)
    rollouts = [Rollout(completion, score) for completion, score in zip(completions, scores, strict=True)]
    return [
        RolloutGroup(prompt, step, tuple(rollouts[place * size : (place + 1) * size])) for place, prompt in enumerate(prompts)
    ]
