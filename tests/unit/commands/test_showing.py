"""`semion show`: the rollouts of a step beside their problems, in the order that was asked for, whatever is written in them."""

import json
from pathlib import Path

import pytest

from engine import cli
from engine.config.load import dump_config
from engine.data.rows import problem_id
from tests import builders

PROBLEMS = {"1 + 1": "2", "[bold]2[/bold] + 2": "4", "3 + 3": "6"}


def rollout(step: int, problem: str, sample: int, reward: float, **more: object) -> str:
    row = {
        "step": step,
        "version": step,
        "prompt_id": problem_id(problem),
        "sample_index": sample,
        "seed": 1,
        "reward": reward,
        "status": "ok",
        "finish_reason": "stop",
        "text": f"so {problem} at {step}, sample {sample}",
        "token_ids": [1, 2, 3],
        "log_probs": [-0.1, -0.2, -0.3],
    }
    return json.dumps(row | more) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two steps of three prompts with three samples each; the means of the last step are 1/3, 1 and, judged once, 0."""
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in PROBLEMS.items()))
    config = builders.config(tmp_path / "run", data={"train": str(train)})
    config.run_directory.mkdir()
    (config.run_directory / "config.toml").write_text(dump_config(config))
    one, two, three = PROBLEMS
    lines = [rollout(0, problem, sample, 0.0) for problem in PROBLEMS for sample in range(3)]
    lines += [rollout(1, one, sample, float(sample == 0)) for sample in range(3)]
    lines += [rollout(1, two, sample, 1.0, finish_reason="length") for sample in range(3)]
    lines += [rollout(1, three, sample, 0.0, status="ok" if sample == 0 else "timeout") for sample in range(3)]
    (config.run_directory / "rollouts.jsonl").write_text("".join(lines))
    return config.run_directory


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["show", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_the_last_step_is_shown_with_problem_right_answer_and_verdict(run, capsys):
    said = shown(capsys, run)
    for part in (
        *("[bold]2[/bold] + 2", "right answer: 4", "reward 1, 3 tokens, cut off at sampling.max_tokens", "not judged: timeout"),
        *("so 1 + 1 at 1, sample 2", "step 1: 3 of 3 prompts"),
    ):
        assert part in said
    assert "at 0" not in said


def test_worst_and_best_come_first(run, capsys):
    names = [problem_id(problem) for problem in PROBLEMS]
    for flag, order in (("--worst", (2, 0, 1)), ("--best", (1, 0, 2))):
        said = shown(capsys, run, flag)
        places = [said.index(names[place]) for place in order]
        assert places == sorted(places), flag
    said = shown(capsys, run, "--worst", "--prompts", 1, "--samples", 1, "--step", 0)
    assert "so 1 + 1 at 0, sample 0" in said and "2 more; --samples N shows them" in said and "1 of 3 prompts" in said


def test_a_row_that_has_gone_is_said_to_be(run, capsys):
    (run.parent / "train.jsonl").unlink()
    said = shown(capsys, run, "--prompt", problem_id("3 + 3"))
    assert "no longer in the training data" in said and "so 3 + 3 at 1" in said


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--step", "9"], "--step must be on record in"),
        (["--prompt", "abc"], "--prompt must be one of step 1; found 'abc'"),
    ],
)
def test_what_is_not_on_record_is_refused(run, capsys, arguments, part):
    assert cli.main(["show", str(run), *arguments]) == 3
    assert part in capsys.readouterr().err
    assert cli.main(["show", str(run.parent)]) == 3
