"""Questions without a gold answer, as AlpacaEval and Arena-Hard publish them. Problems that a verifier can judge are read by
rows.py; answers and their formats are evaluation/answers.py's.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from engine.benchmarks.published import Record, load_json_records, text_field
from engine.core.errors import DataError


@dataclass(frozen=True, slots=True)
class Question:
    """One instruction of a benchmark."""

    id: str  # its own, or a digest of the instruction
    instruction: str
    dataset: str  # where the benchmark says it comes from


def load_questions(path: str | Path) -> list[Question]:
    """Questions of AlpacaEval (`instruction`) or Arena-Hard (`prompt` or `turns`; `uid` or `question_id`), in file order.

    Raises DataError naming file and place; also when two questions have one id.
    """
    found: dict[str, Question] = {}
    num_before: Counter[str] = Counter()
    for where, record in load_json_records(path):
        instruction = _instruction(where, record)
        own = record.get("question_id", record.get("uid"))
        question_id = str(own) if own is not None else instruction_id(instruction, num_before)
        if question_id in found:
            raise DataError(f"{where}: an id must name one question; found {question_id!r} again: change one")
        found[question_id] = Question(question_id, instruction, str(record.get("dataset", Path(path).stem)))
    return list(found.values())


def instruction_id(instruction: str, num_before: Counter[str]) -> str:
    """Digest of the instruction; a benchmark may ask the same twice, so the second has another."""
    num_before[instruction] += 1
    return hashlib.sha256(f"{instruction}\x1f{num_before[instruction]}".encode()).hexdigest()[:16]


def _instruction(where: str, record: Record) -> str:
    turns = record.get("turns")
    if turns is None:
        return text_field(where, record, "instruction", "prompt")
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], dict):
        raise DataError(f"{where}: `turns` must hold one turn with its content; found {turns!r:.60}: keep the first")
    return text_field(where, turns[0], "content")
