"""What a run will move, hold and take, before anything is launched: engine/capacity counts bytes, engine/forecast seconds."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import asdict, dataclass
from typing import Any

from engine.capacity.kv_cache import GIB
from engine.capacity.transfer import Machine, plan_run
from engine.config.load import RunConfig
from engine.core.errors import ConfigError
from engine.forecast.calibration import Calibrated, calibrated
from engine.forecast.constants import Constants, rows
from engine.forecast.lengths import Workload
from engine.forecast.search import Found, Search
from engine.forecast.seconds import Forecast, Forecaster, Inputs, assumed_workload, other_interval
from engine.forecast.telling import as_figures
from engine.run.spec import Spec, resolve, settled

INTERVALS: tuple[int | str, ...] = (1, 2, 5, 10, 100, "never")


@dataclass(frozen=True, slots=True)
class Plan:
    """A run as planned."""

    figures: dict[str, Any]  # all of it, for JSON
    forecast: Forecast | None  # None where nothing trains on rollouts or the run is supervised
    intervals: tuple[Forecast, ...]  # the same with other s


def plan(config: RunConfig, machine: Machine | None = None) -> dict[str, Any]:
    """The figures of a weight sync; under "memory" the bytes of each kind of device (see `plan_run`, `weigh`); under "forecast"
    the seconds of a step and the run's hours, and under "intervals" the same for other s (see `Forecast`). `machine`:
    bandwidths and the memory of a GPU, an H200's where not said. It needs the model's config.json and no other file.

    ConfigError for what `train` would refuse: layouts, placement, a KV cache without room for one request.
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
    known = known or calibrated()
    links = {
        "nvlink_gigabytes_per_second": machine.nvlink_gigabytes_per_second,
        "network_gigabytes_per_second": machine.network_gigabytes_per_second,
    }
    constants = known.constants.model_copy(update=links)
    given = inputs(spec, constants, workload, figures["seconds"], machine)
    own, forecasts = _forecasts(given, intervals)
    figures["forecast"] = as_figures(own, config) if own else None
    figures["intervals"] = [as_figures(one, config) for one in forecasts]
    figures["constants"] = [asdict(row) for row in rows(constants, known.measured)]
    return Plan(figures, own, tuple(forecasts))


def _forecasts(given: Inputs, intervals: Many[int | str]) -> tuple[Forecast | None, list[Forecast]]:
    """(the run's own forecast, those of several s); none where nothing is sampled."""
    spec = given.spec
    if spec.source != "rollouts" or not spec.starts_engines:
        return None, []
    config, forecaster = spec.config, Forecaster(given)
    own = forecaster.forecast()
    chosen = [s for s in _in_order({*intervals, config.sync.sync_interval}) if isinstance(s, str) or s <= config.run.steps]
    return own, [
        own if s == config.sync.sync_interval else forecaster.forecast(other_interval(config.schedule, s)) for s in chosen
    ]


@dataclass(frozen=True, slots=True)
class Optimized:
    """The search's result."""

    best: dict[int | str, list[Found]]
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
    """The fastest layouts of so many GPUs for each s, and for the configuration's own. ConfigError where none fits, or where
    there are no rollouts whose split could be chosen."""
    spec = resolve(settled(config, on_gpus=True), digests=False)
    if spec.source != "rollouts" or not spec.starts_engines:
        raise ConfigError("--optimize is for runs that sample rollouts; found one that does not: plan it without --optimize")
    known = known or calibrated()
    chosen = [s for s in _in_order({*intervals, config.sync.sync_interval}) if isinstance(s, str) or s <= config.run.steps]
    search = Search(spec, machine, known.constants, workload or assumed_workload(spec), num_gpus, chosen)
    best = search.best()
    figures = {
        "gpus": num_gpus,
        "tried": search.tried,
        "best": [
            {"sync_interval": s, "layout": one.layout, "spare_bytes": one.spare_bytes} | as_figures(one.forecast, one.config)
            for s, found in best.items()
            for one in found
        ],
        "constants": [asdict(row) for row in rows(known.constants, known.measured)],
    }
    return Optimized(best, search.tried, figures)


def _in_order(intervals: set[int | str]) -> list[int | str]:
    return sorted(intervals, key=lambda s: (isinstance(s, str), s if isinstance(s, int) else 0))


def inputs(spec: Spec, constants: Constants, workload: Workload | None, transfer_seconds: float, machine: Machine) -> Inputs:
    """What the forecast of a run takes."""
    return Inputs(spec, constants, workload or assumed_workload(spec), transfer_seconds, round(machine.gpu_gibibytes * GIB))


def check_workload(mean: float | None, sigma: float, signal: float) -> None:
    """ConfigError for flags that are no lengths."""
    if mean is not None and not 0 < mean < float("inf"):
        raise ConfigError(f"--mean-tokens must be a number greater than 0; found {mean}: give the responses' mean length")
    if not 0 <= sigma < 5:
        raise ConfigError(
            f"--sigma must be from 0 to 5; found {sigma}: give the spread of the logarithm of the lengths, as 0.6"
        )
    if not 0 < signal <= 1:
        raise ConfigError(f"--signal must be above 0 and at most 1; found {signal}: give the share of prompts with a pair")
