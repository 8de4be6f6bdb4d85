r"""Which rows of a public dataset a run may learn from, and why not the others: NuminaMath without proofs, multiple choice and
synthetic problems, WildChat's first turns (arXiv 2506.21495, sections 3.1 and 3.2). Files and splits are prepare.py's.

The paper names the kinds it leaves out, not how it finds them. Ours, on the text alone:
proof: "prove" or "disprove" anywhere; "show that" and its like as an order (not "records show that"); "give a proof"; an
answer that says "proof", "proved" or "QED".
multiple choice: three options (A), (B), (C) or A. B. C. in order; "which of the following" and its like; an answer that is
one letter A to F, or several with commas.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from engine.data.forms import text_of
from engine.data.rows import first_turn, last_boxed, problem_id

SYNTHETIC_SOURCES = ("orca_math", "synthetic_amc", "synthetic_math")  # labels of AI-MO/NuminaMath-CoT

Kept = dict[str, str]  # a row to write
Judge = Callable[[str, dict[str, Any]], Kept | str]  # (where it stands, record) -> the row, or why it is left out

_ORDERED = (  # what comes before an order and not before a statement such as "records show that"
    r"(?:^|[.:;,!?)\]}$*\n]\s*|\b(?:to|and|then|also|please|you)\s+)"
)
_PROOF = re.compile(
    r"\b(?:dis)?prove\b"
    rf"|{_ORDERED}(?:show|demonstrate|verify|justify|establish|deduce|explain)\b[^.?!]{{0,30}}?\b(?:that|why)\b"
    r"|\b(?:give|write|find|provide|present)\s+(?:a|an|the)\s+(?:\w+\s+){0,2}proof\b",
    re.IGNORECASE,
)
_PROVED = {"proof", "proved", "proven", "qed", "blacksquare", "shown", "proofcomplete", "proofcompleted"}
_WRAPPED = r"(?:\\(?:text|math|rm|bf)\w*\s*\{?\s*)?"
_OPTIONS = re.compile(
    ".{0,600}?".join(rf"(?<![A-Za-z}}])\(\s*{_WRAPPED}{letter}\s*\}}?\s*\)" for letter in "ABC")
    + r"|(?:^|[\n.?:;)$}（）]|\\q?quad)\s*A\s*[.．、:：)]"
    + "".join(rf".{{0,600}}?[\s$}}）]{letter}\s*[.．、:：)]" for letter in "BC"),
    re.DOTALL,
)
_CHOICE = re.compile(r"\bwhich (?:one )?of the following\b|\bthe correct (?:option|choice)\b", re.IGNORECASE)
_LETTERS = re.compile(r"\(?[A-F]\)?(?:,\(?[A-F]\)?)*")
_LATEX_DRESS = re.compile(r"\\(?:text|math)(?:bf|rm|it|sf|tt|normal)?\s*(?=\{)|\\(?:rm|bf)\b|[{}$\s.]|\\[,;:! ]")
_SPACING = re.compile(r"\\(?:left|right|displaystyle|q?quad)\b|\\[,;:!\s()\[\]]|[\s$]+")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a public dataset becomes training data: what to read of it, what to keep, and the paper's sizes of its splits."""

    name: str
    fields: tuple[str, ...]
    judge: Judge
    validation: int
    test: int


def numinamath() -> Recipe:
    """NuminaMath-CoT, or 1.5, whose `answer`, `question_type` and `synthetic` are believed where they are."""
    fields = ("problem", "solution", "answer", "source", "question_type", "synthetic")
    return Recipe("numinamath", fields, _numinamath_row, validation=1980, test=1980)


def wildchat(languages: Collection[str] = ()) -> Recipe:
    """WildChat's first turns; of these languages only, or of all, as the paper names none. Toxic and redacted ones are left
    out, which the paper does not say. The 470 stand for its held-out prompts, which are from elsewhere."""
    wanted = frozenset(language.casefold() for language in languages)
    fields = ("conversation", "language", "toxic", "redacted")
    return Recipe("wildchat", fields, partial(_wildchat_row, wanted), validation=470, test=0)


def is_proof(problem: str, answer: str) -> bool:
    """Whether a problem asks for a proof, or its answer says that one was given."""
    return bool(_PROOF.search(problem)) or re.sub(r"\\?\btext\b|[^a-z]", "", answer.casefold()) in _PROVED


def is_multiple_choice(problem: str, answer: str) -> bool:
    """Whether a problem offers options, or its answer names one."""
    return bool(_OPTIONS.search(problem) or _CHOICE.search(problem) or _LETTERS.fullmatch(_LATEX_DRESS.sub("", answer)))


def normalized(text: str) -> str:
    """The text without what does not change a problem: case, white space, dollars, LaTeX spacing, compatible characters."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return _SPACING.sub("", text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))


def _numinamath_row(where: str, record: dict[str, Any]) -> Kept | str:
    problem, solution = text_of(where, record, "problem"), text_of(where, record, "solution")
    source, kind = text_of(where, record, "source"), text_of(where, record, "question_type")
    answer = text_of(where, record, "answer", numbers=True)
    if not problem:
        return "empty"
    if source.replace("-", "_").casefold() in SYNTHETIC_SOURCES or record.get("synthetic") is True:
        return "synthetic"
    answer = answer or last_boxed(solution) or ""
    if kind == "proof" or is_proof(problem, answer):
        return "proof"
    if kind == "MCQ" or is_multiple_choice(problem, answer):
        return "multiple_choice"
    if not answer.strip() or answer == "notfound":
        return "no_answer"
    return {"id": problem_id(problem), "problem": problem, "answer": answer, "solution": solution, "source": source}


def _wildchat_row(languages: Collection[str], where: str, record: dict[str, Any]) -> Kept | str:
    turn = first_turn(record)
    problem = text_of(where, turn, "content")
    if not problem:
        return "empty"

    def own(field: str) -> Any:
        """What is said of the turn itself, or else of the conversation."""
        return record.get(field) if turn.get(field) is None else turn[field]

    language = own("language")
    if own("toxic") is True:
        return "toxic"
    if own("redacted") is True:
        return "redacted"
    if languages and str(language).casefold() not in languages:
        return "other_language"
    return {"id": problem_id(problem), "problem": problem, "source": "wildchat", "language": str(language or "")}
