"""Which split of so many GPUs is fastest: trainer and engines, their parallelism, slots and microbatches, apart or taking
turns. Every layout that memory, placement and the KV cache allow is estimated from two tables, one of the trainer's layouts and
one of the engines'; the best are then forecast in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any, Literal

from engine.capacity.kv_cache import item_bytes
from engine.capacity.memory import estimate
from engine.capacity.transfer import Machine
from engine.config.load import RunConfig, override
from engine.config.options import Trainer
from engine.core.errors import ConfigError, combined
from engine.forecast.constants import Constants
from engine.forecast.deadlines import missed
from engine.forecast.disk import saving
from engine.forecast.engine_layouts import EngineChoice, EngineLayouts
from engine.forecast.lengths import Workload
from engine.forecast.seconds import Forecast, Forecaster, Inputs, Regime, how_judged, scores_reference
from engine.forecast.space import Space
from engine.forecast.trainer_layouts import TrainerChoice, TrainerLayouts
from engine.forecast.training import TrainingStep
from engine.models.checks import check_engine_layout, check_layout
from engine.models.headers import num_elements
from engine.run.spec import Spec, assemble

FEW_ENGINES = 4  # that are replayed of a layout, which stand for all
BEST = 5  # that are told of each s
TRIED = 8  # that are forecast in full, of each s
MOST_FORECAST = 24  # of each s, where some would not keep the run's deadlines
ALIKE = 0.01  # of a step: of layouts so close, the one with fewer GPUs comes first
Placement = Literal["disaggregated", "colocated"]


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
        self._workload, self._regimes = workload, tuple(regimes)
        self.space = Space(spec, machine, constants, workload, num_gpus)
        self._weight_bytes = num_elements(spec.shape) * item_bytes(spec.config.model.dtype)
        self.trainers = TrainerLayouts(self.space)
        self._judged = how_judged(spec)
        self.engines = EngineLayouts(self.space, [regime.interval for regime in regimes], self._judged)
        self._schedules = {regime: regime.of(spec.config.schedule) for regime in regimes}
        self._trained: dict[tuple[Trainer, bool], Many[TrainingStep]] = {}
        self._slack = slack
        self._late: list[ConfigError] = []  # deadlines that the last layout left out for them would not keep
        self.tried = 0
        self.num_forecasts = 0  # made in full

    def best(self) -> dict[Regime, list[Found]]:
        """The best layouts for each regime, the fastest first; none where those that come first by their estimates would not
        keep the run's deadlines. ConfigError where none fits, or none keeps them for any regime."""
        by_reference: dict[bool, list[TrainerChoice]] = {}  # with and without a pass for it, which not every s needs
        engines = list(self.engines.choices())
        found: dict[Regime, list[Found]] = {}
        for regime in self._regimes:
            scores = scores_reference(self.space.assembled(regime.asked_of(self.space.config)))
            if scores not in by_reference:
                by_reference[scores] = list(self.trainers.choices(regime))
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
            space = self.space
            num_gpus, gibibytes = space.gpus + space.num_reward_gpus, space.machine.gpu_gibibytes
            raise ConfigError(
                f"--gpus {num_gpus} of {gibibytes:g} GiB must hold the trainer and an engine; found no layout by "
                f"tensor, pipeline and data parallelism that fits: give more GPUs, or set trainer.fused_lm_head, "
                f"optimizer.moment_dtype or optimizer.offload_share"
            )
        return found

    def _own(self, regime: Regime, slowest: float = float("inf")) -> Found | None:
        """The configuration's own layout, where it fits into so many GPUs and this regime: somebody has thought about it. None
        where its trainer alone takes longer than the slowest step that is told."""
        if regime.lookahead and self.space.config.inference.placement == "colocated":
            return None
        made = self._made({}, regime)
        return self._forecast(*made, regime, slowest) if made is not None else None

    def _pairs(
        self, trainers: Many[TrainerChoice], engines: Many[EngineChoice]
    ) -> Iterator[tuple[TrainerChoice, EngineChoice, Placement]]:
        for trainer in trainers:
            for engine in engines:
                if trainer.gpus + engine.gpus <= self.space.gpus:
                    yield trainer, engine, "disaggregated"
                if trainer.gpus == engine.gpus and self.space.spec.source == "rollouts":
                    yield trainer, engine, "colocated"

    def _quick(self, trainer: TrainerChoice, engine: EngineChoice, placement: Placement, regime: Regime) -> float:
        """Seconds a step, roughly: of an interval whose steps are trained as they get ready, or with a lookahead while the next
        ones are sampled."""
        ready, c = engine.ready[regime.interval], self.space.constants
        work = self.space.works[0]
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
        copies = max(1, engine_gpus // self.space.per_node)
        inside = engine_gpus + trainer_gpus <= self.space.per_node
        link = self.space.machine.nvlink_gigabytes_per_second if inside else self.space.machine.network_gigabytes_per_second
        entering = size / min(self.space.per_node, engine_gpus)
        return max(copies * size / trainer_gpus, entering) / (link * 1e9) + size / engine_tp / (
            self.space.machine.nvlink_gigabytes_per_second * 1e9
        )

    def _made(self, options: Mapping[str, Any], regime: Regime) -> tuple[RunConfig, Spec, int] | None:
        """The configuration in a regime and how much of the fullest GPU it leaves; None where it breaks a rule or does not
        fit."""
        cluster = {"cluster.nodes": self.space.nodes, "cluster.gpus_per_node": self.space.per_node}
        alone = {"run.on_lost_node": "wait"} if self.space.nodes == 1 else {}  # it cannot lose a node and go on
        try:
            config = regime.asked_of(override(self.space.config, {**options, **cluster, **alone}))
            spec = assemble(config, self.space.spec.shape, reward_shape=self.space.spec.reward_shape)
            spec.placed()
            check_layout(spec.shape, spec.trainer)
            check_engine_layout(spec.shape, spec.engine)
        except ConfigError:
            return None
        spare = self.space.gpu_bytes - estimate(spec, self.space.channel, self.space.gpu_bytes).fullest.num_bytes
        cache = spec.kv_cache
        if spare < 0 or cache is None or cache.holds(cache.num_bytes(self.space.gpu_bytes)) < 1:
            return None
        return config, spec, spare

    def _forecast(
        self, config: RunConfig, spec: Spec, spare: int, regime: Regime, slowest: float = float("inf")
    ) -> Found | None:
        """A layout forecast in full; None where the run would not keep its deadlines, by the rule of `semion plan`, or where a
        step's training takes longer than `slowest`, whatever the engines do."""
        saved = saving(spec, self.space.constants)
        if late := missed(spec, saved, None):
            self._late = late
            return None
        t, given = (config.trainer, scores_reference(spec)), self._inputs(spec)
        try:
            forecaster = self._forecaster(given, FEW_ENGINES, self._trained.get(t))
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
        forecaster = self._forecaster(self._inputs(found.spec), None, trained)
        forecast = forecaster.forecast(self._schedules[regime])
        if late := missed(found.spec, saving(found.spec, self.space.constants), forecast, self._slack):
            self._late = late
        return not late

    def _forecaster(self, inputs: Inputs, num_engines: int | None, trained: Many[TrainingStep] | None) -> Forecaster:
        space = self.space
        return Forecaster(inputs, space.works, num_engines, trained, space.deals, space.rows)

    def _inputs(self, spec: Spec) -> Inputs:
        i, t = spec.config.inference, spec.config.trainer
        transfer = self._transfer(i.engines * i.tensor_parallel, i.tensor_parallel, t.world_size)
        return Inputs(spec, self.space.constants, self._workload, transfer, self.space.gpu_bytes, self._judged)


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
