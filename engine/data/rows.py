"""Problems and conversations as checked rows, whatever form their file has (forms.py). Knows nothing of tokenizers, templates
or the order of training; filters are applied before a file gets here (prepare.py).
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.core.boxed import boxes
from engine.core.errors import DataError, brief, combined
from engine.core.types import Message
from engine.data.forms import (
    ANSWERS,
    PROMPTS,
    SOLUTIONS,
    SOURCES,
    Columns,
    answer_of,
    asked,
    found,
    heads,
    marked,
    named,
    solution_of,
    text_of,
)
from engine.data.records import first_faults, records, sampled

FIELDS = heads(*PROMPTS, *ANSWERS, *SOLUTIONS, *SOURCES, "id")


@dataclass(frozen=True, slots=True)
class Row:
    """One problem of a file."""

    problem: str  # of a conversation the last user's message
    answer: str  # the row's own, or the content of the last balanced box of the solution; may be empty but for Math-Verify
    solution: str  # empty where the row has none
    source: str  # empty where the row has none
    id: str  # empty where the row has none
    columns: str = ""  # all of them, as JSON, where they are kept
    messages: tuple[Message, ...] = ()  # the whole conversation, where the problem is not all of it
    where: str = field(default="", compare=False, repr=False)  # file and line, for messages


def load_rows(
    path: str | Path, *, needs_answer: bool = True, keep_columns: bool = False, columns: Columns | None = None
) -> list[Row]:
    """All rows of a source (see records.py for what it may be), in its order.

    A row has a prompt, as a text or a list of messages, and with `needs_answer` an answer (text or a number) or a solution
    that holds it; forms.py says under which names, or `columns` does. Without `needs_answer` a row has an empty answer where it
    gives none. `source` and `id` are optional, other fields are ignored, or all of them kept with `keep_columns`. Raises the
    DataError of the first row that cannot be used: file, line or row (from 1), rule, value and fix.
    """
    rows = []
    for row in read_rows(path, needs_answer=needs_answer, keep_columns=keep_columns, columns=columns):
        if isinstance(row, DataError):
            raise row
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: a data file must hold at least one row; found none: check how it was written")
    return rows


def read_rows(
    path: str | Path, *, needs_answer: bool = True, keep_columns: bool = False, columns: Columns | None = None
) -> Iterator[Row | DataError]:
    """The rows of a source one after another, and in the place of one that cannot be used the DataError that says why: all that
    is wrong with a file can so be told at once. Arguments and sentences are those of `load_rows`. Raises DataError where the
    file as a whole cannot be read."""
    faults: list[DataError] = []
    columns = columns or {}
    for where, record in records(path, None if keep_columns else wanted_fields(FIELDS, columns), faults.append):
        yield from faults
        faults.clear()
        try:
            row = _row(where, record, needs_answer, keep_columns, columns)
        except DataError as error:
            yield error
            continue
        yield row
    yield from faults


def sample_rows(
    path: str | Path, needs_answer: bool = True, *, keep_columns: bool = False, columns: Columns | None = None
) -> tuple[list[Row], bool]:
    """(some rows of a source, whether they are all), for a preflight. Raises as `load_rows`, for the first few broken rows and
    with their number."""
    columns = columns or {}
    some, is_whole = sampled(path, None if keep_columns else wanted_fields(FIELDS, columns))
    rows: list[Row] = []
    faults: list[DataError] = []
    for where, record in some:
        try:
            if isinstance(record, DataError):
                raise record
            rows.append(_row(where, record, needs_answer, keep_columns, columns))
        except DataError as error:
            faults.append(error)
    if faults:
        raise combined(first_faults(path, faults, len(rows) + len(faults), is_whole=is_whole))
    if not rows:
        raise DataError(f"{path}: a data file must hold at least one row; found none: check how it was written")
    return rows, is_whole


def wanted_fields(fields: Iterable[str], columns: Columns) -> Collection[str]:
    """The columns to read of a file that can be read by column."""
    return {*fields, *heads(*columns.values())}


def has_columns(path: str | Path, columns: Columns | None) -> bool:
    """Whether the first row of a source has one of these columns."""
    _, first = next(iter(records(path, wanted_fields((), columns or {}))), ("", None))
    return isinstance(first, dict) and any(found(first, name) is not None for name in (columns or {}).values())


def last_boxed(text: str) -> str | None:
    r"""The content of the balanced `\boxed{...}` or `\fbox{...}` that starts last; None without one."""
    closed = [box for box in boxes(text) if box.end is not None]
    return text[closed[-1].inside : closed[-1].end] if closed else None


def object_of(where: str, record: Any) -> dict[str, Any]:
    """The record, which must be an object; DataError where it is none."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: a row must be a JSON object with named fields; found {brief(record)}: mend it")
    return record


def _row(where: str, record: Any, needs_answer: bool, keep_columns: bool, columns: Columns) -> Row:
    record = object_of(where, record)
    prompt = asked(where, record, columns)
    if not prompt.text:
        others = ", or name its column by data.columns.problem"
        raise DataError(f"{where}: `problem` must be a text that is not empty; found {brief(record)}: add it{others}")
    solution, column = solution_of(where, record, columns)
    solution = solution or prompt.response
    answer = answer_of(where, record, columns, required=needs_answer)
    if answer and not solution and prompt.column == "question":
        solution = answer  # of GSM8K, and of whoever calls a problem a question, the answer is what a model is to say
    if (result := marked(answer)) is not None:
        answer = result or _missing_result(where, answer)
    if not answer:
        answer = _answer_in(where, solution, required=needs_answer, whole=column == "output")
    label = named(where, record, columns, "source", required=False) if "source" in columns else None
    return Row(
        problem=prompt.text,
        answer=answer,
        solution=solution,
        source=text_of(where, {"source": label}, "source", numbers=True)
        or next(filter(None, (text_of(where, record, name) for name in SOURCES)), ""),
        id=text_of(where, {"id": named(where, record, columns, "id") if "id" in columns else record.get("id")}, "id", True),
        columns=columns_of(where, record) if keep_columns else "",
        messages=prompt.messages,
        where=where,
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


def identity(problem: str, messages: tuple[Message, ...]) -> str:
    """What two rows with the same prompt have in common: the problem, or the whole conversation where that is more."""
    return json.dumps(messages, ensure_ascii=False) if messages else problem


def first_turn(record: dict[str, Any]) -> dict[str, Any]:
    """The first user message of a record's `conversation`; empty where there is none."""
    messages = record.get("conversation")
    turns = [m for m in messages if isinstance(m, dict) and m.get("role") == "user"] if isinstance(messages, list) else []
    return turns[0] if turns else {}


def _missing_result(where: str, answer: str) -> str:
    raise DataError(
        f"{where}: an `answer` with #### must end in #### and the result, as GSM8K's do; found {brief(answer[-60:])}: add it"
    )


def _answer_in(where: str, solution: str, *, required: bool, whole: bool) -> str:
    """The solution's last box, or the result behind its mark; where there is neither, the solution itself where it may be the
    `whole` answer, else empty, or DataError where it is `required`."""
    answer = last_boxed(solution)
    if answer is not None and answer.strip():
        return answer
    if answer is None and (result := marked(solution)):
        return result
    if whole and answer is None:
        return solution
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
