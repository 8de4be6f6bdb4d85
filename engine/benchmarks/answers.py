"""Answers to open-ended questions, in the formats of the benchmarks that judge them: AlpacaEval 2's list of outputs and
Arena-Hard v0.1's model answers. It reads and writes both; open_ended.py samples them, judge.py compares them.

Formats: alpaca_eval 0.6 (a .json list of `dataset`, `instruction`, `output`, `generator`), and arena-hard-auto as first
released with Arena-Hard v0.1 in April 2024 (a .jsonl line of `question_id`, `answer_id`, `model_id`, `choices`, `tstamp`).
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.benchmarks.published import load_json_records, text_field
from engine.benchmarks.questions import Question, instruction_id
from engine.core.errors import ConfigError, DataError
from engine.core.jsonl import write_jsonl
from engine.observe.writing import write_json

Format = Literal["alpaca_eval", "arena_hard"]
SUFFIX: dict[Format, str] = {"alpaca_eval": ".json", "arena_hard": ".jsonl"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to a question."""

    question_id: str
    instruction: str
    output: str
    generator: str  # the model's name


def load_answers(path: str | Path, questions: Sequence[Question] | None = None) -> list[Answer]:
    """Answers in either format, told apart by their fields, in file order. Arena-Hard's name their question by id only:
    `questions` are its instructions. DataError where a field or a question is missing, ConfigError without questions."""
    by_id = {question.id: question for question in questions or ()}
    answers, num_before = [], Counter[str]()
    for where, record in load_json_records(path):
        if "choices" not in record:
            instruction = text_field(where, record, "instruction")
            question_id = instruction_id(instruction, num_before)
            output, generator = _output(where, record.get("output")), text_field(where, record, "generator")
            answers.append(Answer(question_id, instruction, output, generator))
            continue
        if questions is None:
            raise ConfigError(f"--questions is required with Arena-Hard's answers and missing; found them in {path}: name it")
        question_id = text_field(where, record, "question_id", "uid")
        if question_id not in by_id:
            raise DataError(f"{where}: must answer a question of --questions; found id {question_id!r}: name their file")
        output = _output(where, _first_turn(where, record["choices"]))
        generator = text_field(where, record, "model_id")
        answers.append(Answer(question_id, by_id[question_id].instruction, output, generator))
    if len({answer.generator for answer in answers}) > 1:
        raise DataError(f"{path}: must hold the answers of one model; found several: give each a file of its own")
    if len({answer.question_id for answer in answers}) < len(answers):
        raise DataError(f"{path}: must answer each question once; found one with several answers: keep one of them")
    return answers


def write_answers(
    path: Path, form: Format, questions: Sequence[Question], said: Sequence[tuple[str, int]], generator: str
) -> None:
    """Writes the file whole or not at all; `said` is a text and its number of tokens a question. Arena-Hard counts
    `token_len` with OpenAI's tokenizer to report a mean length; here it is the tokens sampled, the end token included."""
    answered = [(question, text, tokens) for question, (text, tokens) in zip(questions, said, strict=True)]
    if form == "alpaca_eval":
        rows: list[dict[str, Any]] = [
            {"dataset": question.dataset, "instruction": question.instruction, "output": text, "generator": generator}
            for question, text, _ in answered
        ]
        write_json(path, rows)
        return
    rows = [
        {
            "question_id": question.id,
            "answer_id": hashlib.sha256(f"{generator}\x1f{question.id}\x1f{text}".encode()).hexdigest()[:22],
            "model_id": generator,
            "choices": [{"index": 0, "turns": [{"content": text, "token_len": tokens}]}],
            "tstamp": time.time(),
        }
        for question, text, tokens in answered
    ]
    write_jsonl(path, rows)


def _first_turn(where: str, choices: Any) -> Any:
    try:
        return choices[0]["turns"][0]["content"]
    except (LookupError, TypeError) as error:
        raise DataError(f"{where}: `choices` must hold a turn with its content; found {choices!r:.60}: mend it") from error


def _output(where: str, value: Any) -> str:
    """An answer may be empty; it must be a text."""
    if not isinstance(value, str):
        raise DataError(f"{where}: an answer must be a text; found {value!r:.60}: add it")
    return value
