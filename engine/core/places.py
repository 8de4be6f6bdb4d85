"""Names of files and folders as people write them: what may be meant by one that is not there, and whether something can be
made at one that is to be written. It reads no content, and leaves nothing behind.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # in no name that a person has chosen
_HUB = re.compile(r"(?:https?://huggingface\.co/|hf://)?(?:datasets/)?([\w.-]+/[\w.-]+?)/?(?:tree/main)?")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
UNEXPANDED = re.compile(r"~|.*\$\w|.*\$\{")


def hub_name(name: str) -> str | None:
    """owner/name where a text is the name or the address of something on the Hugging Face hub, not of a file."""
    found = _HUB.fullmatch(name)
    is_file = name.startswith((".", "/", "~", "$")) or re.search(r"\.(jsonl?|csv|parquet|gz|txt)$", name)
    return found[1] if found and not is_file else None


def meant(name: str, option: str, hub: str) -> str:
    """What to do about a name behind which nothing is. `hub`: what to do where it may be one of the Hugging Face hub, with {}
    for its owner/name."""
    if not name.strip():
        return "write a path"
    if name.lower() in ("none", "null", "false", "no"):
        return f"an option is unset by {option}= without a value"
    if (on_hub := hub_name(name)) is not None and not Path(name).parent.is_dir():
        return hub.format(on_hub)
    if _ADDRESS.match(name):
        return "it is read from disk alone: download it and name the path"
    if UNEXPANDED.match(name):
        return "~ and variables stay as they are in quotes and in files: write the whole path"
    if any(letter in name for letter in "*?"):
        return "no pattern is followed: name one file"
    if not Path(name).is_absolute():
        return f"check the path, which is relative to the working directory, {Path.cwd()}"
    return "check the path"


def obstacle(place: Path) -> str | None:
    """Why nothing can be made or written at a place, in a few words; None where it can. A file or folder that is there is not
    touched; beside one to make, a folder is made and removed again, since permissions do not tell what a file system takes."""
    try:
        whole = place.absolute()
        there = next(parent for parent in (whole, *whole.parents) if os.path.lexists(parent))
        if there == whole and not there.is_dir():
            return None if os.access(there, os.W_OK) else f"no permission to write at {there}"
        if not there.is_dir():
            return f"a link to nothing at {there}" if there.is_symlink() else f"a file at {there}"
        if not os.access(there, os.W_OK):
            return f"no permission to write at {there}"
        if max((len(os.fsencode(part)) for part in whole.parts), default=0) > os.pathconf(there, "PC_NAME_MAX"):
            return f"a name that is too long at {there}"
        probe = there / f".semion-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return f"that the system refuses ({why})" + ("" if len(str(place)) > 200 else f" at {place}")
    return None
