"""Fixtures that every suite may use: a tokenizer small enough to build in milliseconds. And the environment in which Ray is
imported, by whichever test comes first."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key  # what pytest keeps of stderr before it captures it
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.run.nodes import RAY_ENVIRONMENT

# Ray reads how it authenticates when it is imported: as the engine has it before it imports Ray, for the runs that tests/e2e
# starts in this process.
os.environ.update(RAY_ENVIRONMENT)

# What starts a suite in the background has its processes ignore Ctrl-C, and theirs; tests of Ctrl-C need the usual.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)

SPECIAL_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


# Unit tests of seconds each, by file or folder below tests/unit: `tools/test fast` leaves them out
SLOW = (
    "ops",
    "tools",
    "rewards",
    "commands/test_cli.py",
    "config/test_paper_configs.py",
    "bridge/test_bridge.py",
    "bridge/test_plan.py",
    "models/test_vllm_layout.py",
    "models/test_families.py",
    "run/test_checkpoint.py",
    "run/test_faults_of_a_save.py",
    "run/test_forking.py",
    "bridge/test_host_group.py",
    "capacity",
    "api/test_preflight.py",
    "algorithms/test_algorithms.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what SLOW names."""
    unit = Path(__file__).parent / "unit"
    for item in items:
        if any(item.path.is_relative_to(unit / place) for place in SLOW):
            item.add_marker(pytest.mark.slow)


MORE_SECONDS = 60.0  # than pytest-timeout gives a test: for its teardown


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Ends the process with the stacks of its threads where a test goes on after pytest-timeout ended it. That raises once in
    the main thread, which hears nothing inside a library's call and may wait for a thread again on its way out."""
    await_end(item)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """Pytest's own plugin has just cancelled what was set; a test that failed has its teardown before it."""
    if isinstance(node, pytest.Item):
        await_end(node)


def await_end(item: pytest.Item) -> None:
    """Sets the end of a test that does not end: MORE_SECONDS after its mark, --timeout or the configuration has pytest-timeout
    end it; none where that is 0."""
    mark, asked = item.get_closest_marker("timeout"), item.config.getoption("timeout")
    seconds = float(mark.args[0] if mark else item.config.getini("timeout") if asked is None else asked)
    if seconds > 0:
        stderr = item.config.stash[fault_handler_stderr_fd_key]
        faulthandler.dump_traceback_later(seconds + MORE_SECONDS, exit=True, file=stderr)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process whose tests are over ends too, whatever threads it still has."""
    faulthandler.dump_traceback_later(2 * MORE_SECONDS, exit=True, file=session.config.stash[fault_handler_stderr_fd_key])


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and the special tokens of Llama 3 (ids 256 to 259, <|eot_id|> ends), with a chat template like its."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture
def model_folder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Llama's folder as far as prompts need it: the tokenizer and the shape, no weights."""
    shape = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 260,
        "max_position_embeddings": 4096,
    }
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(shape))
    return tmp_path / "model"
