"""The state of a run on disk: staged, digested, synced, renamed, and only then named by LATEST. Killed at any moment, the
folder still holds the last whole checkpoint. It reads no pickle: safetensors and JSON only.

    checkpoints/LATEST                      "step_00000040"
    checkpoints/BEST                        "step_00000020", with checkpoint.best_by; kept beside the newest
    checkpoints/step_00000040/manifest.json step, layout, configuration, how long the run's records were, size and SHA-256 of
                                            every file and of itself
    checkpoints/step_00000040/policy/       the policy as a Hugging Face checkpoint
    checkpoints/step_00000040/rank_0000.safetensors   what this trainer rank needs to go on exactly
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.algorithms.registry import identities as algorithm_identities
from engine.config.load import RunConfig
from engine.core.errors import CheckpointError, StorageError, combined
from engine.core.files import atomic_write, staged_folder, storing, sync
from engine.core.registry import identity
from engine.data.records import source_digest
from engine.models.hf import HfCheckpoint, save_tensors, stored_dtype, write_hf_checkpoint
from engine.rewards.registry import identities as reward_identities

if TYPE_CHECKING:
    import torch

SAVED, SEED = "saved", "seed"  # dtypes of an export beside those that have a name
STEPS = "step_" + "[0-9]" * 8  # folders of ours; a copy of another name is somebody's own
MANIFEST, LATEST, BEST, POLICY = "manifest.json", "LATEST", "BEST", "policy"
MAY_CHANGE = {  # options that a resumed run may have otherwise; every other one is part of what the run is
    "run": {"steps", "directory", "restarts", "sinks"},
    "sync": {"timeout_seconds", "bucket_mebibytes"},
    "trainer": {"timeout_seconds"},
    "inference": {"placement", "timeout_seconds"},
    "rewards": {"workers", "concurrency"},
    "reward_model": {"timeout_seconds"},
    "checkpoint": {"keep", "best_by"},
    "evaluation": None,
    "guard": None,
    "cluster": None,  # where processes are changes no bit
    "sft": None,
}


class _Counted:
    """The tensors of an iterator, and how many bytes they and the state beside them have so far."""

    def __init__(self, tensors: Iterator[tuple[str, torch.Tensor]], num_bytes: int) -> None:
        self._tensors, self.num_bytes = tensors, num_bytes

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        name, tensor = next(self._tensors)
        self.num_bytes += tensor.nbytes
        return name, tensor


class Checkpoints:
    """The checkpoints of one run, as one trainer rank sees them."""

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        barrier: Callable[[], None],
        digests: Mapping[str, str | None] | None = None,
    ) -> None:
        """`barrier` waits for all trainer ranks. `digests`: of data and of what judges, as they were when the run began
        (`Spec.digests`); a file that changes while the run goes on does not change what the run is made of. Taken at each
        commit where not given."""
        self._folder = folder
        self._rank = rank
        self._world_size = world_size
        self._barrier = barrier
        self._digests = digests

    def commit(
        self,
        step: int,
        state: dict[str, torch.Tensor],
        weights: Iterator[tuple[str, torch.Tensor]],
        config: RunConfig,
        records: Mapping[str, Any] | None = None,
        end_ids: Iterable[int] = (),
    ) -> Path:
        """Writes the checkpoint of `step`; collective. `weights` yields the full policy on rank 0 (drained everywhere);
        `records`, rank 0's, is what a resumed run needs of the run's records (`Records.kept`); `end_ids`: what ends a response
        of the policy, which its generation config is to name. StorageError where the disk is full or not to be written: then
        nothing of the checkpoint stays, and the one before does."""
        final = self._folder / f"step_{step:08d}"
        staging = self._folder / f".staging-{final.name}"
        counted = _Counted(weights, sum(tensor.nbytes for tensor in state.values()))
        try:
            with storing(self._folder, lambda: counted.num_bytes):
                self._write(step, state, counted, config, records, end_ids, final, staging)
        except StorageError:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return final

    def _write(
        self,
        step: int,
        state: dict[str, torch.Tensor],
        weights: Iterator[tuple[str, torch.Tensor]],
        config: RunConfig,
        records: Mapping[str, Any] | None,
        end_ids: Iterable[int],
        final: Path,
        staging: Path,
    ) -> None:
        if self._rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            for stale in self._folder.glob(".staging-*"):
                shutil.rmtree(stale)
            staging.mkdir()
        self._barrier()
        file = staging / rank_file(self._rank)
        save_tensors({name: tensor.contiguous() for name, tensor in state.items()}, file)
        sync(file)
        if self._rank == 0:
            write_hf_checkpoint(staging / POLICY, weights, template=config.model.path, end_ids=end_ids)
        else:
            for _ in weights:
                pass
        self._barrier()
        if self._rank == 0:
            self._finish(step, staging, final, config, records)
        self._barrier()

    def _finish(self, step: int, staging: Path, final: Path, config: RunConfig, records: Mapping[str, Any] | None) -> None:
        files = {
            str(path.relative_to(staging)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(staging.rglob("*"))
            if path.is_file()
        }
        manifest = {
            "step": step,
            "ranks": self._world_size,
            "config": json.loads(config.model_dump_json()),
            "data": data_digests(config) if self._digests is None else dict(self._digests),
            "files": files,
            "records": json.loads(json.dumps(records)),
        }
        manifest["sha256"] = _content_digest(manifest)
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        sync(staging / MANIFEST)
        sync(staging)
        if final.exists():
            former = final.with_name(f".staging-former-{final.name}")
            final.rename(former)
            shutil.rmtree(former)
        staging.rename(final)
        sync(self._folder)
        self._point(LATEST, final.name)
        self._prune(final, config.checkpoint.keep)

    def select(self, scores: Mapping[int, float], config: RunConfig) -> None:
        """Names by BEST the checkpoint of the highest score, the earliest of equals, among those up to the newest;
        removes BEST where none has a score. `scores` by step. For rank 0, at any time but during `commit`."""
        newest = latest(self._folder)
        if newest is None:
            return
        folders = {step: self._folder / f"step_{step:08d}" for step in scores}
        there = [step for step in sorted(scores) if (folders[step] / MANIFEST).exists() and folders[step] <= newest]
        if there:
            self._point(BEST, folders[max(there, key=lambda step: scores[step])].name)
        else:
            (self._folder / BEST).unlink(missing_ok=True)
        self._prune(newest, config.checkpoint.keep)

    def _point(self, pointer: str, name: str) -> None:
        with atomic_write(self._folder / pointer, durable=True) as part:
            part.write_text(name, encoding="utf-8")

    def _prune(self, newest: Path, keep: int) -> None:
        """Removes all but the best and the `keep` newest. Later steps than the newest are of a run that was killed before
        it named them; they do not count as kept."""
        kept = sorted(path for path in self._folder.glob(STEPS) if path.is_dir() and path.name <= newest.name)
        chosen = best(self._folder)
        for old in kept[:-keep]:
            if old != chosen:
                shutil.rmtree(old)

    def load(self, config: RunConfig) -> tuple[int, dict[str, torch.Tensor]]:
        """(step, this rank's state) of the newest checkpoint, after checking this rank's file against its digest.

        Raises CheckpointError when there is none, it is torn or altered, or it belongs to another run.
        """
        newest = latest(self._folder)
        if newest is None:
            raise CheckpointError(f"{self._folder} must hold a checkpoint to resume from; found none: start without --resume")
        manifest = read_manifest(newest)
        if found := [*other_options(newest, manifest, config), *other_data(newest, manifest, config)]:
            raise combined(found)
        name = rank_file(self._rank)
        verify_file(newest, name, manifest)
        from safetensors.torch import load_file

        return int(manifest["step"]), load_file(newest / name)

    def steps(self) -> set[int]:
        """The steps of all checkpoints that stand, up to the newest."""
        newest = latest(self._folder)
        if newest is None:
            return set()
        return {int(path.name.removeprefix("step_")) for path in self._folder.glob(STEPS) if path.name <= newest.name}

    def records(self) -> dict[str, Any] | None:
        """What the newest checkpoint keeps of the run's records; None without one, or where an older version wrote it."""
        newest = latest(self._folder)
        found: dict[str, Any] | None = read_manifest(newest).get("records") if newest is not None else None
        return found


def latest(folder: Path) -> Path | None:
    """The checkpoint that LATEST names, or None when the run has none yet."""
    return _named_by(folder / LATEST)


def best(folder: Path) -> Path | None:
    """The checkpoint that BEST names, or None when none has been selected."""
    return _named_by(folder / BEST)


def _named_by(pointer: Path) -> Path | None:
    if not pointer.exists():
        return None
    named = pointer.parent / pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not (named / MANIFEST).exists():
        raise CheckpointError(f"{pointer} names {named.name}, which holds no {MANIFEST}: write the name of another folder")
    return named


def check_prolonged(config: RunConfig, step: int) -> None:
    """CheckpointError when a run of `config` cannot go on from a checkpoint of `step` steps."""
    if step > config.run.steps:
        raise CheckpointError(
            f"run.steps must not be less than the {step} steps already done; found {config.run.steps}: raise it"
        )
    schedule = config.schedule
    if step < config.run.steps and not schedule.resumable(step):
        raise CheckpointError(
            f"run.steps cannot be raised from {step}: that checkpoint is not at a sync boundary, so the run cannot be extended "
            f"from it; found {config.run.steps}: the last that it can be extended from is one of "
            f"{schedule.last_resumable(step)} steps"
        )


def rank_file(rank: int) -> str:
    """The file of one trainer rank's state."""
    return f"rank_{rank:04d}.safetensors"


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; CheckpointError names the file that is missing or not a manifest."""
    file = checkpoint / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; use another checkpoint") from error
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _content_digest(manifest):
        raise CheckpointError(f"{file} differs from its own digest, so its bits have changed: use another checkpoint")
    return manifest


def verify_file(checkpoint: Path, name: str, manifest: dict[str, Any]) -> None:
    """Compares a file with the manifest's size and SHA-256; CheckpointError names it."""
    file = checkpoint / name
    known = manifest["files"].get(name)
    if known is None:
        raise CheckpointError(f"{file} is not part of the checkpoint: resume with the trainer layout that wrote it")
    if not file.exists() or file.stat().st_size != known["bytes"]:
        found = file.stat().st_size if file.exists() else "none"
        raise CheckpointError(f"{file} must have {known['bytes']} bytes; found {found}: use another checkpoint")
    if _sha256(file) != known["sha256"]:
        raise CheckpointError(f"{file} differs from its digest, so its bits have changed: use another checkpoint")


def export(checkpoint: Path, destination: Path, dtype: str = SAVED) -> Path:
    """Copies the verified policy of a checkpoint folder to `destination` as a Hugging Face checkpoint. `dtype`: that of its
    tensors, "saved" as the run had them, "seed" as the model that it began with has them, or "float32" or "bfloat16".

    Raises CheckpointError when a file differs from its digest or the destination holds something else, StorageError when it
    cannot be written.
    """
    manifest = read_manifest(checkpoint)
    names = [name for name in manifest["files"] if name.startswith(f"{POLICY}/")]
    for name in names:
        verify_file(checkpoint, name, manifest)
    if destination.exists() and any(destination.iterdir()):
        raise CheckpointError(f"{destination} must be new or empty; found files in it: choose another folder")
    if dtype != SAVED:
        import torch

        kind = stored_dtype(manifest["config"]["model"]["path"]) if dtype == SEED else getattr(torch, dtype)
        policy = HfCheckpoint(checkpoint / POLICY)
        tensors = ((name, policy.tensor(name).to(kind)) for name in policy.files)
        write_hf_checkpoint(destination, tensors, template=checkpoint / POLICY)
        return destination
    with staged_folder(destination) as staging:
        for name in names:
            shutil.copyfile(checkpoint / name, staging / Path(name).name)
    return destination


def other_data(checkpoint: Path, manifest: dict[str, Any], config: RunConfig) -> Iterator[CheckpointError]:
    """An error for each data file, and each part that judges, that is not the one the run began with."""
    for key, digest in data_digests(config).items():
        if digest != manifest["data"].get(key):
            yield CheckpointError(
                f"{key} must be what {checkpoint} was written with; found other contents: put back what it was, or start a "
                f"new run"
            )


def other_options(checkpoint: Path, manifest: dict[str, Any], config: RunConfig) -> Iterator[CheckpointError]:
    """An error for each option that makes this another run than the one saved."""
    saved = manifest["config"]
    now = json.loads(config.model_dump_json())
    for section, options in now.items():
        free = MAY_CHANGE.get(section, set())
        if free is None:
            continue
        for name, value in options.items():
            known = saved.get(section, {})
            if name in free or (name not in known and value == _default(config, section, name)):
                continue  # an option that came after the checkpoint was written, left as it was then
            before = known.get(name)
            if before != value:
                yield CheckpointError(
                    f"{section}.{name} must be what {checkpoint} was written with; found {value!r} instead of "
                    f"{before!r}: set it back, or start a new run in another directory"
                )


def _default(config: RunConfig, section: str, name: str) -> Any:
    """An option's default, as JSON has it."""
    field = type(getattr(config, section)).model_fields[name]
    return None if field.is_required() else json.loads(json.dumps(field.get_default(call_default_factory=True), default=str))


def _content_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def data_digests(config: RunConfig) -> dict[str, str | None]:
    """SHA-256 of every data file by its option, None where there is none, and who judges (rewards.registry.identities), which
    nobody does in supervised training."""
    digests = {key: source_digest(path) for key, path in config.data.files.items()}
    digests |= algorithm_identities(config.algorithm)
    digests["model.family"] = identity(config.model.family, "model.family")
    digests["sync.semantics"] = identity(config.sync.semantics, "sync.semantics")
    digests["optimizer.schedule"] = identity(config.optimizer.schedule, "optimizer.schedule")
    return digests if config.sft.checkpoint_out is not None else digests | reward_identities(config)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
