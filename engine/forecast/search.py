"""Which split of so many GPUs is fastest: trainer and engines, their parallelism, slots and microbatches, apart or taking
turns. Every layout that memory, placement and the KV cache allow is estimated from two tables, one of the trainer's layouts and
one of the engines'; the best are then forecast in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from typing import Any, Literal

from engine.capacity.kv_cache import GIB, item_bytes
from engine.capacity.memory import STAGING_BUCKETS, Channel, estimate
from engine.capacity.transfer import Machine
from engine.config.load import RunConfig, override
from engine.config.options import Trainer
from engine.core.errors import ConfigError, combined
from engine.forecast.clocks import complete, judged_at
from engine.forecast.constants import Constants
from engine.forecast.deadlines import missed
from engine.forecast.decoding import Deals, Engines
from engine.forecast.disk import saving
from engine.forecast.lengths import Workload, draw_steps
from engine.forecast.rows import Rows
from engine.forecast.seconds import Forecast, Forecaster, Inputs, Regime, judging_seconds, num_judged_together, scores_reference
from engine.forecast.speed import Speed, speed_of
from engine.forecast.training import Training, TrainingStep, mean_step
from engine.models.checks import check_engine_layout, check_layout
from engine.models.headers import num_elements
from engine.models.sharding import engine_layout, trainer_layout
from engine.run.spec import Spec, assemble

FREE_SHARE = 0.05  # of a GPU, for what the memory estimate does not see
FEW_ENGINES = 4  # that are replayed of a layout, which stand for all
BEST = 5  # that are told of each s
TRIED = 8  # that are forecast in full, of each s
MOST_FORECAST = 24  # of each s, where some would not keep the run's deadlines
SLOTS = (64, 256, 1024)  # requests that an engine decodes together, beside the configuration's
ALIKE = 0.01  # of a step: of layouts so close, the one with fewer GPUs comes first
STEPS = 2  # that the trainer's layouts are compared by
MANY = 64  # GPUs, above which less is tried: rows as the configuration has them, no handful of GPUs
KEPT = 4  # of the trainer's layouts of so many GPUs
MOST_ASKED = 2_000  # requests of an engine that are replayed to compare layouts; what follows goes on as fast
Placement = Literal["disaggregated", "colocated"]
Option = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TrainerChoice:
    """A layout of the trainer that fits by itself."""

    gpus: int
    options: Mapping[str, Any]
    seconds: float  # of an optimizer step
    kept_bytes: int  # of its fullest rank, in training


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """A layout of the engines."""

    gpus: int
    options: Mapping[str, Any]
    ready: Mapping[int | str, tuple[float, ...]]  # of each s, when every step of an interval is judged


@dataclass(frozen=True, slots=True)
class Found:
    """A layout that fits, with its forecast."""

    config: RunConfig
    forecast: Forecast
    spare_bytes: int  # of the fullest GPU
    spec: Spec

    @property
    def layout(self) -> str:
        """The layout in a line."""
        t, i = self.config.trainer, self.config.inference
        again = ", recompute" if t.recompute else ""
        turns = " on the same GPUs" if i.placement == "colocated" else ""
        return (
            f"trainer TP{t.tensor_parallel} PP{t.pipeline_parallel} DP{t.data_parallel}, {t.microbatch_tokens} tokens{again}; "
            f"{i.engines} engines TP{i.tensor_parallel} of {i.max_concurrent} slots{turns}"
        )


class Search:
    """The search of one configuration's model, data and algorithm."""

    def __init__(
        self,
        spec: Spec,
        machine: Machine,
        constants: Constants,
        workload: Workload,
        num_gpus: int,
        regimes: Many[Regime],
        slack: float = 1.0,
    ) -> None:
        """`slack`: of deadlines, see `slack_of`. ConfigError for GPUs that are no whole nodes."""
        self._spec, self._machine, self._constants, self._workload = spec, machine, constants, workload
        self._config, self._regimes = spec.config, tuple(regimes)
        self._intervals = tuple(dict.fromkeys(regime.interval for regime in regimes))
        per_node = spec.config.cluster.gpus_per_node
        if num_gpus < 1:
            raise ConfigError(f"--gpus must be at least 1; found {num_gpus}: give the number of GPUs there are")
        if num_gpus > per_node and num_gpus % per_node:
            raise ConfigError(
                f"--gpus must be whole nodes of cluster.gpus_per_node = {per_node}; found {num_gpus}: give a multiple of it"
            )
        self._per_node = min(num_gpus, per_node)
        self._nodes = num_gpus // self._per_node
        self._judges = spec.num_reward_gpus
        self._gpus = num_gpus - self._judges
        if self._gpus < 1:
            raise ConfigError(
                f"--gpus must leave one beside the {self._judges} of the reward model (reward_model.engines * "
                f"reward_model.tensor_parallel); found {num_gpus}: give more"
            )
        self._gpu_bytes = round(machine.gpu_gibibytes * GIB)
        self._weight_bytes = num_elements(spec.shape) * item_bytes(spec.config.model.dtype)
        self.works = draw_steps(spec.config, workload, spec.config.run.steps)
        self._deals, self._rows = Deals(self.works), Rows()
        self._schedules = {regime: regime.of(self._config.schedule) for regime in regimes}
        together = {interval: Regime(interval).of(self._config.schedule).opens(0) for interval in self._intervals}
        self._together = {interval: len(steps) for interval, steps in together.items()}  # steps that are sampled together
        self._trained: dict[tuple[Trainer, bool], Many[TrainingStep]] = {}
        self._slack, self._judged_together = slack, num_judged_together(spec)
        self._late: list[ConfigError] = []  # deadlines that the last layout left out for them would not keep
        self.tried = 0
        self.num_forecasts = 0  # made in full

    def best(self) -> dict[Regime, list[Found]]:
        """The best layouts for each regime, the fastest first; none where those that come first by their estimates would not
        keep the run's deadlines. ConfigError where none fits, or none keeps them for any regime."""
        by_reference: dict[bool, list[TrainerChoice]] = {}  # with and without a pass for it, which not every s needs
        engines = list(self._engines())
        found: dict[Regime, list[Found]] = {}
        for regime in self._regimes:
            scores = scores_reference(self._assembled(regime.asked_of(self._config)))
            if scores not in by_reference:
                by_reference[scores] = list(self._trainers(regime))
            trainers = by_reference[scores]
            ranked = sorted(
                (
                    (
                        self._quick(trainer, engine, placement, regime),
                        trainer.gpus + engine.gpus,
                        number,
                        trainer,
                        engine,
                        placement,
                    )
                    for number, (trainer, engine, placement) in enumerate(self._pairs(trainers, engines))
                    if placement == "disaggregated" or not regime.lookahead
                ),
                key=lambda one: one[:3],
            )
            self.tried = max(self.tried, len(ranked))
            full: list[Found] = []
            until = self.num_forecasts + MOST_FORECAST
            splits: set[tuple[int, int, Placement]] = set()
            for _, _, _, trainer, engine, placement in ranked:
                if len(full) == TRIED or self.num_forecasts == until:
                    break
                split = (trainer.gpus, engine.gpus, placement)
                if split in splits:  # a faster one with as many GPUs each fits
                    continue
                made = self._made({**trainer.options, **engine.options, "inference.placement": placement}, regime)
                if made is not None and (one := self._forecast(*made, regime)) is not None:
                    full.append(one)
                    splits.add(split)
            if (own := self._own(regime, _slowest(full))) is not None and own.layout not in {one.layout for one in full}:
                full.append(own)
            told = _ranked(full)
            while told and not self._keeps(told[0], regime):  # what --write writes is not refused by a plan of it
                told.pop(0)
            found[regime] = told[:BEST]
        if not any(found.values()):
            if self._late:
                raise combined(self._late)
            raise ConfigError(
                f"--gpus {self._gpus + self._judges} of {self._machine.gpu_gibibytes:g} GiB must hold the trainer and an "
                f"engine; found no layout by tensor, pipeline and data parallelism that fits: give more GPUs, or set "
                f"trainer.fused_lm_head, optimizer.moment_dtype or optimizer.offload_share"
            )
        return found

    def _own(self, regime: Regime, slowest: float = float("inf")) -> Found | None:
        """The configuration's own layout, where it fits into so many GPUs and this regime: somebody has thought about it. None
        where its trainer alone takes longer than the slowest step that is told."""
        if regime.lookahead and self._config.inference.placement == "colocated":
            return None
        made = self._made({}, regime)
        return self._forecast(*made, regime, slowest) if made is not None else None

    # -- the trainer's layouts

    def _trainers(self, regime: Regime) -> Iterator[TrainerChoice]:
        """Of every number of GPUs the fastest few, with what a run of this regime holds and computes."""
        for size in self._sizes:
            found = [choice for tp in self._powers(self._per_node) for choice in self._shallowest(size, tp, regime)]
            yield from sorted(found, key=lambda choice: choice.seconds)[:KEPT]

    def _shallowest(self, size: int, tp: int, regime: Regime) -> Iterator[TrainerChoice]:
        """Of so many GPUs and tensor-parallel ranks, the fewest equal pipeline stages that fit, and the next more."""
        taken = 0
        layers = self._spec.shape.num_layers
        for pp in (stages for stages in range(1, min(size, layers) + 1) if layers % stages == 0):
            if size % (tp * pp) or taken == 2:
                continue
            choices = [self._trainer(size, tp, pp, tokens, regime) for tokens in self._microbatches]
            fitting = [choice for choice in choices if choice is not None]
            yield from fitting
            taken += bool(fitting)

    @property
    def _microbatches(self) -> list[int]:
        """Tokens of a row: the configuration's, and half and twice as many where a whole sequence fits."""
        own, config = self._config.trainer.microbatch_tokens, self._config
        if self._gpus > MANY:
            return [own]
        longest = config.data.max_prompt_tokens + config.sampling.max_tokens
        return [tokens for tokens in (own // 2, own, 2 * own) if tokens >= longest or tokens == own]

    def _trainer(self, size: int, tp: int, pp: int, tokens: int, regime: Regime) -> TrainerChoice | None:
        dp = size // (tp * pp)
        options: Option = {
            "trainer.tensor_parallel": tp,
            "trainer.pipeline_parallel": pp,
            "trainer.data_parallel": dp,
            "trainer.virtual_pipeline": 1,
            "trainer.first_stage_layers": None,
            "trainer.last_stage_layers": None,
            "trainer.sequence_parallel": tp > 1,
            "trainer.overlap_tensor_parallel": tp > 1 and self._config.trainer.overlap_tensor_parallel,
            "trainer.distributed_optimizer": dp > 1 or self._config.trainer.distributed_optimizer,
            "trainer.overlap_gradients": dp > 1 and self._config.trainer.overlap_gradients,
            "trainer.microbatch_tokens": tokens,
        }
        for recompute in sorted({False, self._config.trainer.recompute}):
            for again in (recompute,) if recompute else (False, True):
                chosen = options | {"trainer.recompute": again}
                made = regime.asked_of(self._light(chosen))
                try:
                    check_layout(self._spec.shape, trainer_layout(made.trainer))
                    spec = self._assembled(made)
                    held = max(estimate(spec, self._channel, self._gpu_bytes).stages)
                    if held > self._gpu_bytes * (1 - FREE_SHARE):
                        continue
                    training = Training(spec, self._constants, self._rows)
                    compared = 1 if self._gpus > MANY else STEPS
                    step = mean_step([training.step(work.outlines) for work in self.works[:compared]])
                except ConfigError:
                    return None
                return TrainerChoice(size, chosen, step.seconds.total, held)
        return None

    # -- the engines' layouts

    def _engines(self) -> Iterator[EngineChoice]:
        fitting = [tp for tp in self._powers(self._per_node) if self._engine_fits(tp)]
        fitting = sorted({*fitting[:2], *fitting[-1:]})  # the largest answers soonest, the smallest answer most
        slots = sorted({self._config.inference.max_concurrent, *SLOTS})
        for size in self._sizes:
            for tp in fitting:
                whole = size // self._per_node * (self._per_node // tp) + size % self._per_node // tp
                if not whole or size % tp:
                    continue
                seen: set[tuple[int, int]] = set()
                for count in slots:
                    options: Option = {
                        "inference.engines": whole,
                        "inference.tensor_parallel": tp,
                        "inference.max_concurrent": count,
                        "inference.kv_cache": "auto",
                    }
                    spec = self._assembled(self._light(options | {"inference.placement": "disaggregated"}))
                    room = self._room(spec)
                    asked = -(-max(self._together.values()) * self._config.rollouts_per_step // whole)
                    if (min(count, asked), room) in seen:  # an engine is never asked for so many
                        continue
                    seen.add((min(count, asked), room))
                    yield EngineChoice(size, options, self._ready(spec, room))

    def _engine_fits(self, tp: int) -> bool:
        made = self._light(
            {"inference.tensor_parallel": tp, "inference.kv_cache": "auto", "inference.placement": "disaggregated"}
        )
        try:
            check_engine_layout(self._spec.shape, engine_layout(made.inference))
        except ConfigError:
            return False
        held = estimate(self._assembled(made), self._channel, self._gpu_bytes)
        return all(device.num_bytes <= self._gpu_bytes for device in held.devices if device.name.startswith("engine rank"))

    def _room(self, spec: Spec) -> int:
        assert spec.kv_cache is not None
        return spec.kv_cache.num_bytes(self._gpu_bytes) // spec.kv_cache.token_bytes

    def _ready(self, spec: Spec, room: int) -> dict[int | str, tuple[float, ...]]:
        """When every step of an interval has been sampled by the first engine and judged, counted from the sync."""
        together, judged = self._judged_together, [judging_seconds(spec, self._constants, work) for work in self.works]
        speed = speed_of(spec.shape, spec.config, self._constants)
        alone = [speed.iterations(max(map(max, work.completions)), 1, min(work.prompts)) for work in self.works]
        found: dict[int, tuple[float, ...]] = {}
        shown: dict[int | str, tuple[float, ...]] = {}
        for interval in sorted(self._intervals, key=lambda one: -self._together[one]):  # the others' requests are among these
            count = self._together[interval]
            if count not in found:
                most = MOST_ASKED * spec.config.inference.engines // self._config.rollouts_per_step
                replayed = min(count, max(2, most))
                engines = Engines(spec.config, speed, room, self.works, 1, self._deals)
                engines.open(0.0, range(replayed))
                sampled = [engines.sampled(step) for step in range(replayed)]
                parts = [complete(engines.handed_over(step), together) for step in range(replayed)] if together else []
                later = max((sampled[-1] - sampled[0]) / max(1, replayed - 1), self._full_engine(spec, speed, room))
                until, times = 0.0, []
                for step in range(count):
                    known = min(step, replayed - 1)
                    of_step = (parts[known] if parts else []) or [(sampled[known], 1.0)]
                    longest = alone[step % len(alone)]  # of the step's responses, which another engine may have
                    here = [(when + later * (step - known), share) for when, share in of_step]
                    here[-1] = (max(here[-1][0], longest), here[-1][1])
                    until = judged_at(here, judged[step % len(judged)], until)
                    times.append(until)
                found[count] = tuple(times)
            shown[interval] = found[count]
        return shown

    def _full_engine(self, spec: Spec, speed: Speed, room: int) -> float:
        """Seconds a step of an engine that is never short of requests."""
        work, i = self.works[0], spec.config.inference
        requests = sum(map(len, work.completions))
        held = sum(work.prompts) // len(work.prompts) + work.num_sampled // requests // 2  # of a request, half of it sampled
        together = max(1, min(i.max_concurrent, room // held))
        return work.num_sampled / i.engines / together * speed.iterations(1, together, together * held)

    # -- both together

    def _pairs(
        self, trainers: Many[TrainerChoice], engines: Many[EngineChoice]
    ) -> Iterator[tuple[TrainerChoice, EngineChoice, Placement]]:
        for trainer in trainers:
            for engine in engines:
                if trainer.gpus + engine.gpus <= self._gpus:
                    yield trainer, engine, "disaggregated"
                if trainer.gpus == engine.gpus and self._spec.source == "rollouts":
                    yield trainer, engine, "colocated"

    def _quick(self, trainer: TrainerChoice, engine: EngineChoice, placement: Placement, regime: Regime) -> float:
        """Seconds a step, roughly: of an interval whose steps are trained as they get ready, or with a lookahead while the next
        ones are sampled."""
        ready, c = engine.ready[regime.interval], self._constants
        work = self.works[0]
        host = (c.sampled_megatoken_seconds * work.num_sampled + c.trained_megatoken_seconds * work.num_trained) / 1e6
        each, count = trainer.seconds + host, len(ready)
        sync = c.sync_seconds + self._transfer(engine.gpus, int(engine.options["inference.tensor_parallel"]), trainer.gpus)
        if placement == "colocated":
            return (ready[-1] + c.sleep_seconds + sync) / count + each
        if regime.lookahead:
            return max(ready[-1] / count, each) + sync / count
        end = max(moment + (count - step) * each for step, moment in enumerate(ready))
        return (end + sync) / count

    def _transfer(self, engine_gpus: int, engine_tp: int, trainer_gpus: int) -> float:
        """Seconds of a weight sync, at least: a copy into each node of engines from all trainer ranks together, then NVLink."""
        size = self._weight_bytes
        copies = max(1, engine_gpus // self._per_node)
        inside = engine_gpus + trainer_gpus <= self._per_node
        link = self._machine.nvlink_gigabytes_per_second if inside else self._machine.network_gigabytes_per_second
        entering = size / min(self._per_node, engine_gpus)
        return max(copies * size / trainer_gpus, entering) / (link * 1e9) + size / engine_tp / (
            self._machine.nvlink_gigabytes_per_second * 1e9
        )

    def _made(self, options: Mapping[str, Any], regime: Regime) -> tuple[RunConfig, Spec, int] | None:
        """The configuration in a regime and how much of the fullest GPU it leaves; None where it breaks a rule or does not
        fit."""
        cluster = {"cluster.nodes": self._nodes, "cluster.gpus_per_node": self._per_node}
        alone = {"run.on_lost_node": "wait"} if self._nodes == 1 else {}  # it cannot lose a node and go on
        try:
            config = regime.asked_of(override(self._config, {**options, **cluster, **alone}))
            spec = assemble(config, self._spec.shape, reward_shape=self._spec.reward_shape)
            spec.placed()
            check_layout(spec.shape, spec.trainer)
            check_engine_layout(spec.shape, spec.engine)
        except ConfigError:
            return None
        spare = self._gpu_bytes - estimate(spec, self._channel, self._gpu_bytes).fullest.num_bytes
        cache = spec.kv_cache
        if spare < 0 or cache is None or cache.holds(cache.num_bytes(self._gpu_bytes)) < 1:
            return None
        return config, spec, spare

    def _forecast(
        self, config: RunConfig, spec: Spec, spare: int, regime: Regime, slowest: float = float("inf")
    ) -> Found | None:
        """A layout forecast in full; None where the run would not keep its deadlines, by the rule of `semion plan`, or where a
        step's training takes longer than `slowest`, whatever the engines do."""
        saved = saving(spec, self._constants)
        if late := missed(spec, saved, None):
            self._late = late
            return None
        t, given = (config.trainer, scores_reference(spec)), self._inputs(spec)
        try:
            forecaster = Forecaster(given, self.works, FEW_ENGINES, self._trained.get(t), self._deals, self._rows)
            self._trained[t] = forecaster.trained
            if min(step.seconds.total for step in forecaster.trained) > slowest:
                return None
            self.num_forecasts += 1
            forecast = forecaster.forecast(self._schedules[regime])
        except ConfigError:  # a sequence that is longer than a row
            return None
        if late := missed(spec, saved, forecast, self._slack):
            self._late = late
            return None
        return Found(config, forecast, spare, spec)

    def _keeps(self, found: Found, regime: Regime) -> bool:
        """Whether it keeps its deadlines with as many engines replayed as a plan replays, whose longest wait may be longer."""
        if found.config.inference.engines <= FEW_ENGINES:
            return True
        trained = self._trained.get((found.config.trainer, scores_reference(found.spec)))
        forecaster = Forecaster(self._inputs(found.spec), self.works, None, trained, self._deals, self._rows)
        forecast = forecaster.forecast(self._schedules[regime])
        if late := missed(found.spec, saving(found.spec, self._constants), forecast, self._slack):
            self._late = late
        return not late

    def _inputs(self, spec: Spec) -> Inputs:
        i, t = spec.config.inference, spec.config.trainer
        transfer = self._transfer(i.engines * i.tensor_parallel, i.tensor_parallel, t.world_size)
        return Inputs(spec, self._constants, self._workload, transfer, self._gpu_bytes, self._judged_together)

    # -- what all of them need

    @property
    def _sizes(self) -> list[int]:
        """Numbers of GPUs that are tried for either: some ten to twenty, evenly."""
        step = 1
        while step * 2 <= (self._gpus + self._judges) / 10:
            step *= 2
        sizes = {*range(step, self._gpus + 1, step), self._gpus} | ({1, 2, 4} if self._gpus <= MANY else set())
        return sorted(size for size in sizes if size <= self._gpus)

    def _powers(self, most: int) -> list[int]:
        return [1 << power for power in range(most.bit_length()) if 1 << power <= most]

    @property
    def _channel(self) -> Channel:
        staged = STAGING_BUCKETS * (self._config.sync.bucket_mebibytes << 20)
        return Channel(staged, staged)

    def _light(self, options: Mapping[str, Any]) -> RunConfig:
        """The configuration with options set anew and no rule checked, for a look at a part of it."""
        changed: dict[str, dict[str, Any]] = {}
        for key, value in options.items():
            section, name = key.split(".")
            changed.setdefault(section, {})[name] = value
        cluster = {"nodes": self._nodes, "gpus_per_node": self._per_node}
        changed["cluster"] = cluster
        sections = {name: getattr(self._config, name).model_copy(update=update) for name, update in changed.items()}
        run = self._config.run.model_copy(update={"steps": 1})  # steps of no interest here
        return self._config.model_copy(update={**sections, "run": run})

    def _assembled(self, config: RunConfig) -> Spec:
        one_node = config.model_copy(update={"cluster": config.cluster.model_copy(update={"nodes": 1})})
        spec = assemble(one_node, self._spec.shape, source=self._spec.source, reward_shape=self._spec.reward_shape)
        return replace(spec, config=config)


def _slowest(found: Many[Found]) -> float:
    """Seconds of a step above which a layout is not among the best; no limit where there is room for one more."""
    seconds = sorted(one.forecast.step_seconds for one in found)
    return seconds[BEST - 1] * (1 + ALIKE) if len(seconds) >= BEST else float("inf")


def _ranked(found: Many[Found]) -> list[Found]:
    """The fastest first; of two that are alike the one with fewer GPUs."""
    left, ranked = sorted(found, key=lambda one: (one.forecast.step_seconds, one.forecast.gpus)), []
    while left:
        limit = left[0].forecast.step_seconds * (1 + ALIKE)
        alike = [one for one in left if one.forecast.step_seconds <= limit]
        chosen = min(alike, key=lambda one: (one.forecast.gpus, one.forecast.step_seconds))
        ranked.append(chosen)
        left.remove(chosen)
    return ranked
