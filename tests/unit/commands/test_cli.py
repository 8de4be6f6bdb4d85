"""The command in process: a configuration that is printed can be read again, and each mistake ends with its exit code
and one line on stderr that names what to mend. No process is started here; tests/e2e runs whole commands.
"""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from engine import cli
from engine.api import training as api
from engine.api.faults.directory import check_fresh
from engine.api.preflight import examine
from engine.api.training import preemptible
from engine.commands import training
from engine.config.load import dump_config, load_config
from engine.core.errors import InferenceError, PreemptedError
from engine.core.files import locked
from engine.core.jsonl import JsonlLedger
from engine.core.types import Completion
from engine.observe.writing import MetricsWriter
from engine.rewards.registry import RoutedReward
from engine.run.signals import stop_request
from tests import builders
from tests.builders import LLAMA, make_model
from tests.checkpoints import commit, open_folder
from tests.unit.inference.test_pool import FakeEngine
from tests.unit.rollouts.test_rollouts import Parity
from tools.make_reward_model import make_reward_model

CONFIG = """
[run]
directory = "{folder}/run"
steps = 4
[model]
path = "{folder}/seed"
[data]
train = "{folder}/train.jsonl"
held_out = "{folder}/held_out.jsonl"
[trainer]
microbatch_tokens = 8192
"""


@pytest.fixture
def file(tmp_path, tiny_tokenizer):
    """A configuration with which nothing is wrong: a model with weights and tokenizer, and data."""
    make_model(tmp_path / "seed", tiny_tokenizer)
    for name in ("train.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text('{"problem": "1+1", "answer": "2", "solution": "It is 2."}\n')
    (tmp_path / "run.toml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path / "run.toml"


@pytest.fixture
def complaint(capsys):
    """Runs a command that must fail with an exit code; the one line it says."""

    def run(code: int, *arguments: object) -> str:
        assert cli.main([str(argument) for argument in arguments]) == code
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("semion: ")
        assert said.err.count("\n") == 1, said.err
        assert "Traceback" not in said.err
        return said.err

    return run


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("trainer.tensor_parallel=3", "trainer.tensor_parallel"),
        ("trainer.pipeline_parallel=4", "layers"),
        ("inference.max_model_tokens=5000", "4096 positions"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_any_process_starts(file, complaint, override, named):
    assert named in complaint(2, "train", file, override)


def test_a_function_that_cannot_be_called_is_refused_before_any_process_starts(file, complaint):
    overrides = ("data.reward=function", f"rewards.function={file}.py:name")
    assert "rewards.function must name a file of code that exists" in complaint(2, "train", file, *overrides)


def test_check_prints_the_resolved_tree_which_loads_again(file, tmp_path, capsys):
    assert cli.main(["check", str(file), "algorithm.beta=0.25", "sync.sync_interval=never", "--toml"]) == 0
    printed = capsys.readouterr().out
    again = tmp_path / "again.toml"
    again.write_text(printed)
    config = load_config(again)
    assert config == load_config(file, ["algorithm.beta=0.25", "sync.sync_interval=never"])
    assert (config.algorithm.model_dump()["beta"], config.sync.sync_interval) == (0.25, "never")
    assert printed == dump_config(config)
    assert "warmup_steps = 0" in printed, "defaults are resolved"


GENERATE = ["generate", "--questions", "q.json", "--format", "alpaca_eval", "--output", "out.json"]
COMMANDS = [["train"], ["sft"], ["rollout", "--output", "out.jsonl"], ["eval"], GENERATE]


@pytest.mark.parametrize("command", [["check"], *COMMANDS])
def test_an_unknown_key_or_a_missing_file_is_a_configuration_error(command, file, complaint):
    said = complaint(2, *command, file, "algorithm.betta=1")
    assert "algorithm.betta is not an option; found 1" in said
    assert "No such file" in complaint(2, *command, file.with_name("nowhere.toml"))
    assert "must read section.key=value" in complaint(2, *command, file, "beta=1")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_run_needs_is_looked_at_before_any_process_starts(command, file, tmp_path, complaint, monkeypatch):
    monkeypatch.setattr("engine.run.processes.Cluster.__enter__", lambda self: pytest.fail("a process would have started"))
    given = [*command, file, *([f"sft.checkpoint_out={tmp_path / 'out'}"] if command == ["sft"] else [])]
    if command[0] in ("train", "sft", "rollout"):
        said = complaint(3, *given, "data.train=gone.jsonl")
        assert "data.train must be a file or a dataset's folder; found none at gone.jsonl" in said
    if command[0] in ("train", "sft", "eval"):
        assert "data.held_out must be a file" in complaint(3, *given, "data.held_out=gone.jsonl")
    if command[0] in ("train", "rollout"):
        assert "data.mix[0].train must be a file" in complaint(3, *given, 'data.mix=[{train = "gone.jsonl"}]')
    assert "found no folder at gone" in complaint(4, *given, "model.path=gone")
    (tmp_path / "seed" / "config.json").write_text(json.dumps(LLAMA | {"model_type": "qwen2"}))
    said = complaint(2, *given)
    assert "must have model_type = 'llama' or 'qwen3'; found 'qwen2'" in said


def test_what_a_run_does_not_read_or_start_is_not_asked_for(file, tmp_path, complaint, monkeypatch):
    looked_at: list[str] = []

    def facts_of(module: str, arguments: list[str], environment: tuple[str, ...]) -> dict[str, bool]:
        looked_at.extend(arguments)
        return {"is_class": False}

    monkeypatch.setattr("engine.rewards.function.facts_of", facts_of)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    row = {"version": 0, "prompt_id": "p", "sample_index": 0, "seed": 1, "reward": 1.0, "status": "ok"}
    row |= {"finish_reason": "stop", "text": "2", "token_ids": [1], "log_probs": [-1.0]}
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps({"step": step} | row) + "\n" for step in range(4)))
    text = file.read_text()

    def accepted(*overrides: str) -> None:
        config = load_config(file, ["sync.sync_interval=never", *overrides])
        assert examine(config, "train" if config.sft.checkpoint_out is None else "sft") == []

    pairs, ledger = (f"data.replay={tmp_path / name}.jsonl" for name in ("pairs", "ledger"))
    accepted(pairs, "data.train=gone.jsonl")
    assert "data.held_out must be" in complaint(3, "train", file, "sync.sync_interval=never", pairs, "data.held_out=gone.jsonl")
    assert "data.train must be" in complaint(3, "train", file, "sync.sync_interval=never", ledger, "data.train=gone.jsonl")
    assert "data.replay must be" in complaint(3, "train", file, "sync.sync_interval=never", "data.replay=gone.jsonl")
    judged = ("data.reward=function", "rewards.function=gone.py:f")
    accepted(*judged, f"sft.checkpoint_out={tmp_path / 'out'}")
    file.write_text(text[: text.index("held_out")] + text[text.index("[trainer]") :])
    accepted(pairs, *judged)
    accepted(ledger, "data.reward=model", "reward_model.path=gone")
    assert not looked_at
    accepted(ledger, *judged)
    assert looked_at == ["rewards.function", "gone.py:f"], "right or wrong decides how rollouts are compared"


class TwoSteps(FakeEngine):
    """An engine that fails at its third step."""

    def collect(self, request_ids: list[str], num_open: int = 0) -> tuple[list[Completion | None], dict[str, float]]:
        if len({arguments[0][0] for method, arguments in self.calls if method == "collect"}) > 2:
            self.failing["collect"] = InferenceError("the engine failed")
        return super().collect(request_ids, num_open)


def test_rollouts_that_failed_half_way_leave_no_output_and_can_be_made_again(
    file, tmp_path, model_folder, complaint, capsys, monkeypatch
):
    """Engines and reward are fakes; tests/e2e makes rollouts with real ones."""
    engines: list[FakeEngine] = []
    cluster = MagicMock()
    cluster.__enter__.return_value.start_engines.return_value = engines
    closed: list[bool] = []

    class Ledger(JsonlLedger):
        def close(self) -> None:
            closed.append(True)
            super().close()

    monkeypatch.setattr("engine.rollouts.writer.JsonlLedger", Ledger)
    monkeypatch.setattr("engine.run.processes.Cluster", lambda config, **_: cluster)
    monkeypatch.setattr("engine.rewards.registry.open_rewards", lambda config, engine: RoutedReward({"math": Parity()}))
    cluster.__exit__.return_value = False
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    part.write_text('{"step": 0, "of": "an earlier attempt"}\n')
    command = ["rollout", file, f"model.path={model_folder}", "data.prompts_per_step=1", "--output", output]
    make_model(model_folder)
    engines[:] = [TwoSteps()]
    assert cli.main([str(argument) for argument in command]) == 5
    assert "the engine failed" in capsys.readouterr().err
    assert (output.exists(), closed) == (False, [True])
    assert {json.loads(line)["step"] for line in part.read_text().splitlines()} == {0, 1}
    engines[:] = [FakeEngine()]
    assert cli.main([str(argument) for argument in command]) == 0
    steps = [json.loads(line)["step"] for line in output.read_text().splitlines()]
    assert steps == [step for step in range(4) for _ in range(8)]
    assert not part.exists()


def test_no_command_uses_the_hubs_network_unless_told_to(file):
    code = "from engine import cli; cli.main(['check', {!r}]); import huggingface_hub.constants as c; print(c.HF_HUB_OFFLINE)"
    for told, offline in ((None, "True"), ("0", "False")):
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {} if told is None else {"HF_HUB_OFFLINE": told}
        command = [sys.executable, "-c", code.format(str(file))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split()[-1] == offline


def test_a_run_is_not_overwritten_without_resume(file, tmp_path, complaint):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    said = complaint(2, "train", file)
    assert f"found a run in {tmp_path}/run: add --resume auto" in said
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 0}\n'


def test_resuming_from_a_pointer_to_nothing_is_a_checkpoint_error(file, tmp_path, complaint):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "LATEST").write_text("step_00000004")
    assert "LATEST names step_00000004, which holds no manifest.json" in complaint(4, "train", file, "--resume", "auto")


def test_commands_name_the_option_they_need(file, tmp_path, complaint):
    said = complaint(2, "sft", file)
    assert "sft.checkpoint_out is required" in said
    (tmp_path / "out.jsonl").touch()
    assert "--output must be a new file" in complaint(2, "rollout", file, "--output", tmp_path / "out.jsonl")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    said = complaint(2, "rollout", file, f"data.replay={pairs}", "--output", tmp_path / "new.jsonl")
    assert "data.replay is for `semion train`" in said
    text = file.read_text()
    file.write_text(text[: text.index("held_out")] + text[text.index("[trainer]") :])
    assert "data.held_out is required by `semion eval`" in complaint(2, "eval", file)


def test_export_of_a_run_of_a_checkpoint_and_of_nothing(file, tmp_path, complaint, capsys):
    assert "must be a run or a checkpoint; found neither" in complaint(4, "export", tmp_path, tmp_path / "out")
    assert "must be a run or a checkpoint" in complaint(4, "export", tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    checkpoints = open_folder(tmp_path / "run" / "checkpoints")
    weights = [("model.norm.weight", torch.ones(3))]
    folder = commit(checkpoints, 4, {"step": torch.tensor(4)}, weights, load_config(file))
    for source, name in ((tmp_path / "run", "of_run"), (folder, "of_checkpoint")):
        assert cli.main(["export", str(source), str(tmp_path / name)]) == 0
        assert "the policy of step_00000004, verified" in capsys.readouterr().out
        assert (tmp_path / name / "model.safetensors").exists()
    assert "must be new or empty" in complaint(4, "export", folder, tmp_path / "of_run")
    assert "must hold BEST for --best; found none" in complaint(4, "export", tmp_path / "run", tmp_path / "b", "--best")
    commit(checkpoints, 8, {"step": torch.tensor(8)}, weights, load_config(file))
    checkpoints.select({4: 0.5, 8: 0.25}, load_config(file))
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "best"), "--best"]) == 0
    assert "the policy of step_00000004, verified" in capsys.readouterr().out


def test_doctor_reports_what_it_found_in_json_too(tmp_path, capsys):
    code = cli.main(["doctor", "--json", str(tmp_path / "doctor.json")])
    findings = json.loads((tmp_path / "doctor.json").read_text())
    assert {"python", "C++ compiler", "torch", "ray", "free memory", "free disk", "loopback", "device"} <= findings.keys()
    assert findings["torch"] == {"found": version("torch"), "verdict": "ok"}
    assert findings["loopback"]["verdict"] == "ok"
    assert code == int(any(finding["verdict"] != "ok" for finding in findings.values()))
    printed = capsys.readouterr().out
    assert all(name in printed for name in findings)


def test_an_interrupt_says_how_to_go_on(file, monkeypatch, complaint):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.commands.checking.read_config", interrupted)
    assert complaint(130, "check", file) == "semion: interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_first_signal_leaves_a_request_and_a_second_one_ends_the_run_to_be_continued(tmp_path, number):
    config = builders.config(tmp_path)
    before = signal.getsignal(number)
    stop_request(config).touch()  # of a run that was killed before it looked
    seen = []

    def signalled_twice() -> None:
        with preemptible(config) as stop:
            stop.worth_saving = True
            for _ in range(2):
                seen.append(stop_request(config).exists())
                os.kill(os.getpid(), number)

    with pytest.raises(
        PreemptedError, match="ended at once; --resume auto starts over, for there is no checkpoint yet"
    ) as caught:
        signalled_twice()
    assert seen == [False, True]
    assert caught.value.exit_code == 75
    assert signal.getsignal(number) == before
    assert not stop_request(config).exists()


def test_an_interrupt_before_the_first_step_ends_the_run_at_once(tmp_path):
    """There is nothing to save; an exception that no signal made passes as it is."""
    config = builders.config(tmp_path)
    with pytest.raises(KeyboardInterrupt), preemptible(config):
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), preemptible(config):
        raise KeyboardInterrupt
    assert not stop_request(config).exists()


@pytest.mark.parametrize(
    ("line", "overrides"),
    [
        ("train a.toml --resume auto run.steps=3", ["run.steps=3"]),
        (
            "train a.toml run.seed=1 --verbose run.steps=3 data.mix[0].train=b",
            ["run.seed=1", "run.steps=3", "data.mix[0].train=b"],
        ),
        ("rollout a.toml --output F run.directory=R", ["run.directory=R"]),
        ("eval a.toml --suite a.jsonl b.jsonl data.reward=math", ["data.reward=math"]),
    ],
)
def test_options_and_overrides_come_in_any_order(line, overrides):
    options = cli._parsed(line.split())
    assert options.overrides == overrides
    assert getattr(options, "suite", None) in (None, ["a.jsonl", "b.jsonl"])


def test_what_is_neither_an_option_nor_an_override_is_named(capsys):
    for line in ("train a.toml --resume auto --fly", "train a.toml --verbose runsteps=3", "score a.jsonl b run.steps=3"):
        with pytest.raises(SystemExit) as left:
            cli.main(line.split())
        assert left.value.code == 2
    assert "unrecognized arguments: --fly; semion train --help" in capsys.readouterr().err


def test_versions_are_told_without_an_import(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert f"semion {version('semion')}, Python " in said and f"\ntorch {version('torch')}\n" in said


@pytest.mark.parametrize("arguments", [[], ["fly"], ["train"], ["train", "a.toml", "--resume", "never"]])
def test_a_command_line_that_makes_no_sense_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert "usage: semion" in capsys.readouterr().err


class Finished:
    """The processes of a run that say what they are given."""

    def __init__(self, events: list[dict[str, Any]]) -> None:
        self._events = events

    def __enter__(self) -> "Finished":
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def train(self, *, resume: bool) -> Iterator[dict[str, Any]]:
        assert not resume
        yield from self._events


def test_a_run_is_shown_while_it_comes_and_summed_up_from_its_records(file, tmp_path, capsys, monkeypatch):
    """The summary counts what the records hold, also of before a resume; events are only shown."""
    resolved = ["trainer.layers=local", "trainer.fuse_gradient_accumulation=false"]
    config = load_config(file, [f"run.directory={tmp_path / 'run'}", *resolved])
    config.run_directory.mkdir()
    (config.run_directory / "config.toml").write_text(dump_config(config))
    accuracy: dict[str, Any] = {"step": 0, "set": "sums", "measure": "accuracy", "mean": 0.5, "standard_error": 0.1}
    accuracy |= {"num_problems": 10, "num_seeds": 2, "completion_tokens_mean": 3.0}
    graded = accuracy | {"set": "chats", "measure": "reward", "mean": -1.25, "standard_error": None}
    with MetricsWriter(config.run_directory) as writer:
        writer.write({"step": 0, "train_seconds": 1.0, "step_seconds": 2.0, "sync_seconds": 0.5})
        writer.write({"step": 1, "train_seconds": 1.5, "step_seconds": 2.0, "reward_mean": math.nan})
    ledger = JsonlLedger(config.run_directory / "evaluations.jsonl")
    ledger.append([accuracy | {"records": [1, 2]}])
    ledger.close()
    found: list[dict[str, Any]] = [
        {"kind": "note", "text": "12 prompts"},
        {"kind": "evaluation"} | accuracy,
        {"kind": "evaluation"} | graded,
        {"kind": "step", "step": 1, "train_seconds": 1.5, "step_seconds": 2.0},
        {"kind": "done", "engine_versions": {"vllm": "1"}},
    ]
    monkeypatch.setattr(api, "Cluster", lambda spec, **_: Finished(found))
    summary = training.show(config, "train", api.train(config, "auto"))
    assert json.loads((config.run_directory / "summary.json").read_text()) == summary
    assert (summary["steps"], summary["evaluations"], summary["versions"]) == (2, [accuracy], {"vllm": "1"})
    totals = summary["totals"]
    assert (totals["train_seconds"], totals["step_seconds"], totals["sync_seconds"]) == (2.5, 4.0, 0.5)
    printed = capsys.readouterr().out
    assert "12 prompts" in printed
    assert "step 0: held-out accuracy 50.0% ± 10.0% (sums: 10 problems, 2 seeds)" in printed
    assert "step 0: held-out reward -1.250 ± - (chats: 10 problems, 2 seeds)" in printed


def test_a_reward_model_that_cannot_judge_is_refused_before_any_process_starts(
    file, complaint, capsys, tmp_path, tiny_tokenizer
):
    tiny_tokenizer.save_pretrained(tmp_path / "seed")
    make_reward_model(tmp_path / "athene", tmp_path / "seed", "athene", 0)
    capsys.readouterr()  # a progress bar
    (tmp_path / "athene" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    options = ("data.reward=model", "reward_model.max_tokens=512", f"reward_model.path={tmp_path / 'athene'}")
    assert "no cls_token_id in config.json" in complaint(2, "train", file, *options)
    assert "reward_model.path must be" in complaint(4, "eval", file, *options[:2], f"reward_model.path={tmp_path / 'absent'}")


def test_a_directory_belongs_to_one_run_at_a_time(file, complaint, tmp_path):
    with locked(tmp_path / "run"):
        assert "one run at a time" in complaint(2, "train", file, f"run.directory={tmp_path / 'run'}")


def test_a_run_killed_before_its_first_checkpoint_starts_over_only_as_itself(file, complaint, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    where = f"run.directory={directory}"
    config = load_config(file, [where])
    (directory / "config.toml").write_text(dump_config(config))
    (directory / "metrics.jsonl").write_text("")
    check_fresh(load_config(file, [where, "run.seed=9"]), may_start_over=False)  # no step is on record: it is no run yet
    (directory / "metrics.jsonl").write_text('{"step": 0}\n')
    assert "--resume auto" in complaint(2, "train", file, where)
    assert "options it had" in complaint(2, "train", file, where, "run.seed=9", "--resume", "auto")
    check_fresh(config, may_start_over=True)  # raises nothing


def test_supervised_training_is_refused_before_it_could_be_lost(file, complaint, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    assert "choose another folder" in complaint(4, "sft", file, f"sft.checkpoint_out={tmp_path / 'full'}")
    assert "semion sft" in complaint(2, "train", file, f"sft.checkpoint_out={tmp_path / 'new'}")
