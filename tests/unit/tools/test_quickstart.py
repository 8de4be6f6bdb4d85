"""The quickstart takes away what an earlier one made, and nothing else."""

import importlib.util
import json
from pathlib import Path

import pytest

from engine.config.load import load_config

spec = importlib.util.spec_from_file_location("quickstart", Path(__file__).parents[3] / "tools" / "quickstart.py")
assert spec is not None and spec.loader is not None
quickstart = importlib.util.module_from_spec(spec)
spec.loader.exec_module(quickstart)


def test_what_an_earlier_quickstart_made_is_taken_away(tmp_path):
    for name in quickstart.MADE:
        quickstart.mark(tmp_path / name)
    (tmp_path / "summary.json").touch()
    (tmp_path / "mine").mkdir()
    quickstart.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    quickstart.clear(tmp_path / "new")
    assert (tmp_path / "new").is_dir()


def test_a_run_that_it_did_not_make_is_never_deleted(tmp_path):
    quickstart.mark(tmp_path / "data")
    (tmp_path / "train" / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit, match="train without its mark"):
        quickstart.clear(tmp_path)
    assert (tmp_path / "train" / "checkpoints").exists() and (tmp_path / "data").exists(), "nothing is taken away"


def test_a_single_device_is_one_that_both_sides_take_in_turn():
    train = load_config("configs/quickstart.toml", list(quickstart.SINGLE_TRAIN))
    assert (train.trainer.world_size, train.inference.engines, train.inference.placement) == (1, 1, "colocated")
    options = list(quickstart.SINGLE_SFT)
    assert load_config("configs/quickstart_sft.toml", options).trainer.world_size == 1


def test_the_start_of_its_run_is_shown_by_phase(tmp_path):
    assert quickstart.startup(tmp_path) == {}
    phases = [
        {"process": "engine 0", "name": "engine", "about": "", "after_seconds": 6.0, "seconds": 12.0},
        {"process": "the command", "name": "preflight", "about": "", "after_seconds": 0.5, "seconds": 3.0},
    ]
    rows = [json.dumps({"step": 0, "seconds": 24.0, "phases": phases}), json.dumps({"step": 30, "seconds": 9.0, "phases": []})]
    (tmp_path / "startup.jsonl").write_text("\n".join(rows) + "\n")
    found = quickstart.startup(tmp_path)
    assert found["step"] == 0, "the first start of all"
    shown = [("the command: preflight", "3.0 s, 12%"), ("engine 0: engine", "12.0 s, 50%")]
    assert quickstart.startup_rows(found) == shown


def test_it_ends_with_answers_before_and_after_those_that_changed_first(tmp_path):
    rows = [
        {"step": step, "problem": problem, "answer": "5", "text": text}
        for step, problem, text in [
            *((0, "same", "5"), (0, "better", "2"), (0, "wordless", "5")),
            *((30, "same", "no"), (60, "same", "5"), (60, "better", "4 + 1\n5"), (60, "wordless", "")),
        ]
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = quickstart.examples(tmp_path, 2)
    assert shown.split("\n\n")[0] == "\n".join(
        ["problem: better", "right answer: 5", "  before:", "    2", "  after:", "    4 + 1", "    5"]
    )
    assert "same" not in shown and "(nothing)" in shown


def test_its_phases_have_their_share():
    seconds = {"make problems": 10.0, quickstart.TRAIN: 80.0}
    summary = {"seconds": seconds, "total_seconds": 100.0, "train_seconds": 30.0, "wait_seconds": 20.0, "sync_seconds": 1.0}
    assert quickstart.phases(summary) == [
        ("make problems", "10", "10%"),
        (quickstart.TRAIN, "80", "80%"),
        ("  of it steps: training", "30", "30%"),
        ("  of it steps: waiting for rollouts", "20", "20%"),
        ("  of it steps: weight syncs", "1", "1%"),
        ("  of it start, evaluations, saving", "29", "29%"),
        ("in all", "100", "100%"),
    ]
