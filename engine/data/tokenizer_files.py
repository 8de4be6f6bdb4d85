"""A tokenizer and its chat template read from their files alone, in a fraction of the time that importing transformers takes:
for a preflight, which says with it that nothing is wrong. It does not replace transformers: whoever finds something wrong asks
again with what a run uses (`templates.load_tokenizer`). Of a tokenizer whose class says more than its files it knows nothing.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # these take tokenizer.json as it is
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class FileTokenizer:
    """What prompts need of a tokenizer, with the names that transformers gives it."""

    def __init__(self, path: Path, tokenizer: Tokenizer, tokens: Mapping[str, str], chat_template: str | None) -> None:
        self.name_or_path = str(path)
        self.chat_template = chat_template
        self._tokenizer = tokenizer
        self._tokens = dict(tokens)

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_id(self) -> int | None:
        """The end token's id; None without one."""
        token = self._tokens.get("eos_token")
        found: int | None = self._tokenizer.token_to_id(token) if token is not None else None
        return found

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of the tokens that have a part to play."""
        return [token for text in self._tokens.values() if (token := self._tokenizer.token_to_id(text)) is not None]

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """The tokens that are no ordinary text, by their ids."""
        return dict(self._tokenizer.get_added_tokens_decoder())

    def convert_ids_to_tokens(self, token: int) -> str | None:
        """How a token is written."""
        written: str | None = self._tokenizer.id_to_token(token)
        return written

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = False,
        return_dict: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> list[int] | str:
        """Token ids of messages in the chat template, or its text. jinja2's TemplateError where it fails."""
        assert not return_dict
        known = {**self._tokens, **variables}
        text = self._template.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **known
        )
        return self.encode(text) if tokenize else text

    @cached_property
    def _template(self) -> Template:
        assert self.chat_template is not None
        return _environment().from_string(self.chat_template)


def load_file_tokenizer(path: str | Path) -> FileTokenizer | None:
    """The tokenizer of a Hugging Face folder; None where its files do not say all, or cannot be read."""
    path = Path(path)
    try:
        said = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library has no type for a broken file
        if isinstance(error, (OSError, ValueError)) or type(error) is Exception:
            return None
        raise
    if not isinstance(said, dict) or said.get("tokenizer_class") not in PLAIN_CLASSES or said.get("auto_map"):
        return None
    tokens = {name: _text_of(said.get(name)) for name in SPECIAL}
    file = path / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.exists() else said.get("chat_template")
    added = [_text_of(token) for token in (said.get("added_tokens_decoder") or {}).values()]
    wanted = [token for token in (*tokens.values(), *added) if token is not None]
    if any(tokenizer.token_to_id(token) is None for token in wanted) or not isinstance(template, str):
        return None  # transformers would add them, or says what is missing
    return FileTokenizer(path, tokenizer, {name: text for name, text in tokens.items() if text is not None}, template)


def _text_of(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers renders chat templates."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


def _tojson(value: Any, ensure_ascii: bool = False, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **more)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


class _Generation(Extension):
    """{% generation %} marks what an assistant says; for rendering it is what stands inside."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
