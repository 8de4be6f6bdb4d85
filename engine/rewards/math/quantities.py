r"""Words round a value: units, which golds write, spell and leave out as they like, and words that carry meaning, which they
do not. Also quantities of several units (`6 \text{ ft } 2 \text{ in}`). Reads normal text (normal.py); standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from engine.rewards.math.normal import without_text, words_of
from engine.rewards.math.numbers import Number, number

Words = frozenset[str]
NONE: Words = frozenset()

# Units, by the word without its plural's s. Only these stand for themselves outside of \text.
_NAMED_UNITS = words_of(
    "mm cm dm km nm um µm in inch inche ft foot feet yd yard mi mile meter metre centimeter centimetre millimeter "
    "millimetre kilometer kilometre nanometer micrometer mg kg gm gram gramme kilogram milligram lb pound oz ounce "
    "ton tonne stone ml dl cl liter litre milliliter millilitre gal gallon pint quart cup cc acre hectare sec "
    "second min minute hr hour day week month year yr mph kph kmph kmh rpm fps usd dollar cent penny pennie euro "
    "rupee yuan yen pence peso rs degree deg rad radian celsiu fahrenheit kelvin joule kj kwh watt kw mw volt ohm "
    "ampere amp newton pascal pa kpa atm hz khz mhz mol mole unit sq cu ev kev mev gev bit byte kb mb gb tb coulomb "
    "farad tesla henry weber lumen lux candela bar psi cal kcal calorie knot parsec ly au pc"
)
_UNIT_PARTS = words_of("square squared cubic cubed per sq cu s m g h l n j w v a k c f t d b p ms us ns hz")
_FILLING = words_of(
    "the of a an is are was it there we have total altogether in all on each way different possible exactly only "
    "just and approximately about roughly around answer final so"
)
_MULTIPLIERS = {
    **{"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12},
    **{"lakh": 10**5, "crore": 10**7, "quadrillion": 10**15},
}
# Without these the rest says something else, so that they may not be forgotten.
_CARRYING = words_of(
    "north south east west northeast northwest southeast southwest upward upwards downward downwards forward "
    "backward clockwise counterclockwise anticlockwise above below loss gain profit deficit debt increase decrease "
    "bc ad bce ce more less fewer greater least most minimum maximum negative minus not no never percent pct "
    "percentage half quarter third double twice triple pi modulo mod remainder"
) | frozenset(_MULTIPLIERS)
# Nor may these be added to a number: they go on answering.
_TURNING = words_of(
    "or not either maybe possibly perhaps wrong more less fewer greater least most than between to from before no "
    "never percent pct percentage half quarter third double twice triple times minus negative pi plus"
) | frozenset(_MULTIPLIERS)
_WORDS_WITH_DIGITS = re.compile(r"(?<![\^\d.])(?<!\^\{)(?<!\^\{-)(?<!\^-)(?<!base )(?<![a-z])\d|(?<=\d\s)\d")
_LETTERS = re.compile(r"[A-Za-zµ]+")
_COMPASS = {"n": "north", "s": "south", "e": "east", "w": "west"}  # behind degrees
_HALF_DAY = re.compile(r"\b([ap])\.\s?m\b")
_EXPONENT = r"(?:\s*\^\s*\{?\s*-?\d\s*\}?)?"
_UNIT_NAMES = "|".join(sorted(_NAMED_UNITS, key=len, reverse=True))
_BARE_UNIT = rf"(?<![\\a-zA-Z])(?:(?:{_UNIT_NAMES})(?:s|es)?)(?![a-zA-Z])\.?"
_SINGLE_UNIT = r"(?<=[\s/])(?:[mgshLNJWVAK])(?![a-zA-Z])"
_TAIL = re.compile(
    rf"(?:\s*\^\s*\{{\\circ\}}\s*[CFK]?|\s*[/·]?\s*(?:\\cdot\s*)?(?:\\text\s*\{{(?P<words>(?:[^{{}}]|\{{[^{{}}]*\}})*)\}}|(?P<unit>{_BARE_UNIT}|{_SINGLE_UNIT})){_EXPONENT})$"
)
_NO_UNIT = re.compile(r"\s*[eixyzdrnqEXYZ]\s*")  # letters of mathematics, set upright
_TAIL_LENGTH = 160  # characters of one word's group that are looked at
_CURRENCY = re.compile(r"^(?:[€£¥₹]\s*|\\text\s*\{\s*(?:Rs|USD|INR)\.?\s*\}\s*|(?:Rs|USD)\.?\s*)(?=[-\d.])")
_CURRENCY_BEHIND = re.compile(r"\s*[€£¥₹]$")
_WORD_UNIT = rf"\\text\s*\{{\s*[a-zA-Z]+\s*\}}|(?:{_UNIT_NAMES})(?:s|es)?"
_LONE_UNITS = r"m(?=\s*\}\s*\{\s*s(?![a-zA-Z]))|N(?=\s*\}\s*\{\s*[mC](?![a-zA-Z]))"  # letters are names elsewhere
_FRACTION_OF_UNITS = re.compile(
    rf"(?<=[\d}})\s])\s*\\frac\s*\{{\s*(?P<above>{_WORD_UNIT}|{_LONE_UNITS})\s*\}}"
    rf"\s*\{{\s*(?P<below>{_WORD_UNIT}|[mshLC])\s*(?P<power>\^\s*\{{\s*[23]\s*\}})?\s*\}}\s*$"
)
_FRACTION_IN_TEXT = re.compile(r"\\text\s*\{\s*\\frac\{([a-zA-Z]+)\}\{([a-zA-Z]+)(\^\{\d\})?\}\s*\}$")
_VALUE_BEHIND = re.compile(r"[\d)}\]!a-zA-Z']$")


@dataclass(frozen=True, slots=True)
class Quantity:
    """A normal text without the words behind it."""

    value: str
    words: Words  # that are no unit, singular
    units: Words
    goes_on: bool = False  # whether the words hold digits or an alternative, as a second answer does
    factor: int = 1  # of the words behind: 10**6 for a million


def quantity(text: str) -> Quantity:
    """The value and the words behind it; the whole text is the value where it is all words."""
    text = _FRACTION_IN_TEXT.sub(r"\\text{\1/\2\3}", text)
    value, words, units, goes_on = _CURRENCY_BEHIND.sub("", _CURRENCY.sub("", text)), [], [], False
    if len(value) <= 2 * _TAIL_LENGTH and (fraction := _FRACTION_OF_UNITS.search(value)) is not None:
        over = f"{_inside_text(fraction['above'])}/{_inside_text(fraction['below'])}"
        value = rf"{value[: fraction.start()].rstrip()} \text{{{over}{fraction['power'] or ''}}}"
    for _ in range(8):
        start = max(0, len(value) - _TAIL_LENGTH)
        found = _TAIL.search(value, start)
        if found is None:
            break
        rest = value[: found.start()].rstrip().rstrip("/").rstrip()
        if not rest or _VALUE_BEHIND.search(rest) is None:
            break
        if found["words"] is not None and _NO_UNIT.fullmatch(found["words"]) and not rest.endswith(r"\circ}"):
            break
        if found["words"] is not None:
            shown = found["words"].lower().replace("^{\\circ}", "")
            goes_on = goes_on or _WORDS_WITH_DIGITS.search(shown) is not None or "=" in shown
            if rest.endswith(r"\circ}"):
                shown = _COMPASS.get(shown.strip(), shown)
            words += _LETTERS.findall(_HALF_DAY.sub(r"\1m", shown))
        elif found["unit"] is not None:
            units.append(singular(found["unit"].rstrip(".").lower()))
        value = rest
    named = [singular(word) for word in words]
    factor = 1
    for word in named:
        factor *= _MULTIPLIERS.get(word, 1)
    if factor > 1 and number(value) is not None:
        named = [word for word in named if word not in _MULTIPLIERS]
    else:
        factor = 1
    units += [word for word in named if _is_unit(word)]
    left = frozenset(word for word in named if not _is_unit(word) and word not in _FILLING)
    return Quantity(value, left, frozenset(units), goes_on, factor)


def _inside_text(unit: str) -> str:
    return without_text(unit).strip()


def _is_unit(word: str) -> bool:
    return word in _NAMED_UNITS or word in _UNIT_PARTS


def singular(word: str) -> str:
    """A word without the s of its plural, in small letters."""
    word = word.lower()
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word


def words_agree(gold: Quantity, answer: Quantity) -> bool:
    """Whether the words behind two values say the same: units are not compared, a word that names what is counted may be
    left out or added, one that carries meaning may not."""
    if (
        gold.goes_on
        or answer.goes_on
        or (answer.words & {"or", "not", "maybe", "possibly", "wrong", "either"} and answer.words != gold.words)
    ):
        return False
    if gold.words == answer.words:
        return True
    if not answer.words:
        return not gold.words & _CARRYING
    if not gold.words:
        return not answer.words & _TURNING
    subset = gold.words <= answer.words or answer.words <= gold.words
    return subset and not (gold.words ^ answer.words) & (_CARRYING | _TURNING)


def scaled(found: Number, quantity: Quantity) -> Number:
    """A number times the word behind it: 3 million."""
    if quantity.factor == 1:
        return found
    return Number(found.value * quantity.factor, "scientific", found.percent, found.decimal)


# Of several units: how many of the smallest of their kind each one holds.
_KINDS: tuple[dict[str, int], ...] = (
    {"in": 1, "inch": 1, "inche": 1, "ft": 12, "foot": 12, "feet": 12, "yd": 36, "yard": 36, "mi": 63360, "mile": 63360},
    {"sec": 1, "second": 1, "s": 1, "min": 60, "minute": 60, "hr": 3600, "hour": 3600, "h": 3600, "day": 86400, "week": 604800},
    {"oz": 1, "ounce": 1, "lb": 16, "pound": 16},
    {"month": 1, "year": 12, "yr": 12},
    {"cent": 1, "penny": 1, "pennie": 1, "dollar": 100, "euro": 100},
    {
        "mm": 1,
        "millimeter": 1,
        "cm": 10,
        "centimeter": 10,
        "m": 1000,
        "meter": 1000,
        "metre": 1000,
        "km": 10**6,
        "kilometer": 10**6,
    },
    {"mg": 1, "g": 1000, "gram": 1000, "kg": 10**6, "kilogram": 10**6},
    {"ml": 1, "milliliter": 1, "l": 1000, "liter": 1000, "litre": 1000},
    {"cup": 1, "pint": 2, "quart": 4, "gallon": 16, "gal": 16},
    {"arcsecond": 1, "arcminute": 60, "degree": 3600},
)
_PIECE = re.compile(
    r"\s*(?:,|\band\b|&)?\s*(?P<amount>\d+(?:\.\d+)?(?:\s*/\s*\d+)?|\\frac\{\d+\}\{\d+\})\s*"
    r"(?P<unit>(?!and\b|or\b|base\b)[a-zA-Z]+|''|'|\"|\^\{\\circ\})\.?(?=[\s,\d&]|$)"
)
_SIGNS = {"'": "ft", "''": "in", '"': "in"}
_SIGNS_OF_DEGREES = {"'": "arcminute", "''": "arcsecond", '"': "arcsecond", "minute": "arcminute", "second": "arcsecond"}
_SIGNS_OF_HOURS = {"m": "min"}
_SIGNS_OF_FIRST = {
    **{"degree": _SIGNS_OF_DEGREES, "deg": _SIGNS_OF_DEGREES},
    **{"h": _SIGNS_OF_HOURS, "hr": _SIGNS_OF_HOURS, "hour": _SIGNS_OF_HOURS},
}


def compound(text: str) -> tuple[tuple[Fraction, str], ...]:
    """The (amount, unit) parts of a quantity of several units; empty where the text is none."""
    if len(text) > _TAIL_LENGTH:
        return ()
    shown, place, parts = without_text(text).strip(), 0, []
    while place < len(shown):
        piece = _PIECE.match(shown, place)
        if piece is None:
            return ()
        amount = number(piece["amount"].replace(" ", ""))
        if amount is None:
            return ()
        parts.append((amount.value, "degree" if "circ" in piece["unit"] else piece["unit"]))
        place = piece.end()
    if len({unit for _, unit in parts}) < max(2, len(parts)):  # a unit that comes twice makes a list
        return ()
    if any(len(unit) == 1 and unit.isalpha() and singular(unit) not in _UNIT_PARTS for _, unit in parts):
        return ()
    signs = _SIGNS_OF_FIRST.get(singular(parts[0][1]), _SIGNS)
    return tuple((amount, signs.get(singular(unit), singular(unit))) for amount, unit in parts)


def compounds_equal(gold: str, answer: str) -> bool | None:
    """Whether two texts, of which one at least has several units, are the same quantity; None where none has."""
    golds, answers = compound(gold), compound(answer)
    if not golds and not answers:
        return None
    if golds == answers:
        return True
    golds, answers = golds or _single(gold), answers or _single(answer)
    for kind in _KINDS:
        if golds and answers and all(unit in kind for _, unit in (*golds, *answers)):
            return sum(kind[unit] * amount for amount, unit in golds) == sum(kind[unit] * amount for amount, unit in answers)
    return False


def _single(text: str) -> tuple[tuple[Fraction, str], ...]:
    """The one part of a quantity of one unit; empty where the text is none."""
    found = quantity(text)
    value = number(found.value)
    return ((value.value, next(iter(found.units))),) if value is not None and len(found.units) == 1 else ()
