"""What a run will move, hold and take, before anything is launched: engine/capacity counts bytes, engine/forecast seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.api.faults.look import Look, caught
from engine.api.faults.model import layout_faults
from engine.api.preflight import purpose_of
from engine.capacity.kv_cache import GIB, require_one_request, reward_cache
from engine.capacity.transfer import Machine, plan_run
from engine.config.load import RunConfig
from engine.core.errors import ConfigError, SemionError, combined
from engine.core.jsonl import newest_rows, parsed, read_lines, require_names
from engine.forecast import comparing, disk
from engine.forecast.calibration import Calibrated, calibrated, read_calibration
from engine.forecast.constants import Constants, rows
from engine.forecast.deadlines import missed, slack_of
from engine.forecast.hosts import hosts
from engine.forecast.lengths import Workload, newest_lengths
from engine.forecast.played import Played
from engine.forecast.search import Found, Search
from engine.forecast.seconds import (
    Forecast,
    Forecaster,
    Inputs,
    Regime,
    assumed_workload,
    how_judged,
    regimes,
    scores_reference,
)
from engine.forecast.telling import as_figures
from engine.forecast.training import TrainingStep
from engine.models.checks import check_engine_layout
from engine.models.sharding import EngineLayout
from engine.observe.predicted import CALIBRATION, Predicted
from engine.observe.timeline import EVENTS, STARTUP
from engine.run.spec import Spec, assemble, resolve, settled

MOST_LENGTHS, MOST_STEPS = 20_000, 5_000  # of a run's newest responses and steps, by which it is forecast
NO_CALIBRATION = (
    "No calibration of the run's machine is recorded, so nothing is forecast: `semion calibrate --config CONFIG` measures one. "
    f"`semion train` copies {CALIBRATION} of the folder that it is started in to the run's directory; `semion report "
    f"--calibration FILE` names another."
)
INTERVALS: tuple[int | str, ...] = (1, 2, 5, 10, 100, "never")


@dataclass(frozen=True, slots=True)
class Plan:
    """A run as planned."""

    figures: dict[str, Any]  # all of it, for JSON
    forecast: Forecast | None  # None where nothing trains on rollouts or the run is supervised
    intervals: tuple[Forecast, ...]  # the same with other s
    picture: tuple[Played, range, Many[TrainingStep]] | None  # of an interval, as `Forecaster.interval` has it


def plan(config: RunConfig, machine: Machine | None = None) -> dict[str, Any]:
    """The figures of a weight sync; under "memory" the bytes of each kind of device (see `plan_run`, `weigh`); under
    "checkpoint" and "hosts" what is written, and what nodes read and hold (see `Saving`, `Hosts`); under "forecast" the
    seconds of a step and the run's hours, and under "intervals" the same for other s (see `Forecast`). `machine`: bandwidths
    and the memory of a GPU, an H200's where not said. It needs the model's config.json and no other file.

    ConfigError for what `train` would refuse: layouts, placement, lengths, KV caches without room for one request; and for
    deadlines that a checkpoint, an evaluation or a step would not keep by the forecast, by far where that rests on guesses.
    """
    return planned(config, machine or Machine()).figures


def planned(
    config: RunConfig,
    machine: Machine,
    *,
    known: Calibrated | None = None,
    workload: Workload | None = None,
    intervals: Many[int | str] = INTERVALS,
) -> Plan:
    """The plan. `known`: the machine's constants, whose links are the machine's. `workload`: lengths and signal, a guess from
    the configuration's limits where not said. `intervals`: which s are forecast beside the run's own."""
    spec = resolve(settled(config, on_gpus=True), digests=False)
    figures = plan_run(spec, machine)
    spec.placed()
    if found := _refused(spec):
        raise combined(found)
    known = known or calibrated()
    links = {
        "nvlink_gigabytes_per_second": machine.nvlink_gigabytes_per_second,
        "network_gigabytes_per_second": machine.network_gigabytes_per_second,
    }
    constants = known.constants.model_copy(update=links)
    given = inputs(spec, constants, workload, figures["seconds"], machine)
    own, forecasts, picture = _forecasts(given, intervals)
    saved = disk.saving(spec, constants)
    figures["checkpoint"] = asdict(saved) if saved is not None else None
    figures["hosts"] = asdict(hosts(spec))
    if late := missed(spec, saved, own, slack_of(known.measured)):
        raise combined(late)
    figures["forecast"] = as_figures(own, config) if own else None
    figures["intervals"] = [as_figures(one, config) for one in forecasts]
    figures["constants"] = [asdict(row) for row in rows(constants, known.measured)]
    return Plan(figures, own, tuple(forecasts), picture)


def _refused(spec: Spec) -> list[SemionError]:
    """What `train` would refuse of the run's lengths, and of the reward model's KV cache; the layouts fit."""
    look = Look(spec.config, purpose_of(spec.config))
    look.shape = spec.shape
    found = caught(layout_faults, look)
    if spec.reward_shape is not None:
        options = spec.config.reward_model
        found += caught(check_engine_layout, spec.reward_shape, EngineLayout(options.tensor_parallel), "reward_model")
        found += caught(require_one_request, "reward_model", reward_cache(spec.reward_shape, options))
    return found


def _forecasts(
    given: Inputs, intervals: Many[int | str]
) -> tuple[Forecast | None, list[Forecast], tuple[Played, range, Many[TrainingStep]] | None]:
    """(the run's own forecast, those of several s, what a picture takes); none where nothing is sampled."""
    spec = given.spec
    if spec.source != "rollouts" or not spec.starts_engines:
        return None, [], None
    config, forecaster = spec.config, Forecaster(given)
    own, picture = forecaster.forecast(), forecaster.interval()
    trained = {scores_reference(spec): forecaster.trained}
    others: list[Forecast] = []
    for regime in regimes(config, intervals, offered=True):
        if regime == Regime.asked(config):
            others.append(own)
            continue
        asked = assemble(regime.asked_of(config), spec.shape, parts=spec.parts, reward_shape=spec.reward_shape)
        scores = scores_reference(asked)
        other = Forecaster(replace(given, spec=asked), forecaster.works, None, trained.get(scores), forecaster.deals)
        trained[scores] = other.trained
        others.append(other.forecast(regime.of(config.schedule)))
    return own, others, picture


@dataclass(frozen=True, slots=True)
class Optimized:
    """The search's result."""

    best: dict[Regime, list[Found]]
    tried: int  # layouts that fit by themselves, compared for each s
    figures: dict[str, Any]


def optimized(
    config: RunConfig,
    machine: Machine,
    num_gpus: int,
    *,
    known: Calibrated | None = None,
    workload: Workload | None = None,
    intervals: Many[int | str] = INTERVALS,
) -> Optimized:
    """The fastest layouts of so many GPUs for each s, and for the configuration's own, that keep the run's deadlines by the
    rule of `plan`; of an s none where none does. ConfigError where none fits, where none keeps them for any s, or where there
    are no rollouts whose split could be chosen."""
    spec = resolve(settled(config, on_gpus=True), digests=False)
    if spec.source != "rollouts" or not spec.starts_engines:
        raise ConfigError("--optimize is for runs that sample rollouts; found one that does not: plan it without --optimize")
    known = known or calibrated()
    chosen = regimes(config, intervals)
    workload, slack = workload or assumed_workload(spec), slack_of(known.measured)
    search = Search(spec, machine, known.constants, workload, num_gpus, chosen, slack)
    best = search.best()
    figures = {
        "gpus": num_gpus,
        "tried": search.tried,
        "best": [
            {"layout": one.layout, "spare_bytes": one.spare_bytes} | as_figures(one.forecast, one.config)
            for found in best.values()
            for one in found
        ],
        "constants": [asdict(row) for row in rows(known.constants, known.measured)],
    }
    return Optimized(best, search.tried, figures)


def inputs(spec: Spec, constants: Constants, workload: Workload | None, transfer_seconds: float, machine: Machine) -> Inputs:
    """What the forecast of a run takes."""
    gpu_bytes, judged = round(machine.gpu_gibibytes * GIB), how_judged(spec)
    return Inputs(spec, constants, workload or assumed_workload(spec), transfer_seconds, gpu_bytes, judged)


@dataclass(frozen=True, slots=True)
class Run:
    """A run that was, for a forecast of it."""

    config: RunConfig
    rows: Many[dict[str, Any]]  # of metrics.jsonl, the newest
    seen: dict[str, float]  # seconds by part
    workload: Workload

    @classmethod
    def read(cls, directory: Path, config: RunConfig) -> Run:
        """From its newest records, which may still grow. ConfigError for one without a step or without rollouts, DataError
        where a metric is no number."""
        rows = newest_rows(directory / "metrics.jsonl", MOST_STEPS, numbers=True)
        if not rows or "step_seconds" not in rows[0]:
            raise ConfigError(f"a run is forecast by its own records; found no step in {directory}: name another run")
        lengths = newest_lengths(directory, MOST_LENGTHS)
        if not lengths:
            raise ConfigError(f"a run is forecast by the lengths of its rollouts; found none in {directory}: name another run")
        steps = comparing.counted(rows, config)
        seen = comparing.measured(
            steps, rows, _noted(directory / EVENTS, "kind"), _noted(directory / STARTUP, "step", "seconds")
        )
        return cls(config, rows, seen, comparing.workload_of(steps, lengths, config, str(directory)))

    def forecaster(self, machine: Machine) -> Callable[[Constants], Forecast]:
        """The run's forecast by constants."""
        spec = resolve(self.config, digests=False)
        if spec.source != "rollouts" or not spec.starts_engines:
            raise ConfigError("a forecast is of a run that samples rollouts; found one that does not: name another run")
        seconds = plan_run(spec, machine)["seconds"]
        given = inputs(spec, Constants(), self.workload, seconds, machine)
        works = Forecaster(given).works
        schedule = None
        if self.config.schedule.measures is not None:  # what the run decided, in the mean
            syncs = sum("sync_seconds" in row for row in self.rows)
            schedule = Regime(max(1, round(len(self.rows) / max(1, syncs)))).of(self.config.schedule)
        return lambda constants: Forecaster(replace(given, constants=constants), works).forecast(schedule)


def _noted(path: Path, *needs: str) -> Iterator[dict[str, Any]]:
    """The rows of a file of notes, which need not be of a step; none where there is no file."""
    if path.is_file():
        for line in read_lines(path):
            row = parsed(line.where, line.data)
            require_names(row, needs, line)
            yield row


def predicted_beside(directory: Path, config: RunConfig, calibration: str | Path | None = None) -> Predicted:
    """What the forecast of a run says beside what its records say. `calibration`: the file of its machine's constants; else the
    one that lies in the run's directory. Without one the records alone; where nothing can be forecast the note says why.
    ConfigError for a calibration that cannot be used."""
    own = directory / CALIBRATION
    file = Path(calibration) if calibration is not None else own if own.is_file() else None
    known = read_calibration(file) if file is not None else None
    try:
        run = Run.read(directory, config)
        said = {} if known is None else comparing.predicted(run.forecaster(Machine())(calibrated(known).constants))
    except SemionError as error:
        return Predicted((), 0, 0, None, f"Nothing is forecast: {error}.")
    steps = comparing.counted(run.rows, config)
    note = f"By the calibration of {known.machine} and the run's own lengths of responses." if known else NO_CALIBRATION
    machine = known.machine if known else None
    return Predicted(comparing.compared(said, run.seen), len(steps), int(steps[0]["step"]), machine, note)


def recalibrated(directory: Path, config: RunConfig, known: Calibrated, machine: Machine) -> Calibrated:
    """The constants with which the forecast of a run says what its own records say; what they say nothing of stays as known."""
    run = Run.read(directory, config)
    how = f"{len(comparing.counted(run.rows, config))} steps of {directory}"
    found = comparing.recalibrated(run.forecaster(machine), run.seen, known.constants, how)
    constants = known.constants.model_copy(update={name: one.value for name, one in found.items()})
    return Calibrated(constants, known.measured | {name: one.how for name, one in found.items()})


def check_workload(
    mean: float | None, sigma: float, signal: float, prompt: float | None = None, longest_prompt: int = 1
) -> None:
    """ConfigError for flags that are no lengths, or a prompt's that data.max_prompt_tokens does not let in."""
    if prompt is not None and not 1 <= prompt <= longest_prompt:
        raise ConfigError(
            f"--prompt-tokens must be from 1 to data.max_prompt_tokens = {longest_prompt}; found {prompt:g}: give the prompts' "
            f"mean length, or raise max_prompt_tokens"
        )
    if mean is not None and not 0 < mean < float("inf"):
        raise ConfigError(f"--mean-tokens must be a number greater than 0; found {mean}: give the responses' mean length")
    if not 0 <= sigma < 5:
        raise ConfigError(
            f"--sigma must be from 0 to 5; found {sigma}: give the spread of the logarithm of the lengths, as 0.6"
        )
    if not 0 < signal <= 1:
        raise ConfigError(f"--signal must be above 0 and at most 1; found {signal}: give the share of prompts with a pair")
