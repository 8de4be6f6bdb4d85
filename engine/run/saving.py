"""Checkpoints written while the run goes on: every trainer rank copies its part into host memory, and a thread of its own
writes and hashes it while the next steps are trained. Rank 0 names the checkpoint by LATEST once every rank has told that its
part is on disk (rank_parts.py). At most one is under way. What is removed is retention.py's business, reading one loading.py's.

Each element is written once: weights by the ranks of their stage in turn (models/export_plan.py), optimizer state
by the rank that holds it, a reference that equals the policy, another checkpoint or the seed model not at all. Killed at any
moment, the folder, in which `.staging-step_00000040` becomes `step_00000040`, still holds the last whole checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config.load import RunConfig
from engine.core.errors import StorageError
from engine.core.files import storing, sync
from engine.core.provenance import provenance
from engine.core.tensor_files import FileRecord, file_record, write_tensors
from engine.observe.origin import read_origin
from engine.observe.telling import activity
from engine.rollouts.ahead import AHEAD, Ahead
from engine.rollouts.paused import PAUSED
from engine.run.checkpoint import (
    MANIFEST,
    POLICY,
    REFERENCE,
    SLOTS,
    STEPS,
    data_digests,
    latest,
    rank_file,
    read_manifest,
    sealed,
    weight_files,
)
from engine.run.loading import Saved, load
from engine.run.machine import gpu_name
from engine.run.model_folder import Weights, Words, write_beside, write_files
from engine.run.rank_parts import PARTS, await_parts, tell_failure, tell_part
from engine.run.retention import Retention

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Snapshot:
    """What a rank writes of a checkpoint, in host memory, which nobody changes any more."""

    state: Mapping[str, torch.Tensor]  # of this rank alone
    dtype: torch.dtype  # of the weights
    policy: Weights
    reference: Weights | None = None  # where the checkpoint must hold one of its own
    reference_step: int | None = None  # the checkpoint whose policy the reference is; None: `reference`, the seed's, or no need
    needs_seed: bool = False  # whether a resumed run needs the very seed model: as its reference, or for its engines
    slots: Sequence[str] = ()  # the parts of parameters that `state` is of, where data-parallel ranks have different ones

    @property
    def num_bytes(self) -> int:
        """That this rank writes."""
        tensors = [tensor for folder in self.folders.values() for file in folder.own.values() for tensor in file.values()]
        return sum(tensor.nbytes for tensor in [*self.state.values(), *tensors])

    @property
    def folders(self) -> dict[str, Weights]:
        """The folders of weights that the checkpoint holds, by their names in it."""
        return {POLICY: self.policy, **({REFERENCE: self.reference} if self.reference is not None else {})}


@dataclass(frozen=True)
class _Save:
    """A checkpoint that is to be written; `records`, `end_ids` and `ahead` are rank 0's."""

    step: int
    staging: Path
    snapshot: Snapshot
    config: RunConfig
    records: Mapping[str, Any] | None
    end_ids: tuple[int, ...]
    ahead: Ahead | None


class Checkpoints:
    """The checkpoints of one run, as one trainer rank sees them."""

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        host: Words,
        digests: Mapping[str, str | None] | None = None,
        patience_seconds: float = 1200.0,
    ) -> None:
        """`host`: the trainer ranks' words. `digests`: of data and of what judges, as they were when the run began
        (`Spec.digests`); a file that changes while the run goes on does not change what the run is made of. Taken at each
        commit where not given. `patience_seconds`: how long rank 0 waits for other ranks' parts while nothing is added to
        them."""
        self._folder = folder
        self._rank, self._world_size = rank, world_size
        self._host = host
        self._digests = digests
        self._patience = patience_seconds
        self.origin = read_origin(folder.parent)  # of a run that was forked off another
        self._under_way: Future[None] | None = None
        self._seed: dict[str, FileRecord] = {}  # this rank's share of the seed model's files
        self._retention = Retention(folder)

    def commit(
        self,
        step: int,
        snapshot: Snapshot,
        config: RunConfig,
        records: Mapping[str, Any] | None = None,
        end_ids: Iterable[int] = (),
        ahead: Ahead | None = None,
    ) -> None:
        """Begins to write the checkpoint of `step`; collective, after `wait`. `records`, rank 0's, is what a resumed run needs
        of the run's records (`Records.kept`); `end_ids`: what ends a response of the policy, which its generation config is to
        name; `ahead`, rank 0's: rollouts of later steps, which are kept with it. StorageError, on every rank, where the disk is
        full or not to be written; what fails later is raised by the next `check`, `wait` or `commit`. Then nothing of the
        checkpoint stays, and the one before does."""
        self.wait()
        staging, failure = self._folder / f".staging-step_{step:08d}", ""
        if self._rank == 0:
            try:
                self._make_staging(staging)
            except StorageError as error:
                failure = str(error)
                shutil.rmtree(staging, ignore_errors=True)
        if failure := self._host.broadcast(failure.encode()).decode():
            raise StorageError(failure)
        with_thread = ThreadPoolExecutor(1, thread_name_prefix=f"checkpoint of step {step}")
        save = _Save(step, staging, snapshot, config, records, tuple(end_ids), ahead)
        self._under_way = with_thread.submit(self._write, save)
        with_thread.shutdown(wait=False)

    def check(self) -> None:
        """Raises what the checkpoint under way has failed with."""
        if self.finished(0.0):
            self.wait()

    def finished(self, seconds: float) -> bool:
        """Whether nothing is under way, or is done or failed within so many seconds; on rank 0 that all ranks' parts are."""
        return self._under_way is None or bool(wait([self._under_way], seconds).done)

    def wait(self) -> None:
        """Returns when this rank's part of the checkpoint under way is on disk; on rank 0, when LATEST names it. Raises what it
        has failed with."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def select(self, scores: Mapping[int, float], config: RunConfig) -> None:
        """Names by BEST the checkpoint of the highest score, by step (`Retention.select`). For rank 0, at any time."""
        self._retention.select(scores, config.checkpoint.keep)

    def load(self, config: RunConfig) -> Saved:
        """The newest checkpoint, of which all ranks together have checked all (`loading.load`). Collective."""
        saved = load(self._folder, config, self._rank, self._world_size)
        self._host.barrier()
        return saved

    def steps(self) -> set[int]:
        """The steps of all checkpoints that stand, up to the newest."""
        newest = latest(self._folder)
        if newest is None:
            return set()
        return {int(path.name.removeprefix("step_")) for path in self._folder.glob(STEPS) if path.name <= newest.name}

    def ahead(self) -> tuple[Path | None, Path | None]:
        """Where the newest checkpoint keeps rollouts for steps after it: complete ones, and paused ones, each a folder, or the
        file that older versions wrote; None for each that it does not have."""
        newest = latest(self._folder)
        if newest is None:
            return None, None
        names = {Path(name).parts[0] for name in read_manifest(newest)["files"]}
        complete, paused = (
            next((newest / name for name in (one, f"{one}.jsonl") if name in names), None) for one in (AHEAD, PAUSED)
        )
        return complete, paused

    def records(self) -> dict[str, Any] | None:
        """What the newest checkpoint keeps of the run's records; None without one, or where an older version wrote it."""
        newest = latest(self._folder)
        found: dict[str, Any] | None = read_manifest(newest).get("records") if newest is not None else None
        return found

    def _make_staging(self, staging: Path) -> None:
        with storing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            for stale in self._folder.glob(".staging-*"):
                shutil.rmtree(stale)
            for folder in (staging, staging / POLICY, staging / REFERENCE, staging / PARTS):
                folder.mkdir()

    def _write(self, save: _Save) -> None:
        """What the thread does. A rank's failure is told, so that rank 0 need not wait; rank 0 removes what it can."""
        try:
            with activity("checkpoint", f"of {save.step} steps"), storing(self._folder, lambda: save.snapshot.num_bytes):
                self._write_part(save)
                if self._rank == 0:
                    self._finish(save)
        except BaseException as error:
            if self._rank == 0:
                shutil.rmtree(save.staging, ignore_errors=True)
            else:
                tell_failure(save.staging, self._rank, error)
            raise

    def _write_part(self, save: _Save) -> None:
        """This rank's files, and then its word that they are on disk."""
        name = rank_file(self._rank)
        files = {name: write_tensors(save.staging / name, save.snapshot.state)}
        for folder, weights in save.snapshot.folders.items():
            files |= {f"{folder}/{name}": record for name, record in write_files(save.staging / folder, weights).items()}
        if save.snapshot.needs_seed and not self._seed:
            mine = weight_files(Path(save.config.model.path))[self._rank :: self._world_size]
            self._seed = {file.name: file_record(file) for file in mine}
        word = {"files": _as_json(files), "seed": _as_json(self._seed), "slots": list(save.snapshot.slots)}
        tell_part(save.staging, self._rank, word)

    def _finish(self, save: _Save) -> None:
        """Rank 0: what stands beside the weights, the manifest, and the names by which the checkpoint is found."""
        staging = save.staging
        for folder, weights in save.snapshot.folders.items():
            write_beside(staging / folder, weights, save.snapshot.dtype, save.config, save.end_ids)
        if save.ahead is not None:
            save.ahead.write(staging)
        words = await_parts(staging, self._world_size, self._patience)
        shutil.rmtree(staging / PARTS)
        if save.snapshot.reference is None:
            (staging / REFERENCE).rmdir()
        if any(word["slots"] for word in words):
            slots = {rank: word["slots"] for rank, word in enumerate(words)}
            (staging / SLOTS).write_text(json.dumps(slots), encoding="utf-8")
        known = {name: found for word in words for name, found in word["files"].items()}
        rest = [path for path in sorted(staging.rglob("*")) if path.is_file() and str(path.relative_to(staging)) not in known]
        for path in rest:
            sync(path)
        known |= _as_json({str(path.relative_to(staging)): file_record(path) for path in rest})
        manifest = self._manifest(save, known, {name: found for word in words for name, found in word["seed"].items()})
        (staging / MANIFEST).write_text(json.dumps(sealed(manifest), indent=1), encoding="utf-8")
        for path in (staging / MANIFEST, *sorted(path for path in staging.iterdir() if path.is_dir()), staging):
            sync(path)
        self._retention.add(staging, self._folder / f"step_{save.step:08d}", save.config.checkpoint.keep)

    def _manifest(self, save: _Save, files: Mapping[str, Any], seed: Mapping[str, Any]) -> dict[str, Any]:
        """What the manifest says; `files` and `seed`: size and digest of every file of the checkpoint, and of the seed model's
        where a resumed run needs it."""
        config, ahead = save.config, save.ahead
        return {
            "step": save.step,
            "ranks": self._world_size,
            "config": json.loads(config.model_dump_json()),
            "data": data_digests(config) if self._digests is None else dict(self._digests),
            "files": dict(sorted(files.items())),
            "reference": _reference(save.snapshot),
            "seed": dict(seed),
            "records": json.loads(json.dumps(save.records)),
            "ahead": [ahead.kept.start, ahead.kept.stop] if ahead is not None else None,
            **({"paused_from": ahead.first_paused} if ahead is not None and ahead.paused else {}),
            "made_with": provenance() | {"gpu": gpu_name()},
            **({"fork": self.origin.as_json()} if self.origin is not None else {}),
        }


def _reference(snapshot: Snapshot) -> dict[str, Any] | None:
    """Where the reference is, as the manifest has it; None: the seed model's, or not needed."""
    if snapshot.reference is not None:
        return {"folder": REFERENCE}
    return {"step": snapshot.reference_step} if snapshot.reference_step is not None else None


def _as_json(files: Mapping[str, FileRecord]) -> dict[str, Any]:
    return {name: record.as_json() for name, record in files.items()}
