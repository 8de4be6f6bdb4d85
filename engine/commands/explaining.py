"""`semion options`: what an option is, its default, allowed values and unit, in the terminal. It reads no configuration."""

from __future__ import annotations

import argparse
from difflib import get_close_matches

from engine.config.reference import OptionText, SectionText, sections
from engine.core.errors import ConfigError


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Which options are shown."""
    parser.add_argument("names", nargs="*", metavar="SECTION|OPTION", help="such as trainer or optimizer.eps (all sections)")


def explain(options: argparse.Namespace) -> None:
    """Prints the options that were named, or the sections there are. ConfigError for a name that is none."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    everything = list(sections())
    if not options.names:
        for section in everything:
            console.print(Text(section.title, style="bold"), Text(section.text))
        console.print("\nsemion options SECTION prints a section's options, SECTION.OPTION one of them", markup=False)
    for section in _named(everything, options.names):
        console.print(Text(section.title, style="bold"), Text(section.text))
        for option in section.options:
            console.print(_shown(option))


def _shown(option: OptionText) -> str:
    default = "required" if option.default == "required" else f"default {option.default}"
    return f"  {option.section}.{option.name}: {option.text}\n      {option.allowed}; {default}"


def _named(everything: list[SectionText], names: list[str]) -> list[SectionText]:
    """The sections, or parts of them, in the order in which they were asked for."""
    found: list[SectionText] = []
    for name in names:
        section, _, option = name.strip("[]").partition(".")
        kept = [
            SectionText(part.name, part.loss, part.text, tuple(o for o in part.options if option in ("", o.name)))
            for part in everything
            if part.name == section
        ]
        kept = [part for part in kept if part.options]
        if not kept:
            known = [part.name for part in everything] + [f"{o.section}.{o.name}" for part in everything for o in part.options]
            near = get_close_matches(name, known, 1) or get_close_matches(f"{section}.{option}", known, 1, 0.4)
            fix = (
                f"did you mean {near[0]}?" if near else f"the sections are {', '.join(dict.fromkeys(known[: len(everything)]))}"
            )
            raise ConfigError(f"{name} is neither a section nor an option; {fix}")
        found += kept
    return found
