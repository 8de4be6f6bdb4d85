"""A checkpoint that cannot be written ends the run, or is told while the run goes on to the next one, as checkpoint.on_failure
says; the last step's must be written either way."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.config.load import RunConfig
from engine.core.errors import StorageError
from engine.models.sharding import TrainerLayout, tensors
from engine.run.agreement import Agreement
from engine.run.checkpoint import latest
from engine.run.metrics import FAILED_CHECKPOINTS, catalogue
from engine.run.milestones import Milestones
from tests import builders
from tests.checkpoints import ALONE, open_folder
from tests.unit.core.test_files import files_of_at_most


class Policy:
    """What a checkpoint needs of one."""

    shape, layout, dtype, has_reference, holds_seed = builders.SMALL, TrainerLayout(), torch.float32, False, False

    state = SimpleNamespace(copy=lambda *, weights: {"exp_avg": torch.ones(2000)})

    def files(self, plan: Any, *, of: str) -> dict[int, dict[str, torch.Tensor]]:
        return {place: {name: torch.zeros(tensors(self.shape)[name]) for name in file.names} for place, file in enumerate(plan)}


@pytest.fixture
def open_run(tmp_path: Path) -> Callable[[str], tuple[RunConfig, Milestones]]:
    (tmp_path / "seed").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "seed" / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float32"}')

    def make(on_failure: str) -> tuple[RunConfig, Milestones]:
        made = builders.config(
            tmp_path / "run",
            model={"path": str(tmp_path / "seed")},
            data={"train": "train.jsonl"},
            checkpoint={"every": 1, "on_failure": on_failure},
        )
        parallel: Any = SimpleNamespace(rank=0, world_size=1, dp_size=1, device=torch.device("cpu"), host=ALONE)
        controller: Any = SimpleNamespace(scores=dict, collapse=None, kept=lambda steps: None, end_ids=())
        checkpoints = open_folder(made.run_directory / "checkpoints")
        source: Any = SimpleNamespace(drain=lambda steps: None)
        return made, Milestones(made, Policy(), parallel, checkpoints, controller, Agreement(made, parallel), source)  # type: ignore[arg-type]

    return make


def refused(milestones: Milestones, step: int) -> str:
    """What the checkpoint of a step fails with, at once or in its thread."""
    try:
        milestones.checkpoint(step)
        milestones.settle()
    except StorageError as error:
        return str(error)
    return ""


def test_the_run_ends_at_the_next_step(open_run: Callable[[str], tuple[RunConfig, Milestones]]) -> None:
    made, milestones = open_run("end")
    milestones.checkpoint(1)
    milestones.settle()
    with files_of_at_most(1000):
        assert "bytes needed and" in refused(milestones, 2)
    newest = latest(made.run_directory / "checkpoints")
    assert newest is not None and newest.name == "step_00000001" and milestones.told() == {}


def test_the_run_goes_on_and_tells(
    open_run: Callable[[str], tuple[RunConfig, Milestones]], caplog: pytest.LogCaptureFixture
) -> None:
    made, milestones = open_run("continue")
    folder = made.run_directory / "checkpoints"
    milestones.checkpoint(1)
    milestones.settle()
    with caplog.at_level(logging.WARNING), files_of_at_most(1000):
        milestones.checkpoint(2)  # fails in its thread
        milestones.checkpoint(3)  # is told of it, and fails too
    assert "a checkpoint was not written, and the run goes on without it" in caplog.text
    assert milestones.told()[FAILED_CHECKPOINTS.name] >= 1 and FAILED_CHECKPOINTS.name in catalogue()
    newest = latest(folder)
    assert newest is not None and newest.name == "step_00000001"
    with files_of_at_most(1000):
        assert refused(milestones, 4), "the last step's: nothing of the run may be lost"
    milestones.checkpoint(4)
    milestones.settle()
    newest = latest(folder)
    assert newest is not None and newest.name == "step_00000004"


def test_a_folder_that_cannot_be_made_is_told_before_anybody_writes(
    open_run: Callable[[str], tuple[RunConfig, Milestones]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, milestones = open_run("continue")
    folder = made.run_directory / "checkpoints"
    folder.write_text("a file")
    real = Path.mkdir

    def full(path: Path, *arguments: Any, **more: Any) -> None:
        if path == folder:
            raise OSError(28, "No space left on device", str(path))
        real(path, *arguments, **more)

    monkeypatch.setattr(Path, "mkdir", full)
    milestones.checkpoint(1)
    assert milestones.told() == {FAILED_CHECKPOINTS.name: 1.0}
    monkeypatch.undo()
    folder.unlink()
    milestones.checkpoint(2)
    milestones.settle()
    assert latest(folder) is not None
    shutil.rmtree(folder)
