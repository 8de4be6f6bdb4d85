"""Where a run comes from that was forked off another (`semion fork`): written once into its directory, kept in every checkpoint
of it, and read by whoever tells of the run. Making a fork is engine/run/forking.py's business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from engine.core.errors import DataError

FORK = "fork.json"  # in the run's directory


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint that a run began with."""

    run: str  # run.directory of the run that wrote it, as it was named
    step: int  # optimizer steps done before it
    checkpoint: str  # SHA-256 that the checkpoint's manifest has of itself
    # (there, here) of options by their full names, and where these are the same of the contents of files, and of who judges
    changed: Mapping[str, tuple[Any, Any]]
    reference: Literal["seed", "own"] | None = None  # what the reference was there; None: taken from the policy, or not needed

    def as_json(self) -> dict[str, Any]:
        """As FORK and a manifest have it."""
        return json.loads(json.dumps(asdict(self) | {"changed": dict(self.changed)}))  # type: ignore[no-any-return]

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Origin:
        """What `as_json` gave."""
        changed = {name: (before, now) for name, (before, now) in found["changed"].items()}
        return Origin(found["run"], found["step"], found["checkpoint"], changed, found["reference"])

    def sentence(self) -> str:
        """In a line, without what was changed."""
        return f"{self.run} after {self.step} steps (checkpoint {self.checkpoint[:12]})"

    def differences(self) -> str:
        """What was changed, in a line."""
        return "; ".join(f"{name} {before} -> {now}" for name, (before, now) in self.changed.items()) or "nothing"


def read_origin(directory: Path) -> Origin | None:
    """Where the run in `directory` comes from; None where it began by itself. DataError for a file that is none of ours."""
    file = directory / FORK
    if not file.exists():
        return None
    try:
        return Origin.from_json(json.loads(file.read_text("utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} must be what `semion fork` wrote; found {error!r}: put it back") from error
