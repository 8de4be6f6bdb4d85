"""The folder of the model: sizes, the headers of its weights, tokenizer and chat template, and whether trainer ranks and
engines can share it. No weights are read."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from jinja2 import TemplateError

from engine.api.faults.look import Faults, Look, caught, tried
from engine.config.options import Source
from engine.core.errors import ConfigError, SemionError
from engine.data.ends import end_tokens
from engine.data.mixture import prompt_form
from engine.data.templates import check_vocabulary, encode_prompt, policy_tokenizer
from engine.models.checks import check_engine_layout, check_layout
from engine.models.config_file import CONFIG, read_shape
from engine.models.headers import weight_faults
from engine.models.sharding import engine_layout, trainer_layout


def model_faults(look: Look) -> list[SemionError]:
    """The faults of the folder; sets `shape`, `tokenizer` and `renders` of the look."""
    path = look.config.model.path
    look.shape, found = tried(partial(read_shape, path, family=look.config.model.family))
    if look.shape is not None:
        found += weight_faults(path, look.shape)
    if not (Path(path) / CONFIG).exists():  # which has been told
        return found
    # What reads a tokenizer looks at config.json too, and would be blamed for one that is refused
    if look.shape is not None or not (Path(path) / "tokenizer.json").exists():
        look.tokenizer, faults = tried(policy_tokenizer, look.config)
        found += faults
    if look.tokenizer is not None:
        faults = caught(_tokenizer, look)
        look.renders = not any("chat template" in str(fault) for fault in faults)
        found += faults
    return found


def _tokenizer(look: Look) -> Faults:
    """The vocabulary, the chat template, and what ends a response."""
    path, tokenizer, shape = look.config.model.path, look.tokenizer, look.shape
    if shape is not None and (too_many := [*caught(check_vocabulary, tokenizer, shape.vocab_size, path)]):
        yield from too_many
        return
    ends = end_tokens(path, tokenizer)
    if look.samples and not ends.stop:
        yield ConfigError(
            f"model.path must say which token ends a response; found no eos_token_id in generation_config.json or "
            f"config.json, no eos_token in tokenizer_config.json and no end of a turn in the chat template of {path}: add one"
        )
    if shape is not None and any(token >= shape.vocab_size for token in ends.stop):
        yield ConfigError(
            f"model.path must name end tokens of the model's vocabulary of {shape.vocab_size}; found eos_token_id = "
            f"{list(ends.stop)} in {path}: mend generation_config.json"
        )
    for name, tokens in ends.named.items():
        if cutting := [token for token in tokens if token in ends.plain]:
            yield ConfigError(
                f"model.path must name end tokens that are no ordinary text, for responses would be cut off wherever they "
                f"write it; found {cutting[0]} in {name} of {path}, which is {ends.spelled[cutting[0]]!r}: mend it"
            )
    own = look.config.data.chat_template == "tokenizer"
    option, place = ("model.path", path) if own else ("data.chat_template", look.config.data.chat_template)
    try:
        prompt = encode_prompt(tokenizer, "1 + 1", prompt_form(look.config, Source(train="", template="{problem}")))
        if "1+1" not in str(tokenizer.decode(list(prompt))).replace(" ", ""):
            yield ConfigError(
                f"{option} must hold a chat template that writes a user's message; found none of '1 + 1' in what it makes of "
                f"it in {place}: mend the template"
            )
    except TemplateError as error:
        yield ConfigError(
            f"{option} must hold a chat template for a user's message; found that it fails with {str(error)!r} in "
            f"{place}: mend the template"
        )


def layout_faults(look: Look) -> Faults:
    """Whether trainer ranks and engines can share the model, and its positions hold what is asked of it."""
    if look.shape is None:
        return
    if "trainer" in look.parts:
        yield from caught(check_layout, look.shape, trainer_layout(look.config.trainer))
    if look.samples:
        yield from caught(check_engine_layout, look.shape, engine_layout(look.config.inference))
        longest, positions = look.config.inference.max_model_tokens, look.shape.max_positions
        if longest > positions:
            yield ConfigError(
                f"inference.max_model_tokens must not exceed the model's {positions} positions; found {longest}: lower it"
            )
        size = look.shape.vocab_size
        if beyond := [one for one in look.config.sampling.stop if isinstance(one, int) and one >= size]:
            yield ConfigError(
                f"sampling.stop must name token ids of the model's vocabulary of {size}; found {beyond[0]}: remove it, or "
                f"write the text that ends an answer"
            )
