"""Makes a folder of training data from a public dataset: filtered, without duplicates and without the problems of evaluation
files, in seeded splits, with a manifest that says what became of every row. Streams: only digests of the rows are held.

    FOLDER/train.jsonl, validation.jsonl, test.jsonl     rows as load_rows reads them, in the order they came
    FOLDER/manifest.json                                 counts by reason and by source, sizes and SHA-256 of the files
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.core.errors import ConfigError, DataError, brief
from engine.core.files import staged_folder
from engine.core.jsonl import line_of
from engine.core.seeds import counted_seed
from engine.data.filters import Recipe
from engine.data.forms import PROMPTS, asked
from engine.data.overlap import prompt_digest
from engine.data.records import check_source, file_digest, records, source_digest

PARTS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Rows of each part; what a row's problem is decides its part, with the seed, and not where it stood."""

    validation: int
    test: int
    train: int | None = None  # all the others
    seed: int = 0


def prepare(
    recipe: Recipe, sources: Sequence[str], folder: str | Path, sizes: Sizes, exclude: Sequence[str] = ()
) -> dict[str, Any]:
    """Fills `folder`, all or nothing; the manifest. `exclude`: evaluation files whose problems must not be trained on.

    ConfigError when the folder is not new or empty; DataError for what cannot be read, or when too few rows are left.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} must be new or an empty folder; found something in it: name another")
    for source in (*sources, *exclude):
        check_source(source)
    excluded = {digest for file in exclude for digest in _problems_of(file)}
    with staged_folder(folder) as staging:
        kept = staging / "kept.jsonl"
        counts, by_source, ranks = _filter(recipe, sources, excluded, kept, sizes.seed)
        if counts["read"] and counts.get("empty") == counts["read"]:
            raise DataError(
                f"{', '.join(sources)}: rows must have `{recipe.fields[0]}`, as {recipe.name}'s have; found none in "
                f"{counts['read']} rows: name files of {recipe.name}"
            )
        files = _split(kept, _parts(ranks, sizes), staging)
        kept.unlink()
        manifest = {
            "made_by": f"semion prepare {recipe.name}",
            "seed": sizes.seed,
            "sources": {path: source_digest(path) for path in sources},
            "excluded": {path: source_digest(path) for path in exclude},
            "counts": counts,
            "by_source": by_source,
            "files": files,
        }
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def _filter(
    recipe: Recipe, sources: Sequence[str], excluded: set[bytes], kept: Path, seed: int
) -> tuple[dict[str, int], dict[str, dict[str, int]], NDArray[np.int64]]:
    """Writes the rows to keep; (counts by reason, read and kept rows by their `source`, a seeded rank for each kept row)."""
    counts: Counter[str] = Counter(read=0, kept=0)
    by_source: dict[str, Counter[str]] = {}
    seen: set[bytes] = set()
    ranks = array("q")
    with kept.open("w", encoding="utf-8") as file:
        for where, record in (row for path in sources for row in records(path, recipe.fields)):
            if not isinstance(record, dict):
                raise DataError(f"{where}: a row must be a JSON object with named fields; found {brief(record)}: mend it")
            row = recipe.judge(where, record)
            if not isinstance(row, str):
                digest = prompt_digest(row["problem"])
                row = "excluded" if digest in excluded else "duplicate" if digest in seen else row
                seen.add(digest)
            reason = row if isinstance(row, str) else "kept"
            label = str(record.get("source") or recipe.name)
            counts.update(("read", reason))
            by_source.setdefault(label, Counter(read=0, kept=0)).update(("read", reason))
            if not isinstance(row, str):
                ranks.append(counted_seed(seed, "split", digest.hex()))
                file.write(line_of(row))
    return dict(counts), {label: dict(by_source[label]) for label in sorted(by_source)}, np.array(ranks, dtype=np.int64)


def _parts(ranks: NDArray[np.int64], sizes: Sizes) -> NDArray[np.int8]:
    """The part of every kept row, as its place in PARTS; -1 for a row in none. The lowest ranks are validation."""
    held_out = sizes.validation + sizes.test
    wanted = held_out + (sizes.train if sizes.train is not None else 1)
    if len(ranks) < wanted:
        raise DataError(
            f"--validation {sizes.validation}, --test {sizes.test} and the training rows need {wanted} rows; found "
            f"{len(ranks)} that may be kept: lower them, or name more data"
        )
    order = np.argsort(ranks, kind="stable")
    parts = np.full(len(ranks), -1, dtype=np.int8)
    parts[order[: sizes.validation]] = PARTS.index("validation")
    parts[order[sizes.validation : held_out]] = PARTS.index("test")
    parts[order[held_out : None if sizes.train is None else held_out + sizes.train]] = PARTS.index("train")
    return parts


def _split(kept: Path, parts: NDArray[np.int8], folder: Path) -> dict[str, dict[str, Any]]:
    """Deals the kept rows to their files; {file: rows, bytes, sha256} of those that have any."""
    rows = {name: int((parts == place).sum()) for place, name in enumerate(PARTS)}
    paths = {name: folder / f"{name}.jsonl" for name in PARTS if rows[name]}
    with ExitStack() as stack:
        files = {name: stack.enter_context(path.open("wb")) for name, path in paths.items()}
        for part, line in zip(parts.tolist(), stack.enter_context(kept.open("rb")), strict=True):
            if part >= 0:
                files[PARTS[part]].write(line)
    return {
        path.name: {"rows": rows[name], "bytes": path.stat().st_size, "sha256": file_digest(path)}
        for name, path in paths.items()
    }


def _problems_of(file: str) -> Iterator[bytes]:
    """Digests of the problems of an evaluation file, in any form that training files may have (forms.py)."""
    for where, record in records(file, None):
        if not isinstance(record, dict):
            raise DataError(f"{where}: a row must be a JSON object with named fields; found {brief(record)}: mend it")
        found = asked(where, record, {})
        turns = [text for role, text in found.messages if role == "user"]
        texts = {
            text for text in (found.text, *turns[:1]) if text
        }  # of a conversation its first turn too, which WildChat's row is
        if not texts:
            raise DataError(f"{where}: a row to exclude must have one of {', '.join(PROMPTS)}; found {brief(record)}: add it")
        yield from map(prompt_digest, sorted(texts))
