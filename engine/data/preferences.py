"""Reads a preference file: a prompt with a chosen and a rejected response that others wrote or judged. Tokenizes them once;
which pairs a step uses, and the loss, are for others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.core.errors import DataError, brief
from engine.data.records import records
from engine.data.rows import text_of
from engine.data.supervised import completion_tokens
from engine.data.templates import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("problem", "prompt", "chosen", "rejected", "id")


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt's tokens with those of two responses, each with the end token."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PreferenceSet:
    """All pairs of a file, in its order, with what was left out."""

    pairs: tuple[PreferencePair, ...]
    num_long: int  # prompt longer than max_prompt_tokens, or a response longer than max_tokens
    num_equal: int  # chosen and rejected are the same

    def __str__(self) -> str:
        return f"{len(self.pairs)} pairs; left out: {self.num_long} too long, {self.num_equal} of equal responses"


def load_preferences(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, template: str, max_prompt_tokens: int, max_tokens: int
) -> PreferenceSet:
    """The pairs of a source (see records.py): rows with `problem` or `prompt`, `chosen` and `rejected`, all texts.

    DataError names file, row, rule, value and fix, or says that no pair is left.
    """
    pairs: list[PreferencePair] = []
    num_long = num_equal = 0
    for where, record in records(path, FIELDS):
        problem, chosen, rejected = pair_texts(where, record)
        if chosen == rejected:
            num_equal += 1
            continue
        pair = PreferencePair(
            encode_prompt(tokenizer, problem, template),
            completion_tokens(tokenizer, chosen),
            completion_tokens(tokenizer, rejected),
        )
        if len(pair.prompt_ids) > max_prompt_tokens or max(len(pair.chosen_ids), len(pair.rejected_ids)) > max_tokens:
            num_long += 1
            continue
        pairs.append(pair)
    if not pairs:
        raise DataError(
            f"{path}: at least one pair must fit data.max_prompt_tokens and sampling.max_tokens; found {num_long} too long, "
            f"{num_equal} of equal responses and no other: raise them"
        )
    return PreferenceSet(tuple(pairs), num_long, num_equal)


def pair_texts(where: str, record: Any) -> tuple[str, str, str]:
    """(problem, chosen, rejected) of a row. DataError names the field that is missing."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: a row must be a JSON object with named fields; found {brief(record)}: mend it")
    problem = text_of(where, record, "problem") or text_of(where, record, "prompt")
    chosen, rejected = text_of(where, record, "chosen"), text_of(where, record, "rejected")
    for field, text in (("problem", problem), ("chosen", chosen), ("rejected", rejected)):
        if not text:
            raise DataError(f"{where}: `{field}` must be a text that is not empty; found {brief(record)}: add it")
    return problem, chosen, rejected
