"""A first configuration as a commented TOML file: the values that are set with their reasons, and beside them every other
option as a comment with its default, unit and allowed values. It chooses nothing."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from engine.api.initial import Choice
from engine.api.initial_values import Value
from engine.config.load import toml
from engine.config.reference import OptionText, SectionText, sections

WIDTH = 120
HEAD = """Made by `semion init` for {model}. Run it, from this directory, with

    semion check {file}      what can be seen wrong, before anything starts
    semion plan {file}       what memory it takes, and how long a weight sync
    semion train {file}      with --resume auto it goes on from its newest checkpoint

{summary}.
"The paper" is arXiv 2506.21495. Paths are relative to the directory that a command is started in. Lines that begin with "# "
and a name are options at their defaults; docs/options.md and `semion options` explain the same."""


def text_of(choice: Choice, file: str) -> str:
    """The file."""
    head = HEAD.format(model=choice.wishes.model, file=file, summary=choice.summary)
    parts = ["\n".join(f"# {line}".rstrip() for wide in head.splitlines() for line in _wrapped(wide))]
    loss = choice.wishes.loss
    tables: dict[str, list[SectionText]] = {}
    for section in sections():
        if section.loss in (None, loss):
            tables.setdefault(section.name, []).append(section)
    for name, texts in tables.items():
        options = [option for section in texts for option in section.options]
        parts.append("\n".join(_table(name, texts[0].text, options, choice.values.get(name, {}))))
    return "\n\n".join(parts) + "\n"


def _table(name: str, text: str, options: list[OptionText], values: dict[str, Value]) -> list[str]:
    lines = [*(f"# {line}" for line in _wrapped(text)), f"[{name}]"]
    for key, (value, why) in values.items():
        lines += _line(f"{key} = {toml(value)}", why)
    for option in options:
        if option.name not in values:
            value = "..." if option.default in ("null", "required") else option.default
            unset = "unset; " if option.default == "null" and "unset" not in option.text else ""
            lines += _line(f"# {option.name} = {value}", f"{unset}{option.sentence} ({option.values})")
    return lines


def _line(code: str, comment: str) -> list[str]:
    """The code and its comment, which goes on in lines of its own where it is long."""
    first, *rest = textwrap.wrap(comment, WIDTH - 8, initial_indent=" " * (len(code) + 4), break_long_words=False) or [""]
    if len(code) + 4 + len(first.strip().split(" ")[0]) > WIDTH - 8:
        return [f"# {line}" for line in _wrapped(comment)] + [code]
    return [f"{code}  # {first.strip()}", *(f"#       {line}" for line in _again(rest))]


def _again(lines: Iterable[str]) -> list[str]:
    return textwrap.wrap(" ".join(lines), WIDTH - 8, break_long_words=False, break_on_hyphens=False)


def _wrapped(text: str) -> list[str]:
    return [text] if text.startswith("    ") or not text else textwrap.wrap(text, WIDTH - 2, break_on_hyphens=False)
