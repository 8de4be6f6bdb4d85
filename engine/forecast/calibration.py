"""The calibration file: constants of the forecast as they were measured on one machine, each with how. It reads and writes the
file; measuring.py measures, and comparing.py works constants out of a run's records.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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
