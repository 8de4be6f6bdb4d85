"""The calibration file: constants of the forecast as they were measured on one machine, each with how. It reads and writes the
file, and works out constants from measured times; it measures nothing itself (measuring.py does).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import Field, ValidationError

from engine.config.options import Section
from engine.core.errors import ConfigError
from engine.forecast.constants import Constants

FORM = 1
Table = TypeVar("Table", bound=Section)


class Measured(Section):
    """A constant as it was found."""

    value: float = Field(description="in the unit that the table of constants gives")
    how: str = Field(description="what was measured")


class Calibration(Section):
    """A calibration file."""

    form: int = Field(FORM, description="of this file")
    machine: str = Field(description="what it was measured on")
    model: str = Field("", description="with whose sizes")
    constants: dict[str, Measured] = Field(description="by name")


class Calibrated(NamedTuple):
    """The constants of a machine, and of each that was measured where."""

    constants: Constants
    measured: dict[str, str]


def calibrated(calibration: Calibration | None = None, given: Mapping[str, float | None] | None = None) -> Calibrated:
    """The table with a calibration's values, and over them those that a flag gives (None: not given)."""
    found = {name: one.value for name, one in calibration.constants.items()} if calibration else {}
    places = {name: f"{one.how}; {calibration.machine}" for name, one in calibration.constants.items()} if calibration else {}
    for name, value in (given or {}).items():
        if value is not None:
            found[name], places[name] = value, "as given by a flag"
    flags = {name for name, value in (given or {}).items() if value is not None}
    return Calibrated(_read(Constants, found, lambda name: f"--{name.replace('_', '-')}" if name in flags else name), places)


def read_calibration(path: str | Path) -> Calibration:
    """The file. ConfigError names it, and the field that cannot be used."""
    path = Path(path)
    try:
        values = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--calibration {path} cannot be read: {error.strerror}; name a file of `semion calibrate`"
        ) from error
    except ValueError as error:
        raise ConfigError(f"--calibration {path} must be JSON; found {error}: name a file of `semion calibrate`") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--calibration {path} must hold one object; found {type(values).__name__}: name another file")
    if values.get("form", FORM) != FORM:
        raise ConfigError(f"--calibration {path}: form must be {FORM}; found {values['form']!r}: calibrate anew")
    found = _read(Calibration, values, lambda name: f"--calibration {path}: {name}")
    unknown = sorted(found.constants.keys() - Constants.model_fields.keys())
    if unknown:
        known = ", ".join(Constants.model_fields)
        raise ConfigError(f"--calibration {path}: constants.{unknown[0]} is no constant; found it there: known are {known}")
    constants = {name: one.value for name, one in found.constants.items()}
    _read(Constants, constants, lambda name: f"--calibration {path}: constants.{name}.value")
    return found


def _read(section: type[Table], values: dict[str, Any], called: Callable[[str], str]) -> Table:
    """The values as a section has them. ConfigError names the first field that cannot be used, as `called` says it."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name, rule = ".".join(map(str, first["loc"])), first["msg"][0].lower() + first["msg"][1:]
        found = "none" if first["type"] == "missing" else repr(first["input"])
        raise ConfigError(f"{called(name)}: {rule}; found {found}: mend it") from error


def write_calibration(path: str | Path, calibration: Calibration) -> None:
    """Writes the file."""
    from engine.observe.writing import write_json

    write_json(Path(path), calibration.model_dump())


class Line(NamedTuple):
    """seconds = fixed + slope * amount."""

    fixed: float
    slope: float


def fitted(points: Iterable[tuple[float, float]]) -> Line:
    """The line through (amount, seconds) of least squares of the relative error, with neither part below 0."""
    pairs = [(float(x), float(y)) for x, y in points if y > 0]
    assert len({x for x, _ in pairs}) > 1, "a line needs two different amounts"
    weights = [1 / (y * y) for _, y in pairs]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, pairs, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, pairs, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, pairs, strict=True))
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, pairs, strict=True)) / spread
    slope = max(0.0, slope)
    fixed = mean_y - slope * mean_x
    if fixed < 0:  # through the origin
        slope = sum(w * x * y for w, (x, y) in zip(weights, pairs, strict=True)) / sum(
            w * x * x for w, (x, _) in zip(weights, pairs, strict=True)
        )
        fixed = 0.0
    return Line(fixed, slope)


def from_metrics(
    rows: Sequence[Mapping[str, Any]], constants: Constants, flops_of_token: float, num_layers: int
) -> dict[str, Measured]:
    """What the metrics.jsonl of a run on one trainer rank says of training on its machine: the share of the peak, and what a
    step costs whatever its tokens. `flops_of_token`: of all passes over a token of the run's step. The first step, which warms
    up, is left out. ConfigError for too few steps or steps that are all alike."""
    points = [(row["num_tokens"], row["train_seconds"]) for row in rows if "train_seconds" in row and row.get("num_tokens")][1:]
    if len({tokens for tokens, _ in points}) < 2:
        raise ConfigError(
            f"metrics.jsonl must hold three or more steps of different lengths to calibrate by; found {len(points)} after the "
            f"first: name a longer run"
        )
    line = fitted(points)
    how = f"num_tokens and train_seconds of {len(points)} steps of a run"
    found = {"step_seconds": Measured(value=line.fixed, how=how)}
    if line.slope > 0:
        share = flops_of_token / (line.slope * constants.peak_teraflops * 1e12)
        found["train_peak_share"] = Measured(value=min(1.0, share), how=how)
    return found
