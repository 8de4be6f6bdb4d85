r"""The process that judges answers to problems, started by engine/rewards/pool/workers.py: finds the answer of a completion
(answers.py; Math-Verify's own search where there is no box) and compares it with the gold one (compare.py). Deadline and
memory are engine/rewards/pool/worker.py's.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

from math_verify import parse
from sympy import Basic, UnevaluatedExpr

from engine.core.boxed import boxes
from engine.rewards.math.answers import boxed_answer, without_boxes
from engine.rewards.math.compare import equal, is_value
from engine.rewards.math.normal import key, normal, plain
from engine.rewards.pool.worker import Loaded, run

WARM_UP = (r"\frac{1}{2}", r"x^2 + \sqrt{3} \le 5", r"(1, \pi)", r"\{1, 2\}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}")
SAME_IN_OTHER_WORDS = (
    r"\frac{2}{4}",
    r"5 \ge x^2+\sqrt{3}",
    r"(1, \frac{2 \pi}{2})",
    "2,1",
    r"\begin{pmatrix} 2/2 \\ 2 \end{pmatrix}",
)


@dataclass(frozen=True, slots=True)
class Gold:
    """A gold answer as it is compared."""

    text: str  # normal
    same: frozenset[str]  # as it stands, and the keys of what is the same text


def judge(gold: str, text: str, wants_value: bool) -> tuple[float, str]:
    """(1.0 or 0.0, status) of an answer against the gold one; with `wants_value` an expression that is still to compute
    does not equal a number. May run for ever: only for a killable process.

    Where the answer has a box, the last one is judged and nothing else; the gold answer itself in a box is right, letter for
    letter. Without a box Math-Verify's default extraction finds what looks like an answer, LaTeX or a plain expression.
    """
    wanted = _gold(gold)
    if wanted is None:
        return 0.0, "unparsable"
    text = plain(text)
    content = boxed_answer(text)
    if content is None:
        content = _found_in_prose(text)
    elif _is_itself(plain(gold), text):
        return 1.0, "ok"
    answer = normal(content)
    if content and (content in wanted.same or key(answer) in wanted.same):
        return 1.0, "ok"
    right = equal(wanted.text, answer) and (not wants_value or is_value(answer, gold=wanted.text))
    return float(right), "ok"


@lru_cache(maxsize=64)  # the rollouts of one prompt come together
def _gold(gold: str) -> Gold | None:
    """The gold answer, or of a solution its last box; None where there is none."""
    gold = plain(gold)
    if not gold.strip():
        return None
    boxed = boxed_answer(gold)
    shown = (without_boxes(gold) if boxed is None else boxed), without_boxes(gold)
    texts = [normal(text) for text in shown]
    return Gold(texts[0], frozenset((*shown, *map(key, texts))) - {""})


def _is_itself(gold: str, text: str) -> bool:
    """Whether the last box holds a gold answer whose braces do not match, letter for letter: then the box seems to end
    elsewhere."""
    literal = rf"\boxed{{{gold}}}"
    if boxed_answer(literal) == without_boxes(gold):
        return False
    start = text.rfind(literal)
    return start >= 0 and not any(box.start >= start + len(literal) for box in boxes(text))


def _found_in_prose(text: str) -> str:
    """What Math-Verify's own search takes for the answer of a text without a box; empty where it finds none."""
    found = parse(text, parsing_timeout=None)
    if not found:
        return ""
    percent = isinstance(found[0], Basic) and found[0].has(UnevaluatedExpr) and "%" not in str(found[-1])
    return str(found[-1]) + (r"\%" if percent else "")


def load(_: list[str]) -> Loaded:
    """The judge, warmed up: its child starts with what most answers need."""
    logging.disable(logging.CRITICAL)
    for gold, answer in zip(WARM_UP, SAME_IN_OTHER_WORDS, strict=True):
        judge(gold, rf"\boxed{{{answer}}} or ${answer}$ or 2/3", True)
    return Loaded(judge)


if __name__ == "__main__":
    run(load, silent=True)
