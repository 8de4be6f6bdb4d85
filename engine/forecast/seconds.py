"""The forecast of a run: seconds a step by part, rates, idle shares, hours and bytes, put together from sampling, training and
the replay of the loop. What binds is said in telling.py; no process is started and no device is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from engine.capacity.memory import TrainerState
from engine.config.load import RunConfig
from engine.config.schedules.base import Schedule
from engine.config.sync_rules import LEAST_LOOKAHEAD_IN_FLIGHT
from engine.core.errors import ConfigError
from engine.evaluation.accuracy import tickets
from engine.forecast import disk
from engine.forecast.clocks import Cores, Costs
from engine.forecast.constants import Constants
from engine.forecast.decoding import Deals, Engines
from engine.forecast.hosts import read_seconds
from engine.forecast.lengths import LogNormal, StepWork, Workload, draw_steps
from engine.forecast.played import Played, Sampled
from engine.forecast.replay import play, window
from engine.forecast.rows import Rows
from engine.forecast.speed import Speed, quantizing_seconds, speed_of
from engine.forecast.training import Training, TrainingStep, mean_step
from engine.models.headers import num_elements
from engine.rewards.pool.workers import num_workers
from engine.rewards.registry import check_streaming, where_judged
from engine.run.spec import Spec

Interval = int | str
MOST_REPLAYED = 12_000  # requests that are replayed, of so many engines as have them; the others are taken to be like these
LEAST_ENGINES = 2
MOST_TRAINED = 6  # different steps whose rows are laid out; further ones repeat them
SHARE_OF_CAP, SIGMA = 0.35, 0.6  # of sampling.max_tokens, the mean length of responses of which nothing is known; their spread
LEAST_PICTURED = 3  # steps of a picture
PROMPT_TOKENS = 150  # of a prompt of which nothing is known


def assumed_workload(spec: Spec) -> Workload:
    """Lengths of which nothing is known but their limits. They are a guess."""
    config = spec.config
    cap = config.sampling.max_tokens
    prompts = min(PROMPT_TOKENS, config.data.max_prompt_tokens)
    return Workload(LogNormal(SHARE_OF_CAP * cap, SIGMA, cap), LogNormal(prompts, 0.0, config.data.max_prompt_tokens))


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a forecast of one configuration takes for given."""

    spec: Spec
    constants: Constants
    workload: Workload
    transfer_seconds: float  # of a weight sync, by its plan
    gpu_bytes: int  # of a device, which a KV cache of its own size ('auto') follows
    judged: Judged | None = None  # how rewards judge; None: they are asked


@dataclass(frozen=True, slots=True)
class Forecast:
    """A run's time and bytes."""

    regime: str
    sync_interval: Interval
    lookahead: int
    in_flight: bool  # sync.in_flight
    streaming: bool  # sync.streaming
    staleness_mean: float  # optimizer steps, over the run
    staleness_max: int
    step_seconds: float
    parts: dict[str, float]  # of a step; they add up to step_seconds
    train_parts: dict[str, float]  # of its training
    trainer_waits: float  # share of the time
    engines_idle: float  # share of the time; colocated, of that in which no device works
    sampling_seconds: float  # a step, for which an engine is busy, in the mean over them
    sampled_tokens_per_second: float
    trained_tokens_per_second: float
    mfu: float  # of the trainer's devices, over the whole step
    mfu_training: float  # while they train
    gpus: int
    booked_gpus: int  # all of its nodes', where they are several
    most_concurrent: int  # requests that an engine decoded together
    most_open: int  # and that it had together, those that waited included
    preempted: int
    training: TrainingStep
    start_seconds: float  # until the first step begins
    evaluation_seconds: float | None  # each; None where the problems are not there to count
    evaluation_wait_seconds: float | None  # of an engine for the part of an evaluation that takes longest
    num_evaluations: int
    checkpoint_seconds: float  # for which the trainer stands still, each
    checkpoint_disk_seconds: float  # until it is written, beside training
    num_checkpoints: int
    longest_wait_seconds: float  # of an engine for a step's answers, which its deadline has to cover
    judging_seconds: float  # of the step whose answers take longest to judge
    ledger_bytes_per_day: float
    run_seconds: float

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs of the run."""
        return self.run_seconds * self.gpus / 3600


class Judged(NamedTuple):
    """How a run's rewards judge, by the one that waits longest."""

    together: int  # answers that it judges together: 1, those to a prompt, or 0 for all of a step
    calls: int | None  # of a user's class, which judges in one call at a time on a node; None where worker processes judge


def how_judged(spec: Spec) -> Judged:
    """How the run's rewards judge. One of the user's own that cannot be loaded here is taken for a function of one answer."""
    try:
        found = where_judged(spec.config).values()
    except ConfigError:
        return Judged(1, None)
    together = max((where.together for where in found), key=("answer", "group", "step").index)
    calls = [len(spec.nodes) if where.every_node else 1 for where in found if where.kind == "class"]
    return Judged(
        {"answer": 1, "group": spec.config.algorithm.samples_per_prompt, "step": 0}[together], min(calls, default=None)
    )


def judging_seconds(spec: Spec, constants: Constants, work: StepWork, calls: int | None) -> float:
    """Seconds for which a step's answers are judged. `calls`: as in Judged."""
    c, config = constants, spec.config
    answers = sum(map(len, work.completions))
    if spec.reward_shape is not None:
        tokens = work.num_sampled + sum(p * len(of) for p, of in zip(work.prompts, work.completions, strict=True))
        flops, judge = 2 * num_elements(spec.reward_shape) * tokens, config.reward_model
        gpus = judge.engines * judge.tensor_parallel
        return flops / (c.peak_teraflops * 1e12 * c.prefill_peak_share * gpus)
    if calls is not None:
        return answers / (c.function_per_second * calls)
    if config.data.rewards == ("math",):
        return answers / (c.verified_per_second * num_judges(spec))
    return answers / (c.function_per_second * num_judges(spec) * config.rewards.concurrency)


def num_judges(spec: Spec) -> int:
    """Worker processes of a run's one reward, on all nodes of the run, each with as many cores as this machine. Several rewards
    share them where rewards.workers is unset."""
    return sum(num_workers(spec.config.rewards, spec.threads_on(node)) for node in spec.nodes)


class Forecaster:
    """Forecasts of one configuration under several schedules: what they share is worked out once."""

    def __init__(
        self,
        given: Inputs,
        works: Many[StepWork] | None = None,
        only: int | None = None,
        trained: Many[TrainingStep] | None = None,
        deals: Deals | None = None,
        rows: Rows | None = None,
    ) -> None:
        """`works`: steps that were drawn before, of the same data and algorithm. `only`: replays that many engines. `trained`:
        the steps of a trainer of the same layout. `deals`, `rows`: of these works, dealt and laid out before."""
        self.given = given
        self._config = given.spec.config
        self._judged = given.judged or how_judged(given.spec)
        self._only = only
        self.works = works or draw_steps(self._config, given.workload, self._config.run.steps)
        self.deals = deals or Deals(self.works)  # as dealt to engines, for another forecast
        self._training = trained or self._trained(rows)
        samples = given.spec.starts_engines and given.spec.source == "rollouts"
        self._speed: Speed | None = speed_of(given.spec.shape, self._config, given.constants) if samples else None

    def _trained(self, rows: Rows | None) -> list[TrainingStep]:
        training = Training(self.given.spec, self.given.constants, rows)
        distinct = min(len(self.works), max(1, MOST_TRAINED * 256 // max(256, self._config.trainer.world_size)))
        return [training.step(work.outlines) for work in self.works[:distinct]]

    def interval(self) -> tuple[Played, range, Many[TrainingStep]]:
        """The run's loop as replayed, the steps of its last whole interval there, or a few short ones, and the optimizer steps
        by their number modulo their count; for a picture."""
        schedule = self._config.schedule.planned
        played = self.play(schedule)
        count = len(played.steps)
        begins = [step for step in range(count) if schedule.sync_due(step) or schedule.opens(step)]
        first = next((begin for begin in reversed(begins) if begin <= count - LEAST_PICTURED), begins[0])
        return played, range(first, count), self._training

    @property
    def trained(self) -> Many[TrainingStep]:
        """Optimizer steps as replayed, for another forecast with this trainer."""
        return self._training

    def forecast(self, schedule: Schedule | None = None) -> Forecast:
        """Of the run's own schedule, or of another."""
        schedule = schedule or self._config.schedule.planned
        played = self.play(schedule)
        return self._summary(schedule, played)

    def play(self, schedule: Schedule) -> Played:
        """The loop, replayed."""
        num_steps, first = window(schedule, self._config.rollouts_per_step)
        engines = self._engines(num_steps)
        played = play(schedule, num_steps, first, engines, self._costs())
        self._seen = (engines.most, engines.most_open, engines.preempted, engines.longest_wait) if engines else (0, 0, 0, 0.0)
        played.engines = tuple(Sampled(engine.stretches, engine.finished) for engine in engines.engines) if engines else ()
        return played

    @property
    def room(self) -> int:
        """Tokens that the KV cache of an engine holds."""
        cache = self.given.spec.kv_cache
        assert cache is not None
        return cache.num_bytes(self.given.gpu_bytes) // cache.token_bytes

    def _engines(self, num_steps: int) -> Engines | None:
        if self._speed is None:
            return None
        engines = self._config.inference.engines
        if self.given.constants.cores:
            return Engines(self._config, self._speed, self.room, self.works, deals=self.deals)
        most = max(LEAST_ENGINES, MOST_REPLAYED * engines // (num_steps * self._config.rollouts_per_step))
        return Engines(self._config, self._speed, self.room, self.works, min(self._only or most, most), self.deals)

    def _costs(self) -> Costs:
        c = self.given.constants
        trained = [step.seconds.total for step in self._training]
        hosts = [
            (c.sampled_megatoken_seconds * work.num_sampled + c.trained_megatoken_seconds * work.num_trained) / 1e6
            for work in self.works
        ]
        judged = [judging_seconds(self.given.spec, c, work, self._judged.calls) for work in self.works]
        colocated = self.given.spec.colocated
        rounding = quantizing_seconds(self.given.spec.shape, self._config, c)
        return Costs(
            train=lambda step: trained[step % len(trained)],
            judge=lambda step: judged[step % len(judged)],
            host=lambda step: hosts[step % len(hosts)],
            sync=self.given.transfer_seconds + c.sync_seconds + rounding if self._speed is not None else 0.0,
            turn=c.sleep_seconds + self._moving_seconds(c) if colocated else 0.0,
            colocated=colocated,
            cores=self._cores() if c.cores else None,
            streams=self._config.sync.streaming,
            together=self._judged.together,
        )

    def _moving_seconds(self, c: Constants) -> float:
        """For the optimizer's state to go to the host and come back, where it makes room for the engines."""
        spec = self.given.spec
        if self._config.optimizer.memory_while_sampling == "device":
            return 0.0
        most = max(TrainerState(spec, stage).optimizer for stage in range(spec.trainer.pp_size))
        return 2 * most / (c.host_copy_gigabytes_per_second * 1e9)

    def _cores(self) -> Cores:
        """Who computes with how many threads on the machine's cores; a rank that waits for another one takes none."""
        config, spec = self._config, self.given.spec
        step = mean_step(self._training).seconds
        busy = 1 - (step.pipeline + step.imbalance) / step.total if step.total else 1.0
        judges = config.inference.threads * config.reward_model.engines * config.reward_model.tensor_parallel
        return Cores(
            self.given.constants.cores,
            trainer=config.trainer.world_size * config.trainer.threads * busy,
            engine=config.inference.tensor_parallel * config.inference.threads,
            rewards=judges if spec.reward_shape is not None else (self._judged.calls or num_judges(spec)),
        )

    def _summary(self, schedule: Schedule, played: Played) -> Forecast:
        c, spec, config = self.given.constants, self.given.spec, self._config
        step = mean_step(self._training)
        seconds = played.step_seconds
        stale = [schedule.staleness(number) for number in range(config.run.steps)]
        sampled = sum(work.num_sampled for work in self.works) / len(self.works)
        trained = sum(work.num_trained for work in self.works) / len(self.works)
        ranks, engine_ranks = config.trainer.world_size, config.inference.engines * config.inference.tensor_parallel
        gpus = max(ranks, engine_ranks) if spec.colocated else ranks + (engine_ranks if spec.starts_engines else 0)
        gpus += spec.num_reward_gpus
        peak = c.peak_teraflops * 1e12 * ranks
        parts = {
            "rollouts": played.mean("waited") + played.mean("finish") - played.mean("judged"),
            "rewards": played.mean("judged"),
            "host": played.mean("host"),
            "training": played.mean("train"),
            "weight sync": played.mean("sync"),
        }
        idle = 1 - played.engine_seconds / played.duration
        if spec.colocated:
            idle -= played.mean("train") / seconds
        evaluation, longest = self._evaluation()
        saved, num_evaluations = disk.saving(spec, c), len(spec.evaluation_steps)
        count, written = (saved.count, saved.write_seconds) if saved is not None else (0, 0.0)
        between = config.run.steps / max(1, count) * seconds
        standing = (saved.pause_seconds if saved is not None else 0.0) + max(0.0, written - between)  # the next one waits
        start = c.start_seconds + read_seconds(spec, c.disk_gigabytes_per_second * 1e9)
        run = start + config.run.steps * seconds + count * standing + written
        run += num_evaluations * (evaluation or 0.0)
        slowed = played.mean("train") / step.seconds.total if step.seconds.total else 1.0  # by others on the same cores
        nodes = config.cluster.nodes
        return Forecast(
            regime=schedule.regime,
            sync_interval=schedule.sync_interval,
            lookahead=schedule.lookahead,
            in_flight=schedule.updates_in_flight,
            streaming=config.sync.streaming,
            staleness_mean=sum(stale) / len(stale),
            staleness_max=max(stale),
            step_seconds=seconds,
            parts=parts,
            train_parts={name: slowed * getattr(step.seconds, name) for name in TRAIN_PARTS},
            trainer_waits=(played.mean("waited") + played.mean("finish")) / seconds,
            engines_idle=max(0.0, idle) if self._speed is not None else 0.0,
            sampling_seconds=played.engine_seconds / len(played.counted),
            sampled_tokens_per_second=sampled / seconds if self._speed is not None else 0.0,
            trained_tokens_per_second=trained / seconds,
            mfu=step.model_flops / (peak * seconds),
            mfu_training=step.model_flops / (peak * played.mean("train")),
            gpus=gpus,
            booked_gpus=max(gpus, nodes * config.cluster.gpus_per_node) if nodes > 1 else gpus,
            most_concurrent=self._seen[0],
            most_open=self._seen[1],
            preempted=self._seen[2],
            training=step,
            start_seconds=start,
            evaluation_seconds=evaluation,
            evaluation_wait_seconds=longest,
            num_evaluations=num_evaluations,
            checkpoint_seconds=standing,
            checkpoint_disk_seconds=written,
            num_checkpoints=count,
            longest_wait_seconds=self._seen[3],
            judging_seconds=max(judging_seconds(spec, c, work, self._judged.calls) for work in self.works),
            ledger_bytes_per_day=sampled * c.ledger_token_bytes * 86400 / seconds if self._speed is not None else 0.0,
            run_seconds=run,
        )

    def _evaluation(self) -> tuple[float | None, float | None]:
        """Seconds of an evaluation, all held-out problems sampled at once, and of an engine's for the part of them that it is
        waited for longest. None where their number cannot be seen."""
        spec, config = self.given.spec, self._config
        if not spec.evaluation_sets:
            return 0.0, 0.0
        problems = [_problems(one.path, config.evaluation.max_problems) for one in spec.evaluation_sets]
        counts = [count for count in problems if count is not None]
        if len(counts) < len(problems):
            return None, None
        if not sum(counts):
            return 0.0, 0.0
        work, n = self.works[0], config.evaluation.samples
        lengths = [length for of in work.completions for length in of]
        prompts = [work.prompts[i % len(work.prompts)] for i in range(sum(counts))]
        answers = [tuple(lengths[(i * n + k) % len(lengths)] for k in range(n)) for i in range(len(prompts))]
        asked = tickets(range(n * len(prompts)), n, config.inference.engines, in_parts=config.data.rewards == ("math",))
        places = [slice(part[0] // n, part[-1] // n + 1) for part in asked]
        parts = [StepWork(tuple(prompts[place]), tuple(answers[place]), ()) for place in places]
        engines = Engines(config, speed_of(spec.shape, config, self.given.constants), self.room, parts, 4)
        engines.open(0.0, range(len(parts)))
        sampled = max(map(engines.sampled, range(len(parts))))
        everything = StepWork(tuple(prompts), tuple(answers), ())
        return sampled + judging_seconds(spec, self.given.constants, everything, self._judged.calls), engines.longest_wait


TRAIN_PARTS = (
    "reference",
    "again",
    "compute",
    "imbalance",
    "pipeline",
    "tensor_parallel",
    "gradients",
    "optimizer",
    "fixed",
)


def _problems(path: str, most: int | None) -> int | None:
    """Rows of a JSONL file on this machine, at most so many; `most` where the file cannot be counted."""
    file = Path(path)
    if file.suffix != ".jsonl" or not file.is_file():
        return most
    with file.open("rb") as lines:
        count = sum(bool(line.strip()) for line in lines)
    return count if most is None else min(most, count)


def scores_reference(spec: Spec) -> bool:
    """Whether a step has a pass with the reference's weights, which are then held."""
    return "reference" in spec.copies


class Regime(NamedTuple):
    """Between which weight syncs, how many intervals ahead, and what else overlaps."""

    interval: Interval
    lookahead: int = 0
    in_flight: bool = False
    streaming: bool = False

    @classmethod
    def asked(cls, config: RunConfig) -> Regime:
        """A configuration's own; the most of one that decides on its intervals."""
        sync = config.sync
        return cls(config.schedule.planned.sync_interval, sync.lookahead, sync.in_flight, sync.streaming)

    def of(self, schedule: Schedule) -> Schedule:
        """A schedule with another s and lookahead, and updates in flight or none."""
        planned = schedule.planned
        if self[:3] == (planned.sync_interval, planned.lookahead, planned.updates_in_flight):
            return planned
        changed = {"sync_interval": self.interval, "lookahead": self.lookahead, "updates_in_flight": self.in_flight}
        return replace(schedule.other, **changed)  # type: ignore[arg-type]

    def asked_of(self, config: RunConfig) -> RunConfig:
        """A configuration that asks for this regime. Checkpoints come as often as its syncs allow; without syncs a reference
        that follows them stays the seed model."""
        if self == Regime.asked(config):
            return config
        sync, every = config.sync, config.checkpoint.every
        changed = {
            "sync_interval": self.interval,
            "lookahead": self.lookahead,
            "in_flight": self.in_flight,
            "streaming": self.streaming,
            "reference": "never" if self.interval == "never" and sync.reference == "follow" else sync.reference,
        }
        if isinstance(every, int) and isinstance(self.interval, int):
            every += -every % self.interval
        checkpoint = config.checkpoint.model_copy(update={"every": every})
        return config.model_copy(update={"sync": sync.model_copy(update=changed), "checkpoint": checkpoint})


def regimes(config: RunConfig, intervals: Iterable[Interval], *, offered: bool = False) -> list[Regime]:
    """The configuration's own regime and those of several s, each without lookahead, with one interval, and with as many as
    the configuration has; where nothing can be sampled ahead, without. `offered`: and what updates in flight and streaming
    would make of them, where `train` would take that. In order."""
    own = Regime.asked(config)
    colocated = config.inference.placement == "colocated"
    found, more = {own}, set[Regime]()
    for interval in {*intervals, own.interval}:
        if isinstance(interval, str) or interval <= config.run.steps:
            ahead = (0,) if colocated or isinstance(interval, str) else (0, 1, own.lookahead)
            found |= {Regime(interval, one, own.in_flight and one >= LEAST_LOOKAHEAD_IN_FLIGHT) for one in ahead}
            if isinstance(interval, int):
                more.add(Regime(interval, LEAST_LOOKAHEAD_IN_FLIGHT, in_flight=True))
            if interval == 1:
                more.add(Regime(1, streaming=True))
    if offered:
        found |= {one for one in more - found if _is_allowed(one.asked_of(config))}
    return sorted(found, key=lambda one: (isinstance(one.interval, str), *(one if isinstance(one.interval, int) else (0, 0))))


def _is_allowed(config: RunConfig) -> bool:
    """Whether no rule on options forbids the configuration, and its rewards can do what sync.streaming asks of them. One that
    cannot be loaded here does not say that it can."""
    if config.broken_rules:
        return False
    try:
        check_streaming(config)
    except ConfigError:
        return False
    return True
