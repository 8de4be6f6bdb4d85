"""Which tokens end a response: the one rule for sampling, supervised training, preference pairs and what is written. A model's
folder says it in up to four places that need not agree: eos_token_id of generation_config.json and of config.json, the
tokenizer's eos_token, and the token with which its chat template ends an assistant's turn. Llama 3's first release named one in
the first and ended turns with another; a base model that was given a template does so to this day.

Sampling stops at every one that any of them names. A response that is tokenized ends with the template's turn end, or without
one with the tokenizer's eos_token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from engine.data.templates import TEMPLATE_DATE
from engine.models.config_file import CONFIG, GENERATION_CONFIG, read_end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER, TEMPLATE = "eos_token of the tokenizer", "the chat template's end of a turn"
_SAID = "semion"  # an answer to look for in a rendered turn


@dataclass(frozen=True, slots=True)
class EndTokens:
    """What ends a response of a model, and who says so."""

    named: Mapping[str, tuple[int, ...]]  # by file or part, of those that name any
    response: int | None  # ends a response that is tokenized; None where only the files name one, or nobody does
    spelled: Mapping[int, str]  # how the tokenizer writes each; "" for one that it does not have
    plain: frozenset[int]  # those that the tokenizer takes for ordinary text

    @property
    def stop(self) -> tuple[int, ...]:
        """All of them: sampling stops at each."""
        return tuple(dict.fromkeys(token for tokens in self.named.values() for token in tokens))

    @property
    def disagreement(self) -> str:
        """What somebody should know of how the places differ; empty where it makes no difference. It does where a program that
        reads the files alone would write on past the end of a response, and where eos_token does not end a turn."""
        files = self.named.get(GENERATION_CONFIG) or self.named.get(CONFIG)
        said = {token for name in (TOKENIZER, TEMPLATE) for token in self.named.get(name, ())}
        if len(said) < 2 and (files is None or said <= set(files)):
            return ""
        who = "; ".join(f"{name}: {', '.join(map(self._shown, tokens))}" for name, tokens in self.named.items())
        last = "" if self.response is None else f"; responses that are tokenized end with {self._shown(self.response)}"
        return f"the model's folder names its end tokens in places that differ ({who}): sampling stops at each of them{last}"

    def _shown(self, token: int) -> str:
        return f"{token} {self.spelled[token]!r}" if self.spelled[token] else str(token)


def end_tokens(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> EndTokens:
    """The end tokens of the model in folder `path` with its tokenizer. CheckpointError for a file that cannot be read."""
    eos, turn = tokenizer.eos_token_id, turn_end(tokenizer)
    named = dict(read_end_ids(path))
    named |= {TOKENIZER: (eos,)} if isinstance(eos, int) else {}
    named |= {TEMPLATE: (turn,)} if turn is not None else {}
    tokens = {token for found in named.values() for token in found}
    spelled = {token: str(tokenizer.convert_ids_to_tokens(token) or "") if token < len(tokenizer) else "" for token in tokens}
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return EndTokens(named, response_end(tokenizer), spelled, frozenset(t for t in tokens if t < len(tokenizer)) - marks)


def response_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends a response which is tokenized; None where the tokenizer has none."""
    turn = turn_end(tokenizer)
    if turn is not None:
        return turn
    return tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else None


def written_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """How the token that ends a response is written; empty without one."""
    end = response_end(tokenizer)
    return "" if end is None else str(tokenizer.convert_ids_to_tokens(end) or "")


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends an assistant's turn. None without a template, and for a template that has no
    such turn or ends it with ordinary text."""
    return _turn_end(tokenizer, repr(tokenizer.chat_template)) if tokenizer.chat_template else None


@lru_cache(maxsize=8)  # asked for every response of a file
def _turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> int | None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SAID}]
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, date_string=TEMPLATE_DATE)
    except TemplateError:
        return None
    before, _, after = str(rendered).rpartition(_SAID)
    marks = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    ends = [mark for mark in marks if before and after.lstrip().startswith(mark)]
    return marks[max(ends, key=len)] if ends else None
