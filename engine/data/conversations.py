"""From a user's message and an answer to the tokens that a reward model reads: its own chat template and tokenizer, and
behind them the CLS token where its form wants one. It tokenizes nothing for the policy (templates.py) and runs no model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from engine.config.options import RewardModel
from engine.core.errors import ConfigError
from engine.core.types import Message
from engine.data.templates import TEMPLATE_DATE, load_tokenizer
from engine.data.tokens import encode_around, special_texts
from engine.models.reward_head import OPTION, RewardHead, read_reward_head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Conversations:
    """How the reward model of a folder reads a conversation.

    Raises, in one sentence that names reward_model.path or reward_model.max_tokens, ConfigError when model, tokenizer,
    template, CLS token and length do not fit each other, and CheckpointError when a file of the folder is unreadable.
    """

    def __init__(self, config: RewardModel) -> None:
        assert config.path is not None
        self.head: RewardHead = read_reward_head(config.path)
        self._path, self._max_tokens = Path(config.path), config.max_tokens
        self._tokenizer = load_tokenizer(config.path, OPTION)
        self._cls_id = _cls_id(self._tokenizer, self._path) if self.head.form == "athene" else None
        self._check()

    def _check(self) -> None:
        if len(self._tokenizer) > self.head.shape.vocab_size:
            raise ConfigError(
                f"{OPTION} must hold a tokenizer that fits the model; found {len(self._tokenizer)} tokens for a vocabulary of "
                f"{self.head.shape.vocab_size} in {self._path}: use the tokenizer that the reward model was trained with"
            )
        if self._max_tokens > self.head.shape.max_positions:
            raise ConfigError(
                f"reward_model.max_tokens must not exceed the reward model's {self.head.shape.max_positions} positions; found "
                f"{self._max_tokens}: lower it"
            )
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"{OPTION} must hold a tokenizer with a chat template; found none in {self._path}: add chat_template to its "
                f"tokenizer_config.json"
            )
        try:
            self.encode("What is 1 + 1?", "2")
        except TemplateError as error:
            raise ConfigError(
                f"{OPTION} must hold a chat template for a user's message and an assistant's answer; found that it fails with "
                f"{str(error)!r} in {self._path}: mend the template"
            ) from error

    def encode(self, message: str | tuple[Message, ...], answer: str) -> tuple[int, ...] | None:
        """Token ids of the conversation, the last of which the reward is read at; None when there are more than
        reward_model.max_tokens. `message`: a user's, or all turns up to the last user's.

        Sequence classification: the chat template's tokens. Athene's form: those of the template's text with the CLS token
        behind it, special tokens that the tokenizer adds to any text included, as its model card does it (a Llama 3
        tokenizer so begins twice); up to and including the last CLS, the appended one, whatever the texts hold. A date in
        the template is the fixed one of prompts. What the texts themselves spell of special tokens stays text, as in prompts
        (tokens.py); no ids at all where the tokenizer cannot keep it so.
        """
        before = (("user", message),) if isinstance(message, str) else message
        turns = [{"role": role, "content": text} for role, text in (*before, ("assistant", answer))]
        special = special_texts(self._tokenizer)
        if special is not None and any(special.search(turn["content"]) for turn in turns):
            ids = self._as_text(turns)
        elif self._cls_id is None:
            ids = self._tokenizer.apply_chat_template(turns, return_dict=False, date_string=TEMPLATE_DATE)
        else:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, date_string=TEMPLATE_DATE)
            ids = self._tokenizer(text + self._tokenizer.convert_ids_to_tokens(self._cls_id), verbose=False)["input_ids"]
            if self._cls_id not in ids:
                raise ConfigError(
                    f"{OPTION}: the tokenizer must turn the text of its CLS token into that token; found no id {self._cls_id} "
                    f"among those of a conversation in {self._path}: use the tokenizer of the reward model"
                )
            ids = ids[: len(ids) - ids[::-1].index(self._cls_id)]
        return tuple(ids) if len(ids) <= self._max_tokens else None

    def _as_text(self, turns: list[dict[str, str]]) -> list[int]:
        """As `encode`, for texts that spell special tokens: those of the template alone are tokens."""

        def render(contents: Sequence[str]) -> str:
            said = [turn | {"content": content} for turn, content in zip(turns, contents, strict=True)]
            text: str = self._tokenizer.apply_chat_template(said, tokenize=False, date_string=TEMPLATE_DATE)
            return text

        ids = encode_around(self._tokenizer, [turn["content"] for turn in turns], render)
        if ids is None or self._cls_id is None:
            return [*(ids or ())]
        begin = self._tokenizer("", verbose=False)["input_ids"][:1]
        return [*(begin if begin == [self._tokenizer.bos_token_id] else ()), *ids, self._cls_id]


def _cls_id(tokenizer: PreTrainedTokenizerBase, path: Path) -> int:
    """The tokenizer's CLS token, or the one that config.json names."""
    found = tokenizer.cls_token_id
    if found is None:
        found = json.loads((path / "config.json").read_text("utf-8")).get("cls_token_id")
    if not isinstance(found, int):
        raise ConfigError(
            f"{OPTION} holds a reward model whose v_head is read at a CLS token, so its tokenizer must have one; found no "
            f"cls_token in tokenizer_config.json and no cls_token_id in config.json of {path}: add the one that it was trained "
            f"with (Athene-RM: <|reserved_special_token_1|>)"
        )
    return found
