"""What of a completion counts as its answer, as text: the end of its reasoning, its boxes, its characters, and whether it is
a number or an expression still to compute. No mathematics (exact.py), no process; standard library only, and linear in time.
"""

from __future__ import annotations

import re
import unicodedata

from engine.core.boxed import boxes

_REASONING_TAG = re.compile(r"<(/?)(?:think(?:ing)?|thought|reason(?:ing)?|reflection|scratchpad)>", re.IGNORECASE)
_BOX_COMMAND = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
# Boxes with nothing but this between them are one answer of several parts: "$x = \boxed{1}$ or $x = \boxed{2}$".
_ENUMERATION = re.compile(
    r"(?:[\s$,;.&]|\\[()\[\] ,;]|\\q?quad\b|\\text\{\s*(?:and|or)\s*\}|(?:and|or)\b|[a-zA-Z](?:_\w|_\{\w+\})?\s*=)*"
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_ROOT = re.compile(r"√(\d+)")
_SIGNS = {
    **{"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "±": r"\pm ", "≈": r"\approx "},
    **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∞": r"\infty ", "π": r"\pi ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in "},
    **{"°": r"^\circ ", "√": r"\sqrt "},
}


def after_reasoning(text: str) -> str:
    """What follows the last reasoning block; nothing where that block has no end."""
    tags = list(_REASONING_TAG.finditer(text))
    if not tags:
        return text
    return text[tags[-1].end() :] if tags[-1][1] else ""


def boxed_answer(text: str) -> str | None:
    r"""What the last box shows, without the commands of boxes inside it; empty where that box is empty or never closed;
    None without any box. Closed boxes that are listed one after the other are one answer, joined by commas."""
    all_boxes = boxes(text)
    if not all_boxes:
        return None
    shown: list[tuple[int, int, int]] = []  # outermost closed boxes
    for box in all_boxes:
        if box.end is not None and (not shown or box.start > shown[-1][2]):
            shown.append((box.start, box.inside, box.end))
    if not shown or all_boxes[-1].end is None:
        return ""
    first = len(shown) - 1
    while first and _ENUMERATION.fullmatch(text, shown[first - 1][2] + 1, shown[first][0]):
        first -= 1
    contents = (_BOX_COMMAND.sub("", text[inside:end]).strip().rstrip(".") for _, inside, end in shown[first:])
    return ",".join(dict.fromkeys(contents))


def plain(text: str) -> str:
    """The text with digits, letters, superscripts, fractions and signs of Unicode as LaTeX writes them."""
    if text.isascii():
        return text
    raised = _SUPERSCRIPT.sub(lambda found: "^{" + found[0].translate(_SUPERSCRIPTS) + "}", text)
    rooted = _ROOT.sub(r"\\sqrt{\1}", raised)
    return "".join(character if character.isascii() else _plain_character(character) for character in rooted)


def _plain_character(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    if (digit := unicodedata.decimal(character, None)) is not None:
        return str(digit)
    decomposed = unicodedata.normalize("NFKC", character)  # full width, mathematical letters, fractions
    numerator, slash, denominator = decomposed.partition("⁄")
    if slash and numerator.isdecimal() and denominator.isdecimal():
        return rf"\frac{{{numerator}}}{{{denominator}}}"
    return decomposed if decomposed.isascii() else character


_NUMBER = r"(?:\d+(?:(?:,|\{,\}| )\d{3})*(?:\.\d*)?|\.\d+)(?:\\overline\{\d+\})?"
_RATIO = rf"\\frac\{{[-+]?{_NUMBER}\}}\{{[-+]?{_NUMBER}\}}"
_VALUE = re.compile(
    rf"[-+]?(?:(?P<ratio>{_RATIO}|\d+/\d+)|\d+(?:{_RATIO}| \d+/\d+)"
    rf"|{_NUMBER}(?:(?:\\times|\\cdot|\*)10\^(?:\{{[-+]?\d+\}}|\d))?)(?:_\{{?\d+\}}?)?(?:\\?%|\^(?:\{{\\circ\}}|\\circ))?\.?"
)
_SPACING = re.compile(r"\\[,;:! ]|\\q?quad\b|\\(?:left|right)\b")
_SPACES = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # but not those between digits
_AROUND = re.compile(r"\\(?:text|math)(?:bf|rm|it)?\{([^{}]*)\}|\\\{(.*)\\\}|[\[({](.*)[\])}]", re.DOTALL)
_ASSIGNED = re.compile(r"^\s*[a-zA-Z](?:_\w|_\{\w+\})?\s*=(?=[^=]*$)")
_FORM_ASKED = re.compile(
    r"\b(?:express|write|give|leave)\b(?:[^.?!]{0,80}?)\b(?:as|in) (?:an? |the |its )?"
    r"(?:sum|difference|product|quotient|power|factored|exponential|expanded|scientific|prime)\b"
    r"|\bprime factori[sz]ation\b|\bunevaluated\b|\b(?:need|do|should)(?: not|n't) (?:be )?(?:evaluate|simplify|compute)",
    re.IGNORECASE,
)


def is_value(latex: str, gold: str) -> bool:
    """Whether the last member of a normalised answer is a number as it is written down, where the gold answer is one too:
    digits, a decimal or mixed number, a power of ten with a factor before it, and, unless the gold answer is a whole
    number, a ratio of two numbers. True where the gold answer is no such number: then nothing can be said."""
    wanted = _bare(_ASSIGNED.sub("", gold))
    if _VALUE.fullmatch(wanted) is None:
        return True
    found = _VALUE.fullmatch(_bare(latex.rsplit("=", 1)[-1]))
    return found is not None and (found["ratio"] is None or not wanted.lstrip("+-").isdecimal())


def _bare(latex: str) -> str:
    """Without spaces that say nothing and without what is put around the whole."""
    bare = _SPACES.sub("", _SPACING.sub(" ", latex))
    while around := _AROUND.fullmatch(bare):
        bare = next(inside for inside in around.groups() if inside is not None)
    return bare


def asks_for_value(problem: str) -> bool:
    """Whether a problem, as far as its words tell, asks for a number and not for a form of it ("as a product of primes")."""
    return _FORM_ASKED.search(problem) is None


_WORDS_AFTER = re.compile(r"\\(?:text|mbox|textbf|mathrm)\s*\{([^{}]*)\}(?:\^\{?\d\}?)?[\s.$]*$")
_ALTERNATIVE = re.compile(r"\b(?:or|not|either|maybe|possibly|wrong)\b|(?<![\^\d])(?<!\^\{)(?<!base )\d", re.IGNORECASE)
_BASE = re.compile(r"\w*\d_\{?(\d+)\}?")


def says_more(answer: str) -> bool:
    r"""Whether the words behind an answer, which Math-Verify drops as a unit, go on with it: `57 \text{ or 3}`."""
    words = _WORDS_AFTER.search(answer)
    return words is not None and words.start() > 0 and _ALTERNATIVE.search(words[1]) is not None


def other_base(gold: str, answer: str) -> bool:
    """Whether both name a base, and not the same one: `52_8` and `52_9`."""
    bases = [_BASE.fullmatch(_bare(latex)) for latex in (gold, answer)]
    return bases[0] is not None and bases[1] is not None and bases[0][1] != bases[1][1]
