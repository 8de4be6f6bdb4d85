"""A tokenizer read from its files says what transformers says, or nothing."""

import json

import pytest
from jinja2 import TemplateError

from engine.data.templates import encode_prompt, load_tokenizer
from engine.data.tokenizer_files import load_file_tokenizer

LLAMA3 = (  # its turns, and what else real templates do
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}\n"
    "{{- bos_token }}\n"
    "{%- for message in messages if message['role'] != 'tool' %}\n"
    "    {%- if loop.index0 > 9 %}{%- break %}{%- endif %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + date_string + message['content'] | trim }}\n"
    "    {%- if tools is not none or documents is not none %}{{- raise_exception('none asked for') }}{%- endif %}\n"
    "    {%- if message['role'] == 'assistant' %}{% generation %}{{ message | tojson }}{% endgeneration %}{%- endif %}\n"
    "    {{- '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}\n"
)


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def changed(folder, **changes):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("template", [None, LLAMA3], ids=["tiny", "llama3"])
def test_it_gives_the_tokens_that_transformers_gives(folder, template):
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    light, whole = load_file_tokenizer(folder), load_tokenizer(folder)
    assert light is not None
    assert (len(light), light.eos_token_id) == (len(whole), whole.eos_token_id)
    for text in ("1 + 1", " é <|eot_id|> 日本\n\n", "<&'\"> " * 50):
        assert encode_prompt(light, text, "figure4") == encode_prompt(whole, text, "figure4")
        assert light.encode(text) == whole.encode(text, add_special_tokens=False)


def test_a_failing_template_fails_alike(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only systems') }}")
    for tokenizer in (load_file_tokenizer(folder), load_tokenizer(folder)):
        with pytest.raises(TemplateError, match="only systems"):
            encode_prompt(tokenizer, "1", "{problem}")


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"auto_map": {"AutoTokenizer": "mine.Mine"}},
        {"eos_token": "<|not there|>"},
        {"added_tokens_decoder": {"260": {"content": "<|new|>"}}},
    ],
)
def test_what_the_files_alone_do_not_say_is_left_to_transformers(folder, changes):
    changed(folder, **changes)
    assert load_file_tokenizer(folder) is None


def test_broken_files_are_left_to_transformers_too(folder):
    (folder / "tokenizer.json").write_text("{")
    assert load_file_tokenizer(folder) is None
    (folder / "tokenizer.json").unlink()
    assert load_file_tokenizer(folder) is None
