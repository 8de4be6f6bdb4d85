"""To fork a run: the preflight of the new configuration together with what the checkpoint allows, then the new directory. It
starts no process; `train` with resume="auto" goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.api.faults.look import parts_of
from engine.api.preflight import examine
from engine.config.load import read_config
from engine.core.errors import ConfigError, combined, unique
from engine.run.checkpoint import read_manifest
from engine.run.forking import Fork, checkpoint_at, fork_faults, make, planned
from engine.run.spec import resolve, settled

NAMED = "run.directory"


def fork(run: Path, overrides: Sequence[str], step: int | None = None) -> Fork:
    """Makes the directory of a run that begins with a checkpoint of `run` (the newest, or that of `step`) and has its options
    but for `overrides`, among them run.directory; what was made. Raises the SemionError whose `faults` are all that was
    found; then nothing was written."""
    if not (run / "config.toml").is_file():
        raise ConfigError(f"RUN must be the directory of a run, with config.toml; found none in {run}: name a run.directory")
    if not any(text.partition("=")[0].strip() == NAMED for text in overrides):
        raise ConfigError(f"semion fork needs a directory for the new run; found none: add {NAMED}=FOLDER")
    checkpoint = checkpoint_at(run, step)
    config, faults, unread = read_config(run / "config.toml", overrides)
    if config is None or unread:
        raise combined(faults)
    config, manifest = settled(config), read_manifest(checkpoint)
    found = [*faults, *fork_faults(checkpoint, manifest, config), *examine(config, "train")]
    if found:
        raise combined(unique(found))
    spec = resolve(config, parts_of(config, "train"), digests=False)
    made = planned(checkpoint, config, needs_reference="reference" in spec.copies)
    make(made)
    return made
