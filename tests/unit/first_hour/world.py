"""The folder that a case is made in: a model, data, a reward and a configuration with which nothing is wrong."""

from __future__ import annotations

import json
from pathlib import Path

from tests.builders import make_model

RUN = """[run]
directory = "run"
steps = 4
[model]
path = "model"
[data]
train = "train.jsonl"
held_out = "held.jsonl"
max_prompt_tokens = 512
prompts_per_step = 2
[sampling]
max_tokens = 8
"""
REWARDS = '''"""A reward of the user's."""


def right(problem, answer, completion):
    return float(answer in completion)
'''


def make_world(folder: Path, tokenizer: object) -> None:
    """Fills the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.toml").write_text(RUN)
    (folder / "rewards.py").write_text(REWARDS)
    for name, start in (("train", 0), ("held", 50)):
        found = [{"problem": f"{n}+1", "answer": str(n + 1), "solution": f"It is {n + 1}."} for n in range(start, start + 4)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    answered = [{"problem": "1+1", "answer": "2", "completion": "It is \\boxed{2}."}]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answered))
    make_model(folder / "model", tokenizer)
