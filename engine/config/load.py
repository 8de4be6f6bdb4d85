"""One typed tree for a run: a TOML file with dotted overrides becomes a `RunConfig`, checked across fields before
anything starts. The options are those of engine/config/options.py.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError, model_validator

from engine.config.options import Options, Section, Source, options_class
from engine.config.rules import broken_algorithm_rules, broken_rollout_rules, broken_rules
from engine.config.schedules.base import Schedule
from engine.config.schedules.registry import schedule_of
from engine.core.errors import ConfigError

Table = TypeVar("Table", bound=Section)


class RunConfig(Options):
    """Everything a run is; equal configurations and equal data give equal runs."""

    @property
    def schedule(self) -> Schedule:
        """The regime as arithmetic."""
        return schedule_of(self)

    def checkpoint_due(self, step: int) -> bool:
        """Whether the state after `step` optimizer steps is committed to disk."""
        every = self.checkpoint.every
        return step == self.run.steps or (every != "end" and self.schedule.checkpoint_due(every, step))

    def evaluation_due(self, step: int) -> bool:
        """Whether the weights after `step` optimizer steps are judged on held-out problems."""
        every = self.evaluation.every
        at_an_end = step in (0, self.run.steps)
        judged = any(source.held_out is not None for source in self.data.sources)
        return judged and (at_an_end or (every != "ends" and self.schedule.falls_due(every, step)))

    @property
    def evaluates_between_syncs(self) -> bool:
        """Whether some evaluation judges weights that the generator does not sample with."""
        steps = range(1, self.run.steps)
        return any(self.evaluation_due(step) and not self.schedule.sync_due(step) for step in steps)

    @property
    def takes_turns(self) -> bool:
        """Whether engines stand on the trainer's devices and sleep while it trains."""
        return self.uses_engines and self.inference.placement == "colocated"

    @property
    def keeps_seed(self) -> bool:
        """Whether the generator is given the seed's weights again: offline, where newer ones have been judged in between, or
        where it has slept before the next chunk of prompts."""
        return self.schedule.reopens and (self.evaluates_between_syncs or self.takes_turns)

    @property
    def run_directory(self) -> Path:
        """`run.directory` as a path."""
        return Path(self.run.directory)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to another process as JSON: what a user's own file defines can be imported there only by reading it again."""
        return RunConfig.model_validate_json, (self.model_dump_json(),)

    @model_validator(mode="after")
    def _checked(self) -> RunConfig:
        always = broken_rules(self) + broken_algorithm_rules(self)
        for broken in always + ([] if self.sft.checkpoint_out else broken_rollout_rules(self)):
            raise ValueError(broken)
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads a TOML file, applies `section.key=value` overrides (values as TOML, bare words as strings), validates.

    Raises ConfigError in one sentence that names key, rule, value and fix.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error.strerror}; check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} is not TOML: {error}; mend that line") from error
    for override in overrides or []:
        _apply_override(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_sentence(error, tree=tree)) from error


def validated(section: type[Table], name: str, values: dict[str, Any]) -> Table:
    """One table of a configuration by itself, from `values` that no file holds (the whole tree with no
    name); raises ConfigError as `load_config`."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_sentence(error, *([name] if name else []))) from error


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) != 2 or not all(parts):
        raise ConfigError(f"override {override!r} must read section.key=value, such as sync.sync_interval=10")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    section = tree.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise ConfigError(f"override {override!r}: {parts[0]} is not a section; see `semion check` for the sections")
    section[parts[1]] = value


def _sentence(error: ValidationError, *table: str, tree: Mapping[str, Any] | None = None) -> str:
    """The first complaint of pydantic, about the whole `tree` or one table, as a sentence with key, rule, value and fix."""
    first = error.errors()[0]
    location = _location(*table, *first["loc"])
    key = ".".join(location) or "configuration"
    if first["type"] == "extra_forbidden":
        names = sorted(_table(location, tree).model_fields)
        return f"{key} is not an option; found {first['input']!r}: the options there are {', '.join(names)}"
    if first["type"] == "missing" and len(location) == 1:
        return f"section [{key}] is required and missing: add it to the file"
    if first["type"] == "missing":
        override = f" or as {key}=..." if len(location) == 2 else ""
        return f"{key} is required and missing: set it in the file{override}"
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    rules = "; or ".join(
        dict.fromkeys(e["msg"][0].lower() + e["msg"][1:] for e in error.errors() if _location(*table, *e["loc"]) == location)
    )
    return f"{key}: {rules}; found {first['input']!r}: change the value ({_description(location, tree)})"


def _location(*parts: str | int) -> list[str]:
    """Table and option, or data, mix[i] and its option; what pydantic adds of a union's branches is cut off."""
    if len(parts) > 2 and isinstance(parts[2], int):  # data.mix, the one list of tables
        return [str(parts[0]), f"{parts[1]}[{parts[2]}]", *map(str, parts[3:4])]
    return [str(part) for part in parts[:2]]


def _table(location: list[str], tree: Mapping[str, Any] | None) -> type[BaseModel]:
    """The table that the option at `location` stands in; that of the algorithm is its loss's own."""
    if len(location) == 3:
        return Source
    if len(location) == 2 and location[0] == "algorithm" and tree is not None:
        return options_class(tree.get("algorithm", {}))
    section = RunConfig.model_fields[location[0]].annotation if len(location) == 2 else RunConfig
    assert isinstance(section, type) and issubclass(section, BaseModel), location
    return section


def _description(location: list[str], tree: Mapping[str, Any] | None) -> str:
    option = _table(location, tree).model_fields.get(location[-1].partition("[")[0])
    return (option.description if option and len(location) > 1 else None) or f"see section [{location[0]}]"


def dump_config(config: RunConfig) -> str:
    """The resolved tree as TOML that `load_config` reads back to an equal configuration."""
    lines = []
    for name, section in config.model_dump().items():
        lines += [f"[{name}]", *_pairs(section), ""]
        for key, tables in section.items():
            if _holds_tables(tables):
                for table in tables:
                    lines += [f"[[{name}.{key}]]", *_pairs(table), ""]
    return "\n".join(lines)


def _pairs(section: dict[str, Any]) -> list[str]:
    single = {key: value for key, value in section.items() if not _holds_tables(value)}
    return [f"# {key} is unset" if value is None else f"{key} = {_toml(value)}" for key, value in single.items()]


def _holds_tables(value: Any) -> bool:
    return isinstance(value, tuple) and any(isinstance(element, dict) for element in value)


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_toml(key)} = {_toml(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    # JSON's escapes are TOML's, except that TOML wants DEL escaped too.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
