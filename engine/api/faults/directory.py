"""The run's directory: whether it can be made and is this run's alone, and whether the newest checkpoint there can be gone on
from. It writes nothing."""

from __future__ import annotations

import fcntl
from pathlib import Path

from engine.api.faults.look import Faults, Look, caught
from engine.config.load import RunConfig, dump_config
from engine.core.errors import CheckpointError, ConfigError
from engine.core.places import obstacle
from engine.models.hf import check_destination
from engine.run.checkpoint import (
    ahead_of,
    check_prolonged,
    latest,
    other_data,
    other_options,
    read_manifest,
    recall_schedule,
    reference_folder,
)


def directory_faults(look: Look) -> Faults:
    """Whether another run is at work there, and whether a run that starts anew would take records away."""
    config, lock = look.config, look.config.run_directory / ".lock"
    for option, name in (("run.directory", config.run.directory), ("sft.checkpoint_out", config.sft.checkpoint_out)):
        if name is None:
            continue
        place = Path(name)
        what = "an empty name" if not name.strip() else obstacle(place) or (f"a file at {place}" if place.is_file() else None)
        if what:
            yield ConfigError(f"{option} must be a folder that can be made and written; found {what}: name another")
            return
        if place.exists() and place.resolve() == Path(config.model.path).resolve():
            yield ConfigError(
                f"{option} must not be model.path, whose files it would mix with its own; found both as {name}: name another"
            )
            return
    if lock.exists():
        with lock.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                yield ConfigError(
                    f"run.directory must belong to one run at a time; found another at work in {config.run_directory}: "
                    f"wait for it, or name another directory"
                )
                return
    if config.sft.checkpoint_out is not None:
        check_destination(config.sft.checkpoint_out)
    if look.is_whole and (not look.resume or latest(config.run_directory / "checkpoints") is None):
        check_fresh(config, may_start_over=look.resume)


def has_steps(directory: Path) -> bool:
    """Whether a run has recorded a step there."""
    metrics = directory / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


def check_fresh(config: RunConfig, *, may_start_over: bool) -> None:
    """ConfigError when run.directory holds records that starting anew would take away.

    A run that was stopped before its first checkpoint may start over under --resume auto: equal configurations write equal
    records again. One that ended before its first step, for data or a model that were refused, is no run yet.
    """
    directory = config.run_directory
    if not has_steps(directory):
        return
    if not may_start_over:
        raise ConfigError(f"run.directory must be new; found a run in {directory}: add --resume auto, or name another one")
    before = directory / "config.toml"
    if not before.exists() or before.read_text(encoding="utf-8") != dump_config(config):
        raise ConfigError(
            f"run.directory must be new or hold this run; found one with other options and no checkpoint in {directory}: use "
            f"the options it had, or name another directory"
        )


def resume_faults(look: Look, *, reads_data: bool) -> Faults:
    """Whether the newest checkpoint is whole in size and of this run. `reads_data`: whether the data can be compared."""
    newest = latest(look.config.run_directory / "checkpoints") if look.resume else None
    if newest is None:
        return
    manifest = read_manifest(newest)
    yield from other_options(newest, manifest, look.config)
    if reads_data:
        yield from other_data(newest, manifest, look.config)
    recall_schedule(look.config, manifest)
    yield from caught(check_prolonged, look.config, int(manifest["step"]), ahead_of(manifest))
    for name, known in manifest["files"].items():
        found = (newest / name).stat().st_size if (newest / name).exists() else "none"
        if found != known["bytes"]:
            yield CheckpointError(f"{newest / name} must have {known['bytes']} bytes; found {found}: use another checkpoint")
    try:
        reference_folder(newest, manifest)
    except CheckpointError as error:
        yield error
