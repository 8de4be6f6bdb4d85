"""`semion init`: for many models and machines the file parses, resolves and fits, with the paper's values; nothing is
overwritten, nobody waits for an answer that cannot come, and what cannot be used is told with what to do."""

from __future__ import annotations

import builtins
import json
import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from engine.api.initial import FREE_SHARE, choose
from engine.api.initial_file import text_of
from engine.api.initial_values import Found, Wishes
from engine.api.warnings import warnings
from engine.capacity.kv_cache import GIB
from engine.capacity.memory import Channel, estimate
from engine.cli import main
from engine.config.load import RunConfig, load_config
from engine.config.options import LOSSES
from engine.core.errors import ConfigError
from engine.data.templates import model_tokenizer
from engine.models.base import ModelShape
from engine.models.config_file import read_shape
from engine.run.spec import resolve
from tests.builders import make_model

ROOT = Path(__file__).parents[3]
LLAMA_8B, LLAMA_70B = (read_shape(ROOT / "configs" / "models" / f"llama-3.1-{size}") for size in ("8b", "70b"))
LLAMA_1B = ModelShape(16, 2048, 32, 8, 64, 8192, 128256, 5e5, None, 1e-5, True, 131072)
ROW = {"problem": "1+1", "answer": "2"}


def found(shape: ModelShape, **more: object) -> Found:
    said = {"reward_shape": None, "has_chat_template": True, "num_rows": 64, "is_whole": False, "longest_prompt": 200}
    return Found(shape, **(said | more))  # type: ignore[arg-type]


def written(wishes: Wishes, files: Found, folder: Path) -> RunConfig:
    """The configuration of the file that `init` would write."""
    file = folder / "run.toml"
    file.write_text(text_of(choose(wishes, files), str(file)), encoding="utf-8")
    return load_config(file)


@pytest.mark.parametrize(
    ("shape", "gpus", "gibibytes", "nodes"),
    [
        (LLAMA_1B, 1, 23.5, 1),
        (LLAMA_1B, 2, 39.4, 1),
        (LLAMA_8B, 1, 139.0, 1),
        (LLAMA_8B, 2, 79.0, 1),
        (LLAMA_8B, 4, 79.0, 1),
        (LLAMA_8B, 8, 79.0, 1),
        (LLAMA_8B, 8, 139.0, 5),
        (LLAMA_70B, 8, 139.0, 4),
    ],
)
@pytest.mark.parametrize(("loss", "interval"), [("dpo", 10), ("grpo", 1)])
def test_a_file_for_gpus_parses_resolves_and_fits(shape, gpus, gibibytes, nodes, loss, interval, tmp_path):
    wishes = Wishes("m", "t.jsonl", gpus_per_node=gpus, gpu_gibibytes=gibibytes, nodes=nodes, loss=loss, interval=interval)
    choice = choose(wishes, found(shape))
    config = written(wishes, found(shape), tmp_path)
    assert config == choice.config, "the file says what was chosen"
    gpu = round(gibibytes * GIB)
    held = estimate(choice.spec, Channel(128 << 20, 128 << 20), gpu)
    assert held.devices[0].num_bytes <= gpu * (1 - FREE_SHARE)
    assert held.fullest.num_bytes <= gpu
    assert choice.spec.kv_cache is not None and choice.spec.kv_cache.holds(choice.spec.kv_cache.num_bytes(gpu)) >= 32
    used = config.trainer.world_size + (config.inference.engines * config.inference.tensor_parallel) * (
        config.inference.placement == "disaggregated"
    )
    assert used <= gpus * nodes and (config.cluster.nodes, config.cluster.gpus_per_node) == (nodes, gpus)
    assert (config.model.dtype, config.trainer.layers, config.optimizer.implementation) == (
        "bfloat16",
        "transformer_engine",
        "te",
    )


def test_values_are_the_papers_and_not_the_toys(tmp_path):
    config = written(Wishes("m", "t.jsonl", "h.jsonl", gpus_per_node=8), found(LLAMA_8B), tmp_path)
    assert (config.optimizer.learning_rate, config.optimizer.eps, config.optimizer.clip_norm) == (1e-6, 1e-4, 1.0)
    assert (config.sampling.max_tokens, config.data.prompts_per_step, config.inference.max_model_tokens) == (2048, 64, 3072)
    assert (config.sampling.temperature, config.evaluation.temperature, config.evaluation.top_p) == (1.0, 0.6, 0.9)
    assert (config.sync.sync_interval, config.sync.reference, config.algorithm.loss) == (10, "follow", "dpo")
    assert config.checkpoint.every == config.evaluation.every == 100 and config.checkpoint.best_by == "reward"


def test_a_reward_model_has_the_non_verifiable_values_and_a_gpu_of_its_own(tmp_path):
    wishes = Wishes("m", "t", gpus_per_node=8, reward="model", reward_model="rm", interval=5)
    config = written(wishes, found(LLAMA_8B, reward_shape=LLAMA_8B), tmp_path)
    assert (config.optimizer.eps, config.optimizer.clip_norm, config.data.prompts_per_step) == (1e-8, 0.1, 32)
    assert (config.sampling.max_tokens, config.sync.reference, config.data.template) == (1024, "never", "figure5")
    engines = config.inference.engines * config.inference.tensor_parallel
    assert config.trainer.world_size + engines * (config.inference.placement == "disaggregated") <= 7


@pytest.mark.parametrize("interval", [1, 7, 10, 300, "never"])
@pytest.mark.parametrize("loss", LOSSES.names)
def test_every_loss_and_regime_makes_a_configuration_that_breaks_no_rule(loss, interval, tmp_path):
    wishes = Wishes("m", "t", "h", loss=loss, interval=interval)
    assert written(wishes, found(LLAMA_1B, has_chat_template=False), tmp_path).data.chat_template == "none"


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("cispo", {"kl_weight": 0.001}),
        ("dpo", {"beta": 0.1}),
        ("group_dpo", {"beta": 0.1}),
        ("grpo", {"kl_weight": 0.001}),
        ("oapl", {}),
    ],
)
def test_a_loss_has_the_weights_that_it_knows(loss, options, tmp_path):
    text = text_of(choose(Wishes("m", "t", loss=loss), found(LLAMA_1B)), "run.toml")
    algorithm = tomllib.loads(text)["algorithm"]
    assert algorithm == {"loss": loss, "samples_per_prompt": 8, **options}


def test_a_short_model_has_room_for_the_prompts_of_its_data(tmp_path):
    """Of 512 positions 300 tokens are needed for prompts, more than a third; a response has the rest."""
    short = replace(LLAMA_1B, max_positions=512)
    config = written(Wishes("m", "t"), found(short, longest_prompt=300), tmp_path)
    assert (config.data.max_prompt_tokens, config.sampling.max_tokens, config.inference.max_model_tokens) == (320, 192, 512)
    assert written(Wishes("m", "t"), found(short, longest_prompt=900), tmp_path).data.max_prompt_tokens == 384


def test_online_takes_turns_and_semi_online_does_not():
    online, semi = (choose(Wishes("m", "t", gpus_per_node=8, interval=s), found(LLAMA_8B)).config for s in (1, 10))
    assert (online.inference.placement, semi.inference.placement) == ("colocated", "disaggregated")


@pytest.mark.parametrize("gpus_here", [0, 8])
@pytest.mark.parametrize("gpus", [0, 8])
def test_a_run_is_estimated_for_the_machine_that_it_is_for(gpus, gpus_here, monkeypatch):
    """Not for the one, as a login node, that `init` is asked on."""
    monkeypatch.setattr("engine.run.spec.visible_gpus", lambda: gpus_here)
    choice = choose(Wishes("m", "t", gpus_per_node=gpus, gpu_gibibytes=139.0), found(LLAMA_8B if gpus else LLAMA_1B))
    assert choice.config.trainer.fuse_gradient_accumulation == "auto"
    assert choice.spec.config.trainer.fuses_accumulation is (gpus > 0)
    assert choice.spec.config.trainer.uses_te is (gpus > 0)


def test_what_does_not_fit_is_told_with_what_would():
    with pytest.raises(ConfigError, match=r"needs more memory than 1 x 1 GPUs of 79 GiB .* 1 x 2 GPUs of 79 GiB would do"):
        choose(Wishes("m", "t", gpus_per_node=1, gpu_gibibytes=79.0), found(LLAMA_8B))


def test_every_other_option_is_a_comment_that_can_be_uncommented(tmp_path):
    wishes = Wishes("m", "t", "h", gpus_per_node=8)
    text = text_of(choose(wishes, found(LLAMA_8B)), "run.toml")
    assert max(map(len, text.splitlines())) <= 128
    defaults = re.findall(r"^# (\w+ = )(?!\.\.\.)", text, re.MULTILINE)
    assert len(defaults) > 60
    (tmp_path / "all.toml").write_text(re.sub(r"^# (\w+ = )(?!\.\.\.)", r"\1", text, flags=re.MULTILINE))
    (tmp_path / "run.toml").write_text(text)
    assert load_config(tmp_path / "all.toml") == load_config(tmp_path / "run.toml")
    for section in ("guard", "profile", "cluster", "trainer"):
        assert f"\n[{section}]\n" in text


@pytest.fixture
def flags(tmp_path, tiny_tokenizer) -> list[str]:
    """A tiny model and data, for CPUs."""
    make_model(tmp_path / "model", tiny_tokenizer)
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW) + "\n")
    files = ["--model", str(tmp_path / "model"), "--train", str(tmp_path / "train.jsonl")]
    return ["init", *files, "--gpus", "0", "--directory", str(tmp_path / "run"), "--output", str(tmp_path / "run.toml")]


def test_a_file_for_cpus_passes_the_check_and_is_not_overwritten(flags, tmp_path, capsys):
    assert main(flags) == 0
    config = load_config(tmp_path / "run.toml")
    assert (config.model.dtype, config.trainer.layers, config.trainer.world_size) == ("float32", "auto", 1)
    assert "on CPUs; KV cache" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "run.toml")]) == 0
    assert "KV cache on a CPU" in capsys.readouterr().out
    assert main(flags) == 2
    assert "add --force" in capsys.readouterr().err
    assert main([*flags, "--force", "--loss", "grpo"]) == 0
    assert load_config(tmp_path / "run.toml").algorithm.loss == "grpo"


def test_without_a_terminal_nothing_is_asked(flags, capsys, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked"))
    assert main(["init"]) == 2
    assert "needs --model FOLDER and --train FILE where there is no terminal" in capsys.readouterr().err
    assert main([*flags, "--gpus", "8"]) == 2
    assert "needs --gpu-gibibytes GIB" in capsys.readouterr().err


def test_on_a_terminal_what_no_flag_says_is_asked(flags, tmp_path, capsys, monkeypatch):
    answers = iter(["", "three", "grpo", "0", "never"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", lambda text: next(answers))
    assert main(flags) == 0
    config = load_config(tmp_path / "run.toml")
    assert (config.algorithm.loss, config.sync.sync_interval, config.data.held_out) == ("grpo", "never", None)
    printed = capsys.readouterr().out
    assert (
        "must be one of cispo, dpo, group_dpo, grpo, oapl; found 'three'" in printed
        and "1 or more, or never; found '0'" in printed
    )


def test_a_name_of_the_hub_and_rows_without_answers_are_answered_with_what_to_do(flags, tmp_path, capsys):
    assert main([*flags, "--model", "meta-llama/Llama-3.1-8B-Instruct"]) == 4
    said = capsys.readouterr().err
    assert "hf download meta-llama/Llama-3.1-8B-Instruct --local-dir FOLDER" in said
    (tmp_path / "train.jsonl").write_text('{"problem": "Write a poem."}\n')
    assert main(flags) == 3
    assert "--reward FILE.py:NAME" in capsys.readouterr().err
    (tmp_path / "train.jsonl").write_text('{"frage": "1+1", "antwort": "2"}\n')
    assert main([*flags, "--columns", "problem=frage", "answer=antwort"]) == 0
    assert load_config(tmp_path / "run.toml").data.columns == {"problem": "frage", "answer": "antwort"}


def test_a_path_that_is_not_found_is_said_to_be_relative(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*flags, "--train", "nope.jsonl"]) == 3
    assert f"which is relative to the working directory, {tmp_path}" in capsys.readouterr().err
    assert main([*flags, "--train", str(tmp_path / "nope.jsonl")]) == 3
    assert "working directory" not in capsys.readouterr().err


def test_on_a_machine_with_gpus_values_for_cpus_are_warned_of(flags, tmp_path, monkeypatch):
    assert main(flags) == 0
    monkeypatch.setattr("engine.api.warnings.visible_gpus", lambda: 8)
    told = []
    for overrides in ([], ["model.dtype=bfloat16"]):
        spec = resolve(load_config(tmp_path / "run.toml", overrides))
        told.append(warnings(spec, model_tokenizer(spec.config, spec.shape.vocab_size)))
    assert "model.dtype = 'float32' on a machine with GPUs" in told[0][0]
    assert "'transformer_engine' and 'te' are faster" in told[1][0]
