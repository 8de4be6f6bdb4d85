"""Every option as a person reads it: its default, allowed values, unit and what it is, from the declarations in options.py and
in the files of the losses. docs/options.md, `semion options` and the file of `semion init` are made of it; nothing else says
what an option is. It reads no configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from engine.config.options import LOSSES, PURE, AlgorithmOptions, Options, Unit

NUMBERS = {int: "integer", float: "number"}
WORDS: dict[Any, str] = {str: "text", bool: "true or false", NoneType: "unset", **NUMBERS}
SIGNS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


@dataclass(frozen=True, slots=True)
class OptionText:
    """One option in words."""

    section: str
    name: str
    default: str  # as JSON, "required", or "null" for one that is unset
    values: str  # the type and its bounds, or the values that there are
    unit: str  # of its number; empty where it has none
    text: str  # what it is

    @property
    def sentence(self) -> str:
        """What it is, its unit first."""
        if self.unit in ("", PURE.name):
            return self.text
        return f"{'share ' if self.unit == 'of 1' else ''}{self.unit}: {self.text}"

    @property
    def allowed(self) -> str:
        """The values with their unit."""
        return f"{self.values}, {self.unit}" if self.unit else self.values


@dataclass(frozen=True, slots=True)
class SectionText:
    """A table of a configuration, or what one loss adds to [algorithm]."""

    name: str
    loss: str | None
    text: str
    options: tuple[OptionText, ...]

    @property
    def title(self) -> str:
        """As documents head it."""
        return f"[{self.name}]" + (f" with loss = {self.loss!r}" if self.loss else "")


def sections() -> Iterator[SectionText]:
    """Every table in the order of a file; after [algorithm] what each loss adds to it."""
    for name, field in Options.model_fields.items():
        section: Any = AlgorithmOptions if name == "algorithm" else field.annotation
        yield _section(name, None, section, set())
        if name == "algorithm":
            for loss in LOSSES.names:
                yield _section(name, loss, LOSSES.load(loss).Options, set(AlgorithmOptions.model_fields))


def _section(name: str, loss: str | None, section: type[BaseModel], known: set[str]) -> SectionText:
    options = tuple(_option(name, key, field) for key, field in section.model_fields.items() if key not in known)
    return SectionText(name, loss, " ".join((section.__doc__ or "").split()), options)


def _option(section: str, name: str, field: FieldInfo) -> OptionText:
    default = "required" if field.is_required() else json.dumps(field.default)
    return OptionText(section, name, default, _values(field), ", ".join(units(field)), field.description or "")


def units(field: FieldInfo) -> list[str]:
    """The units of an option's numbers, each once."""
    return list(dict.fromkeys(meta.name for meta in _metadata(field) if isinstance(meta, Unit)))


def is_number(annotation: Any) -> bool:
    """Whether some value of this type is a number."""
    return annotation in NUMBERS or any(is_number(inner) for inner in get_args(annotation) if not isinstance(inner, str))


def _metadata(field: FieldInfo) -> list[Any]:
    return [*field.metadata, *_nested(field.annotation)]


def _nested(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield from annotation.__metadata__
    for inner in get_args(annotation):
        yield from _nested(inner)


def _values(field: FieldInfo) -> str:
    """The type of an option and its bounds, as people write them."""
    bounds = [text for meta in field.metadata if (text := _bounds(meta))]
    return ", ".join([_kind(field.annotation), *bounds])


def _kind(annotation: Any) -> str:
    """A type in words: its values where it lists them."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(json.dumps(value) for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_kind, inner)))
    if origin is Annotated:
        return " ".join([_kind(inner[0]), *(text for meta in inner[1:] if (text := _bounds(meta)))])
    if origin is tuple:
        return f"list of {_kind(inner[0])}"
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return "table"
    return WORDS[annotation]


def _bounds(meta: Any) -> str:
    parts = meta.metadata if isinstance(meta, FieldInfo) else (meta,)
    found = [f"{sign} {value}" for part in parts for name, sign in SIGNS if (value := getattr(part, name, None)) is not None]
    return ", ".join(found)
