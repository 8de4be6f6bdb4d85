"""Reads a preference file: a prompt with a chosen and a rejected response that others wrote or judged. Tokenizes them once;
which pairs a step uses, and the loss, are for others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.core.arrays import TokenIds
from engine.core.errors import DataError, brief
from engine.core.types import Message
from engine.data.ends import written_end
from engine.data.forms import PROMPTS, Columns, asked, found, heads, response_of
from engine.data.overlap import prompt_digest
from engine.data.prompts import LARGE_SHARE
from engine.data.records import records
from engine.data.rows import object_of, wanted_fields
from engine.data.supervised import completion_tokens
from engine.data.templates import LeftOut, PromptForm, fit_prompt
from engine.data.tokens import fewest_tokens, stays_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = heads(*PROMPTS, "chosen", "rejected", "id")


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt's tokens with those of two responses, each with the end token."""

    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds


class PairTexts(NamedTuple):
    """What a row of a preference file says."""

    problem: str  # of a conversation the last user's message
    chosen: str  # empty where the row says nothing there
    rejected: str  # the same
    messages: tuple[Message, ...]  # the whole conversation, where the problem is not all of it


@dataclass(frozen=True, slots=True)
class PreferenceSet:
    """All pairs of a file, in its order, with what was left out."""

    pairs: tuple[PreferencePair, ...]
    num_long: int  # prompt longer than max_prompt_tokens, or a response longer than max_tokens
    num_equal: int  # chosen and rejected are the same
    num_empty: int = 0  # chosen or rejected says nothing
    num_special: int = 0  # spell special tokens, which the tokenizer cannot keep text
    digests: frozenset[bytes] = frozenset()  # of the prompts, as overlap.py has them

    def __str__(self) -> str:
        empty = f", {self.num_empty} with an empty response" if self.num_empty else ""
        spell = f", {self.num_special} that spell special tokens" if self.num_special else ""
        return f"{len(self.pairs)} pairs; left out: {self.num_long} too long, {self.num_equal} of equal responses{empty}{spell}"

    @property
    def warning(self) -> str:
        """What is to be said where many pairs were too long; empty where few were."""
        share = self.num_long / (len(self.pairs) + self.num_long or 1)
        if share <= LARGE_SHARE:
            return ""
        return f"{share:.0%} of the pairs are longer than data.max_prompt_tokens or sampling.max_tokens and left out"


def load_preferences(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    template: str | PromptForm,
    max_prompt_tokens: int,
    max_tokens: int,
    columns: Columns | None = None,
) -> PreferenceSet:
    """The pairs of a source (see records.py): rows with a prompt, `chosen` and `rejected`, as texts or messages.

    DataError names file, row, rule, value and fix, or says that no pair is left.
    """
    form = PromptForm(template) if isinstance(template, str) else template
    pairs: list[PreferencePair] = []
    digests: set[bytes] = set()
    num_long = num_equal = num_empty = num_special = 0
    for where, record in records(path, wanted_fields(FIELDS, columns or {})):
        texts = pair_texts(where, record, columns)
        if not texts.chosen or not texts.rejected:
            num_empty += 1
            continue
        if texts.chosen == texts.rejected:
            num_equal += 1
            continue
        pair = _encoded(where, texts, tokenizer, form, (max_prompt_tokens, max_tokens))
        if isinstance(pair, LeftOut):
            num_long += pair.why == "too_long"
            num_special += pair.why == "special_text"
            continue
        pairs.append(pair)
        digests.add(prompt_digest(texts.problem, texts.messages))
    if not pairs:
        raise DataError(
            f"{path}: at least one pair must fit data.max_prompt_tokens and sampling.max_tokens; found {num_long} too long, "
            f"{num_equal} of equal responses, {num_empty} with an empty one, {num_special} that spell special tokens and no "
            f"other: raise them, or name another file"
        )
    return PreferenceSet(tuple(pairs), num_long, num_equal, num_empty, num_special, frozenset(digests))


def _encoded(
    where: str, texts: PairTexts, tokenizer: PreTrainedTokenizerBase, form: PromptForm, limits: tuple[int, int]
) -> PreferencePair | LeftOut:
    """The tokens of a row, of no more than (of the prompt, of a response) `limits`."""
    max_prompt_tokens, max_tokens = limits
    responses = texts.chosen, texts.rejected
    if max(fewest_tokens(tokenizer, len(response.strip())) for response in responses) > max_tokens:
        return LeftOut("too_long")
    if not all(stays_text(tokenizer, response, written_end(tokenizer)) for response in responses):
        return LeftOut("special_text")
    try:
        prompt_ids = fit_prompt(tokenizer, texts.problem, texts.messages, form, max_prompt_tokens)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    if isinstance(prompt_ids, LeftOut):
        return prompt_ids
    answers = (TokenIds.of(completion_tokens(tokenizer, response)) for response in responses)
    pair = PreferencePair(TokenIds.of(prompt_ids), *answers)
    return pair if max(len(pair.chosen_ids), len(pair.rejected_ids)) <= max_tokens else LeftOut("too_long")


def read_pairs(path: str | Path, columns: Columns | None = None) -> Iterator[PairTexts | DataError]:
    """The rows of a preference file one after another, and in the place of one that cannot be used the DataError that says why.
    Raises DataError where the file as a whole cannot be read."""
    faults: list[DataError] = []
    for where, record in records(path, wanted_fields(FIELDS, columns or {}), faults.append):
        yield from faults
        faults.clear()
        try:
            texts = pair_texts(where, record, columns)
        except DataError as error:
            yield error
            continue
        yield texts
    yield from faults


def pair_texts(where: str, record: Any, columns: Columns | None = None) -> PairTexts:
    """What a row says: a prompt, or the turns that its two responses have in common, and the responses, empty where there is
    nothing in them. DataError names the field that is missing, or the turns that differ."""
    columns, record = columns or {}, object_of(where, record)
    prompt = asked(where, record, columns)
    turns = prompt.messages or ((("user", prompt.text),) if prompt.text else ())
    said: dict[str, tuple[tuple[Message, ...], str]] = {}
    for name in ("chosen", "rejected"):
        column = columns.get(name, name)
        value = found(record, column)
        if value is None and (column not in record or name == "chosen"):
            raise DataError(
                f"{where}: `{column}` must be a text that is not empty, or messages; found {brief(record)}: add it, or name "
                f"its column by data.columns.{name}"
            )
        said[name] = response_of(where, column, value)
    (before, chosen), (other, rejected) = said["chosen"], said["rejected"]
    if chosen and rejected and before != other:
        raise DataError(
            f"{where}: the turns before the responses of `chosen` and `rejected` must be equal; found {brief(before)} and "
            f"{brief(other)}: give the prompt for itself, and of each only the response"
        )
    turns = _joined_turns(where, turns, before or other)
    if not turns or turns[-1][0] != "user":
        raise DataError(
            f"{where}: `problem` must be a text that is not empty, or messages that end with a user's; found {brief(record)}: "
            f"add it, or name its column by data.columns.problem"
        )
    return PairTexts(turns[-1][1], chosen, rejected, turns if len(turns) > 1 else ())


def _joined_turns(where: str, prompt: tuple[Message, ...], before: tuple[Message, ...]) -> tuple[Message, ...]:
    """The conversation of a row whose responses may say it too, whole or from where the prompt ends. DataError where the two
    differ."""
    if not before or before == prompt:
        return prompt
    if prompt and before[0][0] == "assistant":
        return (*prompt, *before)
    if prompt and before[: len(prompt)] != prompt and prompt[-1][1].strip() not in (text.strip() for _, text in before):
        raise DataError(
            f"{where}: the turns before a response must be those of the prompt; found {brief(before)} for {brief(prompt)}: "
            f"remove one"
        )
    return before
