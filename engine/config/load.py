"""One typed tree for a run: a TOML file with dotted overrides becomes a `RunConfig`, checked across fields before
anything starts. The options are those of engine/config/options.py.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ValidationError, ValidationInfo, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from engine.config.options import Options, Section, Source, options_class
from engine.config.rules import broken_algorithm_rules, broken_rollout_rules, broken_rules
from engine.config.schedules.base import Schedule
from engine.config.schedules.registry import schedule_of
from engine.core.errors import ConfigError, brief, combined
from engine.core.places import meant

Table = TypeVar("Table", bound=Section)
Copy = Literal["reference", "seed"]  # of its weights, beside the policy
# Where reference log-probs come from: a pass with the reference's weights, the policy's own of the same step, or the rollouts
ReferenceSource = Literal["pass", "policy", "rollouts"]
CHECKED = {"rules": "checked"}  # pydantic's context for a tree whose rules have been checked before
RULES = "broken_rules"  # pydantic's type of the complaint that carries every broken rule
UNREAD = {  # of sections that must be there, what stands for one that cannot be used
    "run": {"directory": "unread", "steps": 1},
    "model": {"path": "unread"},
    "data": {"train": "unread"},
}
KEY = re.compile(r"\w+(\[\d+\])*(\.\w+(\[\d+\])*)+")
FORM = "must read section.key=value, such as sync.sync_interval=10 or data.mix[0].prompts_per_step=8"
MAX_TOLD = 20  # mistakes of a file that are told one by one
MAX_GUESSED = 64  # characters of a word that is compared with those there are


class RunConfig(Options):
    """Everything a run is; equal configurations and equal data give equal runs."""

    @cached_property
    def schedule(self) -> Schedule:
        """The regime as arithmetic. With sync.sync_interval = "auto" it grows while a run goes on, so all that take part in one
        in a process ask the same configuration."""
        return schedule_of(self)

    def __copy__(self) -> Self:
        """A copy, whose options may then be set otherwise (`model_copy`), has a schedule of its own."""
        made = super().__copy__()
        made.__dict__.pop("schedule", None)
        return made

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
    def reference_source(self) -> ReferenceSource:
        """Where reference log-probs come from. Where the reference is copied from the policy before every step, they are the
        policy's own before it moves, exactly: no second set of weights and no pass is needed."""
        schedule, steps = self.schedule.planned, range(1, max(2, self.run.steps))  # at step 0 both are the seed model anyway
        if self.sync.reference_mix == 1 and all(schedule.reference_due(step) for step in steps):
            return "policy"
        return "rollouts" if self.sync.reference_log_probs == "rollouts" else "pass"

    @property
    def keeps_seed(self) -> bool:
        """Whether the generator is given the seed's weights again: offline, where newer ones have been judged in between, or
        where it has slept before the next chunk of prompts."""
        again = self.evaluates_between_syncs or self.inference.placement == "colocated"
        return self.uses_engines and self.schedule.reopens and again

    def shared_bytes(self, weight_bytes: int) -> int:
        """What weight syncs through the memory of a machine move into it, of a trainer rank that holds so many bytes of
        weights: them and staging. FP8 weights are dequantized into a temporary, and everything then goes by way of staging."""
        held = 0 if self.trainer.fp8_parameters else weight_bytes
        return held * (2 if self.keeps_seed else 1) + 2 * (self.sync.bucket_mebibytes << 20)

    @property
    def rollouts_per_step(self) -> int:
        """How many rollouts a step that samples has on record: of all its prompts, the spare ones too."""
        prompts = sum(source.prompts_per_step + source.spare_prompts for source in self.data.sources)
        return prompts * self.algorithm.samples_per_prompt

    @property
    def run_directory(self) -> Path:
        """`run.directory` as a path."""
        return Path(self.run.directory)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to another process as JSON: what a user's own file defines can be imported there only by reading it again.
        Its rules have been checked here."""
        return _received, (self.model_dump_json(),)

    @property
    def broken_rules(self) -> list[str]:
        """A sentence for every combination of options that cannot work."""
        owners = (broken_rules, broken_algorithm_rules, *([] if self.sft.checkpoint_out else [broken_rollout_rules]))
        broken: list[str] = []
        for rules in owners:
            try:
                broken += rules(self)
            except ConfigError as error:  # of a part that an option names and that cannot be loaded
                broken += map(str, error.faults)
        return list(dict.fromkeys(broken))

    @model_validator(mode="after")
    def _checked(self, info: ValidationInfo) -> RunConfig:
        if info.context != CHECKED and (broken := self.broken_rules):
            raise PydanticCustomError(RULES, "{text}", {"text": "\n".join(broken), "sentences": broken})
        return self


def _received(text: str) -> RunConfig:
    return RunConfig.model_validate_json(text, context=CHECKED)


class Reading(NamedTuple):
    """What came of reading a configuration. Where only rules on combinations are broken the configuration is whole beside the
    faults, for whoever wants to look further."""

    config: RunConfig | None  # None where the file is not TOML
    faults: list[ConfigError]
    unread: frozenset[str] = frozenset()  # sections with a value that cannot be used: they stand at their defaults


def load_config(path: str | Path, overrides: Sequence[str] | None = None) -> RunConfig:
    """Reads a TOML file, applies `section.key=value` overrides (values as TOML, bare words as strings; without a value the
    option is as if the file did not set it), validates.

    Raises ConfigError, whose `faults` are all that is wrong: each a sentence that names key, rule, value and fix.
    """
    reading = read_config(path, overrides)
    if reading.config is None or reading.faults:
        raise combined(reading.faults)
    return reading.config


def read_config(path: str | Path, overrides: Sequence[str] | None = None) -> Reading:
    """The configuration, or as much of it as can be used, with all that is wrong."""
    if isinstance(overrides, str) or not all(isinstance(text, str) for text in overrides or ()):
        raise ConfigError(
            f"overrides must be a list of texts that each read section.key=value; found {overrides!r}: make it one"
        )
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # with or without a byte order mark
    except OSError as error:
        why = error.strerror
        fix = "name the configuration first" if "=" in path.name else meant(str(path), "CONFIG", "check the path")
        return Reading(None, [ConfigError(f"configuration file {path} cannot be read: {why}; {fix}")])
    except UnicodeDecodeError as error:
        found = error.object[error.start : error.start + 1]
        why = f"must be UTF-8; found byte {found!r} at {error.start}: save it as UTF-8"
        return Reading(None, [ConfigError(f"configuration file {path} {why}")])
    except tomllib.TOMLDecodeError as error:
        return Reading(None, [ConfigError(f"configuration file {path} is not TOML: {error}; mend that line")])
    except (RecursionError, ValueError) as error:  # lists within lists without an end; a NUL in the name of the file
        return Reading(None, [ConfigError(f"configuration file {path} cannot be read as TOML: {error}; mend it")])
    faults = []
    for text in overrides or []:
        try:
            _apply_override(tree, text)
        except ConfigError as error:
            faults.append(error)
    return _validated_tree(tree, faults)


def override(config: RunConfig, changes: Mapping[str, Any] | None = None, /, **more: Any) -> RunConfig:
    """The configuration with options set anew, checked as `load_config` checks it. A key is an option's full name
    ("sync.sync_interval", "data.mix[0].prompts_per_step") or a section's, whose value is then a table of options:

        override(config, {"sync.sync_interval": 10}, run={"directory": "runs/b", "seed": 1})

    Raises ConfigError, whose `faults` are all that is wrong.
    """
    if changes is not None and not isinstance(changes, Mapping):
        raise ConfigError(f"changes must map names of options to values; found {changes!r}: write {{'section.key': value}}")
    tree = _plain(config.model_dump(exclude_unset=True))  # a default may follow another choice
    faults = []
    for key, value in [*(changes or {}).items(), *more.items()]:
        try:
            for name, option in _named(key, value).items():
                changed = os.fspath(option) if isinstance(option, os.PathLike) else deepcopy(option)
                _set(tree, name, changed, f"{name} = {option!r}")
        except ConfigError as error:
            faults.append(error)
    reading = _validated_tree(tree, faults)
    if reading.config is None or reading.faults:
        raise combined(reading.faults)
    return reading.config


def _named(key: Any, value: Any) -> dict[str, Any]:
    """The options that one entry of `override` sets, by their full names. ConfigError for what is no name, and for a section
    that is not given a table."""
    if not isinstance(key, str):
        raise ConfigError(f"override {key!r} must be the name of an option, a text such as 'sync.sync_interval'; write it so")
    if key not in RunConfig.model_fields:
        return {key: value}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(
            f"override {key} is a section, which takes a table of options, such as {{'key': value}}; found {value!r}: name an "
            f"option of it as '{key}.key', or give a table"
        )
    return {f"{key}.{name}": option for name, option in value.items()}


def validated(section: type[Table], name: str, values: dict[str, Any]) -> Table:
    """One table of a configuration by itself, from `values` that no file holds (the whole tree with no
    name); raises ConfigError as `load_config`."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise combined([ConfigError(sentence) for sentence in _sentences(error, *([name] if name else []))]) from error


def load_tree(tree: dict[str, Any]) -> RunConfig:
    """The configuration of a tree that no file holds; raises ConfigError as `load_config`."""
    reading = _validated_tree(tree, [])
    if reading.config is None or reading.faults:
        raise combined(reading.faults)
    return reading.config


def _validated_tree(tree: dict[str, Any], faults: list[ConfigError]) -> Reading:
    try:
        return Reading(RunConfig.model_validate(tree), faults)
    except ValidationError as error:
        faults = faults + [ConfigError(sentence) for sentence in _sentences(error, tree=tree)]
        unread = frozenset(str(complaint["loc"][0]) for complaint in error.errors() if complaint["type"] != RULES)
    readable = {name: table for name, table in tree.items() if name not in unread}
    return Reading(RunConfig.model_validate(UNREAD | readable, context=CHECKED), faults, unread)


def _plain(value: Any) -> Any:
    """Tables and lists that can be changed, as TOML gives them."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (tuple, list)) else value


def _apply_override(tree: dict[str, Any], text: str) -> None:
    key, equals, written = text.partition("=")
    if not equals or not key.strip():
        blank = "; blanks beside the equals sign need quotes around the whole" if key.count(".") or not key.strip() else ""
        raise ConfigError(f"override {text!r} {FORM}{blank}")
    if not written.strip():
        _unset(tree, key.strip(), text)
        return
    try:
        document = tomllib.loads(f"value = {written}")
    except tomllib.TOMLDecodeError:
        if written.strip()[0] in "\"'":
            raise ConfigError(
                f"override {text!r} must close the quote that its value begins with; found none: add it"
            ) from None
        document = {"value": written}
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"override {brief(text)} must have a value that can be read; found {error}: shorten it") from error
    if document.keys() != {"value"}:
        raise ConfigError(f"override {text!r} {FORM}")
    value = document["value"]
    _set(tree, key.strip(), value, text)


def _set(tree: dict[str, Any], key: str, value: Any, text: str) -> None:
    """Sets the option of that name in the tree. ConfigError quotes `text`."""
    if not KEY.fullmatch(key):
        raise ConfigError(f"override {text!r} {FORM}{_guessed(key)}")
    parts = [int(number) if number else name for number, name in re.findall(r"\[(\d+)\]|(\w+)", key)]
    at: Any = tree
    named = ""
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        if isinstance(part, int) and not (isinstance(at, list) and part < len(at)):
            found = f"{len(at)} tables" if isinstance(at, list) else "no list"
            raise ConfigError(
                f"override {text!r}: {named}[{part}] must be one of the list's; found {found} in {named}: add it first"
            )
        if isinstance(part, str) and not isinstance(at, dict):
            raise ConfigError(
                f"override {text!r}: {named} is not a section; it {FORM}; `semion check --toml` prints the sections"
            )
        named += f"[{part}]" if isinstance(part, int) else f".{part}" if named else part
        if following is None:
            at[part] = value
        else:
            at = at[part] if isinstance(part, int) else at.setdefault(part, [] if isinstance(following, int) else {})


def _guessed(key: str) -> str:
    """What may be meant by a name that is no section.key, to add to a sentence."""
    section, dot, option = key.replace("-", "_").rpartition(".")
    near = f"{section}.{option}" if dot and KEY.fullmatch(f"{section}.{option}") else _elsewhere(option)
    return f"; did you mean {near}?" if near else ""


def _unset(tree: dict[str, Any], key: str, text: str) -> None:
    """Takes the option out of the tree, where it is in it."""
    section, _, option = key.rpartition(".")
    if not KEY.fullmatch(key) or option.endswith("]"):
        raise ConfigError(f"override {text!r} {FORM}")
    at: Any = tree
    for number, name in re.findall(r"\[(\d+)\]|(\w+)", section):
        try:
            at = at[int(number)] if number else at[name]
        except (KeyError, IndexError, TypeError):
            return
    if isinstance(at, dict) and isinstance(at.get(option), (dict, list)):
        raise ConfigError(f"override {text!r} {FORM}")
    if isinstance(at, dict):
        at.pop(option, None)


def _sentences(error: ValidationError, *table: str, tree: Mapping[str, Any] | None = None) -> list[str]:
    """The complaints of pydantic about the whole `tree` or one table, a sentence an option with key, rule, value and fix."""
    by_place: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for complaint in error.errors():
        by_place.setdefault(tuple(_location(*table, *complaint["loc"])), []).append(complaint)
    sentences = []
    for place, complaints in [*by_place.items()][:MAX_TOLD]:
        if complaints[0]["type"] == RULES:
            sentences += complaints[0]["ctx"]["sentences"]
        else:
            sentences.append(_sentence(list(place), complaints, tree))
    if (more := len(by_place) - MAX_TOLD) > 0:
        sentences.append(f"configuration: {more} more options must be mended; found wrong ones as those above: begin with them")
    return sentences


def _sentence(location: list[str], complaints: list[ErrorDetails], tree: Mapping[str, Any] | None) -> str:
    first = complaints[0]
    key = ".".join(location) or "configuration"
    if first["type"] == "extra_forbidden":
        return f"{key} is not an option; found {brief(first['input'])}: {_meant(location, tree)}"
    if first["type"] == "missing" and len(location) == 1:
        return f"section [{key}] is required and missing: add it to the file"
    if first["type"] == "missing":
        override = f" or as {key}=..." if len(location) == 2 else ""
        return f"{key} is required and missing: set it in the file{override}"
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    rules = "; or ".join(dict.fromkeys(e["msg"][0].lower() + e["msg"][1:] for e in complaints))
    fix = _rewritten(complaints) or f"change the value ({_description(location, tree)})"
    return f"{key}: {rules}; found {brief(first['input'])}: {fix}"


def _meant(location: list[str], tree: Mapping[str, Any] | None) -> str:
    """What is offered for a name that is no option: the nearest one of its section or of all, or a list."""
    names = sorted(_table(location, tree).model_fields)
    if near := get_close_matches(location[-1][:MAX_GUESSED].lower(), names, 1):
        return f"did you mean {'.'.join([*location[:-1], near[0]])}?"
    if found := _elsewhere(location[-1]):
        return f"did you mean {found}?"
    return f"the {'options' if len(location) > 1 else 'sections'} there are {', '.join(names)}"


def _elsewhere(name: str) -> str:
    """The options of any section that are called nearly so; empty without one."""
    everywhere: dict[str, list[str]] = {}
    for section, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for option in field.annotation.model_fields:
                everywhere.setdefault(option, []).append(f"{section}.{option}")
    near = get_close_matches(name[:MAX_GUESSED].lower(), everywhere, 1, 0.8)
    return " or ".join(everywhere[near[0]]) if near else ""


def _rewritten(complaints: list[ErrorDetails]) -> str:
    """How a value that is nearly right is written; empty where none is seen."""
    found = complaints[0]["input"]
    kinds = {complaint["type"] for complaint in complaints}
    if isinstance(found, str):
        if kinds & {"int_type", "float_type"} and re.fullmatch(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", found, re.IGNORECASE):
            return f"write {found} without quotes"
        if kinds & {"bool_type", "bool_parsing"} and found.lower() in ("true", "yes", "on", "false", "no", "off"):
            return f"write {'true' if found.lower() in ('true', 'yes', 'on') else 'false'}"
        allowed = re.findall(
            r"'([^']+)'", " ".join(str(complaint.get("ctx", {}).get("expected", "")) for complaint in complaints)
        )
        near = [word for word in allowed if word.lower() == found.lower()] or get_close_matches(
            found[:MAX_GUESSED].lower(), allowed, 1
        )
        return f"write {near[0]!r}" if near else ""
    if kinds & {"bool_type"} and found in (0, 1) and not isinstance(found, bool):
        return f"write {'true' if found else 'false'}"
    if kinds & {"int_type", "int_from_float"} and isinstance(found, float) and found.is_integer():
        return f"write {int(found)}"
    if kinds == {"string_type"} and isinstance(found, (int, float)):
        text = str(found).lower() if isinstance(found, bool) else str(found)
        return f"write it in quotes, on a command line '\"{text}\"'"
    return ""


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


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The options of a tree by their full names: {"sync.sync_interval": 10, "data.mix[0].train": "b.jsonl"}."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif _holds_tables(value):
            for index, table in enumerate(value):
                found |= flat(table, f"{prefix}{name}[{index}].")
        else:
            found[f"{prefix}{name}"] = value
    return found


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
    return [f"# {key} is unset" if value is None else f"{key} = {toml(value)}" for key, value in single.items()]


def _holds_tables(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and any(isinstance(element, dict) for element in value)


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml(key)} = {toml(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    # JSON's escapes are TOML's, except that TOML wants DEL escaped too.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
