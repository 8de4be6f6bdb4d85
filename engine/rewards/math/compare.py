r"""Whether an answer equals the gold one: as text, as written numbers, as quantities, choices and intervals, and only then by
algebra, which is Math-Verify's with the objections of exact.py. Every rewrite is applied to both sides, and what the parser
would read over is an objection. May run for ever: only for a killable process.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, MatrixBase, Set, Symbol, Tuple
from sympy.core.function import AppliedUndef

from engine.rewards.math import forms, notation, regions
from engine.rewards.math.exact import (
    contradict,
    equal_at_integers,
    is_number,
    members_of,
    objects,
    same_function,
    same_number,
    solutions_differ,
    with_imaginary_unit,
)
from engine.rewards.math.normal import key, split
from engine.rewards.math.numbers import Number, as_fractions, number, numbers_equal
from engine.rewards.math.quantities import Quantity, compounds_equal, quantity, scaled, words_agree
from engine.rewards.math.units import amounts_equal, with_radians

# Math-Verify takes `2t` for 2 tonnes and drops everything from the first word to the last brace: units are quantities.py's.
_NO_UNITS = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last")
BOX_ONLY = (LatexExtractionConfig(boxed_match_priority=0, normalization_config=_NO_UNITS),)
DEEPEST = 4  # choices in labels in approximations
_APPROXIMATELY = re.compile(r"\s*\\approx(?![a-zA-Z])\s*")
_PLUS_MINUS = re.compile(r"\\[pm][mp](?![a-zA-Z])")
_IN_BASE = re.compile(r"\w*\d_\{(\d+)\}")
_BASE = re.compile(r"_\{\d+\}$")
_LETTER = re.compile(  # of an unknown; pi is a number
    r"(?<!\\)(?<![a-zA-Z])[a-zA-Z]|\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|chi|psi|omega|Theta|Phi|Omega)"
)
_ARGUMENT = re.compile(r"[(\[].*")
_RATIO = re.compile(r"\d+(?:\.\d+)?\s*:\s*\d+(?:\.\d+)?")
_TO = re.compile(r"\s*(?:\\text\s*\{\s*to\s*\}|(?<![\\a-zA-Z])to(?![a-zA-Z]))\s*")
_LONE_LETTER = re.compile(r"[a-zA-Z]")


def equal(gold: str, answer: str, depth: int = 0) -> bool:
    """Whether two normal texts are the same answer."""
    gold, answer = forms.unlabelled(gold), forms.unlabelled(answer)
    if key(gold) == key(answer):
        return True
    gold, answer = (
        notation.with_digits(forms.in_radians(notation.without_cis(notation.as_list(text)))) for text in (gold, answer)
    )
    if not answer or not gold or depth == DEEPEST:
        return False
    counted = notation.with_one_integer_letter(gold, answer)
    if counted is not None:
        return equal(*counted, depth + 1)
    wanted_for, given_for = forms.quantified(gold), forms.quantified(answer)
    if (wanted_for.text, given_for.text) != (gold, answer):
        other_domain = wanted_for.domain and given_for.domain and wanted_for.domain != given_for.domain
        return not other_domain and equal(wanted_for.text, given_for.text, depth + 1)
    numbers = forms.grouped_by_pairs(gold), forms.grouped_by_pairs(answer)
    if numbers != (gold, answer) and equal(*numbers, depth + 1):
        return True
    ratios = _TO.sub(":", gold), _TO.sub(":", answer)
    if ratios != (gold, answer) and all(map(_RATIO.fullmatch, ratios)):
        if gold != ratios[0] and answer != ratios[1]:
            return key(ratios[0]) == key(ratios[1])  # it may be a range
        gold, answer = ratios
    notations = _notations_equal(gold, answer, depth)
    if notations is not None:
        return notations
    chosen = _choices_equal(gold, answer, depth)
    if chosen is not None:
        return chosen
    golds, answers = _alternatives(gold), _alternatives(answer)
    if len(golds) != 1 or len(answers) != 1:
        return any(equal(one, other, depth + 1) for one in golds for other in answers)
    wanted, given = regions.region(gold), regions.region(answer)
    if wanted is not None and given is not None:
        return _regions_equal(wanted, given)
    gold, answer = forms.oriented(gold), forms.oriented(answer)
    return _values_equal(gold, answer) or any(
        _values_equal(gold, renamed) for renamed in notation.with_the_constants_of(gold, answer)
    )


def _notations_equal(gold: str, answer: str, depth: int) -> bool | None:
    """The verdict where the notation decides it, None where it does not: cheap, and before any algebra."""

    def same(one: str, other: str) -> bool:
        return equal(one, other, depth + 1)

    decided = (
        notation.words_equal(gold, answer),
        notation.counts_equal(gold, answer),
        compounds_equal(gold, answer),
        amounts_equal(gold, answer),
        notation.ratios_equal(gold, answer),
        notation.congruences_equal(gold, answer),
        notation.letters_equal(gold, answer),
    )
    for verdict in decided:
        if verdict is not None:
            return verdict
    rewritten = (
        notation.functions_unnamed(gold, answer),
        (with_radians(gold, answer), with_radians(answer, gold)),
    )
    for pair in rewritten:
        if pair is not None and pair != (gold, answer):
            return same(*pair)
    vectors = notation.vectors_equal(gold, answer, same)
    return notation.named_in_order(gold, answer, same) if vectors is None else vectors


def is_value(answer: str, gold: str) -> bool:
    """Whether the last member of a normal text is a number as it is written down, where the gold answer is one too: digits, a
    decimal or mixed number, a power of ten with a factor before it, and, unless the gold answer is a whole number, a ratio
    of two numbers. True where the gold answer is no such number: then nothing can be said."""
    answer = notation.with_digits(answer)
    sides = forms.members(forms.oriented(gold))
    if len(forms.entries(gold)) > 1 or (len(sides) > 1 and not forms.is_name(sides[0])):
        return True
    wanted = _written(gold)
    if wanted is None or wanted.form == "power":
        return True
    if (chosen := forms.choice(answer)) is not None and not chosen.rest and forms.choice(gold) is not None:
        return True
    found = _written(answer)
    if found is None or (found.form == "power" and wanted.form != "scientific"):
        return False
    return found.form != "ratio" or wanted.form != "whole" or wanted.percent


def _written(text: str) -> Number | None:
    """The number that an answer comes down to as text: the last of its members, without words and base."""
    text = forms.unlabelled(text)
    if (chosen := forms.choice(text)) is not None and chosen.rest:
        text = chosen.rest
    value = quantity(split(forms.members(forms.oriented(text))[-1], _APPROXIMATELY)[-1]).value
    return number(_BASE.sub("", value))


def _choices_equal(gold: str, answer: str, depth: int) -> bool | None:
    """The same for answers to a multiple choice; None where no letter decides."""
    wanted, given = forms.choice(gold), forms.choice(answer)
    if wanted is None and given is None:
        return None
    if wanted is not None and given is not None:
        if wanted.letter.upper() != given.letter.upper():
            return False
        return not (wanted.rest and given.rest) or equal(wanted.rest, given.rest, depth + 1)
    if wanted is not None:
        return equal(wanted.rest, answer, depth + 1) if wanted.rest else None
    assert given is not None
    return True if given.rest and equal(gold, given.rest, depth + 1) else None


def _alternatives(text: str) -> list[str]:
    r"""The values that an answer with \approx names, the exact and the rounded one; none where they contradict each other,
    the text itself where it has no such sign outside of a list."""
    parts = [part for part in split(text, _APPROXIMATELY) if part]
    if len(parts) < 2 or len(forms.entries(text)) > 1:
        return [_APPROXIMATELY.sub("=", text)]
    if forms.is_name(parts[0]):
        return [f"{parts[0]}={part}" for part in parts[1:]] if _consistent(parts[1:]) else []
    sides = [forms.members(part) for part in parts]
    values = [side[-1] for side in sides]
    first = forms.is_name(sides[0][0]) if len(sides[0]) > 1 else _LETTER.search(values[0]) is None
    return parts if first and _consistent(values) else []


def _consistent(values: list[str]) -> bool:
    """Whether numbers that are called about equal are."""
    parsed = [_parsed(quantity(value).value) for value in values]
    return None not in parsed and not any(contradict(first, second) for first, second in pairwise(parsed))


def _regions_equal(gold: regions.Region, answer: regions.Region) -> bool:
    if gold.name is not None and answer.name is not None and key(gold.name).lower() != key(answer.name).lower():
        return False
    return key(gold.latex) == key(answer.latex) or _algebra(gold.latex, answer.latex)


def _values_equal(gold: str, answer: str) -> bool:
    wanted, given = quantity(gold), quantity(answer)
    if not words_agree(wanted, given):
        return False
    if key(wanted.value) == key(given.value) and wanted.factor == given.factor:
        return True
    (gold_name, gold_number), (answer_name, answer_number) = _assigned(wanted), _assigned(given)
    if gold_number is not None and answer_number is not None:
        same_name = not gold_name or not answer_name or gold_name.lower() == answer_name.lower()
        return same_name and numbers_equal(gold_number, answer_number)
    if _other_unknown(wanted.value, given.value) or _loses_parts(wanted.value, given.value):
        return False
    return _algebra(_times(wanted), _times(given), degrees=r"\circ" in answer)


def _assigned(found: Quantity) -> tuple[str, Number | None]:
    """The name and the number of `x = 5`; an empty name where there is none."""
    sides = forms.members(found.value)
    if len(sides) > 2 or (len(sides) == 2 and not forms.is_name(sides[0])):
        return "", None
    value = number(sides[-1])
    return key(sides[0]) if len(sides) == 2 else "", scaled(value, found) if value is not None else None


def _other_unknown(gold: str, answer: str) -> bool:
    """Whether two equations say what different unknowns are, the gold one a number: no algebra makes them equal."""
    golds, answers = forms.members(gold), forms.members(answer)
    if len(golds) < 2 or len(answers) < 2 or _LETTER.search(golds[-1]) is not None:
        return False
    if len(forms.entries(gold)) > 1 or len(forms.entries(answer)) > 1:
        return False
    names = golds[0].strip(), answers[0].strip()
    return all(_LONE_LETTER.fullmatch(name) for name in names) and names[0].lower() != names[1].lower()


def _times(found: Quantity) -> str:
    return found.value if found.factor == 1 else rf"{found.value} \times {found.factor}"


def _loses_parts(gold: str, answer: str) -> bool:
    """Whether Math-Verify would call two answers equal for what it reads over."""
    golds, answers = forms.members(gold), forms.members(answer)
    if forms.marks(golds[-1]) != forms.marks(answers[-1]) or (
        len(golds) > 1 and len(answers) > 1 and forms.marks(golds[0]) != forms.marks(answers[0])
    ):
        return True
    bases = [_IN_BASE.fullmatch(text) for text in (gold, answer)]
    if bases[0] is not None and bases[1] is not None and bases[0][1] != bases[1][1]:
        return True
    if _PLUS_MINUS.search(gold + answer) is None:
        lengths = len(forms.entries(gold)), len(forms.entries(answer))
        if min(lengths) > 1 and lengths[0] != lengths[1]:
            return True
        if lengths[0] > 1 == lengths[1] and len({key(entry) for entry in forms.entries(gold)}) == 1:
            return True  # the same value several times is wanted
    if (wanted := forms.angles(gold)) and (given := forms.angles(answer)) and wanted != given:
        return True
    return _is_unsolved(gold, answer)


def _is_unsolved(gold: str, answer: str) -> bool:
    """Whether the answer, or an entry of it, is an equation left to solve where a value is wanted: its left side is neither
    a name nor a number, so that its right side says nothing. The problem's own equation would be such an answer."""
    wanted = forms.members(gold)
    if len(forms.entries(gold)) == 1 and len(wanted) > 1:
        if not forms.is_name(wanted[0]) or _LETTER.search(wanted[-1]) is not None:
            return False  # an equation is wanted
    elif any(len(sides) > 1 and not forms.is_name(sides[0]) for sides in map(forms.members, forms.entries(gold))):
        return False
    for entry in forms.entries(answer):
        sides = forms.members(entry)
        if len(sides) == 1:
            continue
        if forms.is_name(sides[0]):
            if _shows_an_equation(sides):
                return True
            continue
        if _LETTER.search(sides[0]) is None and _LETTER.search("".join(sides)) is None:
            continue
        left = _parsed(sides[0])
        if left is None or not is_number(left):
            return True
        if any((side := _parsed(text)) is None or not is_number(side) for text in sides[1:]):
            return True
    return False


def _shows_an_equation(sides: list[str]) -> bool:
    """Whether a chain that begins with a name goes on with an unsolved equation: `f(x) = x^2-5x = 0`, where `A = r^2 = 9` is
    a value."""
    if len(sides) < 3 or all(_LETTER.search(side) is None for side in sides[1:-1]):
        return False
    value = number(quantity(sides[-1]).value)
    argument = _ARGUMENT.search(sides[0])
    return (value is not None and value.value == 0) or (argument is not None and _LETTER.search(argument[0]) is not None)


def _algebra(gold: str, answer: str, *, degrees: bool = False) -> bool:
    """Math-Verify's verdict on two texts that its parser reads, after cheap objections and before dear ones."""
    expected, found = _parsed(gold), _parsed(answer)
    if expected is None or found is None:
        return False
    if len(forms.members(answer)) == 1 and not _equations_in(expected) and any(map(_is_left_to_solve, _equations_in(found))):
        return False
    if not (members_of(expected) and members_of(found)):
        counted = equal_at_integers(_side(expected), _side(found))
        if counted is not None:
            return counted
    if objects(expected, found, degrees=degrees):
        return False
    if not verify(expected, found, timeout_seconds=None):
        sides = _side(expected), _side(found)
        return (same_function(*sides) or same_number(*sides)) and not (members_of(expected) and members_of(found))
    return not solutions_differ(expected, found)


def _equations_in(value: Any) -> list[Any]:
    return [part for part in (value.args if isinstance(value, Set) else (value,)) if members_of(part)]


def _is_left_to_solve(equation: Any) -> bool:
    left = members_of(equation)[0]
    return not (isinstance(left, (Symbol, AppliedUndef, Tuple)) or is_number(left))


def _side(value: Any) -> Any:
    sides = members_of(value)
    return sides[-1] if sides else value


def _parsed(latex: str) -> Any | None:
    """The sympy object of a text; None where the parser does not read all of it."""
    return _parse(forms.readable(as_fractions(latex)))


@lru_cache(maxsize=256)  # the rollouts of one prompt come together
def _parse(latex: str) -> Any | None:
    if not forms.is_readable(latex):
        return None
    found = parse(rf"\boxed{{{latex}}}", BOX_ONLY, extraction_mode="first_match", parsing_timeout=None)
    if not found or not isinstance(found[0], (Basic, MatrixBase)):
        return None
    return with_imaginary_unit(found[0])
