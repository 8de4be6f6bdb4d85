r"""Answers that are sets of numbers: an interval or a union of them, a condition on one unknown. Reads normal text (normal.py)
and writes intervals in such text; standard library only, no algebra.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from engine.rewards.math.forms import COMMA, LETTER_LEFT, LONE_NAME, NAME
from engine.rewards.math.normal import closing, split, without_text
from engine.rewards.math.numbers import number

_RELATION = re.compile(r"\\(le|ge|ne)(?![a-zA-Z])\s*|([<>])\s*")
_SET_BUILDER = re.compile(
    rf"\\\{{\s*(?P<name>{NAME})\s*(?:\\in\s*\\mathbb\s*\{{\s*R\s*\}}\s*)?"
    rf"(?:\||:|\\text\s*\{{\s*such that\s*\}})\s*(?P<condition>.+?)\s*\\\}}",
    re.DOTALL,
)
_MEMBER = re.compile(rf"(?:\\forall\s*)?(?P<name>{NAME})\s*\\in(?![a-zA-Z])\s*(?P<set>.+)", re.DOTALL)
_OR = re.compile(r"\s*,?\s*(?:\\lor(?![a-zA-Z])|\\text\s*\{\s*,?\s*or\s*\}|(?<![\\a-zA-Z])or(?![a-zA-Z]))\s*", re.IGNORECASE)
_AND = re.compile(
    r"\s*,?\s*(?:\\land(?![a-zA-Z])|\\text\s*\{\s*,?\s*and\s*\}|(?<![\\a-zA-Z])and(?![a-zA-Z]))\s*", re.IGNORECASE
)
_UNION = re.compile(r"\s*\\cup(?![a-zA-Z])\s*")
_REALS = re.compile(
    r"(?:for\s+)?all\s+reals?(?:\s+(?:numbers?|values?))?(?:\s+(?:of\s+)?[a-z])?"
    r"|(?:the\s+)?(?:set\s+of\s+)?(?:all\s+)?reals?\s+numbers?|(?:all\s+)?reals"
    rf"|(?:{NAME}\s+)?(?:is\s+)?(?:any|every)\s+real(?:\s+number)?|\\mathbb\s*\{{\s*R\s*\}}",
    re.IGNORECASE,
)
_POSITIVE = re.compile(
    r"\\mathbb\s*\{\s*R\s*\}\s*(?:\^\s*\{?\s*\+\s*\}?|_\s*\{\s*>\s*0\s*\})"
    r"|(?:the\s+)?(?:set\s+of\s+)?(?:all\s+)?positive\s+real(?:s|\s+numbers?)",
    re.IGNORECASE,
)
_NOT_NEGATIVE = re.compile(
    r"\\mathbb\s*\{\s*R\s*\}\s*_\s*\{\s*\\ge\s*0\s*\}"
    r"|(?:the\s+)?(?:set\s+of\s+)?(?:all\s+)?non-?\s*negative\s+real(?:s|\s+numbers?)",
    re.IGNORECASE,
)
_NATURAL = re.compile(r"(?:the\s+)?(?:set\s+of\s+)?(?:all\s+)?natural\s+numbers|\\mathbb\s*\{\s*N\s*\}", re.IGNORECASE)
_INTEGERS = re.compile(r"(?:the\s+)?(?:set\s+of\s+)?(?:all\s+)?integers|\\mathbb\s*\{\s*Z\s*\}", re.IGNORECASE)
_EXCEPT = re.compile(
    r"(?P<all>.+?)\s*(?:\\setminus|\bexcept(?:\s+for)?\b|\bother than\b|(?<=\})\s*-)\s*(?:[a-z]\s*=\s*)?"
    r"(?:\\\{\s*)?(?P<points>[^{}]+(?:\{[^{}]*\}[^{}]*)*?)(?:\s*\\\})?",
    re.IGNORECASE | re.DOTALL,
)
_NOTHING = re.compile(
    r"(?:there\s+(?:is|are)\s+)?no\s+(?:real\s+)?(?:solutions?|roots?)(?:\s+exists?)?|(?:the\s+)?empty\s+set|\\emptyset|none",
    re.IGNORECASE,
)
_EVERYTHING = r"(-\infty,\infty)"
_ENDLESS = re.compile(r"\+\s*\\infty")


@dataclass(frozen=True, slots=True)
class Region:
    """Intervals of the real line, as LaTeX, and the unknown that lies in them where it is named."""

    name: str | None
    latex: str


def region(text: str) -> Region | None:
    """The intervals that a text says, as intervals or as a condition on one unknown; None where it says something else."""
    if len(text) > 600:
        return None
    words = re.sub(r"\s+", " ", without_text(text)).strip()
    if _NOTHING.fullmatch(words):
        return Region(None, r"\emptyset")
    if _REALS.fullmatch(words):
        return Region(None, _EVERYTHING)
    for named, latex in ((_INTEGERS, r"\mathbb{Z}"), (_NATURAL, r"\mathbb{N}"), (_POSITIVE, r"(0,\infty)")):
        if named.fullmatch(words):
            return Region(None, latex)
    if _NOT_NEGATIVE.fullmatch(words):
        return Region(None, r"[0,\infty)")
    if (builder := _SET_BUILDER.fullmatch(text)) is not None:
        inside = region(builder["condition"])
        return inside if inside is not None and inside.name == builder["name"] else None
    if (member := _MEMBER.fullmatch(text)) is not None:
        inside = region(member["set"])
        return Region(member["name"], inside.latex) if inside is not None and inside.name is None else None
    if (without := _EXCEPT.fullmatch(words)) is not None and _REALS.fullmatch(without["all"].strip()):
        return _holes(None, [part.strip() for part in split(without["points"], COMMA)])
    if (intervals := _intervals(text)) is not None:
        return Region(None, intervals)
    return _condition(text)


def _holes(name: str | None, points: list[str]) -> Region | None:
    """The real line without some points; several must be numbers, so that they can be put in order."""
    if not all(points):
        return None
    if len(points) > 1:
        values = [number(point) for point in points]
        if any(value is None for value in values):
            return None
        points = [
            point for _, point in sorted(zip((value.value for value in values if value is not None), points, strict=True))
        ]
    ends = [r"-\infty", *points, r"\infty"]
    return Region(name, r"\cup".join(f"({start},{end})" for start, end in pairwise(ends)))


def _intervals(text: str) -> str | None:
    """The text, where it is intervals, in one way of writing; brackets turned outside are open ends."""
    pieces = []
    for piece in _UNION.split(text.strip()):
        if len(piece) < 5 or piece[0] not in "([]" or piece[-1] not in ")][":
            return None
        if (piece[0] == "(" or piece[0] == "[") and piece[-1] in ")]" and closing(piece, 0) != len(piece) - 1:
            return None
        ends = split(piece[1:-1], COMMA)
        if len(ends) != 2 or not all(ends):
            return None
        start, end = ("(" if piece[0] in "(]" else "["), (")" if piece[-1] in ")[" else "]")
        pieces.append(f"{start}{_ENDLESS.sub(_infinity, ends[0])},{_ENDLESS.sub(_infinity, ends[1])}{end}")
    return r"\cup".join(pieces)


def _infinity(_: re.Match[str]) -> str:
    return r"\infty"


def _condition(text: str) -> Region | None:
    """Inequalities of one unknown, joined by `or`, or by `and` or a comma; also with points that are left out."""
    pieces = split(text, _OR)
    if len(pieces) == 1:
        several: list[str] = []
        for part in (part for piece in split(text, _AND) for part in split(piece, COMMA)):
            if several and r"\ne" in several[-1] and _RELATION.search(part) is None:
                several[-1] += f",{part}"  # x \ne 2, 3
            else:
                several.append(part)
        if len(several) > 1:
            return _all_of(several)
    regions = [_inequality(piece) for piece in pieces]
    names = {found.name if found is not None else None for found in regions}
    if len(names) != 1 or None in names:
        return None
    return Region(names.pop(), r"\cup".join(found.latex for found in regions if found is not None))


_TURNED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "ne": "ne"}
_DISTANCE = re.compile(rf"\|\s*(?P<name>{NAME})\s*(?:(?P<sign>[-+])\s*(?P<centre>[^|]+?))?\s*\|")
_LEFT_OUT = re.compile(rf"\s*(?P<name>{NAME})\s*\\ne(?![a-zA-Z])\s*(?P<points>.+)", re.DOTALL)
_ONE_INTERVAL = re.compile(r"(?P<left>[\[(])(?P<start>[^,]+),(?P<end>[^,]+)(?P<right>[\])])")


def _inequality(text: str) -> Region | None:
    relations = [found[1] or found[2] for found in _RELATION.finditer(text)]
    parts = split(text, _RELATION)
    if len(parts) != len(relations) + 1 or not all(parts):
        return None
    relations = [{"<": "lt", ">": "gt"}.get(relation, relation) for relation in relations]
    if any(LONE_NAME.fullmatch(part) is None and "=" in part for part in parts):
        return None
    lone = [LONE_NAME.fullmatch(part) is not None for part in parts]
    if len(relations) == 1:
        for place in (0, 1):
            if _DISTANCE.fullmatch(parts[place]) is not None:
                relation = relations[0] if place == 0 else _TURNED[relations[0]]
                return _about_zero(parts[place], relation, parts[1 - place])
        if lone[0] == lone[1]:
            return None
        if lone[1]:
            parts.reverse()
            relations = [_TURNED[relations[0]]]
        return _half_line(parts[0], relations[0], parts[1])
    if len(relations) != 2 or not lone[1]:
        return None
    if all(relation in ("gt", "ge") for relation in relations):
        parts.reverse()
        relations = [{"gt": "lt", "ge": "le"}[relation] for relation in reversed(relations)]
    if any(relation not in ("lt", "le") for relation in relations):
        return None
    start, end = ("[" if relations[0] == "le" else "("), ("]" if relations[1] == "le" else ")")
    if r"-\infty" in parts[0].replace(" ", ""):
        start = "("
    if r"\infty" in parts[2]:
        end = ")"
    return Region(parts[1], f"{start}{_ENDLESS.sub(_infinity, parts[0])},{_ENDLESS.sub(_infinity, parts[2])}{end}")


def _all_of(pieces: list[str]) -> Region | None:
    """Where every one of some conditions on one unknown holds."""
    bounds = [piece for piece in pieces if r"\ne" not in piece]
    holes = [_LEFT_OUT.fullmatch(piece) for piece in pieces if r"\ne" in piece]
    if not 1 <= len(bounds) <= 2 or None in holes:
        return None
    found = _inequality(bounds[0]) if len(bounds) == 1 else _overlap(*map(_inequality, bounds))
    if found is None or any(hole is not None and hole["name"] != found.name for hole in holes):
        return None
    points = [point for hole in holes if hole is not None for point in split(hole["points"], COMMA)]
    return Region(found.name, latex) if (latex := _without_points(found.latex, points)) is not None else None


def _without_points(interval: str, points: list[str]) -> str | None:
    """An interval without some points, all of them numbers inside it, or its closed ends; None where that cannot be said."""
    whole = _ONE_INTERVAL.fullmatch(interval)
    if not points or whole is None:
        return interval if not points else None
    left, right = whole["left"], whole["right"]
    start, end = (None if r"\infty" in whole[name] else number(whole[name]) for name in ("start", "end"))
    found = [number(point) for point in points]
    inside: list[tuple[Fraction, str]] = []
    for point, latex in zip(found, points, strict=True):
        if (
            point is None
            or (start is None and r"\infty" not in whole["start"])
            or (end is None and r"\infty" not in whole["end"])
        ):
            return None
        if start is not None and point.value <= start.value:
            left = "(" if point.value == start.value else left
        elif end is not None and point.value >= end.value:
            right = ")" if point.value == end.value else right
        else:
            inside.append((point.value, latex))
    ends = [whole["start"], *(latex for _, latex in sorted(inside)), whole["end"]]
    pieces = [f"({one},{other})" for one, other in pairwise(ends)]
    return left + r"\cup".join(pieces)[1:-1] + right


def _about_zero(side: str, relation: str, bound: str) -> Region | None:
    """Of `|x-3| \\le 2`: the interval, or what is left of the line without it; None where the bound may be negative, and for
    the letters of complex numbers."""
    distance = _DISTANCE.fullmatch(side)
    if distance is None or distance["name"][0] in "zw" or "-" in bound or LETTER_LEFT.search(bound) is not None:
        return None
    if (value := number(bound)) is not None and value.value == 0:
        return None
    centre = distance["centre"] or ""
    if LETTER_LEFT.search(centre) is not None:
        return None
    sign = {"-": "", "+": "-", None: ""}[distance["sign"]]
    low, high = (f"{sign}{centre}-{bound}", f"{sign}{centre}+{bound}") if centre else (f"-{bound}", bound)
    written = number(f"{sign}{centre}") if centre else None
    if written is not None and value is not None and written.value.denominator == value.value.denominator == 1:
        low, high = str(written.value - value.value), str(written.value + value.value)
    latex = {
        **{"lt": f"({low},{high})", "le": f"[{low},{high}]"},
        **{"gt": rf"(-\infty,{low})\cup({high},\infty)", "ge": rf"(-\infty,{low}]\cup[{high},\infty)"},
    }.get(relation)
    return Region(distance["name"], latex) if latex is not None else None


def _half_line(name: str, relation: str, bound: str) -> Region | None:
    if re.search(rf"(?<![\\a-zA-Z]){re.escape(name)}(?![a-zA-Z])", bound) or r"\infty" in bound:
        return None
    latex = {
        **{"lt": rf"(-\infty,{bound})", "le": rf"(-\infty,{bound}]", "gt": rf"({bound},\infty)", "ge": rf"[{bound},\infty)"},
        "ne": rf"(-\infty,{bound})\cup({bound},\infty)",
    }[relation]
    return Region(name, latex)


def _overlap(first: Region | None, second: Region | None) -> Region | None:
    """Of a bound below and a bound above of one unknown: what lies between."""
    if first is None or second is None or first.name != second.name:
        return None
    lower, upper = (first, second) if first.latex.endswith(r",\infty)") else (second, first)
    below = re.fullmatch(r"([\[(].*),\\infty\)", lower.latex)
    above = re.fullmatch(r"\(-\\infty,(.*[\])])", upper.latex)
    if below is None or above is None or r"\cup" in lower.latex + upper.latex:
        return None
    return Region(first.name, f"{below[1]},{above[1]}")
