"""Reads files of JSON objects as benchmarks publish them, a .json list or .jsonl lines. What the objects must hold is the
caller's to say; problems for training are read by rows.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.core.errors import DataError
from engine.core.jsonl import read_objects

Record = dict[str, Any]


def load_json_records(path: str | Path) -> list[tuple[str, Record]]:
    """(where, object) of every object of a file, in its order; blank lines are skipped. DataError names file and place."""
    path = Path(path)
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{path}: must end in .json (a list) or .jsonl (an object a line); found {path.suffix!r}: convert it")
    try:
        found = list(read_objects(path)) if path.suffix == ".jsonl" else _list_items(path)
    except OSError as error:
        raise DataError(f"{path}: must be a readable file; found: {error}: check it") from error
    for where, item in found:
        if not isinstance(item, dict):
            raise DataError(f"{where}: must be a JSON object; found {str(item)[:60]!r}: mend it")
    if not found:
        raise DataError(f"{path}: must hold at least one object; found none: check how it was written")
    return found


def text_field(where: str, record: Record, *names: str) -> str:
    """The first of the fields `names` that the record has; DataError unless it is a text that is not empty."""
    name = next((name for name in names if name in record), names[0])
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: `{name}` must be a text that is not empty; found {value!r:.60}: add it")
    return value


def _list_items(path: Path) -> list[tuple[str, Any]]:
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: must be JSON in UTF-8; found {error}: mend it") from error
    if not isinstance(items, list):
        raise DataError(f"{path}: must be a list of JSON objects; found {type(items).__name__}: mend it")
    return [(f"{path}, item {number}", item) for number, item in enumerate(items, start=1)]
