"""What of a completion counts as its answer: the end of its reasoning and its boxes; and whether a problem asks for a value.
Not what the answer says (normal.py, forms.py); standard library only, and linear in time.
"""

from __future__ import annotations

import re

from engine.core.boxed import boxes

_REASONING_TAG = re.compile(r"<(/?)(?:think(?:ing)?|thought|reason(?:ing)?|reflection|scratchpad)>", re.IGNORECASE)
_BOX_COMMAND = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
# Boxes with nothing but this between them are one answer of several parts: "$x = \boxed{1}$ or $x = \boxed{2}$".
_ENUMERATION = re.compile(
    r"(?:[\s$,;.&]|\\[()\[\] ,;]|\\q?quad\b|\\text\{\s*(?:and|or)\s*\}|(?:and|or)\b|[a-zA-Z](?:_\w|_\{\w+\})?\s*=)*"
)


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
    contents = [without_boxes(text[inside:end]) for _, inside, end in shown[first:]]
    if len(contents) == 1:
        return contents[0]
    return ",".join(dict.fromkeys(part if part.endswith("\\right.") else part.rstrip(".") for part in contents))


def without_boxes(text: str) -> str:
    """The text without the commands of boxes; what they hold stays."""
    return _BOX_COMMAND.sub("", text).strip()


_FORM_ASKED = re.compile(
    r"\b(?:express|write|give|leave)\b(?:[^.?!]{0,80}?)\b(?:as|in) (?:an? |the |its )?"
    r"(?:sum|difference|product|quotient|power|factored|exponential|expanded|scientific|prime)\b"
    r"|\bprime factori[sz]ation\b|\bunevaluated\b|\b(?:need|do|should)(?: not|n't) (?:be )?(?:evaluate|simplify|compute)",
    re.IGNORECASE,
)


def asks_for_value(problem: str) -> bool:
    """Whether a problem, as far as its words tell, asks for a number and not for a form of it ("as a product of primes")."""
    return _FORM_ASKED.search(problem) is None
