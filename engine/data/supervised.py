"""Training sequences for supervised fine-tuning: the prompt and its worked solution. No rollouts, no rewards."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from engine.errors import ConfigError, DataError
from engine.types import Prompt, Sequence


def supervised_sequence(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Sequence:
    """The solution's tokens and the end token as completion; no rollout log-probs.

    Raises DataError when the prompt has no solution, ConfigError when the tokenizer has no end token.
    """
    if not prompt.solution:
        raise DataError(f"prompt {prompt.id}: `solution` must not be empty for supervised training; found none: add it")
    if not isinstance(tokenizer.eos_token_id, int):
        raise ConfigError(
            f"model.path must hold a tokenizer with an end token; found none in {tokenizer.name_or_path!r}: "
            f"set eos_token in its tokenizer_config.json"
        )
    solution_ids = tokenizer.encode(prompt.solution, add_special_tokens=False)
    return Sequence(prompt.token_ids, (*solution_ids, tokenizer.eos_token_id), rollout_log_probs=())
