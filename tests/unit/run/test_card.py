"""The model card and the generation config of an export: what the run wrote down is in them, what is on no record is left out,
and the lines that say how to ask the model run."""

import hashlib
import io
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import metadata_load
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.config.load import RunConfig
from engine.core.jsonl import JsonlLedger
from engine.core.provenance import commit, provenance
from engine.data.templates import PromptForm, encode_prompt, load_tokenizer
from engine.models.hf import HfCheckpoint
from engine.run.card import CARD, complete
from engine.run.checkpoint import data_digests, export
from tests import builders
from tests.checkpoints import commit as save
from tests.checkpoints import open_folder

ROW = {"measure": "accuracy", "num_problems": 5, "num_seeds": 2, "truncated": 0.125, "standard_error": 0.0625}
ROW |= {"completion_tokens_mean": 9.0}
STEP = 4
Make = Callable[..., tuple[RunConfig, Path]]


@pytest.fixture(scope="module")
def model(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seed model with weights, whose own card has a license, and whose generation config says other things than the run."""
    folder = tmp_path_factory.mktemp("models") / "Small-Llama"
    torch.manual_seed(3)
    shape = {name: value for name, value in builders.LLAMA.items() if name != "model_type"}
    made = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=256, tie_word_embeddings=False))
    made.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    said = {"bos_token_id": 256, "eos_token_id": [259, 258], "top_k": 20, "repetition_penalty": 1.1, "temperature": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(said))
    (folder / CARD).write_text("---\nlicense: llama3.1\ntags: [x]\n---\n# Small Llama\nlicense: not this\n")
    return folder


@pytest.fixture
def make(tmp_path: Path, model: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Make:
    """A run with a checkpoint and records, and its export, completed."""

    def made(*, records: bool = True, **tables: dict[str, Any]) -> tuple[RunConfig, Path]:
        data = tmp_path / "data"
        data.mkdir()
        (data / "train.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n' * 3)
        (data / "held_out.jsonl").write_text('{"problem": "1+2", "answer": "3"}\n')
        own: dict[str, dict[str, Any]] = {
            "model": {"path": str(model)},
            "data": {"train": str(data / "train.jsonl"), "held_out": str(data / "held_out.jsonl")},
        }
        config = builders.config(tmp_path / "a run", **builders.merged(own, tables))
        run = config.run_directory
        seed = HfCheckpoint(model)
        weights: Iterator[tuple[str, torch.Tensor]] = ((name, seed.tensor(name)) for name in seed.files)
        checkpoints = open_folder(run / "checkpoints", digests=data_digests(config))
        judged = [ROW | {"step": 0, "set": "held_out", "mean": 0.25}]
        folder = save(checkpoints, STEP, {"x": torch.ones(1)}, weights, config, {"judged": judged}, (259, 258))
        if records:
            rows = [*judged, *(ROW | {"step": step, "set": "held_out", "mean": step / 8} for step in (2, STEP, 6))]
            ask = PromptForm(config.data.template, config.data.system)
            prompt = list(encode_prompt(tiny_tokenizer, "1+2", ask))
            sample = {"problem": "1+2", "text": greedy(model, prompt, config), "prompt_ids": prompt}
            ledgers: dict[str, list[dict[str, Any]]] = {
                "evaluations": [*rows, ROW | {"step": STEP, "set": "other", "mean": 0.0, "standard_error": 0.0}],
                "samples": [sample | {"step": 0, "text": "an old one"}, sample | {"step": STEP}],
                "metrics": [{"step": step, "unix_seconds": 1764000000.0 + 60 * step} for step in range(6)],
                "guard": [{"step": 1, "text": "no signal"}, {"step": 5, "text": "later"}],
            }
            for name, found in ledgers.items():
                ledger = JsonlLedger(run / f"{name}.jsonl")
                ledger.append(found)
                ledger.close()
        exported = export(folder, tmp_path / "exported")
        complete(exported, folder)
        return config, exported

    return made


def greedy(model: Path, prompt: list[int], config: RunConfig) -> str:
    loaded, tokens = AutoModelForCausalLM.from_pretrained(model, dtype="auto"), torch.tensor([prompt])
    plain = {"eos_token_id": [259, 258], "pad_token_id": 0, "max_new_tokens": config.sampling.max_tokens}
    loaded.generation_config = GenerationConfig(**plain, do_sample=False)  # without the seed model's penalty
    output = loaded.generate(tokens, attention_mask=torch.ones_like(tokens))[0, len(prompt) :]
    return str(load_tokenizer(model).decode(output, skip_special_tokens=True))


def asked(card: str) -> str:
    """The lines of Python that ask the model through transformers."""
    return next(code for code in re.findall(r"```python\n(.*?)\n```", card, re.DOTALL) if "AutoModel" in code)


def test_the_card_says_what_the_run_wrote_down(make: Make) -> None:
    config, exported = make()
    card = (exported / CARD).read_text("utf-8")
    front = metadata_load(exported / CARD)
    assert front == {
        "base_model": "Small-Llama",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "llama3.1",
        "tags": ["semion", "reinforcement-learning", "dpo", "online", "conversational"],
    }
    assert "# a run\n" in card
    assert "| held_out | 0 | accuracy | 25.0% ± 6.2% | 5 × 2 | 12.5% |" in card
    assert "| held_out | 4 | accuracy | 50.0% ± 6.2% | 5 × 2 | 12.5% |" in card, "of this checkpoint, not of a later one"
    assert "75.0%" not in card
    assert "| other | 4 | accuracy | 0.0% (no spread among the problems) | 5 × 2 |" in card
    digest = hashlib.sha256(Path(config.data.train).read_bytes()).hexdigest()
    assert f"| `data.train` | `train.jsonl` | 3 | `{digest}` |" in card
    assert "| s (steps between weight syncs) | 1, online |" in card
    assert f"| steps | 4 of {config.run.steps} |" in card
    assert "beta 0.1" in card
    assert "no signal" in card and "later" not in card
    assert "2025-11-24 16:00 to 2025-11-24 16:03 UTC" in card
    made = provenance()
    assert f"torch {made['versions']['torch']}" in card and made["semion"] in card and str(made["processor"]) in card
    assert "an old one" not in card
    assert str(exported.parent) not in card, "no folder of this machine"


def test_what_is_on_no_record_is_left_out(make: Make, model: Path) -> None:
    """Only the checkpoint is left: it knows what was judged before it. The data have changed since."""
    config, exported = make(records=False, data={"chat_template": "none"})
    Path(config.data.train).write_text("{}\n")
    complete(exported, config.run_directory / "checkpoints" / f"step_{STEP:08d}")
    card = (exported / CARD).read_text("utf-8")
    assert "| held_out | 0 | accuracy | 25.0%" in card
    assert "| `data.train` | `train.jsonl` |  | `" in card
    assert 'problem = "..."' in card and "greedily:" not in card
    assert "| when |" not in card
    assert "conversational" not in card


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data": {"template": 'What is {problem}?\nSay "it".', "system": "Count."}},
        {"data": {"chat_template": "none", "template": "{problem}="}},
    ],
)
def test_the_lines_of_the_card_ask_the_model_as_the_run_did(
    make: Make, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, exported = make(**changes)
    card = (exported / CARD).read_text("utf-8")
    said = re.search(r"greedily:\n\n```\n(.*?)\n```\n", card, re.DOTALL)
    if "chat_template" in changes.get("data", {}):
        assert said is None, "the sample's tokens are of another form, so nothing is claimed of it"
    monkeypatch.chdir(exported)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(asked(card), "card", "exec"), {})
    assert said is None or printed.getvalue() == said[1] + "\n"


def test_the_generation_config_asks_as_the_evaluation_did(make: Make, recwarn: pytest.WarningsRecorder) -> None:
    config, exported = make()
    said = json.loads((exported / "generation_config.json").read_text())
    assert said == {
        "bos_token_id": 256,
        "eos_token_id": [259, 258],
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 0,
        "max_new_tokens": config.sampling.max_tokens,
    }
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    assert (loaded.generation_config.temperature, loaded.generation_config.max_new_tokens) == (0.6, 8)
    loaded.generate(torch.tensor([[256, 65]]), pad_token_id=0)
    assert not [str(warning.message) for warning in recwarn if "generation" in str(warning.message)]


def test_a_greedy_evaluation_gives_a_greedy_model(make: Make) -> None:
    _, exported = make(evaluation={"temperature": 0.0})
    said = json.loads((exported / "generation_config.json").read_text())
    assert said["do_sample"] is False and "temperature" not in said
    GenerationConfig.from_pretrained(exported).validate(strict=True)


def test_a_name_from_the_hubs_cache_and_parts_of_the_users_own(make: Make, model: Path, tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--owner--Small-Llama" / "snapshots" / "0123"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(model)
    judge = tmp_path / "judge.py"
    judge.write_text("def f(completion): return 1.0")
    _, exported = make(model={"path": str(cached)}, data={"reward": f"{judge}:f"}, sync={"sync_interval": 2})
    card = (exported / CARD).read_text("utf-8")
    assert (metadata_load(exported / CARD) or {})["base_model"] == "owner/Small-Llama"
    assert "`judge.py:f`" in card and str(tmp_path) not in card
    assert "2, semi-online" in card


def test_a_chat_template_of_the_runs_own_goes_along_and_is_named_where_it_does_not(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "plain.jinja"
    file.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    config, exported = make(data={"chat_template": str(file)})
    checkpoint = config.run_directory / "checkpoints" / f"step_{STEP:08d}"
    assert (exported / "chat_template.jinja").read_bytes() == file.read_bytes()
    assert "chat_template=" not in (exported / CARD).read_text("utf-8")
    (exported / "chat_template.jinja").unlink()
    complete(exported, checkpoint)
    assert 'chat_template=open("plain.jinja").read()' in (exported / CARD).read_text("utf-8")


def test_a_commit_is_told_where_a_checkout_says_it(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    assert commit(tmp_path) is None, "no commit yet"
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "one"], check=True)
    found = commit(tmp_path)
    assert found is not None and re.fullmatch("[0-9a-f]{40}", found)
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path) == f"{found}-changed"
