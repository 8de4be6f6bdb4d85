"""From a problem's text, or a conversation, to a prompt's tokens: the user message of the paper and a chat template, the
tokenizer's own, one from a file, or none. The only place that tokenizes prompts; it knows nothing of files of rows or of order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2 import TemplateError

from engine.core.errors import ConfigError, DataError
from engine.core.places import meant
from engine.core.types import Message
from engine.data.tokens import encode_around, fewest_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from engine.config.load import RunConfig

    Tokenizer = PreTrainedTokenizerBase  # for those who pass one on and may not import transformers

# Figure 4 of arXiv 2506.21495. The paper prints typographic quotes, an effect of its typesetting; ours are plain ASCII.
FIGURE4 = (
    "Given the following problem, reason and give a final answer to the problem. Problem: {problem}\n"
    "Your response should end with 'The final answer is $\\boxed{[answer]}$. I hope it is correct.' "
    "where [answer] is the response to the problem."
)
FIGURE5 = "{problem}"  # the user's own words
NAMED = {"figure4": FIGURE4, "figure5": FIGURE5}
TEMPLATE_DATE = "26 Jul 2024"  # Llama's templates print a date, today's by default: a run would depend on its day
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # names of the one class, before transformers 5 and since
NO_CHAT = ""  # in place of a chat template's text


@dataclass(frozen=True, slots=True)
class PromptForm:
    """How a source's problems are put to the policy."""

    template: str  # 'figure4', 'figure5', or a text whose every {problem} is replaced, literally
    system: str = ""  # a system message before all; a conversation that begins with its own keeps that
    chat_template: str | None = None  # the text of one; None: the tokenizer's own; NO_CHAT: none


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")  # one of which a tokenizer has


class LeftOut(NamedTuple):
    """Why a prompt cannot be used."""

    why: Literal["too_long", "special_text"]
    num_tokens: int = 0  # of one that is too long; where it was not tokenized, at least so many
    is_exact: bool = False


def load_tokenizer(path: str | Path, option: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder, never from the network. Raises ConfigError naming `option` and the folder."""
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(
            f"{option} must be a folder with a tokenizer; found no folder {path}: {meant(str(path), option, 'check the path')}"
        )
    if not any((path / name).exists() for name in TOKENIZERS):  # told without the seconds that the library takes to say so
        raise ConfigError(
            f"{option} must hold a tokenizer (tokenizer.json and tokenizer_config.json, beside config.json); found none in "
            f"{path}: copy the model's files there again"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = _class_of(path).from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # the library has no type for a broken file
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{option} must hold a tokenizer (tokenizer.json and tokenizer_config.json, beside config.json); found that {path} "
            f"cannot be read ({why}): copy the model's files there again"
        ) from error
    return tokenizer


def _class_of(path: Path) -> Any:
    """What loads a folder's tokenizer: the class that its tokenizer_config.json names where that takes tokenizer.json as it
    is, as Llama 3's does, else the one that finds the class by the model, which imports all of them, and torch, for seconds."""
    file = path / "tokenizer_config.json"
    said = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}  # who calls this tells what cannot be read
    if not isinstance(said, dict):
        raise TypeError(f"{file.name} must hold an object; found a {type(said).__name__}")
    if said.get("tokenizer_class") in PLAIN_CLASSES and not said.get("auto_map"):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def policy_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template that the run uses: its own, or what data.chat_template says, so that prompts
    and the token that ends a turn are of one template. Raises as `load_tokenizer` and `read_chat_template`."""
    tokenizer, text = load_tokenizer(config.model.path), read_chat_template(config.data.chat_template)
    if text is not None:
        tokenizer.chat_template = text or None
    return tokenizer


def model_tokenizer(config: RunConfig, vocab_size: int) -> PreTrainedTokenizerBase:
    """The same, of a model with `vocab_size` tokens. A process loads it once and passes it on. Raises as `policy_tokenizer` and
    `check_vocabulary`."""
    tokenizer = policy_tokenizer(config)
    check_vocabulary(tokenizer, vocab_size, config.model.path)
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, path: str) -> None:
    """ConfigError for a tokenizer with more tokens than its model has."""
    if len(tokenizer) > vocab_size:
        raise ConfigError(
            f"model.path must hold a tokenizer that fits the model; found {len(tokenizer)} tokens for a vocabulary of "
            f"{vocab_size} in {path}: use the tokenizer that the model was trained with"
        )


def read_chat_template(name: str) -> str | None:
    """What data.chat_template names, for a PromptForm. ConfigError for a file that cannot be read."""
    if name in ("tokenizer", "none"):
        return None if name == "tokenizer" else NO_CHAT
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.chat_template must be 'tokenizer', 'none' or a file with a Jinja template; found that {name} cannot be read "
            f"({error}): {meant(str(name), '', 'check the path')}"
        ) from error
    if not text.strip():
        raise ConfigError(f"data.chat_template must be a Jinja template; found nothing in {name}: use 'none' for none")
    return text


def encode_prompt(tokenizer: PreTrainedTokenizerBase, problem: str, template: str | PromptForm) -> tuple[int, ...]:
    """Token ids of one user message in the chat template, generation prompt included; special tokens that `problem` spells are
    text.

    `template` is 'figure4', 'figure5' or a text whose every {problem} is replaced, literally, or the whole form. Raises
    ConfigError when there is no chat template, DataError for a problem that the tokenizer cannot keep text.
    """
    form = PromptForm(template) if isinstance(template, str) else template
    found = _encoded(tokenizer, problem, (), form, None)
    if isinstance(found, LeftOut):
        raise DataError(
            f"a problem must not spell special tokens, which this tokenizer cannot keep text; found {problem!r:.80}"
        )
    return found


def fit_prompt(
    tokenizer: PreTrainedTokenizerBase, problem: str, messages: Sequence[Message], form: PromptForm, max_tokens: int
) -> tuple[int, ...] | LeftOut:
    """As `encode_prompt`, of a problem or of the whole conversation that it ends, and of no more than `max_tokens` tokens; a
    text that must have more, by its characters, is not tokenized. DataError for a conversation that the chat template
    refuses."""
    try:
        return _encoded(tokenizer, problem, messages, form, max_tokens)
    except TemplateError as error:
        roles = [role for role, _ in messages] or ["system"] * bool(form.system) + ["user"]
        raise DataError(
            f"a conversation must be one that the chat template can write; found {str(error)!r} for turns of {roles}: mend or "
            f"leave out the row, or use another data.chat_template"
        ) from error


def _encoded(
    tokenizer: PreTrainedTokenizerBase, problem: str, messages: Sequence[Message], form: PromptForm, max_tokens: int | None
) -> tuple[int, ...] | LeftOut:
    turns = tuple(messages) or (("user", problem),)
    roles, contents = [role for role, _ in turns], [text for _, text in turns]
    if form.chat_template == NO_CHAT:
        _check_bare(roles)
    elif not (form.chat_template or tokenizer.chat_template):
        raise ConfigError(
            f"model.path must hold a tokenizer with a chat template; found none in {tokenizer.name_or_path!r}: "
            f"add chat_template to its tokenizer_config.json, or set data.chat_template to a file, or to 'none' for a base "
            f"model"
        )

    def render(texts: Sequence[str]) -> str:
        message = NAMED.get(form.template, form.template).replace("{problem}", texts[-1])
        said = [*zip(roles, (*texts[:-1], message), strict=True)]
        if form.system and roles[0] not in ("system", "developer"):
            said = [("system", form.system), *said]
        if form.chat_template == NO_CHAT:
            return "\n\n".join(text for _, text in said)
        text: str = tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in said],
            chat_template=form.chat_template,
            add_generation_prompt=True,
            tokenize=False,
            date_string=TEMPLATE_DATE,
        )
        return text

    if max_tokens is not None and (least := fewest_tokens(tokenizer, len(render(contents)))) > max_tokens:
        return LeftOut("too_long", least)
    ids = encode_around(tokenizer, contents, render)
    if ids is None:
        return LeftOut("special_text")
    if form.chat_template == NO_CHAT:
        ids = (*_beginning(tokenizer), *ids)
    if max_tokens is not None and len(ids) > max_tokens:
        return LeftOut("too_long", len(ids), is_exact=True)
    return ids


def _check_bare(roles: Sequence[str]) -> None:
    """DataError for turns that only a chat template can tell apart."""
    if "assistant" in roles or roles.count("user") > 1 or not {*roles} <= {"system", "user"}:
        raise DataError(
            f"a conversation of several turns needs a chat template to be written; found turns of {list(roles)} with "
            f"data.chat_template = 'none': name a file"
        )


def _beginning(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token that the tokenizer begins a bare text with, where it does."""
    around = tokenizer("", verbose=False)["input_ids"]
    return tuple(around[:1]) if around[:1] == [tokenizer.bos_token_id] else ()
