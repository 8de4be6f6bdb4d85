"""Training sequences for supervised fine-tuning: the prompt and its worked solution. No rollouts, no rewards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.core.arrays import TokenIds
from engine.core.errors import ConfigError, DataError
from engine.core.types import Prompt, Sequence
from engine.data.ends import response_end, written_end
from engine.data.tokens import encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def supervised_sequence(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Sequence:
    """The solution's tokens and the end token as completion; no rollout log-probs.

    Raises DataError when the prompt has no solution, ConfigError when the tokenizer has no end token.
    """
    if not prompt.solution:
        raise DataError(f"prompt {prompt.id}: `solution` must not be empty for supervised training; found none: add it")
    return Sequence(prompt.token_ids, TokenIds.of(completion_tokens(tokenizer, prompt.solution)))


def completion_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """The tokens of a response as the policy would have sampled it, the end token included, once also where the text spells it
    at its end; other special tokens that it spells are text. ConfigError when there is no end token, DataError for a text that
    the tokenizer cannot keep text."""
    end = response_end(tokenizer)
    if end is None:
        raise ConfigError(
            f"model.path must hold a tokenizer with an end token; found none in {tokenizer.name_or_path!r}: "
            f"set eos_token in its tokenizer_config.json"
        )
    ids = encode_text(tokenizer, text, written_end(tokenizer))
    if ids is None:
        raise DataError(
            f"a response must not spell special tokens, which this tokenizer cannot keep text; found {text!r:.80}: remove "
            f"the row"
        )
    return (*ids, end)
