"""Held-out problems that are also trained on: found whatever their dress, told before a run and by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.api.warnings import warnings
from engine.config.load import RunConfig, override
from engine.data.mixture import load_mixture
from engine.data.overlap import overlap_warning, prompt_digest, shared
from engine.data.preferences import load_preferences
from engine.data.templates import load_tokenizer
from engine.rewards.registry import judging_of
from engine.run.spec import resolve
from tests.builders import config

SUM = {"problem": "What is $1 + 1$?", "answer": "2"}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def made(tmp_path, model_folder) -> RunConfig:
    """A configuration of which one held-out problem of three is trained on, in another dress."""
    train = write(tmp_path / "train.jsonl", *({"problem": f"{n} + 1?", "answer": str(n + 1)} for n in range(5)), SUM)
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "what is 1+1?"}]
    held_out = write(tmp_path / "held.jsonl", {"messages": turns, "answer": "2"}, *(SUM | {"problem": x} for x in "ab"))
    data = {"train": train, "held_out": held_out, "max_prompt_tokens": 512}
    return config(tmp_path / "run", model={"path": str(model_folder)}, data=data)


def said(config: RunConfig) -> list[str]:
    return warnings(resolve(config), load_tokenizer(config.model.path))


def test_what_asks_the_same_has_one_digest():
    digest = prompt_digest("What is 1+1?")
    assert prompt_digest("what is $1 + 1$?") == digest != prompt_digest("What is 1-1?")
    assert prompt_digest("b", (("user", "a"), ("assistant", "x"), ("user", "b"))) == prompt_digest("a\nb")
    assert shared([("What is 1 + 1?", ()), ("b", ())], {digest}) == ["What is 1 + 1?"]
    assert overlap_warning("data.held_out", 2, []) == ""


def test_before_a_run_the_overlap_is_told(made):
    (told,) = said(made)
    assert told.startswith("data.held_out: 1 of 3 problems are also trained on, such as 'what is 1+1?': ")
    other = override(made, {"data.held_out": write(Path(made.data.train).parent / "other.jsonl", SUM | {"problem": "c"})})
    assert said(other) == []


def test_the_digests_of_a_run_are_those_of_its_prompts_or_pairs(made, tmp_path):
    tokenizer = load_tokenizer(made.model.path)
    assert prompt_digest(SUM["problem"]) in load_mixture(made, judging_of, tokenizer).digests
    path = write(tmp_path / "pairs.jsonl", {"prompt": SUM["problem"], "chosen": "a", "rejected": "b"})
    assert load_preferences(path, tokenizer, "{problem}", 99, 9).digests == {prompt_digest(SUM["problem"])}
    replayed = override(made, {"data.replay": path, "sync.sync_interval": "never"})
    (told,) = said(replayed)
    assert told.startswith("data.held_out: 1 of 3 problems")


def test_before_a_run_many_long_rows_are_told(made, tmp_path):
    rows = [{"problem": "x" * n, "answer": "1"} for n in range(1, 101)]
    long = override(made, {"data.train": write(tmp_path / "long.jsonl", *rows), "data.template": "{problem}"})
    told = said(override(long, {"data.max_prompt_tokens": 90}))
    assert len(told) == 1 and told[0].startswith("data.train: ") and "would keep 99%" in told[0]
