"""Raw records from where data are kept: JSONL, parquet, a folder that `datasets` saved, a dataset of the Hugging Face hub. One
at a time, so that a file of any size fits; what a record must hold is for others to say (rows.py, prepare.py, replay.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from engine.core.errors import ConfigError, DataError, SemionError
from engine.core.jsonl import parsed, read_objects

Record = tuple[str, Any]  # where it stands, for messages; what it holds
HUB = "hf://"
SAVED = ("state.json", "dataset_dict.json")  # what `datasets.save_to_disk` leaves in the folder of a dataset, or of several
MESSAGE_FIELDS = ("role", "content", "toxic", "redacted", "language")  # of a conversation's messages
SAMPLE, SMALL_BYTES = 256, 1 << 20  # records that are looked at in a preflight; of a file of so many bytes the first ones alone
MAX_FAULTS = 3  # broken records of a source that a preflight tells one by one
BATCH_ROWS = 1024  # of parquet held in memory at once: a row may be a long conversation


def records(source: str | Path, fields: Collection[str] | None) -> Iterator[Record]:
    """The records of a .jsonl file (UTF-8, one object a line, blank lines skipped), a .parquet file, a dataset folder, or
    hf://owner/name[:config][:split] (the split is 'train' unless named). A record of JSONL is the whole object, any other has
    those of `fields` that its source has, or all with None. DataError names file, line or row (from 1), rule, value and fix."""
    check_source(source)
    if str(source).startswith(HUB):
        return _dataset_records(str(source), _hub_dataset(str(source)), fields)
    path = Path(source)
    if path.is_dir():
        return _dataset_records(str(path), _saved_dataset(path), fields)
    return read_objects(path) if path.suffix == ".jsonl" else _parquet_records(path, fields)


def sampled(source: str | Path, fields: Collection[str] | None) -> tuple[list[Record], bool]:
    """(some records of a source, whether they are all): the first ones, and of a long JSONL file as many more from all over it.
    A line that is not JSON stands among them as its DataError; else raises as `records` does."""
    path = Path(source)
    check_source(source)
    if path.suffix != ".jsonl" or not path.is_file():
        found = list(islice(records(source, fields), SAMPLE + 1))
        return found[:SAMPLE], len(found) <= SAMPLE
    if path.stat().st_size > SMALL_BYTES:
        return [*islice(_json_records(path), SAMPLE // 2), *_spread_records(path, SAMPLE // 2)], False
    found = list(islice(_json_records(path), SAMPLE + 1))
    return found[:SAMPLE], len(found) <= SAMPLE


def first_faults(source: str | Path, faults: Sequence[SemionError], count: int, *, is_whole: bool) -> list[SemionError]:
    """The first of the faults of `count` records that were looked at, and where there are more, how many there are in all."""
    shown = list(faults[:MAX_FAULTS])
    if len(faults) > MAX_FAULTS:
        of = f"{count} rows" if is_whole else f"{count} rows that were looked at"
        shown.append(
            DataError(
                f"{source}: every row must be one that can be used; found {len(faults)} of {of} that cannot, of which "
                f"{MAX_FAULTS} are told: mend or remove them all"
            )
        )
    return shown


def _json_records(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _parsed_or_fault(where, line)


def _parsed_or_fault(where: str, line: bytes) -> Any:
    try:
        return parsed(where, line)
    except DataError as error:
        return error


def _spread_records(path: Path, count: int) -> Iterator[Record]:
    """The records that begin behind evenly spread places of a JSONL file."""
    with path.open("rb") as file:
        for place in range(count):
            file.seek(path.stat().st_size * place // count)
            file.readline()  # the rest of a line
            start = file.tell()
            if (line := file.readline()).strip():
                where = f"{path}, the line at byte {start}"
                yield where, _parsed_or_fault(where, line)


def check_source(source: str | Path) -> None:
    """DataError when there can be no records, as far as can be seen without reading any."""
    if str(source).startswith(HUB):
        _hub_parts(str(source))
        return
    path = Path(source)
    if not path.exists():
        raise DataError(f"{path}: a data file must exist; found none there: check the path")
    if path.is_dir() and (path / SAVED[1]).exists():
        raise DataError(f"{path}: must be one dataset; found a folder of several splits: name one of them, as {path}/train")
    if path.is_dir() and not (path / SAVED[0]).exists():
        raise DataError(
            f"{path}: a folder must be one that `datasets` saved; found no {SAVED[0]} in it: name a file, or save it anew"
        )
    if path.is_file() and path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{path}: a data file must end in .jsonl or .parquet; found {path.suffix!r}: convert the file")


def source_digest(source: str | Path) -> str | None:
    """SHA-256 of what a source holds: of the file, or of the names and digests of a dataset's files; None without any."""
    if str(source).startswith(HUB):
        files = [Path(file["filename"]) for file in _hub_dataset(str(source)).cache_files]
    elif Path(source).is_dir():
        files = sorted(Path(source).iterdir())
    else:
        return file_digest(Path(source)) if Path(source).exists() else None
    listed = "".join(f"{file.name} {file_digest(file)}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file; one that has not been written to since is not read again."""
    known = path.stat()
    return _file_digest(path, known.st_size, known.st_mtime_ns)


@lru_cache(maxsize=64)
def _file_digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parquet_records(path: Path, fields: Collection[str] | None) -> Iterator[Record]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
            number = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=[leaf for leaf in leaves if _wanted(leaf, fields)]):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: must be a readable parquet file; found: {error}: write it again") from error


def _wanted(leaf: str, fields: Collection[str] | None) -> bool:
    """Whether to read a parquet column: of a conversation only what the messages need, for the rest is most of it."""
    name, *inner = leaf.split(".")
    return fields is None or (name in fields and (name != "conversation" or inner[-1] in MESSAGE_FIELDS))


def _dataset_records(source: str, dataset: Any, fields: Collection[str] | None) -> Iterator[Record]:
    columns = [name for name in dataset.column_names if fields is None or name in fields]
    for number, record in enumerate(dataset.select_columns(columns) if columns else (), start=1):
        yield f"{source}, row {number}", record


def _saved_dataset(path: Path) -> Any:
    try:
        return _library(str(path)).load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: must be a dataset that can be read; found: {error}: save it anew") from error


def _hub_dataset(source: str) -> Any:
    name, config, split = _hub_parts(source)
    try:
        return _library(source).load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise DataError(
            f"{source}: must be in the local cache of the hub, for runs have no network; found: {why}: fetch it once with "
            f"`HF_HUB_OFFLINE=0 semion prepare`, or name a file"
        ) from error


def _hub_parts(source: str) -> tuple[str, str | None, str]:
    """(owner/name, configuration, split)."""
    name, *rest = source.removeprefix(HUB).split(":")
    if not all((name.count("/") == 1, *name.split("/"), *rest)) or len(rest) > 2:
        raise DataError(f"{source}: must read hf://owner/name[:config][:split]; found another form: mend it")
    return name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train"


def _library(source: str) -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            f"{source}: needs the library `datasets`; found none installed: pip install --no-deps -r requirements/common.txt, "
            f"or name a .jsonl or .parquet file"
        )
    import datasets

    return datasets
