r"""What an answer is beside a value: a choice letter, words before the value, the name on the left of an equation, a list.
Intervals and conditions are regions.py's. Reads normal text (normal.py) and writes such text; standard library only, no
algebra.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.rewards.math.normal import closing, key, split, unwrapped, without_text, words_of

NAME = r"(?:[a-zA-Z]|\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|phi|tau|omega))(?:_\{\w+\})?"  # of an unknown
LONE_NAME = re.compile(NAME)
COMMA = re.compile(r"\s*[,;]\s*")
LETTER_LEFT = re.compile(r"(?<!\\)(?<![a-zA-Z])[a-zA-Z]")  # once commands are taken away: an unknown
# Words before a value that say that it is one.
_LABEL_WORDS = (
    r"(?:(?:so|thus|hence|therefore|and)\b,?\s*)?(?:(?:the|our|my|a|an)\s+)?"
    r"(?:(?:final|correct|required|exact|numerical|right)\s+)?"
    r"(?:answer|ans|result|solution|value|solutions|values|option|choice)\b(?:\s*(?:is|are|equals|would be|must be))?\s*[:.=]?"
    r"|(?:so|thus|hence|therefore|exactly|only|just|it is|it's|there are|there is|we get|we have"
    r"|about|approximately|roughly|around"
    r"|approx)\b[,.:]?"
)
_LABEL = re.compile(
    rf"\s*(?:\\text\s*\{{\s*(?:{_LABEL_WORDS})\s*\}}|(?<![\\a-zA-Z])(?:{_LABEL_WORDS})(?=[\s\\\d(-])|\\therefore|\\approx)\s*[:=]?",
    re.I,
)
_LABEL_IN_TEXT = re.compile(rf"\s*\\text\s*\{{\s*(?:{_LABEL_WORDS})\s+(?=[^\s}}])", re.I)


def unlabelled(text: str) -> str:
    """Without words that only announce the answer: `\\text{Answer: } 5`, `\\approx 5`."""
    for _ in range(4):
        found = _LABEL.match(text)
        if found is not None and found.end() > 0 and text[found.end() :].strip():
            text = text[found.end() :].strip()
        elif (found := _LABEL_IN_TEXT.match(text)) is not None:
            text = r"\text{" + text[found.end() :]
        else:
            break
    return unwrapped(text)


@dataclass(frozen=True, slots=True)
class Choice:
    """A letter of a multiple choice, and what stands beside it, which may be nothing."""

    letter: str
    rest: str


_LETTER = re.compile(r"(?:(?:[Oo]ption|[Cc]hoice)\s*)?(?:\(\s*([A-Ja-j])\s*\)|([A-J])\s*[.):]|\[([A-J])\]|([A-J]))\s*[.:]?")
_LETTER_AND_TEXT = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice)\s*)?(?:\(\s*([A-J])\s*\)\s*[.:]?(?![(^_'!])|([A-J])\s*[.):](?=\s|\\text|[-\d]))(.+)", re.DOTALL
)
_OTHER_LETTER = re.compile(
    r"\([A-Ja-j]\)|(?<![\\a-zA-Z])[A-J][.)]|^\s*(?:,|;|&|or\b|and\b|not\b|\\lor)"
)  # several choices are none
_WRAPPED_LETTER = re.compile(
    r"\\text\s*\{\s*(?:(?:[Oo]ption|[Cc]hoice)\s*)?(\(\s*[A-J]\s*\)|[A-J][.):]|[A-J])\s*[.:]?\s*(\}|(?=[^}]*\}))"
)


def choice(text: str) -> Choice | None:
    """The letter of an answer to a multiple choice, with the text of that choice where it is given."""
    if len(text) > 400:
        return None
    shown = text
    if (wrapped := _WRAPPED_LETTER.match(text)) is not None and "^" not in text[wrapped.end() : wrapped.end() + 1]:
        inside = wrapped[1] if len(wrapped[1]) > 1 or wrapped[2] else ""
        shown = inside + (text[wrapped.end() :] if wrapped[2] else r" \text{" + text[wrapped.end() :]) if inside else text
    alone = without_text(shown).strip()
    if (found := _LETTER.fullmatch(alone)) is not None:
        return Choice(next(letter for letter in found.groups() if letter is not None), "")
    found = _LETTER_AND_TEXT.fullmatch(shown.strip())
    if found is not None and found[3].strip() and _OTHER_LETTER.search(without_text(found[3])) is None:
        return Choice(found[1] or found[2], found[3].strip())
    return None


_EQUALS = re.compile(r"\s*(?:(?<![<>!\\])=|\\approx(?![a-zA-Z])|\\equiv(?![a-zA-Z]))\s*")
_GREEK = (
    r"\\(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi|omega"
    r"|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega|ell)"
)
_TEXT_NAME = r"\\(?:text|operatorname)\s*\{[^{}=\d+*/<>]+\}"
_MARKED = (
    r"\\(?:hat|bar|vec|tilde|overline|dot|ddot|mathcal|"
    r"mathbb|mathscr|overarc|widetilde|wideparen|overset\{\\frown\})\s*\{[^{}]*\}"
)
_ATOM = rf"(?:[a-zA-Z]|{_GREEK}|{_TEXT_NAME}|{_MARKED}|[A-Z]{{2,4}}|\\(?:max|min|deg|dim|det|arg|Pr|gcd|lcm|sup|inf|ker|rank))"
_INDEX = r"(?:\s*_\s*\{[^{}]*\})?(?:'+)?(?:\s*\^\s*\{\s*(?:-1|\\cdot|\*|\(\w\)|[TH]|\\circ)\s*\})?(?:\s*_\s*\{[^{}]*\})?"
_DERIVATIVE = (
    r"\\frac\s*\{\s*(?:d|\\partial)\s*(?:\^\{\d\})?\s*[a-zA-Z]?\s*\}"
    r"\s*\{\s*(?:d|\\partial)\s*[a-zA-Z](?:\^\{\d\})?\s*\}(?:\([^()]*\))?"
)
_PRESENTED = re.compile(
    rf"(?:m\s*)?(?:\\(?:angle|triangle|measuredangle|Delta|square|sphericalangle)\s*)?{_ATOM}{_INDEX}"
    rf"|(?:m\s*)?\\(?:angle|triangle)\s*[A-Z]{{1,4}}|\|\s*(?:[A-Zzw]|[A-Z]{{2}}|{_MARKED}){_INDEX}\s*\||\[\s*[A-Z]{{3,6}}\s*\]|{_DERIVATIVE}"
)
_APPLIED = re.compile(rf"(?P<name>{_ATOM}{_INDEX})\s*(?P<open>[(\[])")
# Letters that stand for functions, so that what follows in parentheses is an argument and no factor.
_FUNCTIONS = re.compile(r"[fghFGHPETVSQRAN](?![a-zA-Z])|\\")
_SIMPLE_ARGUMENT = re.compile(
    r"\s*(?:-?\d+(?:\.\d+)?|-?\\frac\{\d+\}\{\d+\}|[a-zA-Z]|\\pi|[a-zA-Z]\s*,\s*[a-zA-Z]|\d+\s*,\s*\d+)\s*"
)


def members(text: str) -> list[str]:
    """The sides of an equation, or of a chain of them; the whole text alone where it is none."""
    return split(text, _EQUALS)


def is_name(text: str) -> bool:
    """Whether the left side of an equation is a lone name or the application of a function, so that the right side is what
    it is worth: `x`, `AB`, `f(3)`, `\\text{Area}`, but not `x(x-3)`."""
    text = text.strip()
    if len(text) > 200:
        return False
    if _PRESENTED.fullmatch(text):
        return True
    if text.startswith("(") and closing(text, 0) == len(text) - 1 and len(names := split(text[1:-1], COMMA)) > 1:
        return all(_PRESENTED.fullmatch(name) for name in names)
    applied = _APPLIED.match(text)
    if applied is None or closing(text, applied.end() - 1) != len(text) - 1:
        return False
    name, argument = applied["name"].strip(), text[applied.end() : -1]
    letter = name[0]
    if letter != "\\" and re.search(rf"(?<![\\a-zA-Z]){letter}(?![a-zA-Z])", argument):
        return False
    return _FUNCTIONS.match(name) is not None or _SIMPLE_ARGUMENT.fullmatch(argument) is not None


def oriented(text: str) -> str:
    """An equation with its name on the left: `57=x` is `x=57`."""
    sides = members(text)
    if len(sides) == 2 and LONE_NAME.fullmatch(sides[1]) and not is_name(sides[0]) and LETTER_LEFT.search(sides[0]) is None:
        return f"{sides[1]}={sides[0]}"
    return text


_MARKED_NAME = re.compile(r"(?:\\[a-zA-Z]+|[a-zA-Z])(?:_\{\w+\})?(?:'+|\s*\^\s*\{\s*(?:T|\\top|\\dagger|H)\s*\})")
_ELLIPSIS = re.compile(r"\\ldots")


def marks(text: str) -> tuple[frozenset[str], int]:
    """What Math-Verify reads over: primes and transposes behind names, and dots that stand for the rest of a list."""
    return frozenset(key(found[0]) for found in _MARKED_NAME.finditer(text)), len(_ELLIPSIS.findall(text))


_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])\s*(?:\^\s*\{[^{}]*\}\s*)?")
_DEGREES = re.compile(
    r"(\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\}|(?<!\\)(?<![a-zA-Z])[a-zA-Z]|\\(?:alpha|beta|theta|phi)|\([^()]*\))\s*\^\s*\{\s*\\circ\s*\}"
)


def in_radians(text: str) -> str:
    """The text with the degrees in arguments of trigonometric functions in radians; the sign is dropped otherwise."""
    if "circ" not in text or _TRIGONOMETRIC.search(text) is None:
        return text
    written, place = [], 0
    for function in _TRIGONOMETRIC.finditer(text):
        if function.start() < place:
            continue
        written.append(text[place : function.end()])
        place = function.end()
        if text[place : place + 1] in ("(", "{", "["):
            end = closing(text, place) + 1 or len(text)
            written.append(_DEGREES.sub(_radians, text[place:end]))
            place = end
        elif (argument := _DEGREES.match(text, place)) is not None:
            written.append(f"({_radians(argument)})")
            place = argument.end()
    return "".join(written) + text[place:]


def _radians(found: re.Match[str]) -> str:
    return rf"\frac{{{found[1]} \pi}}{{180}}"


_LISTED = re.compile(r"\s*(?:[,;]|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![\\a-zA-Z])(?:and|or)(?![a-zA-Z]))\s*")


def entries(text: str) -> list[str]:
    """The entries of a list without brackets round it; the whole text alone where it is none."""
    return [entry for entry in split(text, _LISTED) if entry]


_SYSTEM = re.compile(
    r"(?:\\\{\s*)?\\begin\s*\{(?:array|cases|aligned|align\*?|gathered)\}"
    r"(?:\s*\{[lcr| ]*\})?(.*?)\\end\s*\{\w+\*?\}\.?",
    re.DOTALL,
)
_BOTH_SIGNS = re.compile(r"\\pm(?![a-zA-Z])")


def with_each_sign(text: str) -> str:
    r"""The two values of a text with one `\pm` inside a fraction or a root, where the parser cannot read it."""
    if len(_BOTH_SIGNS.findall(text)) != 1 or len(split(text, _BOTH_SIGNS)) > 1 or len(entries(text)) > 1:
        return text
    sides = members(text)
    if len(sides) > 2 or (len(sides) == 2 and not is_name(sides[0])):
        return text
    values = ", ".join(_BOTH_SIGNS.sub(sign, sides[-1]) for sign in "+-")
    return rf"{sides[0]}=\{{{values}\}}" if len(sides) == 2 else values


_FUNCTION = r"\\(?:log|ln|sin|cos|tan|cot|sec|csc|sinh|cosh|tanh|exp)(?![a-zA-Z])"
_OVER_FUNCTION = re.compile(  # the parser takes what follows the slash into the argument
    rf"(?P<function>{_FUNCTION}(?:\s*[_^]\s*\{{[^{{}}]*\}})*)\s*"
    r"(?P<argument>\d+(?:\.\d+)?[a-zA-Z]?|[a-zA-Z]|\\pi|\\frac\{[^{}]*\}\{[^{}]*\})"
    rf"\s*/\s*(?={_FUNCTION})"
)
_UNIT_INSIDE = re.compile(
    r"(?<=[\d}])\s*\\text\s*\{\s*(?:cm|mm|km|m|ft|feet|in|inches|kg|g|units?|degrees|square units)\.?\s*\}(?:\^\{\d\})?"
)
_UNIT_AND = re.compile(r"(?<=[\d}])\s*\\text\s*\{\s*(?:cm|mm|km|m|ft|feet|in|inches|kg|g|units?|degrees)?,?\s+(and|or)\s*\}")
_LETTER_IN_TEXT = re.compile(r"\\text\s*\{\s*([a-zA-Z])\s*\}")
_FACTORIAL_POWER = re.compile(r"(?<![a-zA-Z\d!])([a-zA-Z]|\d+|\([^()]*\))!\s*\^")
_IMAGINARY = re.compile(r"(?<=\d)i(?![a-zA-Z])")


def readable(text: str) -> str:
    """The text as Math-Verify's parser reads it: a system of equations as a list, letters out of `\\text`, powers
    of factorials in parentheses."""
    if (system := _SYSTEM.fullmatch(text)) is not None and "&" not in system[1].replace("&=", "="):
        text = ", ".join(row.strip() for row in system[1].replace("&=", "=").split("\\\\") if row.strip())
    text = _OVER_FUNCTION.sub(r"\g<function>(\g<argument>)/", with_each_sign(text))
    text = _LETTER_IN_TEXT.sub(r" \1", _UNIT_INSIDE.sub("", _UNIT_AND.sub(r" \\text{ \1 }", text)))
    return _IMAGINARY.sub(" i", _FACTORIAL_POWER.sub(r"(\1!)^", text))


_BY_PAIRS = re.compile(
    r"(?P<before>(?:[^=,()\[\]{}]*=)?(?:\s|[-+₹]|\\text\s*\{\s*(?:Rs|INR)\.?\s*\}|Rs\.?)*)"
    r"(?P<number>\d{1,2}(?:,\d{2})+,\d{3})(?![\d,])(?P<after>[^,]*)",
    re.DOTALL,
)


def grouped_by_pairs(text: str) -> str:
    """The text with 12,34,567, which may be a list as well, as the number that it is in India."""
    found = _BY_PAIRS.fullmatch(text)
    return found["before"] + found["number"].replace(",", "") + found["after"] if found is not None else text


_QUANTIFIER = re.compile(
    r"\s*,?\s*(?:\\forall(?![a-zA-Z])|\\text\s*\{\s*,?\s*for\s+(?:all|every|each|any)(?![a-zA-Z])(?P<words>[^{}]*)\})"
    r"(?P<rest>[^=,;]*)$"
)
_SAYS_NOTHING = re.compile(
    r"\\text|\b(?:real|reals|values?|numbers?|of|integers?)\b|\\in(?![a-zA-Z])|\\mathbb\s*\{[RZN]\}|[^\w<>\\]", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Quantified:
    """A text without the quantifier behind it, and what that restricts its letter to; empty where it is any."""

    text: str
    domain: str


def quantified(text: str) -> Quantified:
    """`2n \\text{ for all } n \\ge 1` is `2n`, with the domain `n \\ge 1`. A text that is nothing else stays as it is."""
    found = _QUANTIFIER.search(text) if len(text) <= 600 else None
    if found is None or not text[: found.start()].strip():
        return Quantified(text, "")
    domain = f"{found['words'] or ''} {found['rest']}"
    bare = _SAYS_NOTHING.sub(" ", without_text(domain)).strip()
    return Quantified(text[: found.start()].strip(), "" if len(bare) <= 1 else key(domain))


_ANGLE = re.compile(r"\\(?:measured)?angle(?![a-zA-Z])\s*([A-Z])([A-Z])([A-Z])(?![A-Za-z])")


def angles(text: str) -> list[tuple[str, str, str]]:
    """The angles that a text names by three points: the parser multiplies the letters, whose order matters."""
    return [(min(one, other), vertex, max(one, other)) for one, vertex, other in _ANGLE.findall(text)]


# What Math-Verify's parser knows; it takes an unknown command for the letters of its name, or drops it.
_KNOWN = words_of(
    "frac sqrt pi infty cdot times div pm mp le ge ne in notin subset cup cap setminus emptyset mathbb sin cos tan "
    "cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh arcsinh arcosh arccosh artanh arctanh log "
    "ln lg exp binom circ text operatorname sum prod int iint oint lim to max min gcd lcm det begin end alpha beta "
    "gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi chi psi omega Gamma Delta "
    "Theta Lambda Xi Pi Sigma Phi Psi Omega ell hat bar vec overline tilde lfloor rfloor lceil rceil langle rangle "
    "bmod mod pmod ldots angle triangle degree Re Im partial mathcal forall land lor sup inf dim approx equiv cr "
    "hline prime imath jmath nabla therefore because overset mathscr sgn mathfrak Vert lVert rVert"
)
_COMMANDS = re.compile(r"\\([a-zA-Z]+)")
_NUMBERS_SIDE_BY_SIDE = re.compile(r"\d \d|(?<!\d)\.\d+\.\d")


def is_readable(text: str) -> bool:
    """Whether Math-Verify's parser reads all of a text: only commands that it knows, no two numbers side by side, which it
    adds."""
    if _NUMBERS_SIDE_BY_SIDE.search(text) is not None:
        return False
    return all(command in _KNOWN for command in _COMMANDS.findall(text))
