"""A save of a checkpoint in the background, killed, cut from its power or out of room at every single thing that it does to the
disk: the last whole checkpoint, or the new one, goes on bit for bit, and the next save works.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.load import RunConfig
from engine.core.arrays import TokenIds
from engine.core.errors import StorageError
from engine.core.types import RolloutGroup
from engine.inference.pool import Usage
from engine.inference.sampling import SampleRequest
from engine.rollouts.ahead import Ahead
from engine.rollouts.ledger import RolloutLedger
from engine.rollouts.paused import Pending
from engine.run.checkpoint import BEST, LATEST, best, latest
from engine.run.model_folder import Weights
from engine.run.saving import Checkpoints, Snapshot
from tests import builders
from tests.checkpoints import open_folder
from tests.unit.rollouts.test_rollouts import group
from tests.unit.run.faulty_disk import Disk, Killed, failing

OLD, NEW = 10, 15


def configured(root: Path, seed: Path) -> RunConfig:
    seed.mkdir(exist_ok=True)
    (seed / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float32"}')
    tables: dict[str, dict[str, Any]] = {"run": {"steps": 100}, "sync": {"sync_interval": 5}, "checkpoint": {"keep": 1}}
    return builders.config(root / "run", **tables, model={"path": str(seed)}, data={"train": "train.jsonl"})


def state_of(step: int) -> dict[str, torch.Tensor]:
    return {"exp_avg": torch.arange(24.0) + step, "schedule.step": torch.tensor(step)}


def weights_of(step: int) -> dict[str, torch.Tensor]:
    return {"embed": torch.full((4, 2), float(step)).bfloat16(), "norm": (torch.arange(3.0) * step).bfloat16()}


def folder_of(tensors: Mapping[str, torch.Tensor]) -> Weights:
    """A file each."""
    own = {place: {name: tensor} for place, (name, tensor) in enumerate(tensors.items())}
    return Weights(tuple((name,) for name in tensors), own, sum(tensor.nbytes for tensor in tensors.values()))


def snapshot(step: int) -> Snapshot:
    """With a reference of its own, so that all there is is written."""
    return Snapshot(state_of(step), torch.bfloat16, folder_of(weights_of(step)), folder_of(weights_of(step - 1)))


def group_of(step: int) -> RolloutGroup:
    """What stands ready of a step."""
    return replace(group([step / 7, 0.0]), step=step)


def begun(step: int) -> SampleRequest:
    """A sample that engines have paused."""
    asked = SampleRequest(f"rollout:{step}:p0:0", "p0", 0, step, TokenIds.of([1, 2]), 1.0, 1.0, 8)
    return asked.paused([step, 7], [-1 / step, -0.5], step - 1)


def ahead_of(step: int) -> Ahead:
    """Two steps that are ready and one that is paused."""
    paused = {step + 2: Pending([], [begun(step + 2)], [begun(step + 2)])}
    return Ahead({of: ([group_of(of)], Usage(3, 0.5)) for of in (step, step + 1)}, paused)


def save(checkpoints: Checkpoints, step: int, config: RunConfig) -> None:
    checkpoints.commit(step, snapshot(step), config, {"bytes": {"metrics": step}}, ahead=ahead_of(step))
    checkpoints.wait()


def assert_whole(root: Path, config: RunConfig, steps: set[int]) -> int:
    """The newest checkpoint is one of these steps in every bit, with its records, rollouts and pointers; which one."""
    checkpoints = open_folder(root / "run" / "checkpoints")
    saved = checkpoints.load(config)
    assert saved.step in steps and saved.state is not None and saved.reference is not None
    for found, expected in ((saved.policy, weights_of(saved.step)), (saved.reference, weights_of(saved.step - 1))):
        assert all(torch.equal(found.tensor(name), tensor) for name, tensor in expected.items())
    assert saved.state.keys() == state_of(saved.step).keys()
    assert all(torch.equal(saved.state[name], tensor) for name, tensor in state_of(saved.step).items())
    assert checkpoints.records() == {"bytes": {"metrics": saved.step}}
    complete, unfinished = checkpoints.ahead()
    assert complete is not None and unfinished is not None
    ahead, paused = RolloutLedger(complete), RolloutLedger(unfinished)
    for step in (saved.step, saved.step + 1):
        assert [row.rollout() for row in ahead.rows(step)] == list(group_of(step).rollouts)
    ((_, row),) = paused.with_columns(saved.step + 2)
    assert (row["token_ids"], row["log_probs"]) == (begun(row["step"]).sampled.token_ids, begun(row["step"]).sampled.log_probs)
    chosen = best(root / "run" / "checkpoints")
    assert chosen is not None and (chosen / "policy" / "config.json").exists(), "the best one stands too"
    return saved.step


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose newest checkpoint is of step 10 and whose best is of step 5, with what a run that was killed left behind: a
    staged folder, and a checkpoint of the step that comes next, which LATEST never named."""
    root = tmp_path_factory.mktemp("before")
    config, folder = configured(root, root / "seed"), root / "run" / "checkpoints"
    checkpoints = open_folder(folder)
    checkpoints.select({5: 0.5}, config)
    for step in (5, OLD):
        save(checkpoints, step, config)
    shutil.copytree(folder / f"step_{OLD:08d}", folder / f"step_{NEW:08d}")
    (folder / ".staging-step_00000099" / "parts").mkdir(parents=True)
    (folder / ".staging-step_00000099" / "parts" / "rank_0000.json").write_text("{}")
    assert (folder / LATEST).read_text() == f"step_{OLD:08d}" and (folder / BEST).read_text() == "step_00000005"
    return root


def faulty_save(root: Path, disk: Disk, config: RunConfig) -> str:
    """Saves step 15 on a disk with a fault; how it ended."""
    checkpoints = open_folder(root / "run" / "checkpoints")
    checkpoints.select({5: 0.5, NEW: 0.25}, config)
    with failing(disk):
        try:
            save(checkpoints, NEW, config)
            ended = "saved"
        except Killed:
            ended = "killed"
        except StorageError:
            ended = "full"
    if disk.dead and disk.kind == "power":
        ended = "cut"
        disk.cut()
    disk.close()
    return ended


def test_every_operation_of_a_save_may_be_the_last(before: Path, tmp_path: Path) -> None:
    """Some 130 operations, each three times: killed there, cut from its power, out of room."""
    root = tmp_path / "root"

    def fresh() -> RunConfig:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(before, root)
        return configured(root, before / "seed")

    counting = Disk(root)
    assert faulty_save(root, counting, fresh()) == "saved"
    operations = counting.log
    kinds = {operation.split()[0] for operation in operations}
    assert kinds == {"mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir"}, kinds
    ends: dict[str, int] = {}
    newest: dict[str, list[int]] = {"kill": [], "power": [], "full": []}
    for kind in ("kill", "power", "full"):
        for at, operation in enumerate(operations):
            config, told = fresh(), f"{kind} at {at}: {operation}"
            ended = faulty_save(root, Disk(root, at, kind), config)  # type: ignore[arg-type]
            ends[ended] = ends.get(ended, 0) + 1
            try:
                step = assert_whole(root, config, {OLD, NEW})
                newest[kind].append(step)
                if kind == "full" and ended == "full":
                    assert not list((root / "run" / "checkpoints").glob(f".staging-step_{NEW:08d}")), "nothing of it is left"
                if at % 5 == 0:
                    checkpoints = open_folder(root / "run" / "checkpoints")
                    checkpoints.select({5: 0.5, NEW: 0.25}, config)
                    save(checkpoints, NEW, config)  # the next one works, whatever was left
                    assert assert_whole(root, config, {NEW}) == NEW
            except BaseException as error:
                raise AssertionError(told) from error
    assert ends["killed"] == ends["cut"] == len(operations) >= 70
    assert ends["killed"] + ends["cut"] + ends["full"] >= 200
    assert ends["full"] > 40
    for kind, steps in newest.items():
        assert steps == sorted(steps) and {OLD, NEW} == set(steps), f"{kind}: the new one from some moment on, and never back"
    assert latest(root / "run" / "checkpoints") is not None
