"""Where the boxes of a text are: `\\boxed{...}` and `\\fbox{...}`, nested and unclosed ones too. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Box:
    r"""Where a `\boxed{...}` or `\fbox{...}` of a text stands."""

    start: int  # of its backslash
    inside: int  # of its content
    end: int | None  # of its closing brace; None where the text ends before


def boxes(text: str) -> list[Box]:
    """All boxes, nested and unclosed ones too, by their start. Escaped braces do not count."""
    found: list[Box] = []
    unclosed: list[re.Match[str]] = []
    for brace in _BRACES.finditer(text):
        if brace["close"] and unclosed:
            opening = unclosed.pop()
            if opening["box"]:
                found.append(Box(opening.start(), opening.end(), brace.start()))
        elif brace["box"] or brace["open"]:
            unclosed.append(brace)
    found += [Box(opening.start(), opening.end(), None) for opening in unclosed if opening["box"]]
    return sorted(found, key=lambda box: box.start)
