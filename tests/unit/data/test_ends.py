"""The one rule of end tokens: who names which, what sampling stops at, what a tokenized response ends with, and when people
are told; over the ways in which models are released.
"""

import json
from copy import deepcopy
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from engine.core.errors import CheckpointError, ConfigError
from engine.data.ends import end_tokens, response_end, turn_end
from engine.data.supervised import completion_tokens
from engine.data.templates import policy_tokenizer
from tests.builders import config
from tests.conftest import CHAT_TEMPLATE

BEGIN, HEADER, HEADER_END, END = 256, 257, 258, 259  # of the tests' tokenizer
CHATML = "{% for m in messages %}<|start_header_id|>{{ m.role }}\n{{ m.content }}<|end_header_id|>\n{% endfor %}"


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None, eos: str | None = "<|eot_id|>"):
    made = deepcopy(tokenizer)
    made.chat_template = template
    made.eos_token = eos
    return made


def folder(path: Path, generation: object = None, config: object = None) -> Path:
    (path / "config.json").write_text(json.dumps({} if config is None else {"eos_token_id": config}))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return path


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (CHAT_TEMPLATE, END),
        (CHATML, HEADER_END),
        ("{% for m in messages %}{{ m.content + ' <|eot_id|>' }}{% endfor %}", END),  # Llama 2 has a space there
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", None),  # ends with ordinary text
        ("{{ messages[0].content }}<|eot_id|>", None),  # renders no answer
        ("{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no') }}{% endif %}{% endfor %}", None),
        (None, None),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_writes_behind_an_answer(tiny_tokenizer, template, wanted):
    assert turn_end(with_template(tiny_tokenizer, template)) == wanted


def test_all_that_any_place_names_end_a_response(tmp_path, tiny_tokenizer):
    """And each place is told of; equal ones say nothing twice, and nobody is told where nothing differs."""
    ends = end_tokens(folder(tmp_path, [END, BEGIN], END), tiny_tokenizer)
    assert ends.stop == (END, BEGIN) and ends.response == END and ends.disagreement == "" and not ends.plain
    assert list(ends.named) == [
        *("generation_config.json", "config.json", "eos_token of the tokenizer", "the chat template's end of a turn"),
    ]


def test_a_generation_config_that_never_heard_of_the_tokenizers_end(tmp_path, tiny_tokenizer):
    """The finding: generation config 256, tokenizer and template 259."""
    ends = end_tokens(folder(tmp_path, BEGIN), tiny_tokenizer)
    assert set(ends.stop) == {BEGIN, END} and ends.response == END
    assert "generation_config.json: 256 '<|begin_of_text|>'" in ends.disagreement


def test_a_base_model_with_a_template_ends_responses_as_its_template_does(tmp_path, tiny_tokenizer):
    base = with_template(tiny_tokenizer, CHATML)
    ends = end_tokens(folder(tmp_path, END, END), base)
    assert set(ends.stop) == {END, HEADER_END} and ends.response == HEADER_END
    assert completion_tokens(base, "a")[-1] == HEADER_END == response_end(base)
    assert "end with 258 '<|end_header_id|>'" in ends.disagreement


@pytest.mark.parametrize(("chat_template", "wanted"), [("tokenizer", END), ("chatml.jinja", HEADER_END), ("none", END)])
def test_the_chat_template_that_a_run_uses_says_how_its_turns_end(tmp_path, model_folder, chat_template, wanted):
    """A file named by data.chat_template as well as the tokenizer's own; without one, the tokenizer's eos_token ends it."""
    (tmp_path / "chatml.jinja").write_text(CHATML)
    name = chat_template if chat_template in ("tokenizer", "none") else str(tmp_path / chat_template)
    made = config(tmp_path / "run", model={"path": str(model_folder)}, data={"train": "t", "chat_template": name})
    tokenizer = policy_tokenizer(made)
    assert response_end(tokenizer) == wanted and wanted in end_tokens(model_folder, tokenizer).stop
    assert completion_tokens(tokenizer, "a")[-1] == wanted
    assert (turn_end(tokenizer) is None) == (chat_template == "none")


def test_a_folder_that_names_none_leaves_it_to_the_tokenizer_and_without_a_template_to_its_eos(tmp_path, tiny_tokenizer):
    assert end_tokens(folder(tmp_path), tiny_tokenizer).stop == (END,)
    assert end_tokens(folder(tmp_path), with_template(tiny_tokenizer, None)).response == END
    nobody = with_template(tiny_tokenizer, None, None)
    ends = end_tokens(folder(tmp_path), nobody)
    assert (ends.stop, ends.response, ends.disagreement) == ((), None, "")
    with pytest.raises(ConfigError, match="must hold a tokenizer with an end token"):
        completion_tokens(nobody, "a")


def test_ordinary_text_and_what_no_tokenizer_has_are_known(tmp_path, tiny_tokenizer):
    ends = end_tokens(folder(tmp_path, [END, 65, 900]), tiny_tokenizer)
    assert ends.plain == {65} and ends.spelled[900] == "" and 900 in ends.stop


def test_what_is_no_token_is_refused(tmp_path, tiny_tokenizer):
    with pytest.raises(CheckpointError, match="must have eos_token_id as a number or a list of numbers; found 'x'"):
        end_tokens(folder(tmp_path, "x"), tiny_tokenizer)
