r"""Answers of which the notation, not the value, differs: congruences, ratios of several parts, letters for any whole number
and for constants of integration, vectors, lists that name their entries, several letters of a choice, words. Each function
takes two normal texts (normal.py) and says whether they are the same, None where it cannot tell, or writes one of them as the
other is written. Standard library only, no algebra.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import permutations

from engine.rewards.math import forms
from engine.rewards.math.normal import closing, key, split, without_text

Equal = Callable[[str, str], bool]
_LONGEST = 400  # characters that are looked at

_COMMA = re.compile(r"\s*[,;]\s*")
_MODULUS = re.compile(
    r"\s*,?\s*\(?\s*(?:\\pmod|\\mod|\\bmod|\\text\s*\{\s*\(?\s*mod(?:ulo)?\s*\}|\\text\s*\{\s*\(?\s*mod(?:ulo)?(?=\s*\d)|(?<![\\a-zA-Z])mod)"
    r"\s*\{?\s*(\d+)\s*\}?\s*\)?\s*\}?\s*$"
)
_CONGRUENT = re.compile(r"\s*(?:\\equiv(?![a-zA-Z])|=)\s*")


def congruences_equal(gold: str, answer: str) -> bool | None:
    r"""The same for `x \equiv 3 \pmod 7`, with the name or without it: of one modulus, and the same residues."""
    if "mod" not in gold + answer:
        return None
    wanted, given = _residues(gold), _residues(answer)
    if wanted is None or given is None:
        found, other = (wanted, answer) if given is None else (given, gold)
        if found is None or not other.isdecimal():
            return None
        return len(found[1]) == 1 and int(other) in found[1]  # the residue, without what it is of
    same_name = not wanted[0] or not given[0] or key(wanted[0]) == key(given[0])
    return same_name and wanted[1:] == given[1:]


def _residues(text: str) -> tuple[str, frozenset[int], int] | None:
    found = _MODULUS.search(text) if len(text) <= _LONGEST else None
    if found is None or int(found[1]) == 0:
        return None
    sides = split(text[: found.start()], _CONGRUENT)
    numbers = [part.strip() for part in forms.entries(sides[-1])]
    if len(sides) > 2 or not numbers or any(re.fullmatch(r"[-+]?\d+", part) is None for part in numbers):
        return None
    name = sides[0] if len(sides) == 2 else ""
    return name, frozenset(int(part) % int(found[1]) for part in numbers), int(found[1])


_RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?){2,}")


def ratios_equal(gold: str, answer: str) -> bool | None:
    """The same for ratios of three parts or more, which may be reduced."""
    if _RATIO.fullmatch(gold) is None or _RATIO.fullmatch(answer) is None:
        return None
    golds, answers = ([Fraction(part.strip()) for part in text.split(":")] for text in (gold, answer))
    if len(golds) != len(answers):
        return False
    return all(
        one * answers[0] == other * golds[0] and (one == 0) == (other == 0) for one, other in zip(golds, answers, strict=True)
    )


_ANY_INTEGER = re.compile(
    r"\s*[,;]?\s*\(?\s*(?:\\text\s*\{\s*,?\s*(?:where|with|for|and)?\s*\}\s*)?\(?"
    r"(?:(?P<letter>[a-zA-Z])\s*\\in\s*\\mathbb\s*\{\s*(?P<set>[ZN])\s*\}"
    r"|\\text\s*\{\s*,?\s*(?:where|with|for)?\s*(?:any|some|all|every|each)?\s*(?P<kind>integers?)\s*\}\s*(?P<letter1>[a-zA-Z])"
    r"|(?P<letter2>[a-zA-Z])\s*\\text\s*\{\s*(?:is\s+)?(?:an|any)\s+(?P<kind2>integer)\s*\}"
    r"|\\text\s*\{\s*,?\s*(?:where|with|for)?\s*(?:any|some|all|every|each)?\s*(?:(?P<kind3>integers?)\s+(?P<letter3>[a-zA-Z])"
    r"|(?P<letter4>[a-zA-Z])\s+(?:is\s+)?(?:an|any)\s+(?P<kind4>integer))\s*\})\s*\)?\s*$"
)
_INTEGER_LETTERS = frozenset("nkmlNK")


def _letters(text: str) -> set[str]:
    return set(re.findall(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])", re.sub(r"\\[a-zA-Z]+", " ", text)))


def with_one_integer_letter(gold: str, answer: str) -> tuple[str, str] | None:
    r"""The two texts without `k \in \mathbb{Z}` behind them, and with the gold's letter in both; None where neither says that
    a letter is any whole number, or they say it of different numbers."""
    if max(len(gold), len(answer)) > _LONGEST or ("mathbb" not in gold + answer and "integer" not in gold + answer):
        return None
    found = [_ANY_INTEGER.search(text) for text in (gold, answer)]
    if found == [None, None] or any(clause is not None and clause.start() == 0 for clause in found):
        return None
    if found[0] is not None and found[1] is not None and (found[0]["set"] == "N") != (found[1]["set"] == "N"):
        return None
    texts = [
        text if clause is None else text[: clause.start()].strip() for text, clause in zip((gold, answer), found, strict=True)
    ]
    named: list[str] = []
    for text, clause in zip(texts, found, strict=True):
        if clause is not None:
            letter = next(clause[name] for name in ("letter", "letter1", "letter2", "letter3", "letter4") if clause[name])
        else:
            candidates = _letters(forms.members(text)[-1]) & _INTEGER_LETTERS
            if len(candidates) != 1:
                return texts[0], texts[1]
            letter = candidates.pop()
        named.append(letter)
    if named[0] != named[1] and named[0] not in _letters(texts[1]):
        texts[1] = _renamed(texts[1], {named[1]: named[0]})
    return texts[0], texts[1]


_NAME = re.compile(r"\\[a-zA-Z]+|(?P<name>[a-zA-Z](?:_\{\w\})?)")


def _renamed(text: str, names: dict[str, str]) -> str:
    return _NAME.sub(lambda found: names.get(found["name"], found[0]) if found["name"] else found[0], text)


_CONSTANT = re.compile(r"[cC]_\{\w\}")
_LAST_CONSTANT = re.compile(r"[+]\s*(?P<name>[cC])\s*$")
_MAY_BE_CONSTANT = re.compile(r"[a-dkA-DK](?:_\{\w\})?")


def _names(text: str) -> set[str]:
    return {found["name"] for found in _NAME.finditer(text) if found["name"]}


def with_the_constants_of(gold: str, answer: str) -> Iterator[str]:
    """The answer with its constants of integration in the names that the gold has for its own: `C_1` and `C_2`, or a C that is
    added at the end. At most two, in either order."""
    if max(len(gold), len(answer)) > _LONGEST or ("C" not in gold and "c" not in gold) or r"\text" in gold + answer:
        return
    golds = _names(gold)
    constants = {name for name in golds if _CONSTANT.fullmatch(name)}
    if (last := _LAST_CONSTANT.search(gold)) is not None and gold.count(last["name"]) == 1:
        constants.add(last["name"])
    elif "C" in golds and not constants and "e^" in gold:
        constants.add("C")
    answers = _names(answer) - (golds - constants)
    if not 1 <= len(constants) <= 2 or len(answers) != len(constants) or golds == constants:
        return
    if not (golds - constants) <= _names(answer) or any(_MAY_BE_CONSTANT.fullmatch(name) is None for name in answers):
        return
    for order in permutations(sorted(constants)):
        names = dict(zip(sorted(answers), order, strict=True))
        if any(name != other for name, other in names.items()):
            yield _renamed(answer, names)


_COLUMN = re.compile(r"\\begin\s*\{(?:[pb]matrix|array)\}(?:\s*\{[lcr| ]*\})?(?P<rows>.*?)\\end\s*\{\w+\}", re.DOTALL)
_TERM = re.compile(
    r"\s*(?P<sign>[-+]?)\s*(?P<factor>(?:\([^()]*\)|\\(?:frac|sqrt)\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}\s*)+|\\pi|[\w.]|\s)*?)\s*\\hat\s*\{(?P<letter>[ijk])\}"
)


def _column(text: str) -> list[str] | None:
    found = _COLUMN.fullmatch(_without_brackets(text))
    if found is None or "&" in found["rows"] or "\\begin" in found["rows"]:
        return None
    return [row.strip() for row in found["rows"].split("\\\\") if row.strip()]


def _without_brackets(text: str) -> str:
    """Without the brackets round an array."""
    shown = text.strip()
    if len(shown) > 2 and shown[0] in "([" and closing(shown, 0) == len(shown) - 1 and "\\begin" in shown[1:12]:
        return shown[1:-1].strip()
    return shown


def _tuple(text: str) -> list[str] | None:
    if not text.startswith("(") or closing(text, 0) != len(text) - 1 or not text.endswith(")"):
        return None
    parts = split(text[1:-1], _COMMA)
    return parts if len(parts) > 1 and all(parts) else None


def _components(text: str, length: int) -> list[str] | None:
    r"""Of `2\hat{i} - \hat{k}`: as many components as the other side has."""
    found, place = {}, 0
    while place < len(text):
        term = _TERM.match(text, place)
        if term is None or term["letter"] in found or (place and not term["sign"]):
            return None
        found[term["letter"]] = term["sign"].replace("+", "") + (term["factor"].strip() or "1")
        place = term.end()
        place += len(text[place:]) - len(text[place:].lstrip())
    if any("ijk".index(letter) >= length for letter in found):
        return None
    return [found.get(letter, "0") for letter in "ijk"[:length]]


def vectors_equal(gold: str, answer: str, same: Equal) -> bool | None:
    r"""The same for vectors of which one is written as a column, a tuple or a sum of unit vectors, and the other in another of
    these ways; None where they are written alike."""
    if r"\hat" not in gold + answer and r"\begin" not in gold + answer:
        return None
    (*names, gold), (*others, answer) = forms.members(gold), forms.members(answer)
    if max(len(gold), len(answer)) > _LONGEST or (names and others and key(names[0]) != key(others[0])):
        return None
    for one, other in ((gold, answer), (answer, gold)):
        first = _tuple(one) or _column(one)
        if first is None or len(first) < 2:
            continue
        second = _column(other) if _column(one) is None else None
        if second is None and r"\hat" in other:
            second = _components(other, len(first))
        if second is not None:
            return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return None


def named_in_order(gold: str, answer: str, same: Equal) -> bool | None:
    """The same for a gold that says which value is whose (`a=1, b=2`) and an answer that does not: the order decides. None
    where the names are one name with indices, or it is no such pair."""
    if gold.count("=") < 2 or "=" in answer or "\\pm" in gold + answer:
        return None
    sides = [forms.members(entry) for entry in forms.entries(gold)]
    if any(len(side) != 2 or not forms.is_name(side[0]) for side in sides):
        return None
    if len({side[0].split("_")[0].strip() for side in sides}) < len(sides):
        return None
    values = _tuple(answer) or forms.entries(answer)
    if len(values) < 2:
        return None
    return len(values) == len(sides) and all(same(side[1], value) for side, value in zip(sides, values, strict=True))


_LETTER_LIST = re.compile(r"\(?[A-H]\)?(?:\s*(?:,|;|&|\band\b|\s)\s*\(?[A-H]\)?)+")
_LETTERS_TOGETHER = re.compile(r"[A-H]{2,6}")


def letters_equal(gold: str, answer: str) -> bool | None:
    """The same for several letters of a multiple choice, as a list or written together (`AC`)."""
    shown = [re.sub(r"\s+", " ", without_text(text)).strip() for text in (gold, answer)]
    together = [text for text in shown if _LETTERS_TOGETHER.fullmatch(text)]
    listed = [sorted(re.findall("[A-H]", text)) for text in shown if _LETTER_LIST.fullmatch(text)]
    if len(listed) == 2:
        return listed[0] == listed[1] or None
    if len(together) != 1 or len(listed) != 1 or sorted(set(together[0])) != list(together[0]):
        return None
    return listed[0] == list(together[0])


_DISJUNCTION = re.compile(r"\s*\\lor(?![a-zA-Z])\s*")


def as_list(text: str) -> str:
    r"""`x=3 \lor x=5` as the list that it is."""
    if r"\lor" not in text:
        return text
    parts = split(text, _DISJUNCTION)
    return ", ".join(parts) if all("=" in part for part in parts) else text


_OF_LETTERS = re.compile(r"[a-zA-Z](?:_\{\w+\})?\s*\(\s*(?P<argument>[a-z])\s*\)")


def functions_unnamed(gold: str, answer: str) -> tuple[str, str] | None:
    """The right sides of `f(x) = ...` and `y = ...`, where y is none of their letters."""
    golds, answers = forms.members(gold), forms.members(answer)
    if len(golds) != 2 or len(answers) != 2:
        return None
    for one, other in ((golds[0], answers[0]), (answers[0], golds[0])):
        applied = _OF_LETTERS.fullmatch(one.strip())
        if applied is not None and other.strip() == "y" and applied["argument"] != "y":
            return None if "y" in _letters(golds[1]) | _letters(answers[1]) else (golds[1], answers[1])
    return None


_CIS = re.compile(
    r"\\text\s*\{\s*cis\s*\}\s*|\\operatorname\s*\{\s*cis\s*\}\s*|\\cis(?![a-zA-Z])\s*|(?<![\\a-zA-Z])cis(?![a-zA-Z])\s*"
)
_CIS_ARGUMENT = re.compile(
    r"(?P<around>\((?:[^()]|\([^()]*\))*\))|(?P<bare>(?:\\frac\{[^{}]*\}\{[^{}]*\}|\d+(?:\.\d+)?\s*\\pi|\d+(?:\.\d+)?|\\[a-zA-Z]+|[a-zA-Z])"
    r"(?:\s*\^\s*\{\s*\\circ\s*\})?(?:\s*/\s*\d+)?)"
)


def without_cis(text: str) -> str:
    r"""The text with `\cos t + i \sin t` for `cis t`."""
    if "cis" not in text:
        return text
    written, place = [], 0
    for found in _CIS.finditer(text):
        argument = _CIS_ARGUMENT.match(text, found.end())
        if argument is None or found.start() < place:
            return text
        inside = argument["around"] or f"({argument['bare']})"
        written += [text[place : found.start()], rf"(\cos {inside} + i \sin {inside})"]
        place = argument.end()
    return "".join(written) + text[place:]


_ARTICLE = re.compile(r"^(?:the|an?)\s+(?=[a-z]{3})")
_WORDS = re.compile(r"[a-z][a-z',&\- ]*")
_WORD = re.compile(r"[a-z]{3}")
_JOINT = re.compile(r",\s*(?:and|or)\b|,|&|\b(?:and|or)\b")
_SAID_OTHERWISE = {
    **dict.fromkeys(("dne", "it does not exist", "limit does not exist"), "does not exist"),
    **dict.fromkeys(
        (
            *("infinitely many solutions", "infinite solutions", "infinite number of solutions", "infinite"),
            *("there are infinitely many solutions", "infinite many solutions"),
        ),
        "infinitely many",
    ),
    **dict.fromkeys(("converges", "it converges", "series converges"), "convergent"),
    **dict.fromkeys(("diverges", "it diverges", "series diverges"), "divergent"),
}


def words_equal(gold: str, answer: str) -> bool | None:
    """Whether two answers of nothing but words say the same: articles aside, and with the parts of "A and B" in any order,
    which "A or B" is not. None where the words differ: what they mean is not known here."""
    said = [re.sub(r"\s+", " ", without_text(text)).strip(" .").lower() for text in (gold, answer)]
    if any(len(text) > _LONGEST or _WORDS.fullmatch(text) is None or _WORD.search(text) is None for text in said):
        return None
    (joined, *parts), (others_joined, *others) = _parts_of(said[0]), _parts_of(said[1])
    if parts != others:
        return None
    return joined == others_joined or "" in (joined, others_joined)


def _parts_of(said: str) -> list[str]:
    """The word that joins the parts, none where only commas do, and the parts in order."""
    joined = re.findall(r"\b(?:and|or)\b|&", said)
    parts = [_ARTICLE.sub("", part.strip()).removesuffix(" only") for part in _JOINT.split(said)]
    return [joined[0].replace("&", "and") if joined else "", *sorted(_SAID_OTHERWISE.get(part, part) for part in parts if part)]


_COUNTED = re.compile(
    r"(?:,|;|&|\band\b|\s)*(?P<amount>\d+(?:\.\d+)?(?:/\d+)?)\s+(?P<words>(?!and\b|or\b)[a-z]+(?: (?!and\b|or\b)[a-z]+)*)"
)


def counts_equal(gold: str, answer: str) -> bool | None:
    """The same for how many there are of each of several things: "12 boys and 8 girls", in any order."""
    golds, answers = _counts(gold), _counts(answer)
    if golds is None or answers is None or set(golds) != set(answers):
        return None
    return golds == answers


def _counts(text: str) -> dict[str, Fraction] | None:
    shown = re.sub(r"\s+", " ", without_text(text)).strip().lower() if len(text) <= _LONGEST else ""
    found, place = {}, 0
    while place < len(shown):
        part = _COUNTED.match(shown, place)
        if part is None or part["words"] in found or "/0" in part["amount"]:
            return None
        found[part["words"]] = Fraction(part["amount"])
        place = part.end()
    return found if len(found) > 1 else None


_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_NUMBER_WORD = re.compile(rf"(?P<sign>(?:negative|minus)\s+)?(?:(?P<word>{'|'.join(_NUMBERS)})|(?P<digits>\d+))", re.IGNORECASE)


def with_digits(text: str) -> str:
    """`7` for a text that is nothing but the word for it, up to twelve; also behind `negative`."""
    if len(text) > 40:
        return text
    found = _NUMBER_WORD.fullmatch(without_text(text).strip())
    if found is None:
        return text
    digits = found["digits"] or str(_NUMBERS.index(found["word"].lower()))
    return ("-" if found["sign"] else "") + digits
