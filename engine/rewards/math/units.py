r"""Units with what they are worth: `2 \text{ hours}` is `120 \text{ minutes}` and not `2 \text{ minutes}`, `45^\circ` is
`\frac{\pi}{4}`. Only where both sides name units that are known in full; what one leaves out or spells otherwise is
quantities.py's. Reads normal text (normal.py); standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from engine.rewards.math.normal import split, without_text
from engine.rewards.math.numbers import Number, number, numbers_equal
from engine.rewards.math.quantities import quantity, singular

# What one unit of each name is worth, in the smallest of its dimension. Names that may be several units are left out.
_WORTH: dict[str, dict[str, Fraction]] = {
    "length": {
        **{name: Fraction(10**power) for power, names in (
            (0, "mm millimeter millimetre"),
            (1, "cm centimeter centimetre"),
            (2, "dm decimeter decimetre"),
            (3, "m meter metre"),
            (6, "km kilometer kilometre"),
        ) for name in names.split()},
        **{name: Fraction(254, 10) * inches for inches, names in (
            (1, "in inch inche"),
            (12, "ft foot feet"),
            (36, "yd yard"),
            (63360, "mi mile"),
        ) for name in names.split()},
    },
    "time": {
        **{name: Fraction(seconds) for seconds, names in (
            (1, "s sec second"),
            (60, "min minute"),
            (3600, "h hr hour"),
            (86400, "day"),
            (604800, "week"),
        ) for name in names.split()},
        "ms": Fraction(1, 1000),
        "millisecond": Fraction(1, 1000),
    },
    "months": {"month": Fraction(1), "year": Fraction(12), "yr": Fraction(12)},
    "mass": {"mg": Fraction(1), "milligram": Fraction(1), "g": Fraction(1000), "gram": Fraction(1000)}
    | {name: Fraction(10**6) for name in ("kg", "kilogram")},
    "weight": {"oz": Fraction(1), "ounce": Fraction(1), "lb": Fraction(16), "pound": Fraction(16)},
    "money": {"cent": Fraction(1), "penny": Fraction(1), "pennie": Fraction(1), "dollar": Fraction(100), "usd": Fraction(100)},
    "capacity": {"cup": Fraction(1), "pint": Fraction(2), "quart": Fraction(4), "gallon": Fraction(16), "gal": Fraction(16)},
}  # fmt: skip
_UNITS = {name: (dimension, worth) for dimension, names in _WORTH.items() for name, worth in names.items()}
_LITRES = {
    **dict.fromkeys(("ml", "milliliter", "millilitre", "cc"), Fraction(10**3)),
    **dict.fromkeys(("cl",), Fraction(10**4)),
    **dict.fromkeys(("l", "liter", "litre"), Fraction(10**6)),
}  # in cubic millimetres
_RATES = {"mph": "mile / hour", "kph": "km / hour", "kmph": "km / hour", "kmh": "km / hour", "fps": "ft / second"}
_BEFORE = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_BEHIND = {"squared": 2, "cubed": 3}
_FRACTION = re.compile(r"\\frac\s*\{(?P<above>.+)\}\s*\{(?P<below>[^{}]+(?:\{[^{}]*\}[^{}]*)*)\}\s*$")
_TOKEN = re.compile(
    r"\s*(?:(?P<word>[a-zA-Zµ]+)\.?|\^\s*\{?\s*(?P<power>-?\d)\s*\}?|(?P<over>/)|(?P<times>\\cdot(?![a-zA-Z])|·))"
)
_SCALE = re.compile(r"\\circ\s*\}\s*(?:\\text\s*\{\s*)?([CFK])(?![a-zA-Z])")
_DEGREES = re.compile(r"\s*(?:\^\s*\{\s*\\circ\s*\}|(?:\\text\s*\{\s*)?degrees?(?:\s*\})?)\s*$")
_EQUALS = re.compile(r"\s*(?<![<>!\\])=\s*")
_COMMA = re.compile(r"\s*,\s*")
_LONGEST = 200


@dataclass(frozen=True, slots=True)
class Unit:
    """What one of a unit is worth, and of which dimensions to which power; `metres` where it is written m, which some read as
    miles."""

    dimensions: tuple[tuple[str, int], ...]
    worth: Fraction
    names: frozenset[str]


def unit(text: str) -> Unit | None:
    """The unit that a text of words, powers and strokes is; None where a part of it is not known."""
    if (fraction := _FRACTION.fullmatch(text.strip())) is not None:
        text = f"{fraction['above']} / {fraction['below']}"
    shown = re.sub(r"\bper\b", "/", without_text(text)).strip()
    powers: dict[str, int] = {}
    worth, sign, following, place = Fraction(1), 1, 1, 0
    last: tuple[dict[str, int], Fraction] | None = None
    names = []
    while place < len(shown):
        found = _TOKEN.match(shown, place)
        if found is None:
            return None
        place = found.end()
        if found["over"] is not None:
            sign = -1
        elif found["word"] is not None and found["word"] in _RATES:
            shown, place = f"{_RATES[found['word']]} {shown[place:]}".strip(), 0
        elif found["word"] is not None and (power := _BEFORE.get(found["word"].lower())) is not None:
            following = power
        elif found["word"] is not None and found["word"].lower() not in _BEHIND:
            name = singular(found["word"]) if len(found["word"]) > 1 else found["word"].replace("L", "l")
            parts = {"length": 3} if name in _LITRES else {_UNITS[name][0]: 1} if name in _UNITS else None
            if parts is None:
                return None
            names.append(name)
            last = (
                {part: sign * following * by for part, by in parts.items()},
                ((_LITRES[name] if name in _LITRES else _UNITS[name][1]) ** (sign * following)),
            )
            for part, by in last[0].items():
                powers[part] = powers.get(part, 0) + by
            worth, following = worth * last[1], 1
        elif found["power"] is not None or found["word"] is not None:
            if last is None:
                return None
            more = (int(found["power"]) if found["power"] is not None else _BEHIND[found["word"].lower()]) - 1
            for part, by in last[0].items():
                powers[part] += by * more
            worth, last = worth * last[1] ** more, None
    return Unit(tuple(sorted((part, by) for part, by in powers.items() if by)), worth, frozenset(names)) if names else None


def _amount(text: str) -> tuple[Number, str] | None:
    """The number of a quantity and the text of its unit."""
    shown = split(text, _EQUALS)[-1]
    found = quantity(shown)
    value = number(found.value)
    if value is None or found.factor != 1 or found.goes_on or not shown.startswith(found.value):
        return None
    return value, shown[len(found.value) :]


def amounts_equal(gold: str, answer: str) -> bool | None:
    """Whether two quantities in different units of one dimension are the same; None where the units are the same or not known,
    or of different dimensions, which may be a slip of the gold's."""
    if max(len(gold), len(answer)) > _LONGEST:
        return None
    scales = _SCALE.search(gold), _SCALE.search(answer)
    if scales[0] is not None and scales[1] is not None:
        return False if scales[0][1] != scales[1][1] else None
    found = _amount(gold), _amount(answer)
    if found[0] is None or found[1] is None or not (found[0][1] and found[1][1]):
        return None
    wanted, given = unit(found[0][1]), unit(found[1][1])
    if wanted is None or given is None or wanted.dimensions != given.dimensions or wanted.worth == given.worth:
        return None
    if any("m" in one.names and {"mi", "mile"} & other.names for one, other in ((wanted, given), (given, wanted))):
        return None  # m for miles
    ratio = given.worth / wanted.worth
    value = found[1][0]
    return numbers_equal(found[0][0], Number(value.value * ratio, value.form, value.percent, value.decimal))


def with_radians(text: str, other: str) -> str:
    r"""Angles in degrees as multiples of pi, where the other side has a pi and no degrees."""
    if r"\pi" not in other or r"\circ" in other or "degree" in other or r"\pi" in text:
        return text
    *names, shown = split(text, _EQUALS)
    angles = [_angle(part) for part in split(shown, _COMMA)]
    return text if None in angles else "=".join((*names, ", ".join(angle for angle in angles if angle is not None)))


def _angle(text: str) -> str | None:
    sign = _DEGREES.search(text)
    if sign is None or (value := number(text[: sign.start()])) is None:
        return None
    angle = value.value / 180
    return rf"\frac{{{angle.numerator} \pi}}{{{angle.denominator}}}"
