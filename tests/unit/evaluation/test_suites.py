"""Suites on disk: an evaluation is done again exactly when something it depends on has changed, what is broken off does not
stand as done, and the command says what it will not do before any process starts.
"""

import hashlib
import json
import os
from typing import Any

import pytest

from engine import cli
from engine.config.load import load_config
from engine.core.errors import ConfigError, DataError
from engine.evaluation import suites
from engine.rewards.math.reward import VERIFIER_VERSION
from tests.builders import make_model

CONFIG = """
[run]
directory = "{folder}/run"
steps = 1
[model]
path = "{folder}/model"
[data]
train = "{folder}/amc.jsonl"
"""
FIGURES = {"suite": "amc", "mean": 0.5}
RECORDS = [{"prompt_id": "a", "text": "x\u2028y"}, {"prompt_id": "b", "text": ""}]


@pytest.fixture
def world(tmp_path):
    """A folder with a model of one file, a suite and a configuration; settings of the suite under overrides."""
    (tmp_path / "model").mkdir()
    llama = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    llama |= {"num_attention_heads": 4, "vocab_size": 67, "max_position_embeddings": 4096}
    (tmp_path / "model" / "config.json").write_text(json.dumps(llama))
    (tmp_path / "amc.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    (tmp_path / "run.toml").write_text(CONFIG.format(folder=tmp_path))

    (tmp_path / "mine.py").write_text("def score(problem, answer, completion):\n    return 1.0\n")

    def settings(*overrides, reward="math"):
        named = ["data.reward=function"] if any(o.startswith("rewards.function") for o in overrides) else []
        config = load_config(tmp_path / "run.toml", [*overrides, *named])
        changes = {"held_out": str(tmp_path / "amc.jsonl"), "reward": reward}
        return suites.settings_of(config, config.data.model_copy(update=changes))

    return tmp_path, settings


def test_what_was_saved_is_found_with_equal_settings_only(world):
    folder, settings = world
    suites.save(folder / "out", "amc", FIGURES | {"settings": settings()}, RECORDS)
    assert suites.load_finished(folder / "out", "amc", settings()) == FIGURES | {"settings": settings()}
    assert suites.load_records(folder / "out", "amc") == RECORDS
    assert suites.load_finished(folder / "out", "math", settings()) is None
    assert suites.load_finished(folder / "elsewhere", "amc", settings()) is None
    others = (
        *("run.seed=1", "evaluation.samples=8", "evaluation.temperature=0.7", "evaluation.top_p=1.0"),
        *("evaluation.max_problems=3", "sampling.max_tokens=8", "data.template={problem}", "inference.max_model_tokens=5000"),
        *("model.dtype=bfloat16", "inference.engines=2", "rewards.deadline_seconds=9.0"),
    )
    for override in others:
        assert suites.load_finished(folder / "out", "amc", settings(override)) is None, override
    function = f"rewards.function={folder}/mine.py:score"
    assert suites.load_finished(folder / "out", "amc", settings(function, reward="function")) is None
    for override in ("inference.timeout_seconds=9.0", "data.max_prompt_tokens=9", "run.steps=7"):
        assert suites.load_finished(folder / "out", "amc", settings(override)), override


@pytest.mark.parametrize("change", ["suite", "weights", "time"])
def test_a_changed_file_is_another_evaluation(world, change):
    folder, settings = world
    before = settings()
    if change == "suite":
        (folder / "amc.jsonl").write_text('{"problem": "1+1", "answer": "3"}\n')
    elif change == "weights":
        (folder / "model" / "model.safetensors").write_bytes(b"1")
    else:
        os.utime(folder / "model" / "config.json", ns=(1, 1))
    assert settings() != before


def test_another_verifier_is_another_evaluation(world, monkeypatch):
    _, settings = world
    before = settings()
    assert before["judged_by"] == {"the version of the verifier": VERIFIER_VERSION}
    monkeypatch.setattr("engine.rewards.math.reward.VERIFIER_VERSION", "of tomorrow")
    assert settings() != before


@pytest.mark.parametrize("named", ["{folder}/mine.py:score", "mine:score", "inner.deep.mine:score", "a.b.mine:score"])
def test_a_function_written_anew_is_another_evaluation_and_is_not_run_to_see_that(world, monkeypatch, named):
    """Modules are looked for from the working directory, as the workers do, and folders without an __init__.py count."""
    folder, settings = world
    monkeypatch.chdir(folder)
    place = named.format(folder=folder).rpartition(":")[0].removesuffix(".py").replace(".", "/")
    file = folder / f"{place}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    if "inner" in named:
        (file.parent / "__init__.py").write_text("raise SystemExit('imported')\n")
    override = f"rewards.function={named.format(folder=folder)}"
    for text in ("raise SystemExit('imported')\n", "raise SystemExit('imported')\n# another\n"):
        file.write_text(text)
        found = settings(override, reward="function")
        assert found["judged_by"]["rewards.function"] == hashlib.sha256(text.encode()).hexdigest()


def test_a_module_without_a_file_has_no_digest(world):
    _, settings = world
    for named in ("sys:intern", "sys.deep:intern", "nowhere.at.all:score"):
        assert settings(f"rewards.function={named}", reward="function")["judged_by"] == {"rewards.function": None}


def test_the_summary_says_all_it_takes_to_repeat(world):
    _, settings = world
    found = settings()
    assert (found["temperature"], found["top_p"], found["samples"]) == (0.6, 0.9, 4)
    assert "\\boxed{[answer]}" in found["template"], "the text, not its name"
    assert {"torch", "math-verify"} <= found["versions"].keys()


def test_an_evaluation_that_breaks_off_while_it_is_written_does_not_stand(world):
    folder, settings = world
    suites.save(folder / "out", "amc", FIGURES | {"settings": settings()}, RECORDS)
    with pytest.raises(ValueError, match="JSON"):
        suites.save(folder / "out", "amc", FIGURES | {"settings": settings()}, [{"reward": float("nan")}])
    assert suites.load_finished(folder / "out", "amc", settings()) is None


def test_names_must_differ_and_files_exist(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "amc.jsonl").touch()
    first, second = (str(tmp_path / folder / "amc.jsonl") for folder in ("a", "b"))
    assert suites.suite_names([first]) == {"amc": first}
    with pytest.raises(ConfigError, match="different names"):
        suites.suite_names([first, second])
    with pytest.raises(DataError, match=r"found none at gone\.jsonl"):
        suites.suite_names([first, "gone.jsonl"])
    (tmp_path / "amc.json").write_text("{")
    with pytest.raises(DataError, match="remove it"):
        suites.load_finished(tmp_path, "amc", {})


def test_the_command_refuses_before_it_starts_and_starts_nothing_for_what_is_done(world, monkeypatch, capsys, tiny_tokenizer):
    folder, settings = world
    (folder / "model" / "config.json").unlink()
    make_model(folder / "model", tiny_tokenizer)
    monkeypatch.setattr("engine.run.processes.Cluster.__enter__", lambda self: pytest.fail("a process would have started"))
    config, suite, out = (str(folder / name) for name in ("run.toml", "amc.jsonl", "out"))
    assert cli.main(["eval", config]) == 2
    assert "data.held_out is required" in capsys.readouterr().err
    assert cli.main(["eval", config, "--suite", "gone.jsonl"]) == 3
    assert cli.main(["eval", config, "--suite", suite, "--model", "nowhere"]) == 4
    assert "found no folder at" in capsys.readouterr().err
    figures: dict[str, Any] = {"measure": "accuracy"}
    figures |= {"mean": 0.25, "standard_error": 0.1, "seed_spread": 0.0, "pass_at": {"1": 0.25, "2": 0.5}, "truncated": 1.0}
    figures |= {"completion_tokens_mean": 3.0, "num_problems": 1, "num_seeds": 2, "settings": settings()}
    suites.save(folder / "out", "amc", figures, RECORDS)
    assert cli.main(["eval", config, "--suite", suite, "--output", out, "--json", str(folder / "figures.json")]) == 0
    assert "amc: done before" in capsys.readouterr().out
    assert json.loads((folder / "figures.json").read_text()) == {"suites": {"amc": figures}}
