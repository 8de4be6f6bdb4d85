"""The state of a run on disk, as it is read: found, compared with the run that is to go on from it, checked against its
digests and exported. How it is written is saving.py's business, and how a run goes on from it loading.py's. It reads no pickle:
safetensors and JSON only.

    checkpoints/LATEST                      "step_00000040"
    checkpoints/BEST                        "step_00000020", with checkpoint.best_by; kept beside the newest
    checkpoints/step_00000040/manifest.json step, layout, configuration, how long the run's records were, where the reference
                                            is, size and SHA-256 of every file and of itself
    checkpoints/step_00000040/policy/       the policy as a Hugging Face folder, each file written by one trainer rank
    checkpoints/step_00000040/reference/    the reference likewise, where nothing else holds it
    checkpoints/step_00000040/ahead/        with sync.lookahead, the rollouts that were sampled for steps after it
    checkpoints/step_00000040/paused/       with sync.in_flight, what engines have begun for further steps; both in segments
    checkpoints/step_00000040/rank_0000.safetensors   what this trainer rank needs beside the weights: optimizer, scales
    checkpoints/step_00000040/slots.json    with the distributed optimizer, which rank keeps which elements of what
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from engine.algorithms.registry import identities as algorithm_identities
from engine.config.load import RunConfig
from engine.config.options import Trainer
from engine.core.errors import CheckpointError
from engine.core.files import staged_folder
from engine.core.registry import identity
from engine.core.tensor_files import file_record
from engine.data.records import source_digest
from engine.models.config_file import stored_dtype
from engine.models.hf import HfCheckpoint, write_hf_checkpoint
from engine.observe.origin import Origin
from engine.rewards.model import ASKED, READ
from engine.rewards.registry import identities as reward_identities

SAVED, SEED = "saved", "seed"  # dtypes of an export beside those that have a name
STEPS = "step_" + "[0-9]" * 8  # folders of ours; a copy of another name is somebody's own
MANIFEST, LATEST, BEST = "manifest.json", "LATEST", "BEST"
SLOTS = "slots.json"  # {rank: what its state keeps of parameters}, by which another layout finds what it needs
POLICY, REFERENCE = "policy", "reference"
MAY_CHANGE = {  # options that a resumed run may have otherwise; every other one is part of what the run is
    "run": {"steps", "directory", "restarts", "on_lost_node", "sinks"},
    "sync": {"timeout_seconds", "bucket_mebibytes"},
    "trainer": {"timeout_seconds", "reference_memory"},
    "optimizer": {"memory_while_sampling"},
    "inference": {"placement", "timeout_seconds"},
    "rewards": {"workers", "concurrency"},
    "reward_model": {"engines", "timeout_seconds"},  # each group is judged by itself, whichever engine has it
    "checkpoint": {"keep", "best_by", "other_layout", "on_failure"},
    "records": None,
    "evaluation": None,
    "guard": None,
    "cluster": None,  # where processes are changes no bit
    "sft": None,
}
LAYOUT = {  # options that may differ beside those with checkpoint.other_layout = "allow"
    "trainer": {
        "tensor_parallel",
        "pipeline_parallel",
        "virtual_pipeline",
        "first_stage_layers",
        "last_stage_layers",
        "data_parallel",
        "sequence_parallel",
        "distributed_optimizer",
        "recompute",
        "microbatch_tokens",
        "share_prompts",
    },
    "inference": {"engines", "tensor_parallel"},
}
AXES = LAYOUT["trainer"] - {"sequence_parallel", "recompute", "microbatch_tokens", "share_prompts"}  # what rank holds what
SCHEDULE = "schedule"  # among what the manifest keeps of the run's records: the state of a regime that measures
VERIFIER = "the version of the verifier"  # its key among the digests


def latest(folder: Path) -> Path | None:
    """The checkpoint that LATEST names; where that file is gone, which is written last, the newest that is whole; None when the
    run has none yet. CheckpointError where LATEST names none."""
    if (named := _named_by(folder / LATEST)) is not None:
        return named
    whole = sorted(path for path in folder.glob(STEPS) if (path / MANIFEST).is_file())
    return whole[-1] if whole else None


def best(folder: Path) -> Path | None:
    """The checkpoint that BEST names, or None when none has been selected."""
    return _named_by(folder / BEST)


def _named_by(pointer: Path) -> Path | None:
    if not pointer.exists():
        return None
    try:
        named = pointer.parent / pointer.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise CheckpointError(f"{pointer} must be a file with a checkpoint's name; found {error}: write it anew") from error
    if not (named / MANIFEST).exists():
        raise CheckpointError(f"{pointer} names {named.name}, which holds no {MANIFEST}: write the name of another folder")
    return named


def ahead_of(manifest: Mapping[str, Any]) -> range:
    """The steps that a checkpoint keeps rollouts of; those of older versions keep none."""
    return range(*(manifest.get("ahead") or (0, 0)))


def recall_schedule(config: RunConfig, manifest: Mapping[str, Any]) -> None:
    """Has the schedule of `config`, where it decides as the run goes on, go on from what it had decided at a checkpoint."""
    state = (manifest.get("records") or {}).get(SCHEDULE)
    if config.schedule.measures is not None and state is not None:
        config.schedule.restore(state)


def check_prolonged(config: RunConfig, step: int, ahead: range) -> None:
    """CheckpointError when a run of `config` cannot go on from a checkpoint of `step` steps, which keeps rollouts of the steps
    `ahead`."""
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
    wanted = schedule.in_flight(step)
    if not set(wanted) <= set(ahead):
        raise CheckpointError(
            f"run.steps = {config.run.steps} cannot be reached from the checkpoint of {step} steps: with sync.lookahead = "
            f"{schedule.lookahead} the rollouts of steps {wanted.start} to {wanted.stop - 1} come from weights before that "
            f"checkpoint's; found {f'those of {ahead.start} to {ahead.stop - 1}' if ahead else 'none'} in it, for the run was "
            f"to end there: leave run.steps as it was, or export its policy (semion export) and start a new run with that as "
            f"model.path"
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


def manifest_digest(checkpoint: Path) -> str:
    """The SHA-256 that a checkpoint's manifest has of itself, which names the checkpoint's contents: it holds their digests."""
    return _content_digest(read_manifest(checkpoint))


def reference_place(config: RunConfig, step: int, origin: Origin | None = None) -> int | Literal["seed", "own"] | None:
    """Where a checkpoint after `step` steps has the reference: as the policy of the checkpoint of another step, as the seed
    model or in a folder of its own; None where a resumed run copies it from the policy before the next step, or needs none. One
    that is mixed is no policy's: the seed model until it has been mixed for the first time, and its own from then on. `origin`:
    of a run that was forked, whose reference is what it began with until it is next copied."""
    schedule = config.schedule
    if config.sync.reference_mix < 1:
        moved = schedule.reference_version(step - 1) > 0 or (origin is not None and origin.reference == "own")
        return "own" if moved else "seed"
    if schedule.reference_due(step) or config.reference_source != "pass":
        return None
    version = schedule.reference_version(step)
    if origin is not None and version <= origin.step:
        return version if version == origin.step else origin.reference
    if version == 0:
        return "seed"
    return version if config.checkpoint_due(version) else "own"


def trainer_of(manifest: Mapping[str, Any]) -> Trainer:
    """The trainer options that a checkpoint's ranks were written with; those of its configuration, but for a fork's."""
    return Trainer.model_validate(manifest.get("trainer") or manifest["config"]["trainer"])


def state_rank(trainer: Trainer, rank: int) -> int:
    """The rank whose file holds a rank's state: without the distributed optimizer data-parallel ranks have the same one, and
    the first of them writes it."""
    tp_size, dp_size = trainer.tensor_parallel, trainer.data_parallel
    stage, tp_rank = rank // (tp_size * dp_size), rank % tp_size
    return rank if trainer.distributed_optimizer else stage * tp_size * dp_size + tp_rank


def same_layout(one: Trainer, other: Trainer) -> bool:
    """Whether each rank holds the same part of the state under both."""
    return all(getattr(one, name) == getattr(other, name) for name in AXES)


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with its own digest, which `read_manifest` checks."""
    return manifest | {"sha256": _content_digest(manifest)}


def reference_folder(checkpoint: Path, manifest: Mapping[str, Any] | None = None) -> Path | None:
    """The Hugging Face folder of the reference that a checkpoint goes on with, in it or in another checkpoint; None where the
    reference is the seed model, or is not needed. `manifest`: the checkpoint's, where it has been read."""
    said = (read_manifest(checkpoint) if manifest is None else manifest).get("reference") or {}
    if "step" in said:
        other = checkpoint.parent / f"step_{said['step']:08d}"
        if not (other / MANIFEST).exists():
            raise CheckpointError(
                f"{checkpoint} needs {other.name}, whose policy is its reference; found none: put it back, or use another "
                f"checkpoint"
            )
        return other / POLICY
    return checkpoint / REFERENCE if "folder" in said else None


def weight_files(folder: Path) -> list[Path]:
    """The files of weights of a Hugging Face folder, in order."""
    return sorted(folder / name for name in set(HfCheckpoint(folder).files.values()))


def verify_file(checkpoint: Path, name: str, manifest: dict[str, Any]) -> None:
    """Compares a file with the manifest's size and SHA-256; CheckpointError names it."""
    file = checkpoint / name
    known = manifest["files"].get(name)
    if known is None:
        raise CheckpointError(f"{file} is not part of the checkpoint: resume with the trainer layout that wrote it")
    if not file.exists() or file.stat().st_size != known["bytes"]:
        found = file.stat().st_size if file.exists() else "none"
        raise CheckpointError(f"{file} must have {known['bytes']} bytes; found {found}: use another checkpoint")
    if file_record(file).sha256 != known["sha256"]:
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
        saved = manifest["data"].get(key)
        if key == READ and saved is None:
            continue  # it was written before that was looked at
        if digest != saved and key in (VERIFIER, ASKED):
            what = f"version {saved} of the verifier, this Semion has version {digest}"
            if key == ASKED:
                what = "a Semion that asks the reward model in another way, which decides the last bits of its scores"
            yield CheckpointError(
                f"{checkpoint} was written with {what}, and rewards would change in the middle of the run: resume with the "
                f"Semion that wrote it, or export its policy (semion export) and start a new run with that as model.path"
            )
        elif digest != saved:
            yield CheckpointError(
                f"{key} must be what {checkpoint} was written with; found other contents: put back what it was, or start a "
                f"new run"
            )


def other_options(checkpoint: Path, manifest: dict[str, Any], config: RunConfig) -> Iterator[CheckpointError]:
    """An error for each option that makes this another run than the one saved."""
    saved = manifest["config"]
    now = json.loads(config.model_dump_json())
    moves = config.checkpoint.other_layout == "allow"
    for section, options in now.items():
        free = MAY_CHANGE.get(section, set())
        if free is not None and moves:
            free = free | LAYOUT.get(section, set())
        if free is None:
            continue
        gone = [name for name, value in saved.get(section, {}).items() if name not in {*options, *free} and value]
        if gone and section != "algorithm":  # whose options are each loss's own
            yield older(checkpoint, ", ".join(f"{section}.{name}" for name in gone))
            continue
        for name, value in options.items():
            known = saved.get(section, {})
            if name in free or (name not in known and value == _default(config, section, name)):
                continue  # an option that came after the checkpoint was written, left as it was then
            before = known.get(name)
            if before != value and _lacks_options(before, value):
                yield older(checkpoint, f"another form of {section}.{name}")
            elif before != value:
                moved = "resume with checkpoint.other_layout=allow, which is not bit for bit"
                instead = moved if name in LAYOUT.get(section, ()) else "start a new run in another directory"
                yield CheckpointError(
                    f"{section}.{name} must be what {checkpoint} was written with; found {value!r} instead of "
                    f"{before!r}: set it back, or {instead}"
                )


def older(checkpoint: Path, what: str) -> CheckpointError:
    """The error of a checkpoint that an older version wrote, with `what`."""
    return CheckpointError(
        f"{checkpoint} was written by an older Semion with {what}, which this one cannot go on with: resume with the Semion "
        f"that wrote it, or export its policy (semion export) and start a new run with that as model.path"
    )


def _lacks_options(before: Any, now: Any) -> bool:
    """Whether two lists of tables, as data.mix is one, differ in that the tables have other options."""
    lists = isinstance(before, list) and isinstance(now, list) and len(before) == len(now)
    return lists and any(
        isinstance(old, dict) and isinstance(new, dict) and old.keys() != new.keys()
        for old, new in zip(before, now, strict=True)
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
