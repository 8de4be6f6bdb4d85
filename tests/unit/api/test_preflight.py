"""What can be seen wrong before a process starts, all of it at once: each fault is made once and must be told, in a line, with
the exit code of its class; and a configuration without one is accepted without a trace left on disk."""

import json
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import cli
from engine.api.faults import machine
from engine.api.faults.look import Purpose
from engine.api.preflight import check, examine
from engine.api.warnings import warnings
from engine.commands.checking import table
from engine.config.load import RunConfig, dump_config, override
from engine.core.errors import CheckpointError, ConfigError, DataError, SemionError, StorageError, combined
from engine.core.files import locked
from engine.core.segment_writer import SegmentWriter
from engine.data import templates
from engine.data.templates import policy_tokenizer
from engine.run.spec import Spec, resolve, settled
from tests.builders import LLAMA, config, make_model
from tests.checkpoints import commit, open_folder
from tests.conftest import CHAT_TEMPLATE

ROW = {"problem": "1+1", "answer": "2", "solution": "It is 2."}


@pytest.fixture
def made(tmp_path, tiny_tokenizer) -> RunConfig:
    """A configuration with which nothing is wrong."""
    make_model(tmp_path / "model", tiny_tokenizer)
    write(tmp_path / "train.jsonl", [ROW])
    write(tmp_path / "held_out.jsonl", [ROW | {"problem": "1+2", "answer": "3"}])
    data = {"train": str(tmp_path / "train.jsonl"), "held_out": str(tmp_path / "held_out.jsonl"), "max_prompt_tokens": 512}
    return settled(config(tmp_path / "run", model={"path": str(tmp_path / "model")}, data=data))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_check_loads_the_tokenizer_once(made, tmp_path, monkeypatch, capsys):
    (tmp_path / "run.toml").write_text(dump_config(made))
    loaded: list[str] = []
    load = templates.load_tokenizer

    def counted(path: str) -> Any:
        loaded.append(path)
        return load(path)

    monkeypatch.setattr(templates, "load_tokenizer", counted)
    assert cli.main(["check", str(tmp_path / "run.toml")]) == 0
    assert loaded == [made.model.path]


def faults(made: RunConfig, purpose: Purpose = "train", **more: Any) -> list[str]:
    return [str(fault) for fault in examine(made, purpose, **more)]


def only(made: RunConfig, purpose: Purpose = "train", **more: Any) -> str:
    (fault,) = faults(made, purpose, **more)
    return fault


def test_a_run_with_nothing_wrong_is_accepted_and_nothing_is_written(made, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert check(made).starts_engines
    assert check(made, resume=True).parts == check(made).parts
    for purpose in ("rollout", "eval", "generate"):
        assert faults(made, purpose) == []
    assert check(override(made, {"sft.checkpoint_out": str(tmp_path / "out")})).source == "supervised"
    assert sorted(tmp_path.rglob("*")) == before


def test_all_faults_are_told_at_once_with_the_first_ones_exit_code(made, tmp_path, capsys, tiny_tokenizer):
    """F3: the three of the finding, which exited 0, and a broken rule beside them."""
    file = tmp_path / "run.toml"
    file.write_text(
        f'[run]\ndirectory = "{tmp_path}/run"\nsteps = 4\n[model]\npath = "{tmp_path}/model"\n[data]\ntrain = "gone.jsonl"\n'
        "[sampling]\nmax_tokens = 8\n"
    )
    assert cli.main(["check", str(file), "trainer.tensor_parallel=3", "rewards.function=a.py:f"]) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == "" and all(line.startswith("semion: ") for line in lines)
    named = ("rewards.function judges", "data.train must be a file", "trainer.tensor_parallel must divide")
    assert [any(name in line for line in lines) for name in named] == [True] * 3
    assert len(lines) == 3
    assert cli.main(["check", str(file), "model.path=/nowhere", "trainer.tensor_parallel=3"]) == 4
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["model.path", "data.train"]


def test_every_complaint_of_the_configuration_is_told(tmp_path, capsys):
    (tmp_path / "run.toml").write_text("[run]\nsteps = 0\n[data]\ntrian = 3\n")
    assert cli.main(["check", str(tmp_path / "run.toml"), "sync.x=1", "beta=1"]) == 2
    said = capsys.readouterr().err
    for part in (
        "run.directory is required",
        "run.steps: ",
        "section [model]",
        "data.trian is not",
        "sync.x is not",
        "'beta=1'",
    ):
        assert part in said
    assert said.count("semion: ") == said.count("\n") == 7


def test_a_run_that_is_refused_leaves_its_directory_alone(made, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(dump_config(made))
    for command in ("train", "sft"):
        assert cli.main([command, str(tmp_path / "run.toml"), "data.train=gone.jsonl"]) in (2, 3)
        assert not made.run_directory.exists()
    assert "data.train must be a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sync.sync_interval": 20}, True),
        ({"sync.sync_interval": 10}, False),
        ({"sync.sync_interval": 10, "sync.lookahead": 1}, True),
        ({"sync.sync_interval": "never"}, True),
        ({"sync.sync_interval": 20, "algorithm.correction": "truncate", "algorithm.correction_high": 2.0}, False),
        ({"sync.sync_interval": 20, "algorithm.loss": "oapl"}, False),
        ({"sync.sync_interval": 20, "algorithm.loss": "dpo"}, False),
        ({"sync.sync_interval": 20, "algorithm.loss": "group_dpo", "algorithm.alpha": 0.01}, True),
    ],
)
def test_old_answers_whose_ratios_only_a_clip_bounds_are_warned_of(made, options, told):
    config = override(made, {"algorithm.loss": "grpo", "run.steps": 40} | options)
    spec = resolve(config)
    found = [text for text in warnings(spec, policy_tokenizer(config)) if "steps old" in text]
    assert len(found) == told
    assert not told or "set algorithm.correction = 'truncate' and algorithm.correction_high = 2.0" in found[0]


def test_check_shows_the_run_and_writes_it_as_json(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "run.toml").write_text(dump_config(made))
    assert cli.main(["check", str(tmp_path / "run.toml"), "--json", str(tmp_path / "spec.json")]) == 0
    said = capsys.readouterr().out
    for part in (
        "rollouts, sampled by engines",
        "reference",
        "nccl: sync.transport",
        "held_out.jsonl after steps 0, 4",
        "digest of",
    ):
        assert part in said
    assert Spec.from_json((tmp_path / "spec.json").read_text()) == check(made)


def test_check_needs_neither_ray_nor_an_engine_and_takes_seconds(made, tmp_path):
    """The bound is loose, for a machine that may be busy; the time of the process itself counts. Some versions of transformers
    import torch where they are imported."""
    (tmp_path / "run.toml").write_text(dump_config(made))
    own = "import sys\nfrom transformers import PreTrainedTokenizerFast\nprint('torch' in sys.modules)"
    imports_torch = subprocess.run([sys.executable, "-c", own], capture_output=True, text=True, check=True).stdout == "True\n"
    code = (
        "import sys, time\nfrom engine import cli\n"
        f"assert cli.main(['check', {str(tmp_path / 'run.toml')!r}]) == 0\n"
        "print('SECONDS', time.process_time())\n"
        "print('LOADED', *sorted({'ray', 'vllm', 'megatron.core', 'torch'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, loaded = done.stdout.splitlines()[-2:]
    assert loaded == ("LOADED torch" if imports_torch else "LOADED")
    assert float(seconds.split()[1]) < 10


def broken_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00not json")


def cut_short(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])


def sharded(folder: Path, **files: str) -> None:
    """The weights in two files, named by an index; `files`: where else the index says that a tensor is."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {name: file for file, held in parts.items() for name in held} | {names[0]: files.get("first", "a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def shard_cut_short(folder: Path) -> None:
    sharded(folder)
    (folder / "b.safetensors").write_bytes((folder / "b.safetensors").read_bytes()[:-10])


def shard_missing(folder: Path) -> None:
    sharded(folder, first="c.safetensors")


def test_a_model_in_several_files_is_as_good(made):
    sharded(Path(made.model.path))
    assert faults(made) == []


def of_another_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA | {"intermediate_size": 64}))


def deeper(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 3}))


def small_vocabulary(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 200, "eos_token_id": 199}))
    make_model(folder)


def no_end(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({k: v for k, v in LLAMA.items() if k != "eos_token_id"}))
    without(folder, "eos_token")
    endless_turns(folder)


def endless_turns(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}\n{% endfor %}")
    without(folder, "chat_template")


def ends_with_a_letter(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [259, 65]}')


def end_beyond(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [259, 300]}')


def without(folder: Path, key: str) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != key}))


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    without(folder, "chat_template")


def bad_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only systems') }}")
    without(folder, "chat_template")


@pytest.mark.parametrize(
    ("spoil", "kind", "part"),
    [
        (broken_header, CheckpointError, "model.safetensors cannot be read: Error while deserializing header"),
        (cut_short, CheckpointError, "model.safetensors cannot be read: Error while deserializing header"),
        (shard_cut_short, CheckpointError, "b.safetensors cannot be read: Error while deserializing header"),
        (shard_missing, CheckpointError, "c.safetensors cannot be read: No such file"),
        (of_another_model, CheckpointError, "must be [64, 32] by config.json; found [48, 32]"),
        (deeper, CheckpointError, "must hold every tensor of the model in its config.json; found no model.layers.2."),
        (lambda folder: (folder / "model.safetensors").unlink(), CheckpointError, "found neither: check model.path"),
        (small_vocabulary, ConfigError, "found 260 tokens for a vocabulary of 200"),
        (no_end, ConfigError, "model.path must say which token ends a response"),
        (end_beyond, ConfigError, "found eos_token_id = [259, 300]"),
        (ends_with_a_letter, ConfigError, "no ordinary text"),
        (no_template, ConfigError, "must hold a tokenizer with a chat template; found none"),
        (bad_template, ConfigError, "found that it fails with 'only systems'"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), ConfigError, "must hold a tokenizer (tokenizer.json"),
    ],
)
def test_what_is_wrong_with_a_models_folder(made, spoil, kind, part):
    spoil(Path(made.model.path))
    found = examine(made, "train")
    assert any(part in str(fault) and isinstance(fault, kind) for fault in found), [str(fault) for fault in found]
    assert all("model" in str(fault) for fault in found), "and of nothing else"


def test_a_model_without_eos_whose_template_ends_turns_has_an_end_token(made):
    folder = Path(made.model.path)
    no_end(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert faults(made) == [] and warnings(resolve(made), policy_tokenizer(made)) == []


def test_what_the_engines_are_to_be_told_is_compared_with_the_vllm_that_is_there(made):
    wrong = override(made, {"inference.vllm": {"enforce_eagr": True}, "sampling.stop": ["</answer>", 260, 3]})
    found = faults(wrong)
    assert len(found) == 2 and "sampling.stop must name token ids of the model's vocabulary of 260; found 260" in found[0]
    assert "inference.vllm.enforce_eagr is no argument of the installed vLLM" in found[1]
    right = override(made, {"inference.vllm": {"enforce_eager": True, "attention_backend": "FLASH_ATTN"}, "sampling.stop": [3]})
    assert dict(table(check(right)))["further arguments of vLLM"] == 'enforce_eager = true, attention_backend = "FLASH_ATTN"'


def test_end_tokens_that_differ_are_told_and_are_no_fault(made, tmp_path, capsys):
    """The files name one, the tokenizer and its template another, as Llama 3's first release did."""
    (Path(made.model.path) / "generation_config.json").write_text('{"eos_token_id": 256}')
    assert faults(made) == []
    (told,) = warnings(resolve(made), policy_tokenizer(made))
    assert told == (
        "the model's folder names its end tokens in places that differ (generation_config.json: 256 '<|begin_of_text|>'; "
        "config.json: 259 '<|eot_id|>'; eos_token of the tokenizer: 259 '<|eot_id|>'; the chat template's end of a turn: 259 "
        "'<|eot_id|>'): sampling stops at each of them; responses that are tokenized end with 259 '<|eot_id|>'"
    )
    (tmp_path / "run.toml").write_text(dump_config(made))
    assert cli.main(["check", str(tmp_path / "run.toml")]) == 0
    assert "places that differ" in " ".join(capsys.readouterr().out.split())


def test_a_broken_row_is_told_wherever_it_stands(made, tmp_path):
    rows, file = [ROW | {"problem": f"{number}+1"} for number in range(20)], tmp_path / "train.jsonl"
    write(tmp_path / "train.jsonl", [*rows[:7], {"problem": 3}, *rows[7:], {"answer": "2"}])
    assert faults(made) == [
        f"data.train ({file}), line 8: `problem` must be a text; found 3: write it as text",
        f"data.train ({file}), line 22: `problem` must be a text that is not empty; found {{'answer': '2'}}: add it, or "
        "name its column by data.columns.problem",
    ]


def test_of_a_large_file_a_sample_is_read(made, tmp_path, monkeypatch):
    """Broken at its end, where only the spread part of the sample comes."""
    monkeypatch.setattr("engine.data.records.SMALL_BYTES", 1000)
    rows = [ROW | {"problem": f"{number}+1"} for number in range(3000)]
    write(tmp_path / "train.jsonl", [*rows[:2000], *[{"problem": 3}] * 1000])
    found = faults(made)
    assert len(found) == 4 and all("the line at byte" in fault for fault in found[:3])
    assert re.search(r"found \d\d of \d+ rows that were looked at that cannot, of which 3 are told", found[3])
    write(tmp_path / "train.jsonl", rows)
    assert faults(made) == []


def test_a_prompt_that_fits_is_looked_for(made, tmp_path):
    short = override(made, {"data.max_prompt_tokens": 20})
    assert "data.max_prompt_tokens; found none of 20 or fewer tokens" in only(short), "an evaluation has another limit"
    template = override(short, {"data.template": "{problem}", "data.max_prompt_tokens": 64})
    assert faults(template) == []


def test_a_chat_template_in_a_file_is_looked_at(made, tmp_path):
    file = tmp_path / "chat.jinja"
    asked = override(made, {"data.chat_template": str(file)})
    assert "data.chat_template must be 'tokenizer', 'none' or a file" in only(asked)
    file.write_text("{{ raise_exception('no users here') }}")
    assert "data.chat_template must hold a chat template for a user's message; found that it fails with" in only(asked)
    file.write_text("{{ messages[0]['content'] }}")
    assert faults(asked) == []
    assert faults(override(made, {"data.chat_template": "none", "data.system": "Be brief."})) == []


def test_rows_of_other_names_are_read_by_a_table(made, tmp_path):
    row = {"q": [{"role": "user", "content": "1+1"}], "meta": {"gold": 2}}
    write(tmp_path / "train.jsonl", [row])
    write(tmp_path / "held_out.jsonl", [row | {"meta": {"gold": 3}}])
    assert len(faults(made)) == 2
    assert faults(override(made, {"data.columns": {"problem": "q", "answer": "meta.gold"}})) == []
    assert (
        "must have `meta.no`, which data.columns.answer names"
        in faults(override(made, {"data.columns": {"problem": "q", "answer": "meta.no"}}))[0]
    )


def test_one_id_of_two_problems_is_told(made, tmp_path):
    write(tmp_path / "train.jsonl", [ROW | {"id": "a"}, ROW | {"id": "a", "problem": "2+2"}])
    assert "`id` must name one problem; found 'a' for '1+1' and '2+2'" in only(made)


def test_supervised_rows_have_solutions_that_fit(made, tmp_path):
    supervised = override(made, {"sft.checkpoint_out": str(tmp_path / "out")})
    write(tmp_path / "train.jsonl", [ROW, {"problem": "2+2", "answer": "4"}])
    assert "`solution` must not be empty" in only(supervised, "sft")
    write(tmp_path / "train.jsonl", [ROW | {"solution": "x" * 5000}])
    assert "a limit of 4096" in only(supervised, "sft")


def test_a_ledger_and_pairs_are_looked_at(made, tmp_path):
    offline = {"sync.sync_interval": "never", "data.replay": str(tmp_path / "replay.jsonl")}
    write(tmp_path / "replay.jsonl", [{"step": step, "prompt_id": "p", "token_ids": [1]} for step in range(3)])
    assert "found no step 3, and 3 from 0" in only(override(made, offline))
    write(tmp_path / "replay.jsonl", [{"step": step, "prompt_id": "p", "token_ids": [1]} for step in range(4)])
    assert "replay.jsonl, line 1" in only(override(made, offline)), "a row that is no rollout"
    write(tmp_path / "replay.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a"}])
    assert "line 2: `rejected` must be a text that is not empty" in only(override(made, offline))


def test_rollouts_of_a_run_are_looked_at_in_whatever_form_and_those_to_train_on_are_kept_whole(made, tmp_path):
    offline = {"sync.sync_interval": "never", "data.replay": str(tmp_path / "other" / "rollouts")}
    writer = SegmentWriter(tmp_path / "other" / "rollouts", {}, segment_bytes=1)
    for step in range(3):
        writer.append(step, [{"step": step, "version": 0}], {})
    writer.close()
    assert "found no step 3, and 3 from 0" in only(override(made, offline))
    whole = override(made, offline | {"data.replay": str(tmp_path / "other")})
    assert "found the folder of a whole run" in only(whole)
    assert f"name {tmp_path}/other/rollouts" in only(whole)
    assert faults(override(made, {"records.rollouts": (), "records.keep_steps": 3})) == []
    assert "must name 'tokens' and 'log_probs'" in only(override(made, {"records.rollouts": ("text", "tokens")}), "rollout")
    assert "must be unset for `semion rollout`" in only(override(made, {"records.keep_steps": 3}), "rollout")


def test_the_kv_cache_holds_one_request(made):
    """Two layers of 2 * 4 * 8 numbers in float32 are 512 bytes a token."""
    long = override(made, {"inference.max_model_tokens": 4096, "inference.kv_cache": "1 MiB"})
    sentence = only(long)
    assert "must hold one request of inference.max_model_tokens = 4096 tokens; found 1 MiB for 2.0" in sentence
    assert "raise it to '2 MiB', set 'auto', or lower" in sentence
    for enough in ("2 MiB", "auto"):
        assert faults(override(long, {"inference.kv_cache": enough})) == []


def test_layouts_positions_and_devices(made, monkeypatch):
    assert "trainer.tensor_parallel must divide" in faults(override(made, {"trainer.tensor_parallel": 3}))[0]
    long = override(made, {"inference.max_model_tokens": 5000})
    assert "must not exceed the model's 4096 positions" in only(long)
    monkeypatch.setattr(machine, "visible_gpus", lambda: 1)
    assert "on this machine" in only(made)
    assert faults(override(made, {"inference.placement": "colocated"})) == []


def test_shared_memory_and_disk(made, monkeypatch):
    asked = override(made, {"sync.transport": "ipc"})
    assert faults(asked) == []
    monkeypatch.setattr(machine, "room_for", lambda num_bytes: False)
    assert "sync.transport = 'ipc' needs 12" in only(asked) and "/dev/shm" in only(asked)
    assert faults(made) == [], "auto falls back to gloo"
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert "run.directory must be on a disk with room for 1 checkpoints; found 1,000 bytes free for" in only(made)
    with pytest.raises(StorageError) as caught:
        check(made)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(("place", "found"), [("file", "a file"), ("file/below", "a file"), ("", "an empty name")])
def test_a_run_directory_that_cannot_be_made(made, tmp_path, place, found):
    (tmp_path / "file").write_text("")
    other = override(made, {"run.directory": str(tmp_path / place) if place else ""})
    assert f"run.directory must be a folder that can be made and written; found {found}" in only(other)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("config.json", {"num_hidden_layers": "x"}, "must hold the sizes of"),
        ("config.json", {"vocab_size": None}, "has no vocab_size"),
        ("config.json", {"num_attention_heads": 0, "head_dim": None}, "must hold the sizes of"),
        ("generation_config.json", {"eos_token_id": "x"}, "must have eos_token_id as a number or a list"),
    ],
)
def test_a_broken_file_of_the_model_is_a_sentence(made, file, changes, said):
    path = Path(made.model.path) / file
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | changes))
    assert any(file in fault and said in fault for fault in faults(made)), faults(made)


def test_a_run_directory_of_another_run(made, tmp_path):
    made.run_directory.mkdir()
    with locked(made.run_directory):
        assert "one run at a time" in only(made)
    (made.run_directory / "metrics.jsonl").write_text('{"step": 0}\n')
    assert "add --resume auto" in only(made)
    assert "one with other options and no checkpoint" in only(made, resume=True)


def test_a_checkpoint_that_cannot_be_gone_on_from(made, tmp_path):
    checkpoints = open_folder(made.run_directory / "checkpoints")
    folder = commit(checkpoints, 4, {"step": torch.tensor(4)}, [("model.norm.weight", torch.ones(3))], made)
    assert faults(made, resume=True) == []
    write(tmp_path / "train.jsonl", [ROW | {"problem": "other"}])
    other = override(made, {"run.seed": 3, "algorithm.beta": 0.5, "run.steps": 2})
    found = faults(other, resume=True)
    for part in (
        "run.seed must be what",
        "algorithm.beta must be what",
        "data.train must be what",
        "run.steps must not be less",
    ):
        assert sum(part in fault for fault in found) == 1
    assert len(found) == 4
    write(tmp_path / "train.jsonl", [ROW])
    (folder / "rank_0000.safetensors").write_bytes(b"")
    assert "rank_0000.safetensors must have" in only(made, resume=True)


def test_a_users_function_is_tried_and_its_process_ended(made):
    judged = override(made, {"data.reward": "function", "rewards.function": "gone.py:f"})
    assert "rewards.function must name a file of code that exists" in only(judged)
    assert faults(judged, "generate") == [], "it judges nothing there"


def test_an_error_of_many_is_one_of_the_first_ones_class():
    one = ConfigError("a")
    assert combined([one]) is one and one.faults == (one,)
    several = combined([DataError("b"), combined([one, CheckpointError("c")])])
    assert isinstance(several, DataError) and several.exit_code == 3 and str(several) == "b\na\nc"
    again: SemionError = pickle.loads(pickle.dumps(several))
    assert [str(fault) for fault in again.faults] == ["b", "a", "c"]


def test_a_preflight_is_fast_enough_to_run_before_everything(made):
    check(made)
    started = time.process_time()
    check(made)
    assert time.process_time() - started < 5


def test_files_are_looked_at_beside_an_option_that_cannot_be_read(made, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(dump_config(made))
    write(tmp_path / "held_out.jsonl", [{"problem": 3}])
    (Path(made.model.path) / "model.safetensors").unlink()
    assert cli.main(["check", str(tmp_path / "run.toml"), "trainer.tensor_paralel=2", "inference.engines=0", "sync.x=1"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 5
    for part in (
        "trainer.tensor_paralel",
        "inference.engines: ",
        "sync.x",
        "model.safetensors or",
        "line 1: `problem` must be a t",
    ):
        assert sum(part in line for line in said) == 1
    cli.main(["check", str(tmp_path / "run.toml"), "model.dtype=int", "data.train=gone.jsonl"])
    assert len(capsys.readouterr().err.splitlines()) == 3, "nothing of the model, whose section could not be read"


def test_a_reward_that_is_not_there_is_told_once(made, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(dump_config(made))
    assert cli.main(["check", str(tmp_path / "run.toml"), 'data.reward=""']) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_broken_lines_are_told_and_counted(made, tmp_path):
    rows = [json.dumps(ROW | {"problem": f"{number}+1"}) for number in range(9)]
    (tmp_path / "train.jsonl").write_text("\n".join([*rows[:3], "{", *rows[3:], "3", "[", '{"problem": 1}']))
    found = faults(made)
    assert [re.findall(r"line (\d+)", fault)[:1] for fault in found[:3]] == [["4"], ["11"], ["12"]]
    assert "found 4 of 13 rows that cannot, of which 3 are told: mend or remove them all" in found[3]
    write(tmp_path / "replay.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}, *[{"prompt": "p", "chosen": "a"}] * 2])
    offline = override(made, {"sync.sync_interval": "never", "data.replay": str(tmp_path / "replay.jsonl")})
    assert ["replay.jsonl, line" in fault for fault in faults(offline)].count(True) == 2


def test_weights_without_fractions_are_refused(made):
    file = Path(made.model.path) / "model.safetensors"
    save_file({name: value.to(torch.int8) for name, value in load_file(file).items()}, file)
    found = faults(made)
    assert len(found) == 3 and "must be of F64, F32, F16, BF16; found I8, as of " in found[0]


def test_the_tokenizer_is_not_blamed_for_a_config_that_is_refused(made):
    file = Path(made.model.path) / "config.json"
    file.write_text(json.dumps(LLAMA | {"model_type": "unheard"}))
    assert "model_type" in only(made)
    (Path(made.model.path) / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert "model_type" in only(made)


def test_a_sink_that_cannot_work_is_told_before_a_run(made):
    assert "run.sinks must be one of mlflow, tensorboard, wandb" in only(override(made, {"run.sinks": ["tensorbord"]}))
    assert faults(override(made, {"run.sinks": ["tensorbord"]}), "eval") == [], "which tells nobody"
    assert faults(override(made, {"run.sinks": []})) == []


def test_a_machine_of_the_run_has_the_memory_for_what_is_kept_on_the_host(made, monkeypatch):
    """A tiny run asks for next to nothing. Where no GPU is here, this machine is none of those that the run is for."""
    alone = override(made, {"inference.placement": "colocated"})
    monkeypatch.setattr(machine, "visible_gpus", lambda: 1)
    assert faults(alone) == []
    monkeypatch.setattr(machine, "host_bytes", lambda: 1000)
    sentence = only(alone)
    assert "0.0 GiB on this machine for 0.0 GiB needed (snapshot of a checkpoint" in sentence
    assert "): take nodes, or a container's limit, with more memory" in sentence
    monkeypatch.setattr(machine, "visible_gpus", lambda: 0)
    assert faults(alone) == []
