r"""The process that judges answers to problems, started by engine/rewards/pool/workers.py: Math-Verify on the answer that
answers.py finds in a completion, and then the objections of answers.py and exact.py. Deadline and memory are
engine/rewards/pool/worker.py's.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Float

from engine.rewards.math.answers import boxed_answer, is_value, other_base, plain, says_more
from engine.rewards.math.exact import CHAIN_TOLERANCE, differ, objects
from engine.rewards.pool.worker import Loaded, run

WARM_UP = (r"\frac{1}{2}", r"x^2 + \sqrt{3} \le 5", r"(1, \pi)", r"\{1, 2\}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}")
LATEX = re.compile(r"(?<!\\)\$.+\$|\\\(.+\\\)|\\\[.+\\\]|\\boxed\s*\{", re.DOTALL)
BOX_ONLY = (LatexExtractionConfig(boxed_match_priority=0),)
APPROXIMATELY = re.compile(r"\\approx\b|~=")

Parsed = list[Any]  # of Math-Verify: a sympy object where it could make one, and the normalised text


def judge(gold: str, text: str, wants_value: bool) -> tuple[float, str]:
    """(1.0 or 0.0, status) of an answer against the gold one; with `wants_value` an expression that is still to compute
    does not equal a number. May run for ever: only for a killable process.

    Where the answer has a box, the last one is judged and nothing else; else Math-Verify's default extraction finds what
    looks like an answer, LaTeX or a plain expression.
    """
    expected = _parse_gold(gold)
    if not expected:
        return 0.0, "unparsable"
    text = plain(text)
    content = boxed_answer(text)
    if content is None:
        found: Parsed = parse(text, parsing_timeout=None)
    else:
        found = _parse_box(content, expected)
    right = bool(found) and verify(expected, found, timeout_seconds=None) and not _refused(expected, found, content)
    if right and wants_value:
        right = is_value(str(found[-1]), gold=str(expected[-1]))
    return float(right), "ok"


@lru_cache(maxsize=64)  # the rollouts of one prompt come together
def _parse_gold(gold: str) -> Parsed:
    gold = plain(gold)
    expected: Parsed = parse(gold if LATEX.search(gold) else rf"\boxed{{{gold}}}", parsing_timeout=None)
    return expected


def _parse_box(content: str, expected: Parsed) -> Parsed:
    """The content of a box; of `a \\approx b` the a, or the b where a is no number or the gold answer is a decimal."""
    parts = [_parse_latex(part) for part in APPROXIMATELY.split(content)]
    if len(parts) == 1 or not all(parts):
        return parts[0]
    first, last = parts[0], parts[-1]
    if getattr(first[0], "free_symbols", True):
        return last
    if differ(first[0], last[0], CHAIN_TOLERANCE):
        return []
    return last if isinstance(expected[0], Float) else first


def _parse_latex(content: str) -> Parsed:
    found: Parsed = parse(rf"\boxed{{{content}}}", BOX_ONLY, extraction_mode="first_match", parsing_timeout=None)
    return found


def _refused(expected: Parsed, found: Parsed, content: str | None) -> bool:
    """Whether there is an objection to what Math-Verify calls equal; none to the same text."""
    if content is not None and says_more(content):
        return True
    if found[-1] == expected[-1]:
        return False
    gold, answer = str(expected[-1]), str(found[-1])
    return other_base(gold, answer) or objects(expected[0], found[0], degrees=r"\circ" in answer)


def load(_: list[str]) -> Loaded:
    """The judge, warmed up: its child starts with what most answers need."""
    logging.disable(logging.CRITICAL)
    for expression in WARM_UP:
        judge(expression, rf"\boxed{{{expression}}} or ${expression}$ or 2/3", True)
    return Loaded(judge)


if __name__ == "__main__":
    run(load, silent=True)
