"""What a run's policy says, for people who follow it: answers from the records of the newest step, each in a line or two. It
judges nothing, and `semion show` prints them whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.core.jsonl import read_backwards, row_of
from engine.observe.rollouts import rollouts_of, rows_of_step

NOT_KEPT = "(what it says is not kept: no 'text' in records.rollouts)"


def greedy_answers(directory: Path, step: int, name: str, number: int) -> list[tuple[str, str]]:
    """(problem, what is said) of the first greedy answers that an evaluation of the set `name` after `step` steps gave."""
    rows = [row for row in _rows_of(directory / "samples.jsonl", step) if row["set"] == name]
    right = [f", right: {row['answer']}" if row["answer"] else "" for row in rows[:number]]
    return [(row["problem"], f"{row['text']}{told}") for row, told in zip(rows[:number], right, strict=True)]


def rollouts(directory: Path, step: int, number: int) -> list[tuple[str, str]]:
    """(prompt's id and reward, what is said) of a step's rollouts, of as many prompts as there are, then further ones."""
    seen: dict[str, int] = {}
    ordered = []
    place = rollouts_of(directory)
    for row in rows_of_step(place, step) if place is not None else ():
        turn = seen[row["prompt_id"]] = seen.get(row["prompt_id"], 0) + 1
        ordered.append((turn, row))
    chosen = [row for _, row in sorted(ordered, key=lambda pair: pair[0])[:number]]
    return [(f"{row['prompt_id']}, {_verdict(row)}", row.get("text", NOT_KEPT)) for row in chosen]


def _verdict(row: dict[str, Any]) -> str:
    return f"reward {row['reward']:g}" if row["status"] == "ok" else f"not judged: {row['status']}"


def _rows_of(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of a step in a ledger whose last rows they are, but for a few of later steps; in their order."""

    def found() -> Iterator[dict[str, Any]]:
        for line in read_backwards(path) if path.exists() else ():
            row = row_of(line)
            if row["step"] < step:
                return
            if row["step"] == step:
                yield row

    return list(found())[::-1]


def in_a_line(text: str, width: int) -> str:
    """A text without line breaks; of a long one the beginning and the end, where an answer stands."""
    whole = " ".join(text.split())
    if len(whole) <= width:
        return whole
    end = (width - 3) * 2 // 5
    return f"{whole[: width - 3 - end]} … {whole[len(whole) - end :]}"
