"""Problems in the NuminaMath schema, and first turns of conversations, as checked rows. Knows nothing of tokenizers,
templates or the order of training; filters are applied before a file gets here (prepare.py).
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from engine.core.boxed import boxes
from engine.core.errors import DataError, brief, combined
from engine.data.records import records, sampled

FIELDS = ("problem", "prompt", "conversation", "question", "answer", "solution", "source", "id")
MAX_FAULTS = 3  # broken rows of a file that a preflight tells


@dataclass(frozen=True, slots=True)
class Row:
    """One problem of a file."""

    problem: str
    answer: str  # the row's own, or the content of the last balanced box of the solution; may be empty but for Math-Verify
    solution: str  # empty where the row has none
    source: str  # empty where the row has none
    id: str  # empty where the row has none
    columns: str = ""  # all of them, as JSON, where they are kept


def load_rows(path: str | Path, *, needs_answer: bool = True, keep_columns: bool = False) -> list[Row]:
    """All rows of a source (see records.py for what it may be), in its order.

    A row has `problem`, or `prompt`, or a `conversation` (WildChat's form: messages with `role` and `content`) whose first
    user message it is. With `needs_answer` it has at least one of `answer` (text or a number) and `solution`; else it needs
    neither, and has an empty answer where neither gives one. `source` and `id` (text or a number) are optional, other fields
    are ignored, or all of them kept with `keep_columns`. A row without `problem` may be GSM8K's: `question`, and an `answer`
    that is worked out and ends in "#### N". Raises DataError naming file, line or row (from 1), rule, value and fix.
    """
    read = records(path, None if keep_columns else FIELDS)
    rows = [_row(where, record, needs_answer, keep_columns) for where, record in read]
    if not rows:
        raise DataError(f"{path}: a data file must hold at least one row; found none: check how it was written")
    return rows


def sample_rows(path: str | Path, needs_answer: bool = True, *, keep_columns: bool = False) -> tuple[list[Row], bool]:
    """(some rows of a source, whether they are all), for a preflight. Raises as `load_rows`, for the first few broken rows."""
    found, is_whole = sampled(path, None if keep_columns else FIELDS)
    rows: list[Row] = []
    faults: list[DataError] = []
    for where, record in found:
        try:
            rows.append(_row(where, record, needs_answer, keep_columns))
        except DataError as error:
            faults.append(error)
    if faults:
        raise combined(faults[:MAX_FAULTS])
    if not rows:
        raise DataError(f"{path}: a data file must hold at least one row; found none: check how it was written")
    return rows, is_whole


def last_boxed(text: str) -> str | None:
    r"""The content of the balanced `\boxed{...}` or `\fbox{...}` that starts last; None without one."""
    closed = [box for box in boxes(text) if box.end is not None]
    return text[closed[-1].inside : closed[-1].end] if closed else None


def _row(where: str, record: Any, needs_answer: bool, keep_columns: bool) -> Row:
    if not isinstance(record, dict):
        raise DataError(f"{where}: a row must be a JSON object with named fields; found {brief(record)}: mend it")
    columns = columns_of(where, record) if keep_columns else ""
    if record.get("problem") is None and record.get("question") is not None:
        record = _from_gsm8k(where, record)
    problem = text_of(where, record, "problem") or text_of(where, record, "prompt")
    problem = problem or text_of(where, first_turn(record), "content")
    if not problem:
        raise DataError(f"{where}: `problem` must be a text that is not empty; found {brief(record)}: add it")
    answer, solution = text_of(where, record, "answer", numbers=True), text_of(where, record, "solution")
    if not answer:
        answer = _answer_of(where, solution, required=needs_answer)
    return Row(
        problem=problem,
        answer=answer,
        solution=solution,
        source=text_of(where, record, "source"),
        id=text_of(where, record, "id", numbers=True),
        columns=columns,
    )


def columns_of(where: str, record: dict[str, Any]) -> str:
    """All of a record as JSON, for a reward that asks for it; dates and decimals are text. DataError for what JSON cannot hold,
    such as the bytes of an image."""

    def text(value: Any) -> str:
        if isinstance(value, (datetime.date, datetime.time)):
            return value.isoformat()
        if isinstance(value, decimal.Decimal):
            return str(value)
        raise DataError(
            f"{where}: a row that a reward looks at must be texts, numbers, lists and mappings; found {brief(value)}: leave "
            f"the column out"
        )

    return json.dumps(record, ensure_ascii=False, default=text)


def problem_id(problem: str) -> str:
    """The id of a problem whose row has none: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(problem.encode()).hexdigest()[:16]


def first_turn(record: dict[str, Any]) -> dict[str, Any]:
    """The first user message of a record's `conversation`; empty where there is none."""
    messages = record.get("conversation")
    turns = [m for m in messages if isinstance(m, dict) and m.get("role") == "user"] if isinstance(messages, list) else []
    return turns[0] if turns else {}


def _from_gsm8k(where: str, record: dict[str, Any]) -> dict[str, Any]:
    """A row of GSM8K in the NuminaMath schema: the whole `answer` is the solution, what follows its last #### the answer,
    without the commas that group digits."""
    solution = text_of(where, record, "answer", numbers=True)
    _, mark, final = solution.rpartition("####")
    if not mark or not final.strip():
        raise DataError(
            f"{where}: the `answer` of a row with `question` must end in #### and the result, as GSM8K's do; found "
            f"{brief(solution[-60:])}: add it, or rename `question` to `problem`"
        )
    return record | {"problem": record["question"], "solution": solution, "answer": final.strip().replace(",", "")}


def text_of(where: str, record: dict[str, Any], field: str, numbers: bool = False) -> str:
    """The field as text; empty when it is absent, null or blank. A number is written out in
    its shortest digits, without an exponent (0.00001, not 1e-05), and without a decimal point where it is whole."""
    value = record.get(field)
    if value is None:
        return ""
    if numbers and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return format(Decimal(repr(value)), "f").removesuffix(".0") if value else "0"
    if not isinstance(value, str):
        kinds = "a text or a finite number" if numbers else "a text"
        raise DataError(f"{where}: `{field}` must be {kinds}; found {brief(value)}: write it as text")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{where}: `{field}` must be whole characters; found half a pair in {brief(value)}: mend it")
    return value if value.strip() else ""


def _answer_of(where: str, solution: str, *, required: bool) -> str:
    """The solution's last box; where there is none, empty, or DataError where it is `required`."""
    answer = last_boxed(solution)
    if answer is not None and answer.strip():
        return answer
    if not required:
        return ""
    if not solution:
        raise DataError(f"{where}: a row needs `answer` or `solution`; found neither: add one, or remove the row")
    if answer is None and (box := re.search(r"\\boxed\s*\{", solution)):
        raise DataError(
            f"{where}: `solution` must close the braces of its box; found {brief(solution[box.start() :])}: "
            f"mend it, or add `answer`"
        )
    raise DataError(
        f"{where}: `solution` must hold its answer in \\boxed{{...}} when there is no `answer`; "
        f"found {brief(solution[-60:])}: add `answer`, or remove the row"
    )
