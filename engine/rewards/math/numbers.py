r"""Numbers as people write them (whole, decimal, repeating, mixed, a ratio, times a power of ten, a percentage) and the exact
ratio each one is; how near two of them must be. Reads normal text (normal.py); standard library only, computes no expression.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

DECIMAL_TOLERANCE = Fraction(1, 10**4)  # relative, beside Math-Verify's own six digits behind the point
PLACES = 6
LONGEST = 1000  # characters; what is longer is left to the algebra
LARGEST_EXPONENT = 400


@dataclass(frozen=True, slots=True)
class Number:
    """A number that was written down, not computed."""

    value: Fraction
    form: str  # "whole", "decimal", "ratio", "mixed", "scientific", "power"
    percent: bool = False
    decimal: bool = False  # whether its digits may have been rounded


_REPEATED = (
    r"\\(?:overline|bar)\s*\{\s*(?P<bar>\d+)\s*\}"
    r"|(?P<dots>(?:\\dot\s*\{?\s*\d\s*\}?\d*)+)|\((?P<round>\d+)\)|(?P<endless>\\ldots)"
)
_DECIMAL = re.compile(rf"(?P<whole>\d*)(?:\.(?P<digits>\d*)\s*(?:{_REPEATED})?)?")
_REPEATING = re.compile(rf"(?<![\d.])\d*\.\d*\s*(?:{_REPEATED})")
_TEN = re.compile(r"\s*(?:\\times|\\cdot|\*)?\s*(?P<ten>10)\s*\^\s*\{\s*(?P<exponent>[-+]?\d{1,4})\s*\}")
_RATIO = re.compile(
    r"\\frac\s*\{\s*(?P<sign>[-+]?)\s*(?P<above>[\d.]+)\s*\}\s*\{\s*(?P<below>[\d.]+)\s*\}|(?P<over>\d+)\s*/\s*(?P<under>\d+)"
)
_WHOLE_BEFORE = re.compile(r"(?P<whole>\d+)(?:\s+(?=\d)|\s*(?=\\frac))")
_SIGN = re.compile(r"(?:[-+]\s*)?")
_PERCENT = re.compile(r"\s*\\%$")


def number(text: str) -> Number | None:
    """The number that the whole of a normal text is; None for everything else, numbers in another base among them."""
    if len(text) > LONGEST or not text:
        return None
    shown, num_percent_signs = _PERCENT.subn("", text.strip())
    shown = _inside(shown.strip())
    sign = _SIGN.match(shown)
    assert sign is not None  # it may be empty
    found = _unsigned(shown[sign.end() :].strip())
    if found is None:
        return None
    negative = sign[0].startswith("-")
    return Number(-found.value if negative else found.value, found.form, bool(num_percent_signs), found.decimal)


_AROUND = re.compile(r"\\text\s*\{([^{}]*)\}|\((?![^()]*\()([^(),]*)\)|\{([^{}]*)\}|\\\{([^{},]*)\\\}")


def _inside(text: str) -> str:
    """Without what is put around the whole; a set of one is its element."""
    while (around := _AROUND.fullmatch(text)) is not None:
        text = next(inside for inside in around.groups() if inside is not None).strip()
    return text


def _unsigned(text: str) -> Number | None:
    ratio = _RATIO.fullmatch(text)
    if ratio is not None:
        return _ratio(ratio, "ratio")
    before = _WHOLE_BEFORE.match(text)
    if before is not None and (ratio := _RATIO.fullmatch(text, before.end())) is not None:
        part = _ratio(ratio, "mixed")
        if part is None or not 0 <= part.value < 1:
            return None
        return Number(int(before["whole"]) + part.value, "mixed", decimal=part.decimal)
    decimal = _DECIMAL.match(text)
    if decimal is None or not any(character.isdecimal() for character in decimal[0]):
        return None
    value, endless = _decimal(decimal)
    if value is None:
        return None
    rest = text[decimal.end() :].strip()
    rounded = bool(decimal["digits"]) and not endless
    if not rest:
        return Number(value, "decimal" if decimal["digits"] is not None else "whole", decimal=rounded)
    ten = _TEN.fullmatch(rest)
    if ten is not None and rest[0] != "1" and abs(int(ten["exponent"])) <= LARGEST_EXPONENT:
        return Number(value * Fraction(10) ** int(ten["exponent"]), "scientific", decimal=rounded)
    if (ten := _TEN.fullmatch(text)) is not None and text[0] == "1" and abs(int(ten["exponent"])) <= LARGEST_EXPONENT:
        return Number(Fraction(10) ** int(ten["exponent"]), "power")
    return None


def _ratio(found: re.Match[str], form: str) -> Number | None:
    above, below = (found["above"], found["below"]) if found["above"] else (found["over"], found["under"])
    try:
        value = Fraction(above) / Fraction(below)
    except (ValueError, ZeroDivisionError):
        return None
    return Number(-value if found["sign"] == "-" else value, form, decimal="." in above + below)


def _decimal(found: re.Match[str]) -> tuple[Fraction | None, bool]:
    """What a decimal number is worth, and whether its digits go on for ever; None where they do so in an unknown way."""
    whole, digits = found["whole"] or "0", found["digits"] or ""
    period = found["bar"] or found["round"] or ""
    if found["dots"]:
        period = _dotted(found["dots"])
    elif found["endless"]:
        length = _period(digits)
        if not length:
            return Fraction(int(whole + digits), 10 ** len(digits)), False
        digits, period = digits[: len(digits) - length], digits[len(digits) - length :]
    if found.lastgroup in ("bar", "round", "dots", "endless") and not period:
        return None, True
    value = Fraction(int(whole + digits), 10 ** len(digits))
    if period:
        value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(digits))
    return value, bool(period)


_DOTTED = re.compile(r"(\\dot\s*\{?\s*)?(\d)")


def _dotted(marked: str) -> str:
    """The digits that repeat: those between the first and the last dot."""
    digits = [(found[2], found[1] is not None) for found in _DOTTED.finditer(marked)]
    if not digits[-1][1] or (sum(dotted for _, dotted in digits) > 2 and not all(dotted for _, dotted in digits)):
        return ""
    return "".join(digit for digit, _ in digits)


def _period(digits: str) -> int:
    """How many digits at the end repeat what stands before them, the fewest; 0 where none do. One digit that comes twice
    at the end of others is no period."""
    if len(digits) > 2 and digits[-1] == digits[-2] != digits[-3]:
        return 0
    for length in range(1, len(digits) // 2 + 1):
        if digits[-length:] == digits[-2 * length : -length]:
            return length
    return 0


def as_fractions(text: str) -> str:
    """The text with repeating decimals as fractions, which Math-Verify cannot read otherwise."""
    if "\\" not in text and "(" not in text:
        return text
    return _REPEATING.sub(_fraction, text)


def _fraction(found: re.Match[str]) -> str:
    value = number(found[0])
    return found[0] if value is None else rf"\frac{{{value.value.numerator}}}{{{value.value.denominator}}}"


def numbers_equal(gold: Number, answer: Number) -> bool:
    """Whether two written numbers are one: exactly, or with a decimal among them to six digits behind the point and
    relative to their size. A percentage is its hundredth, and its sign may be forgotten."""
    if gold.percent == answer.percent:
        return _near(gold.value, answer.value, gold.decimal or answer.decimal)
    decimal = gold.decimal or answer.decimal
    gold_value, answer_value = (side.value / 100 if side.percent else side.value for side in (gold, answer))
    if _near(gold_value, answer_value, decimal):
        return True
    both_whole = gold.value.denominator == answer.value.denominator == 1
    return (gold.percent or both_whole) and gold.value == answer.value


def _near(gold: Fraction, answer: Fraction, decimal: bool) -> bool:
    if gold == answer:
        return True
    if not decimal or round(gold, PLACES) != round(answer, PLACES):
        return False
    return abs(gold - answer) <= DECIMAL_TOLERANCE * max(abs(gold), abs(answer))
