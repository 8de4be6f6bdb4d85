"""Runs judged by a reward model that vLLM serves, in both forms: every reward against the same weights in float64, what is
too long, training on extremes, and a reward engine that is killed on the way."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

from engine.config.load import RunConfig
from tests.e2e.test_commands import command, rollouts, rows, semion, written
from tools.make_reward_model import make_reward_model

pytestmark = pytest.mark.timeout(900)  # as tests/e2e/test_commands.py

Make = Callable[..., RunConfig]
CLOSE = 1e-5  # of float32 in vLLM to float64 in torch, for rewards of order 1


@pytest.fixture(scope="module")
def reward_model(seed_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """Folder of a tiny reward model of a form."""

    def make(form: Any) -> Path:
        folder = tmp_path_factory.mktemp(form)
        make_reward_model(folder, seed_model("plain"), form, seed=3)
        return folder

    return make


class Judge:
    """The reward model of a folder in float64, one conversation at a time, as its form's authors run it."""

    def __init__(self, folder: Path) -> None:
        tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.is_athene = "v_head.weight" in tensors
        self.head = tensors.pop("v_head.weight" if self.is_athene else "score.weight")
        self.model = LlamaModel(LlamaConfig.from_pretrained(folder)).double().eval()
        self.model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})

    def ids(self, message: str, answer: str) -> list[int]:
        turns = [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        return list(self.tokenizer(text + (self.tokenizer.cls_token if self.is_athene else ""))["input_ids"])

    @lru_cache(maxsize=1024)  # noqa: B019  # the samples of a prompt repeat each other
    def reward(self, message: str, answer: str) -> float:
        ids = self.ids(message, answer)
        place = max(i for i, token in enumerate(ids) if token == self.tokenizer.cls_token_id) if self.is_athene else -1
        with torch.no_grad():
            hidden = self.model(torch.tensor([ids])).last_hidden_state[0, place]
        return float(hidden @ self.head[0])


def problems(config: RunConfig) -> dict[str, str]:
    """The problem of each prompt id."""
    texts = [json.loads(line)["problem"] for line in Path(config.data.train).read_text().splitlines()]
    return {hashlib.sha256(text.encode()).hexdigest()[:16]: text for text in texts}


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_a_classifier_gives_what_torch_gives_whatever_the_order(
    run_config: Make, reward_model: Callable[[Any], Path], tmp_path: Path, tensor_parallel: int
) -> None:
    folder, draw = reward_model("classification"), random.Random(0)
    judge, longest = Judge(folder), 90
    texts = ["".join(draw.choices("abc 0123+=$\n", k=draw.randrange(2, 50))) for _ in range(50)]
    conversations = [*itertools.pairwise(texts), ("twice", "the same"), ("twice", "the same")]
    config = run_config(
        *("data.reward=model", f"reward_model.path={folder}", f"reward_model.max_tokens={longest}"),
        *("reward_model.kv_cache=64 MiB", f"reward_model.tensor_parallel={tensor_parallel}"),
    )
    (tmp_path / "conversations.json").write_text(json.dumps(conversations))
    script = [sys.executable, str(Path(__file__).with_name("reward_probe.py")), written(config, tmp_path)]
    found = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}  # by the script, which imports this folder
    asked = [*script, str(tmp_path / "conversations.json")]
    run = subprocess.run(asked, capture_output=True, text=True, timeout=300, env=found)
    assert run.returncode == 0, run.stderr[-4000:]
    forward, backward, alone, by_one, by_two = json.loads(run.stdout.partition("RESULT ")[2])
    assert forward == backward, "the same bits in any order"
    assert by_one == by_two, "and of groups, whatever engine has them and whenever"
    statuses = ["too_long" if len(judge.ids(*conversation)) > longest else "ok" for conversation in conversations]
    assert [status for _, status in forward] == statuses
    assert 10 < statuses.count("ok") < 50
    for conversation, (value, status), *others in zip(conversations, forward, alone, by_one, strict=True):
        expected = judge.reward(*conversation) if status == "ok" else 0.0
        assert [value, *(other for other, _ in others)] == pytest.approx([expected] * 3, abs=CLOSE)
    apart = [abs(value - other) for (value, _), (other, _) in zip(forward, by_one, strict=True)]
    print(f"in groups {sum(map(bool, apart))} of {len(apart)} numbers are others, by {max(apart):.1e} at most")


@pytest.mark.nightly
def test_a_model_that_vllm_does_not_know_judges_over_two_ranks(
    run_config: Make, reward_model: Callable[[Any], Path], tmp_path: Path
) -> None:
    """Athene, whose class each worker process of an engine finds by our plugin alone."""
    folder = reward_model("athene")
    config = run_config(
        *("data.reward=model", f"reward_model.path={folder}", "reward_model.max_tokens=90", "run.steps=1"),
        *("reward_model.kv_cache=64 MiB", "reward_model.tensor_parallel=2", "evaluation.max_problems=2"),
    )
    semion("train", written(config, tmp_path))
    judge, asked = Judge(folder), problems(config)
    judged = [row for row in rollouts(config) if row["status"] == "ok"]
    assert len(judged) > 10
    for row in judged:
        assert row["reward"] == pytest.approx(judge.reward(asked[row["prompt_id"]], row["text"]), abs=CLOSE)


def test_rows_are_scored_without_a_configuration(reward_model: Callable[[Any], Path], tmp_path: Path) -> None:
    folder, file, output = reward_model("athene"), tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    conversations = [("What is 1+1?", "2"), ("Sing.", "La"), ("Sing.", "La" * 99)]
    lines = [json.dumps({"problem": message, "completion": answer}) for message, answer in conversations]
    file.write_text("\n".join(lines) + "\n")
    flags = ["--reward", "model", "--reward-model", str(folder), "--max-tokens", "90", "--output", str(output)]
    semion("score", str(file), *flags)
    judge, scored = Judge(folder), [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["status"] for row in scored] == ["ok", "ok", "too_long"]
    for conversation, row in zip(conversations[:2], scored[:2], strict=True):
        assert row["score"] == pytest.approx(judge.reward(*conversation), abs=CLOSE)


def reward_engines(run: subprocess.Popen[bytes]) -> set[int]:
    """Processes of the run's reward engines."""
    found = set()
    for process in psutil.Process(run.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end meanwhile
            if "ray::RewardEngine" in " ".join(process.cmdline()):
                found.add(process.pid)
    return found


def test_athenes_form_trains_a_policy_and_survives_the_death_of_its_engine(
    run_config: Make, reward_model: Callable[[Any], Path], tmp_path: Path
) -> None:
    folder, log_file = reward_model("athene"), tmp_path / "log"
    judge = Judge(folder)
    longest = len(judge.ids("0+5", "$5$ "))  # some first rollouts are longer
    config = run_config(
        *("data.reward=model", f"reward_model.path={folder}", f"reward_model.max_tokens={longest}"),
        *("reward_model.kv_cache=64 MiB", "reward_model.engines=2", "run.steps=6", "evaluation.max_problems=2"),
    )
    with log_file.open("w+") as log:
        run = subprocess.Popen(command("train", written(config, tmp_path)), stdout=log, stderr=log)
        try:
            metrics = config.run_directory / "metrics.jsonl"
            until(lambda: metrics.exists() and bool(metrics.read_text()), run, log_file)
            first, second = reward_engines(run)
            psutil.Process(first).kill()
            until(lambda: bool(reward_engines(run) - {first, second}), run, log_file)
            assert second in reward_engines(run), "only the lost one is started anew"
            assert run.wait(timeout=300) == 0, log_file.read_text()[-2000:]
        finally:
            run.terminate()
    asked, ledger = problems(config), rollouts(config)
    assert len(ledger) == config.run.steps * config.data.prompts_per_step * config.algorithm.samples_per_prompt
    for row in ledger:
        if len(judge.ids(asked[row["prompt_id"]], row["text"])) > longest:
            assert (row["status"], row["reward"]) == ("too_long", 0.0)
        else:
            assert row["status"] == "ok"
            assert row["reward"] == pytest.approx(judge.reward(asked[row["prompt_id"]], row["text"]), abs=CLOSE)
    assert {row["status"] for row in ledger} == {"ok", "too_long"}
    for record in rows(config, "metrics.jsonl"):
        of_step = [row for row in ledger if row["step"] == record["step"]]
        rewards = [row["reward"] for row in of_step if row["status"] == "ok"]
        assert record["reward_too_long"] == len(of_step) - len(rewards)
        assert record["reward_mean"] == pytest.approx(sum(rewards) / len(rewards))
        assert record["skipped_prompts"] + record["pairs"] == config.data.prompts_per_step
        assert record["all_correct_prompts"] == record["all_wrong_prompts"] == 0
        assert "accuracy" not in record
    summary = json.loads((config.run_directory / "summary.json").read_text())
    assert [evaluation["measure"] for evaluation in summary["evaluations"]] == ["reward", "reward"]
    assert "held-out reward" in log_file.read_text()


def until(condition: Callable[[], bool], run: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for a condition while the run lives."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline and run.poll() is None, log.read_text()[-2000:]
        time.sleep(0.02)
