"""The events of a run, and the two files by which the command and rank 0 tell each other that a run lives or shall end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.config.load import RunConfig

Event = dict[str, Any]


def sign_of_life(config: RunConfig) -> Path:
    """The file that rank 0 touches when it has waited for something, between two of its events."""
    return config.run_directory / "alive"


def stop_request(config: RunConfig) -> Path:
    """The file by which the command asks rank 0 to save and end; rank 0 is on the command's machine."""
    return config.run_directory / "stop"
