"""Checkpoints on disk: what is committed comes back, any altered, torn or missing file is refused by name, another run
is refused by option, and a process killed at any moment leaves a whole checkpoint and never an older one.

Run as a script with a folder, this file is the process that gets killed (see the last test).
"""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.config.load import RunConfig
from engine.core.arrays import TokenIds
from engine.core.errors import CheckpointError, ConfigError, StorageError, WatchdogError
from engine.inference.pool import Usage
from engine.inference.sampling import SampleRequest
from engine.models.hf import HfCheckpoint
from engine.rewards.math.reward import VERIFIER_VERSION
from engine.rollouts.ahead import AHEAD, Ahead
from engine.rollouts.paused import PAUSED, Pending
from engine.run import model_folder
from engine.run.checkpoint import (
    BEST,
    LATEST,
    MANIFEST,
    SLOTS,
    _content_digest,
    best,
    data_digests,
    export,
    latest,
    rank_file,
    read_manifest,
    reference_place,
)
from engine.run.milestones import commits, resume_policy
from engine.run.model_folder import Weights, check_shared, write_model
from engine.run.saving import Checkpoints, Snapshot
from tests import builders
from tests.checkpoints import ALONE, open_folder, snapshot_of
from tests.checkpoints import commit as committed
from tests.checkpoints import weights_of as own_weights
from tests.unit.core.test_files import files_of_at_most
from tests.unit.rollouts.test_rollouts import group

ROOT = Path(__file__).resolve().parents[3]
KILLS = 15


def run_config(root: Path, **changes: dict[str, Any]) -> RunConfig:
    """A configuration whose model is the template folder root/seed, made here."""
    (root / "seed").mkdir(exist_ok=True)
    (root / "seed" / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float32"}')
    own: dict[str, dict[str, Any]] = {"run": {"steps": 100}, "sync": {"sync_interval": 5}}
    own["model"] = {"path": str(root / "seed")}
    return builders.config(root / "run", **builders.merged(own, {"data": {"train": "train.jsonl"}}, changes))


def open_checkpoints(root: Path) -> Checkpoints:
    return open_folder(root / "run" / "checkpoints")


def state_of(step: int) -> dict[str, torch.Tensor]:
    return {"0.exp_avg": torch.full((3, 4), float(step)), "0.step": torch.tensor(step), "empty": torch.zeros(0)}


def weights_of(step: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield "embed", torch.full((4, 2), float(step)).bfloat16()
    yield "norm", torch.arange(3.0).bfloat16()


def commit(root: Path, step: int, **changes: dict[str, Any]) -> Path:
    return committed(open_checkpoints(root), step, state_of(step), weights_of(step), run_config(root, **changes))


def state_in(checkpoints: Checkpoints, config: RunConfig) -> dict[str, torch.Tensor]:
    state = checkpoints.load(config).state
    assert state is not None
    return state


def test_a_checkpoint_records_what_the_run_began_with(tmp_path):
    """A file that changes, or goes, while the run goes on."""
    (tmp_path / "train.jsonl").write_text("one")
    config = run_config(tmp_path, data={"train": str(tmp_path / "train.jsonl")})
    folder = tmp_path / "run" / "checkpoints"
    checkpoints = open_folder(folder, digests=data_digests(config))
    (tmp_path / "train.jsonl").write_text("two")
    committed(checkpoints, 5, state_of(5), weights_of(5), config)
    with pytest.raises(CheckpointError, match=r"data\.train must be what .* was written with"):
        checkpoints.load(config)
    (tmp_path / "train.jsonl").unlink()
    committed(checkpoints, 10, state_of(10), weights_of(10), config)
    (tmp_path / "train.jsonl").write_text("one")
    assert checkpoints.load(config).step == 10


def test_an_option_that_came_later_counts_as_its_default(tmp_path):
    commit(tmp_path, 5)
    manifest = tmp_path / "run" / "checkpoints" / "step_00000005" / "manifest.json"
    saved = json.loads(manifest.read_text())
    del saved["config"]["model"]["family"], saved["config"]["data"]["reward_combine"], saved["sha256"]
    manifest.write_text(json.dumps(saved | {"sha256": _content_digest(saved)}))
    assert open_checkpoints(tmp_path).load(run_config(tmp_path)).step == 5
    with pytest.raises(CheckpointError, match=r"model\.family must be what .* found 'llama' instead of None"):
        open_checkpoints(tmp_path).load(run_config(tmp_path, model={"family": "llama"}))


def older(root: Path, **changes: Any) -> None:
    """Makes the checkpoint of step 5 one that an older Semion wrote."""
    manifest = root / "run" / "checkpoints" / "step_00000005" / "manifest.json"
    saved = json.loads(manifest.read_text())
    del saved["sha256"]
    for part, change in changes.items():
        saved[part] = builders.merged(saved[part], change) if part == "config" else saved[part] | change
    manifest.write_text(json.dumps(saved | {"sha256": _content_digest(saved)}))


def test_a_checkpoint_of_an_older_verifier_says_what_to_do(tmp_path):
    commit(tmp_path, 5)
    older(tmp_path, data={"the version of the verifier": "3"})
    with pytest.raises(CheckpointError) as raised:
        open_checkpoints(tmp_path).load(run_config(tmp_path))
    said = str(raised.value)
    assert f"version 3 of the verifier, this Semion has version {VERIFIER_VERSION}" in said
    assert "resume with the Semion that wrote it, or export its policy (semion export)" in said and "\n" not in said


def test_a_checkpoint_from_before_the_reward_model_was_asked_by_groups_says_what_to_do(tmp_path):
    (tmp_path / "rm").mkdir()
    judged = {"data": {"reward": "model"}, "reward_model": {"path": str(tmp_path / "rm")}}
    checkpoint = commit(tmp_path, 5, **judged)
    assert open_checkpoints(tmp_path).load(run_config(tmp_path, **judged)).step == 5
    saved = json.loads((checkpoint / "manifest.json").read_text())
    del saved["data"]["how the reward model is asked"], saved["sha256"]
    (checkpoint / "manifest.json").write_text(json.dumps(saved | {"sha256": _content_digest(saved)}))
    with pytest.raises(CheckpointError, match=r"asks the reward model in another way.*: resume with the Semion that wrote it"):
        open_checkpoints(tmp_path).load(run_config(tmp_path, **judged))


def test_a_checkpoint_with_options_of_another_form_says_what_to_do(tmp_path):
    """One that is gone, if it said anything; and sources of data.mix from before a source had all its options of today."""
    commit(tmp_path, 5)
    older(tmp_path, config={"data": {"blend": None}})
    assert open_checkpoints(tmp_path).load(run_config(tmp_path)).step == 5
    older(tmp_path, config={"data": {"blend": 0.5}})
    with pytest.raises(CheckpointError, match=r"older Semion with data\.blend, which .* cannot go on with: resume .*export"):
        open_checkpoints(tmp_path).load(run_config(tmp_path))
    mixed = {"data": {"mix": [{"train": "other.jsonl", "prompts_per_step": 1}]}}
    commit(tmp_path, 5, **mixed)
    assert open_checkpoints(tmp_path).load(run_config(tmp_path, **mixed)).step == 5
    older(tmp_path, config={"data": {"mix": [{"train": "other.jsonl", "prompts_per_step": 1}]}})
    with pytest.raises(CheckpointError, match=r"older Semion with another form of data\.mix, which .*: resume .*export"):
        open_checkpoints(tmp_path).load(run_config(tmp_path, **mixed))


def test_what_is_exported_carries_the_chat_template_of_the_run(tmp_path):
    (tmp_path / "turns.jinja").write_text("{{ messages[0].content }}")
    checkpoint = commit(tmp_path, 5, data={"chat_template": str(tmp_path / "turns.jinja")})
    exported = export(checkpoint, tmp_path / "exported")
    narrow = export(checkpoint, tmp_path / "narrow", "bfloat16")
    assert [(folder / "chat_template.jinja").read_text() for folder in (exported, narrow)] == ["{{ messages[0].content }}"] * 2
    assert not (export(commit(tmp_path, 10), tmp_path / "own") / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": {"truncated": "wrong"}},
        {"sampling": {"overlong_buffer": 5}},
        {"algorithm": {"choose_truncated": True}},
        {"optimizer": {"schedule": "linear", "decay_steps": 9}},
    ],
)
def test_what_becomes_of_long_responses_and_the_schedule_are_part_of_the_run(tmp_path, change):
    commit(tmp_path, 5)
    ((section, options),) = change.items()
    with pytest.raises(CheckpointError, match=f"{section}.{next(iter(options))} must be what"):
        open_checkpoints(tmp_path).load(run_config(tmp_path, **change))


def test_the_policy_of_a_checkpoint_names_all_that_ends_a_response(tmp_path):
    config = run_config(tmp_path)
    written = committed(open_checkpoints(tmp_path), 5, state_of(5), weights_of(5), config, None, (7, 8))
    assert json.loads((written / "policy" / "generation_config.json").read_text()) == {"eos_token_id": [7, 8]}
    export(written, tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").exists()


def test_a_copy_of_a_checkpoint_under_another_name_is_left_alone(tmp_path):
    shutil.copytree(commit(tmp_path, 5), tmp_path / "run" / "checkpoints" / "step_00000005_good")
    for step in (10, 15, 20):
        commit(tmp_path, step)
    assert open_checkpoints(tmp_path).steps() == {15, 20}
    assert (tmp_path / "run" / "checkpoints" / "step_00000005_good" / "manifest.json").exists()


def test_what_judges_belongs_to_the_run(tmp_path):
    """The user's function and the reward model may not change between a kill and a resume; how long to wait may."""
    function, model = tmp_path / "judge.py", tmp_path / "judge_model"
    function.write_text("def f(problem, answer, completion): return 1.0")
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"one")
    mix = {"mix": ({"train": "chat.jsonl", "reward": "model"},), "reward": "function", "train": "train.jsonl"}
    judges: dict[str, Any] = {"data": mix, "rewards": {"function": f"{function}:f"}}
    judges |= {"reward_model": {"path": str(model), "timeout_seconds": 5.0}}
    commit(tmp_path, 5, **judges)
    patient = judges | {"reward_model": judges["reward_model"] | {"timeout_seconds": 9.0}}
    assert open_checkpoints(tmp_path).load(run_config(tmp_path, **patient)).step == 5
    more = judges | {"reward_model": judges["reward_model"] | {"engines": 2}}
    assert open_checkpoints(tmp_path).load(run_config(tmp_path, **more)).step == 5
    split = judges | {"reward_model": judges["reward_model"] | {"tensor_parallel": 2}}
    with pytest.raises(CheckpointError, match=r"reward_model\.tensor_parallel"):
        open_checkpoints(tmp_path).load(run_config(tmp_path, **split))
    (model / "model.safetensors").write_bytes(b"three")
    with pytest.raises(CheckpointError, match=r"^reward_model\.path must be what .* was written with"):
        open_checkpoints(tmp_path).load(run_config(tmp_path, **judges))
    (model / "model.safetensors").write_bytes(b"two")
    function.write_text("def f(problem, answer, completion): return 0.5")
    with pytest.raises(CheckpointError, match=r"^rewards\.function must be what "):
        open_checkpoints(tmp_path).load(run_config(tmp_path, **judges))


def assert_whole(root: Path, step: int) -> None:
    """The newest checkpoint loads, is that of `step` in every tensor, and exports."""
    saved = open_checkpoints(root).load(run_config(root))
    found, state = saved.step, saved.state
    assert found == step and state is not None
    assert all(torch.equal(saved.policy.tensor(name), tensor) for name, tensor in weights_of(step))
    assert state.keys() == state_of(step).keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in state_of(step).items())
    newest = latest(root / "run" / "checkpoints")
    assert newest is not None
    shutil.rmtree(root / "exported", ignore_errors=True)
    exported = HfCheckpoint(export(newest, root / "exported"))
    assert all(torch.equal(exported.tensor(name), tensor) for name, tensor in weights_of(step))
    assert json.loads((root / "exported" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_what_is_committed_comes_back(tmp_path):
    for step in (5, 10):
        folder = commit(tmp_path, step)
        assert folder.name == f"step_{step:08d}"
        assert_whole(tmp_path, step)
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")], "nothing staged is left"


def two_ranks(root: Path, patience_seconds: float = 60.0) -> tuple[list[Checkpoints], list[Snapshot]]:
    """The checkpoints of two ranks of the distributed optimizer, each of which has a file of the weights."""
    weights = dict(weights_of(5))
    names, num_bytes = (("embed",), ("norm",)), sum(tensor.nbytes for tensor in weights.values())
    ranks = [open_folder(root / "run" / "checkpoints", rank, 2, patience_seconds=patience_seconds) for rank in range(2)]
    states = state_of(5), {"moment": torch.ones(2)}
    snapshots = [
        Snapshot(states[rank], torch.bfloat16, Weights(names, {rank: {name: weights[name]}}, num_bytes))
        for rank, (name,) in enumerate(names)
    ]
    return ranks, snapshots


class Together:
    """The words of two ranks that are threads."""

    def __init__(self, rank: int, met: threading.Barrier, said: dict[int, bytes]) -> None:
        self.rank, self._met, self._said = rank, met, said

    def broadcast(self, word: bytes) -> bytes:
        return self.agreed(word, lambda words: words[0])

    def barrier(self) -> None:
        self.agreed(b"", lambda _: b"")

    def agreed(self, word: bytes, judge: Callable[[list[bytes]], bytes]) -> bytes:
        self._met.wait(30)
        self._said[self.rank] = word
        self._met.wait(30)
        return judge([self._said[0], self._said[1]])


def together(does: Callable[[int, Together], None]) -> list[str]:
    """Two ranks do the same; how it ended for each."""
    met, said, ended = threading.Barrier(2), dict[int, bytes](), ["", ""]

    def write(rank: int) -> None:
        try:
            does(rank, Together(rank, met, said))
        except (StorageError, ConfigError) as error:
            ended[rank] = str(error)

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


def write_together(out: Path, parts: Sequence[Weights], config: RunConfig) -> list[str]:
    """Two ranks write a model, each in two turns, in the second of which it has nothing to write."""

    def write(rank: int, host: Together) -> None:
        turns = iter([parts[rank], replace(parts[rank], own={})])
        write_model(out, turns, torch.bfloat16, config, host, (7,) if rank == 0 else ())

    return together(write)


def test_a_model_is_written_by_all_ranks_each_its_own_files(tmp_path, monkeypatch):
    """It loads with every bit of every rank's; where one cannot write, all hear of it, and what was there before stands."""
    config, out = run_config(tmp_path), tmp_path / "out"
    _, snapshots = two_ranks(tmp_path)
    parts, written = [snapshot.policy for snapshot in snapshots], dict[str, str]()
    real = model_folder.write_tensors

    def counted(path: Path, *arguments: Any) -> Any:
        written[path.name] = threading.current_thread().name
        return real(path, *arguments)

    monkeypatch.setattr(model_folder, "write_tensors", counted)
    assert write_together(out, parts, config) == ["", ""]
    model = HfCheckpoint(out)
    assert all(torch.equal(model.tensor(name), tensor) for name, tensor in weights_of(5))
    assert len(written) == len(set(written.values())) == 2, "a file each"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [7]

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for code, why in (
        (errno.ENOSPC, "the disk is full"),
        (errno.ENOENT, "by trainer rank 1 on "),
        (errno.EIO, "rank 1"),
    ):

        def fails(path: Path, *arguments: Any, code: int = code) -> Any:
            if path.name.startswith("model-00002"):
                raise OSError(code, os.strerror(code), str(path))
            return real(path, *arguments)

        monkeypatch.setattr(model_folder, "write_tensors", fails)
        first, second = write_together(out, parts, config)
        assert first == second != "" and why in first
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == [], "nothing staged is left"


def test_a_model_is_written_with_one_turn_in_memory_at_a_time(tmp_path):
    """The tensors of a turn are gone when the next one is asked for."""
    seen, asked = list[weakref.ref[torch.Tensor]](), list[int]()

    def turns() -> Iterator[Weights]:
        names = ("embed",), ("norm",)
        for place, (name,) in enumerate(names):
            assert all(ref() is None for ref in seen), "held for longer than its turn"
            asked.append(place)
            yield Weights(names, {place: {name: remembered(name)}}, 0)

    def remembered(name: str) -> torch.Tensor:
        tensor = dict(weights_of(5))[name].clone()
        seen.append(weakref.ref(tensor))
        return tensor

    write_model(tmp_path / "out", turns(), torch.bfloat16, run_config(tmp_path), ALONE)
    assert asked == [0, 1]
    model = HfCheckpoint(tmp_path / "out")
    assert all(torch.equal(model.tensor(name), tensor) for name, tensor in weights_of(5))


def test_a_folder_that_a_node_does_not_see_is_refused_before_training(tmp_path, monkeypatch):
    """On every rank, by the name of the node; nothing of the look stays. The second rank's node sees nothing of the first's."""
    out = tmp_path / "new" / "out"
    assert together(lambda rank, host: check_shared(out, host)) == ["", ""]
    assert list(out.parent.iterdir()) == []
    real, first = Path.exists, list[threading.Thread]()

    def exists(path: Path, **options: Any) -> bool:
        return threading.current_thread() in first and real(path, **options)

    def look(rank: int, host: Together) -> None:
        if rank == 0:
            first.append(threading.current_thread())
        check_shared(out, host)

    monkeypatch.setattr(Path, "exists", exists)
    monkeypatch.setattr(model_folder.socket, "gethostname", lambda: "node-7")
    told = together(look)
    assert told[0] == told[1] and re.match(r"sft\.checkpoint_out must be on .* share, .*found that node-7 does not", told[0])
    assert list(out.parent.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir() if "staging" in path.name] == []


REQUEST = SampleRequest("rollout:7:p0:0", "p0", 0, 1, TokenIds.of([1, 2]), 1.0, 1.0, 8)


def test_rollouts_sampled_ahead_are_files_of_the_checkpoint(tmp_path):
    """Under a digest, as every other; the manifest says of which steps, and from which on they are paused. Without any, there
    is none."""
    config, folder = run_config(tmp_path), tmp_path / "run" / "checkpoints" / "step_00000005"
    checkpoints = open_checkpoints(tmp_path)
    ready = {step: ([group([1.0, 0.0])], Usage(3, 0.5)) for step in (5, 6)}
    ahead = Ahead(ready, {step: Pending([], [REQUEST], [REQUEST.paused([7], [-0.5], 4)]) for step in (7, 8)})
    checkpoints.commit(5, snapshot_of(state_of(5), weights_of(5)), config, ahead=ahead)
    checkpoints.wait()
    assert checkpoints.ahead() == (folder / AHEAD, folder / PAUSED)
    files = read_manifest(folder)["files"]
    kept = [f"{AHEAD}/00000005.arrows", f"{AHEAD}/00000005.jsonl", f"{PAUSED}/00000007.arrows", f"{PAUSED}/00000007.jsonl"]
    assert [name for name in files if name.startswith((AHEAD, PAUSED))] == kept
    assert checkpoints.load(config).ahead == range(5, 9)
    assert read_manifest(folder)["paused_from"] == 7
    for name in kept:
        flip(folder / name, 40)
        with pytest.raises(CheckpointError, match=rf"{name} differs from its digest"):
            checkpoints.load(config)
        flip(folder / name, 40)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1])
        with pytest.raises(CheckpointError, match=rf"{name} must have {len(whole)} bytes; found {len(whole) - 1}"):
            checkpoints.load(config)
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=rf"{name} must have {len(whole)} bytes; found none"):
            checkpoints.load(config)
        (folder / name).write_bytes(whole)
    assert checkpoints.load(config).step == 5
    commit(tmp_path, 10)
    assert checkpoints.ahead() == (None, None) and checkpoints.load(config).ahead == range(0)


def test_several_ranks_write_their_own_parts_at_once(tmp_path):
    config, folder = run_config(tmp_path), tmp_path / "run" / "checkpoints" / "step_00000005"
    ranks, snapshots = two_ranks(tmp_path)
    for rank, snapshot in zip(ranks, snapshots, strict=True):
        rank.commit(5, snapshot, config)
    for rank in reversed(ranks):
        rank.wait()
    assert sorted(path.name for path in (folder / "policy").iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "policy", rank_file(0), rank_file(1)]
    assert_whole(tmp_path, 5)
    assert torch.equal(state_in(ranks[1], config)["moment"], torch.ones(2))
    with pytest.raises(CheckpointError, match=r"rank_0002\.safetensors is not part of the checkpoint"):
        open_folder(folder.parent, 2, 3).load(config)
    flip(folder / "policy" / "model-00001-of-00002.safetensors", 99)
    refused = 0
    for rank in ranks:  # one of them checks that file
        try:
            rank.load(config)
        except CheckpointError as error:
            refused += "model-00001-of-00002.safetensors differs from its digest" in str(error)
    assert refused == 1


def test_another_layout_is_told_which_rank_has_what_and_its_own_needs_no_such_file(tmp_path):
    config, folder = run_config(tmp_path), tmp_path / "run" / "checkpoints" / "step_00000005"
    ranks, snapshots = two_ranks(tmp_path)
    own = ["w[0:3]"], ["w[3:9]", "norm"]
    for rank, snapshot, slots in zip(ranks, snapshots, own, strict=True):
        rank.commit(5, replace(snapshot, slots=slots), config)
    for rank in reversed(ranks):
        rank.wait()
    assert open_checkpoints(tmp_path).load(config).slots is None
    other = run_config(tmp_path, trainer={"data_parallel": 2}, checkpoint={"other_layout": "allow"})
    found = open_checkpoints(tmp_path).load(other)
    assert found.state is None and found.slots == dict(enumerate(own))
    flip(folder / SLOTS, 9)
    with pytest.raises(CheckpointError, match=r"slots\.json differs from its digest"):
        open_checkpoints(tmp_path).load(other)


def test_a_rank_that_does_not_write_or_cannot_is_told_and_nothing_is_named(tmp_path):
    first = commit(tmp_path, 4)
    config, folder = run_config(tmp_path), tmp_path / "run" / "checkpoints"
    (alone, _), (part, _) = two_ranks(tmp_path, patience_seconds=0.3)
    alone.commit(5, part, config)
    with pytest.raises(WatchdogError, match=r"trainer rank 1 must write its part .* found nothing new for 0\.3 s"):
        alone.wait()
    assert sorted(path.name for path in folder.iterdir()) == [LATEST, first.name]
    ranks, (small, whole) = two_ranks(tmp_path)
    ranks[0].commit(5, small, config)
    with files_of_at_most(5000):
        ranks[1].commit(5, replace(whole, state={"moment": torch.ones(5000)}), config)
        with pytest.raises(StorageError, match="bytes needed and"):
            ranks[1].wait()
    with pytest.raises(StorageError, match="cannot be written"):
        ranks[0].wait()
    assert sorted(path.name for path in folder.iterdir()) == [LATEST, first.name]


def look_again_and_again(checkpoints: Checkpoints) -> None:
    while True:
        checkpoints.check()
        time.sleep(0.001)


def test_a_failure_in_the_background_is_raised_at_the_next_look(tmp_path):
    checkpoints, config = open_checkpoints(tmp_path), run_config(tmp_path)
    with files_of_at_most(100):
        checkpoints.commit(5, snapshot_of(state_of(5), weights_of(5)), config)
        with pytest.raises(StorageError):
            look_again_and_again(checkpoints)
    checkpoints.wait()
    checkpoints.commit(5, snapshot_of(state_of(5), weights_of(5)), config)
    checkpoints.wait()
    assert_whole(tmp_path, 5)


def test_a_mixed_reference_is_the_seed_model_and_then_its_own(tmp_path):
    """Of what is due before the next step the checkpoint has not seen anything: a resumed run mixes it anew. One that is copied
    is none of its own where a checkpoint has it, or is copied anew."""
    sync = {"sync_interval": 2, "reference": 2}
    mixed = run_config(tmp_path, run={"steps": 8}, sync=sync | {"reference_mix": 0.5}, checkpoint={"every": 2})
    copied = run_config(tmp_path, run={"steps": 8}, sync=sync, checkpoint={"every": 2})
    assert [reference_place(mixed, step) for step in (1, 2, 3, 4, 8)] == ["seed", "seed", "own", "own", "own"]
    assert [reference_place(copied, step) for step in (1, 2, 3, 4, 8)] == ["seed", None, 2, None, None]


def test_a_reference_is_read_from_where_it_is(tmp_path):
    """In the checkpoint, in another one, which is then kept, or in the seed model, which must be the one the run began with."""
    seed = tmp_path / "seed" / "model.safetensors"
    config = run_config(tmp_path, checkpoint={"keep": 1})
    save_file({"w": torch.ones(2)}, seed)
    checkpoints = open_checkpoints(tmp_path)

    def save(step: int, **reference: Any) -> None:
        checkpoints.commit(step, snapshot_of(state_of(step), weights_of(step), **reference), config)
        checkpoints.wait()

    save(5, needs_seed=True)
    assert checkpoints.load(config).reference is None
    save_file({"w": torch.zeros(2)}, seed)
    with pytest.raises(CheckpointError, match=r"model\.path must hold the weights .* found others at .*model\.safetensors"):
        checkpoints.load(config)
    save_file({"w": torch.ones(2)}, seed)
    for step in (10, 15, 20):
        save(step, reference_step=5)
        reference = checkpoints.load(config).reference
        assert reference is not None and torch.equal(reference.tensor("embed"), dict(weights_of(5))["embed"])
        assert steps_kept(tmp_path) == [5, step]
    save(25, reference=own_weights(dict(weights_of(7))))
    reference = checkpoints.load(config).reference
    assert reference is not None and torch.equal(reference.tensor("embed"), dict(weights_of(7))["embed"])
    assert steps_kept(tmp_path) == [25], "nobody needs the fifth any more"
    save(30, reference_step=25)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000025")
    with pytest.raises(CheckpointError, match="needs step_00000025, whose policy is its reference; found none"):
        checkpoints.load(config)


def test_the_same_step_can_be_saved_twice(tmp_path):
    commit(tmp_path, 5)
    committed(open_checkpoints(tmp_path), 5, state_of(6), weights_of(6), run_config(tmp_path))
    assert torch.equal(state_in(open_checkpoints(tmp_path), run_config(tmp_path))["0.step"], torch.tensor(6))
    commit(tmp_path, 10)
    assert_whole(tmp_path, 10)


def test_what_the_run_says_of_its_records_comes_back_with_the_newest(tmp_path):
    assert (open_checkpoints(tmp_path).records(), open_checkpoints(tmp_path).steps()) == (None, set())
    checkpoints, config = open_checkpoints(tmp_path), run_config(tmp_path, checkpoint={"keep": 2})
    for step in (5, 10, 15):
        records = {"bytes": {"metrics": step}, "judged": [{10: 0.1, 9: None}]}
        committed(checkpoints, step, state_of(step), weights_of(step), config, records)
    assert checkpoints.records() == {"bytes": {"metrics": 15}, "judged": [{"10": 0.1, "9": None}]}
    assert checkpoints.steps() == {10, 15}
    (tmp_path / "run" / "checkpoints" / "step_00000020").mkdir()
    assert checkpoints.steps() == {10, 15}, "one that was never named does not stand"


def steps_kept(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (root / "run" / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(("keep", "kept"), [(1, [20]), (2, [15, 20]), (9, [5, 10, 15, 20])])
def test_only_the_newest_are_kept(tmp_path, keep, kept):
    for step in (5, 10, 15, 20):
        commit(tmp_path, step, checkpoint={"keep": keep})
    assert steps_kept(tmp_path) == kept


def test_an_unnamed_later_checkpoint_never_displaces_the_newest(tmp_path):
    """A run killed between the rename and LATEST leaves a later folder; going on from before, it is not counted."""
    commit(tmp_path, 20)
    commit(tmp_path, 5, checkpoint={"keep": 1})
    assert steps_kept(tmp_path) == [5, 20]
    assert_whole(tmp_path, 5)


def judged_run(root: Path, scores: dict[int, float], keep: int, start: int = 0) -> list[int]:
    """Commits and then judges every step from `start` on, as the loop does; the best step after each."""
    checkpoints, chosen = open_checkpoints(root), []
    known = {step: score for step, score in scores.items() if step < start}
    config = run_config(root, checkpoint={"keep": keep})
    checkpoints.select(known, config)  # as a run begins, or goes on
    for step in sorted(scores.keys() - known.keys()):
        commit(root, step, checkpoint={"keep": keep})
        known[step] = scores[step]
        checkpoints.select(known, config)
        folder = best(root / "run" / "checkpoints")
        assert folder is not None
        chosen.append(int(folder.name.removeprefix("step_")))
    return chosen


@pytest.mark.parametrize(("keep", "kept"), [(1, [10, 30]), (2, [10, 25, 30])])
def test_the_best_is_kept_beside_the_newest_and_the_former_best_is_not(tmp_path, keep, kept):
    scores = {5: 0.25, 10: 0.5, 15: -1.0, 20: 0.5, 25: 0.375, 30: 0.0}
    assert judged_run(tmp_path, scores, keep) == [5, 10, 10, 10, 10, 10], "of equals the earliest"
    assert steps_kept(tmp_path) == kept
    assert judged_run(tmp_path, scores | {35: 0.75}, keep, start=35) == [35]
    assert steps_kept(tmp_path) == ([35] if keep == 1 else [30, 35])
    assert export(tmp_path / "run" / "checkpoints" / "step_00000035", tmp_path / "best").is_dir()


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8), st.integers(1, 3), st.integers(0, 8))
@settings(max_examples=12, deadline=None)
def test_retention_never_takes_the_best_nor_what_has_yet_to_be_judged(values, keep, resumed_at):
    """For any scores, any number kept, and a resume before the newest checkpoint has been judged."""
    scores = {5 * (place + 1): float(value) for place, value in enumerate(values)}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        resumed_at = min(resumed_at, len(values))
        judged_run(root, {step: score for step, score in scores.items() if step <= 5 * resumed_at}, keep)
        judged_run(root, scores, keep, start=5 * max(1, resumed_at))
        newest = sorted(scores)[-keep:]
        expected = max(sorted(scores), key=lambda step: scores[step])
        assert steps_kept(root) == sorted({*newest, expected})
        named = best(root / "run" / "checkpoints")
        assert named is not None and named.name == f"step_{expected:08d}"


def test_choosing_the_best_looks_at_the_checkpoints_that_are_kept_alone(tmp_path, monkeypatch):
    """However many steps were judged."""
    judged_run(tmp_path, {5: 0.5, 10: 0.25, 15: 0.75}, keep=2)
    looked, exists = list[str](), Path.exists

    def counted(path: Path) -> bool:
        looked.append(path.parent.name)
        return exists(path)

    monkeypatch.setattr(Path, "exists", counted)
    judged = dict.fromkeys(range(0, 50_000, 5), 0.0) | {10: 1.0}
    open_checkpoints(tmp_path).select(judged, run_config(tmp_path, checkpoint={"keep": 2}))
    assert set(looked) <= {"run", "checkpoints", "step_00000010", "step_00000015"} and len(looked) < 20
    assert (tmp_path / "run" / "checkpoints" / BEST).read_text() == "step_00000010"


def test_the_best_of_a_run_that_went_back_is_among_what_it_still_has(tmp_path):
    """LATEST set to an earlier folder by hand: what came after it is of another future."""
    folder = tmp_path / "run" / "checkpoints"
    judged_run(tmp_path, {5: 0.5, 10: 0.25, 15: 0.75}, keep=9)
    (folder / LATEST).write_text("step_00000010")
    config = run_config(tmp_path)
    open_checkpoints(tmp_path).select({5: 0.5}, config)
    assert (folder / BEST).read_text() == "step_00000005"
    open_checkpoints(tmp_path).select({}, config)
    assert best(folder) is None
    (folder / BEST).write_text("step_00000099")
    with pytest.raises(CheckpointError, match=r"BEST names step_00000099, which holds no manifest\.json"):
        best(folder)


def test_nothing_is_selected_before_the_first_checkpoint(tmp_path):
    """The seed model is judged at step 0 and has no checkpoint."""
    open_checkpoints(tmp_path).select({0: 0.5}, run_config(tmp_path))
    assert not (tmp_path / "run").exists()


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


@pytest.mark.parametrize("name", [rank_file(0), "policy/model.safetensors", "policy/config.json"])
def test_a_flipped_bit_is_refused_naming_the_file(tmp_path, name):
    """At the ends and in forty places between; the file is right again afterwards."""
    file = commit(tmp_path, 5) / name
    num_bits, draw = 8 * file.stat().st_size, random.Random(0)
    for bit in [0, num_bits - 1, *(draw.randrange(num_bits) for _ in range(40))]:
        flip(file, bit)
        with pytest.raises(CheckpointError, match=f"{name} differs from its digest"):
            assert_whole(tmp_path, 5)
        flip(file, bit)
    assert_whole(tmp_path, 5)


def test_a_flipped_bit_of_the_manifest_is_refused_or_changes_nothing(tmp_path):
    """A step, a name, a size, a digest or an option, in 300 random places; only 1e-6 may become 1E-6."""
    folder = commit(tmp_path, 5)
    file, right = folder / MANIFEST, read_manifest(folder)
    refused = 0
    for bit in random.Random(0).sample(range(8 * file.stat().st_size), 300):
        flip(file, bit)
        try:
            assert read_manifest(folder) == right, bit
        except CheckpointError:
            refused += 1
        flip(file, bit)
    assert refused > 290
    assert_whole(tmp_path, 5)


@pytest.mark.parametrize("name", [rank_file(0), "policy/model.safetensors"])
@pytest.mark.parametrize("num_bytes", [0, 1, -1, None])
def test_a_truncated_or_missing_file_is_refused_naming_it(tmp_path, name, num_bytes):
    file = commit(tmp_path, 5) / name
    whole = file.read_bytes()
    if num_bytes is None:
        file.unlink()
    else:
        file.write_bytes(whole[:num_bytes])
    found = "none" if num_bytes is None else len(whole[:num_bytes])
    with pytest.raises(CheckpointError, match=f"{name} must have {len(whole)} bytes; found {found}"):
        assert_whole(tmp_path, 5)


def test_a_lost_manifest_or_pointer_is_told(tmp_path):
    folder = commit(tmp_path, 5)
    pointer = folder.parent / LATEST
    for text in (b"step_00000009", b"", b"step_\xff0000005", b"step_0000000\x00"):
        pointer.write_bytes(text)
        with pytest.raises(CheckpointError, match=r"LATEST names .*, which holds no manifest\.json"):
            open_checkpoints(tmp_path).load(run_config(tmp_path))
    pointer.write_text(folder.name + "\n")  # as an editor leaves it
    assert_whole(tmp_path, 5)
    (folder / MANIFEST).write_text("[]")
    with pytest.raises(CheckpointError, match=r"manifest\.json differs from its own digest"):
        open_checkpoints(tmp_path).load(run_config(tmp_path))
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"step_00000005, which holds no manifest\.json"):
        open_checkpoints(tmp_path).load(run_config(tmp_path))
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        export(folder, tmp_path / "out")
    pointer.unlink()
    with pytest.raises(CheckpointError, match="must hold a checkpoint to resume from; found none"):
        open_checkpoints(tmp_path).load(run_config(tmp_path))
    assert latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("section", "option", "value", "words"),
    [
        ("algorithm", "beta", 0.5, r"algorithm\.beta must be what .*step_00000005.* found 0\.5 instead of 0\.1"),
        ("run", "seed", 1, r"run\.seed must be what"),
        ("sync", "sync_interval", "never", r"sync\.sync_interval .* found 'never' instead of 5"),
        ("trainer", "tensor_parallel", 2, r"trainer\.tensor_parallel must be what"),
        ("data", "held_out", "other.jsonl", r"data\.held_out .* instead of None"),
    ],
)
def test_another_run_is_refused_naming_the_option(tmp_path, section, option, value, words):
    commit(tmp_path, 5)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoints(tmp_path).load(run_config(tmp_path, **{section: {option: value}}))


@pytest.mark.parametrize(
    ("section", "options"),
    [
        ("run", {"steps": 200, "directory": "elsewhere"}),
        ("sync", {"timeout_seconds": 9.0, "bucket_mebibytes": 3}),
        ("rewards", {"workers": 3}),
        ("evaluation", {"samples": 2, "every": 5}),
        ("guard", {"action": "stop", "length_share": 0.5}),
        ("checkpoint", {"keep": 7}),
    ],
)
def test_what_does_not_change_a_run_may_differ(tmp_path, section, options):
    commit(tmp_path, 5)
    assert open_checkpoints(tmp_path).load(run_config(tmp_path, **{section: options})).step == 5


def test_a_loss_of_the_users_own_must_be_the_one_the_run_began_with(tmp_path):
    """By the digest of its file; a moved file is another value of the option."""
    own = (Path(__file__).resolve().parents[2] / "own_loss.py").read_text("utf-8")
    file = tmp_path / "own_loss.py"
    file.write_text(own)
    algorithm = {"loss": f"{file}:Regression"}
    commit(tmp_path, 5, algorithm=algorithm)
    assert open_checkpoints(tmp_path).load(run_config(tmp_path, algorithm=algorithm)).step == 5
    file.write_text(own + "# another\n")
    with pytest.raises(CheckpointError, match=r"algorithm\.loss must be what .*step_00000005 was written with; found other"):
        open_checkpoints(tmp_path).load(run_config(tmp_path, algorithm=algorithm))
    file.write_text(own)
    with pytest.raises(CheckpointError, match=r"algorithm\.loss must be what .* found 'dpo' instead of '.*own_loss\.py:Reg"):
        open_checkpoints(tmp_path).load(run_config(tmp_path))


class Loaded:
    """A policy that takes what it is given."""

    def __init__(self) -> None:
        self.state, self.tensors = self, dict[str, torch.Tensor]()

    def load_checkpoint(self, tensors: dict[str, torch.Tensor], policy: HfCheckpoint, reference: HfCheckpoint | None) -> None:
        self.tensors = tensors


def test_resuming_goes_on_at_the_step_of_the_checkpoint_or_says_why_not(tmp_path):
    commit(tmp_path, 12, run={"steps": 12})
    policy: Any = Loaded()
    assert resume_policy(run_config(tmp_path, run={"steps": 12}), open_checkpoints(tmp_path), policy) == (12, [])
    assert policy.tensors
    with pytest.raises(CheckpointError, match=r"run\.steps cannot be raised from 12: .* found 13: .* is one of 10 steps"):
        resume_policy(run_config(tmp_path, run={"steps": 13}), open_checkpoints(tmp_path), policy)
    with pytest.raises(CheckpointError, match=r"run\.steps must not be less than the 12 steps already done; found 11"):
        resume_policy(run_config(tmp_path, run={"steps": 11}), open_checkpoints(tmp_path), policy)
    commit(tmp_path, 15)
    assert resume_policy(run_config(tmp_path), open_checkpoints(tmp_path), policy) == (15, [])


@pytest.mark.parametrize("semantics", ["paper", "fairseq2"])
@pytest.mark.parametrize("interval", [1, 5, "never"])
def test_a_run_that_the_guard_stops_saves_only_what_it_could_go_on_from(tmp_path, interval, semantics):
    config = run_config(tmp_path, sync={"sync_interval": interval, "semantics": semantics}, run={"steps": 33})
    saved = [step for step in range(1, 34) if commits(config, step, ends=True)]
    boundaries = {1: range(1, 33), 5: range(5, 33, 5), "never": range(16, 33, 16)}[interval]
    early = int(interval == 5 and semantics == "fairseq2")
    assert saved == [*(step - early for step in boundaries), 33]
    assert [step for step in range(1, 34) if commits(config, step, ends=False)] == [33]


def test_a_prolonged_run_of_fairseq2s_count_is_told_where_it_may_go_on(tmp_path):
    sync = {"sync_interval": 5, "semantics": "fairseq2"}
    commit(tmp_path, 12, run={"steps": 12}, sync=sync)
    policy: Any = Loaded()
    with pytest.raises(CheckpointError, match=r"found 13: .* is one of 9 steps$"):
        resume_policy(run_config(tmp_path, run={"steps": 13}, sync=sync), open_checkpoints(tmp_path), policy)
    commit(tmp_path, 14, sync=sync)
    assert resume_policy(run_config(tmp_path, sync=sync), open_checkpoints(tmp_path), policy) == (14, [])


def test_an_export_replaces_nothing_but_an_empty_folder(tmp_path):
    folder, out = commit(tmp_path, 5), tmp_path / "out"
    out.mkdir()
    export(folder, out)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(CheckpointError, match="out must be new or empty; found files in it"):
        export(folder, out)
    assert not list(tmp_path.glob(".*")), "nothing staged is left"


@pytest.mark.parametrize(("dtype", "kind"), [("saved", "bfloat16"), ("seed", "float16"), ("float32", "float32")])
def test_an_export_has_the_dtype_that_was_asked_for(tmp_path, dtype, kind):
    folder = commit(tmp_path, 5)
    (tmp_path / "seed" / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float16"}')
    out = export(folder, tmp_path / "out", dtype)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == kind
    exported, saved = HfCheckpoint(out), HfCheckpoint(folder / "policy")
    assert exported.names() == saved.names()
    for name in saved.names():
        assert torch.equal(exported.tensor(name), saved.tensor(name).to(getattr(torch, kind))), name
    (tmp_path / "seed" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="must say the dtype of the weights"):
        export(folder, tmp_path / "other", "seed")


def test_every_file_has_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        folder = commit(tmp_path, 5)
        out = export(folder, tmp_path / "out")
    finally:
        os.umask(before)
    files = [path for place in (folder, out) for path in place.rglob("*") if path.is_file()]
    assert len(files) > 4 and {path.stat().st_mode & 0o777 for path in files} == {0o644}


@pytest.mark.parametrize("limit", [100, 600, 1200])  # of the rank's state, of the policy, of the manifest
def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_stands(tmp_path, limit):
    first = commit(tmp_path, 5)
    sizes = sorted(path.stat().st_size for path in first.rglob("*") if path.is_file())
    assert sizes[-1] > 1200, "the manifest"
    with files_of_at_most(limit), pytest.raises(StorageError) as caught:
        commit(tmp_path, 10)
    folder = tmp_path / "run" / "checkpoints"
    assert f"{folder} cannot be written" in str(caught.value)
    assert re.search(r"[\d,]+ bytes needed and [\d,]+ free", str(caught.value))
    assert (caught.value.exit_code, caught.value.may_pass) == (4, False)
    assert sorted(path.name for path in folder.iterdir()) == [LATEST, "step_00000005"]
    assert latest(folder) == first
    assert commit(tmp_path, 10).exists(), "when there is room again"


def test_a_run_killed_at_any_moment_keeps_its_newest_checkpoint(tmp_path):
    """A child commits in a loop and is killed by SIGKILL at 15 random moments, each time going on from the newest."""
    command, env = [sys.executable, __file__, str(tmp_path)], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    steps, staged = json.loads(done.stdout)
    assert len(steps) == KILLS
    assert steps == sorted(steps), "it never goes back"
    assert steps[-1] > 0, "and it gets somewhere"
    assert staged > 0, "some were killed with a checkpoint half written, or the test means nothing"
    commit(tmp_path, steps[-1] + 1)
    assert_whole(tmp_path, steps[-1] + 1)


def kill_again_and_again(root: Path) -> tuple[list[int], int]:
    """(newest step after each kill, kills that left a staged folder); raises when a checkpoint is not whole."""
    torch.set_num_threads(1)
    draw, staged, newest = random.Random(0), 0, 0
    steps: list[int] = []
    commit(root, newest)
    started = time.monotonic()
    commit(root, newest)
    seconds = time.monotonic() - started
    while len(steps) < KILLS:
        child = os.fork()
        if child == 0:
            for step in range(newest + 1, newest + 1000):
                commit(root, step)
            os._exit(0)
        time.sleep(draw.uniform(0.5, 10) * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        newest = open_checkpoints(root).load(run_config(root)).step
        assert_whole(root, newest)
        steps.append(newest)
        staged += any((root / "run" / "checkpoints").glob(".staging-*"))
    return steps, staged


if __name__ == "__main__":
    print(json.dumps(kill_again_and_again(Path(sys.argv[1]))))


def test_without_latest_the_newest_whole_checkpoint_is_gone_on_from_and_it_is_said(tmp_path):
    """A lost pointer (a copy, a cleanup) must not start a run over; a folder without a manifest is no checkpoint."""
    for step in (5, 10):
        newest = commit(tmp_path, step)
    folder = newest.parent
    (folder / "step_00000015").mkdir()
    (folder / "LATEST").unlink()
    assert latest(folder) == newest
    step, notes = resume_policy(run_config(tmp_path), open_checkpoints(tmp_path), Loaded())  # type: ignore[arg-type]
    assert step == 10
    assert notes == [f"{folder / 'LATEST'} is gone: goes on after 10 steps, from the newest checkpoint that is whole"]
    (folder / "LATEST").mkdir()
    with pytest.raises(CheckpointError, match=r"LATEST must be a file with a checkpoint's name; found .*: write it anew"):
        latest(folder)
    assert latest(tmp_path / "none") is None


def test_an_older_checkpoint_that_cannot_be_read_ends_no_run(tmp_path, caplog):
    """It is kept as it is, and it is said."""
    older, _ = commit(tmp_path, 5, checkpoint={"keep": 2}), commit(tmp_path, 10, checkpoint={"keep": 2})
    (older / "manifest.json").write_text("{", encoding="utf-8")
    commit(tmp_path, 15, checkpoint={"keep": 3})
    assert sorted(path.name for path in older.parent.glob("step_*")) == ["step_00000005", "step_00000010", "step_00000015"]
    assert f"{older / 'manifest.json'} cannot be read" in caplog.text
    assert latest(older.parent) == older.with_name("step_00000015")
