"""Raw records from where data are kept: JSONL, JSON arrays and CSV, each also under gzip, parquet, a folder that `datasets`
saved, a dataset of the Hugging Face hub. One at a time, so that a file of any size fits (but a JSON array); what a record must
hold is for others to say (rows.py, prepare.py, replay.py).
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.util
import io
import sys
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from engine.core.errors import ConfigError, DataError, SemionError
from engine.core.jsonl import Fault, objects_in, parsed
from engine.core.places import meant

Record = tuple[str, Any]  # where it stands, for messages; what it holds
HUB = "hf://"
SUFFIXES = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet")
SAVED = ("state.json", "dataset_dict.json")  # what `datasets.save_to_disk` leaves in the folder of a dataset, or of several
CONVERSATIONS = ("conversation", "conversations", "messages", "prompt", "chosen", "rejected", "completion")
MESSAGE_FIELDS = ("role", "content", "from", "value", "toxic", "redacted", "language")  # of a conversation's messages
PART_FIELDS = ("type", "text")  # of a message's content, where that is a list of parts
SAMPLE, SMALL_BYTES = 256, 1 << 20  # records that are looked at in a preflight; of a file of so many bytes the first ones alone
MAX_FAULTS = 3  # broken records of a source that a preflight tells one by one
BATCH_ROWS = 1024  # of parquet held in memory at once: a row may be a long conversation


def records(source: str | Path, fields: Collection[str] | None, fault: Fault | None = None) -> Iterator[Record]:
    """The records of a file (UTF-8, with or without a byte order mark), of a dataset's folder, or of
    hf://owner/name[:config][:split] (the split is 'train' unless named).

    .jsonl has one object a line, blank lines skipped; .json one array of objects, or lines as .jsonl has them; .csv a line of
    names and then texts, of which an empty one is none; each may end in .gz. A record of these is whole, any other has those
    of `fields` that its source has, or all with None. DataError names file, line or row (from 1), rule, value and fix;
    that of a single line is told to `fault` where there is one, and the line passed over.
    """
    check_source(source)
    if str(source).startswith(HUB):
        return _dataset_records(str(source), _hub_dataset(str(source)), fields)
    path = Path(source)
    if path.is_dir():
        return _dataset_records(str(path), _saved_dataset(path), fields)
    if path.suffix == ".parquet":
        return _parquet_records(path, fields)
    return _text_records(path, fault)


def _text_records(path: Path, fault: Fault | None) -> Iterator[Record]:
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    with _opened(path) as file:
        if kind == "csv":
            yield from _csv_records(file, path, fault)
        elif kind == "json" and _begins_array(file):
            yield from _array_records(file, path)
        else:
            yield from objects_in(file, path, fault)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked. DataError where they cannot be."""
    if path.suffix != ".gz":
        with path.open("rb") as file:
            yield file
        return
    try:
        with gzip.open(path, "rb") as packed:
            yield cast(BinaryIO, packed)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: must be a whole gzip file; found: {error}: pack it again") from error


def _begins_array(file: BinaryIO) -> bool:
    """Whether the first character that says anything is a bracket; the file is at its beginning again."""
    head = file.read(1 << 12).decode("utf-8-sig", errors="replace").lstrip()
    file.seek(0)
    return head.startswith("[")


def _array_records(file: BinaryIO, path: Path) -> Iterator[Record]:
    array = parsed(str(path), file.read().removeprefix(b"\xef\xbb\xbf"), fix="write an array of objects, or one a line")
    for number, record in enumerate(array, start=1):
        yield f"{path}, row {number}", record


def _csv_records(file: BinaryIO, path: Path, fault: Fault | None) -> Iterator[Record]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    before = csv.field_size_limit(sys.maxsize)  # the library's own limit is of 128 KiB a cell
    try:
        reader = csv.reader(text, strict=True)
        names = next(reader, [])
        if len(set(names)) < len(names) or not all(names):
            raise DataError(f"{path}, line 1: must name every column once; found {names!r:.200}: mend it")
        start = reader.line_num + 1
        for cells in reader:
            where, start = f"{path}, line {start}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(names):
                error = DataError(f"{where}: must have {len(names)} cells, as line 1; found {len(cells)}: put texts in quotes")
                if fault is None:
                    raise error
                fault(error)
                continue
            yield where, {name: cell or None for name, cell in zip(names, cells, strict=True)}
    except UnicodeDecodeError as error:
        found = error.object[error.start : error.start + 1]
        raise DataError(f"{path}: must be UTF-8; found byte {found!r}: save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: must be CSV; found: {error}: mend it") from error
    finally:
        csv.field_size_limit(before)
        text.detach()


def sampled(source: str | Path, fields: Collection[str] | None) -> tuple[list[Record], bool]:
    """(some records of a source, whether they are all): the first ones, and of a long JSONL file as many more from all over it.
    A line that cannot be read stands among them as its DataError; else raises as `records` does."""
    path = Path(source)
    is_long = path.suffix == ".jsonl" and path.is_file() and path.stat().st_size > SMALL_BYTES
    found: list[Record] = []
    for record in records(source, fields, lambda error: found.append((str(path), error))):
        if len(found) >= (SAMPLE // 2 if is_long else SAMPLE):
            break
        found.append(record)
    else:
        return found, True
    return [*found, *_spread_records(path, SAMPLE // 2)] if is_long else found, False


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


def _parsed_or_fault(where: str, line: bytes) -> Any:
    try:
        return parsed(where, line, fix="mend it")
    except DataError as error:
        return error


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


def check_source(source: str | Path) -> None:
    """DataError when there can be no records, as far as can be seen without reading any."""
    if str(source).startswith(HUB):
        _hub_parts(str(source))
        return
    path = Path(source)
    if not path.exists():
        raise DataError(f"{path}: a data file must exist; found none there: {meant(str(path), '', 'check the path')}")
    if path.is_dir() and (path / SAVED[1]).exists():
        raise DataError(f"{path}: must be one dataset; found a folder of several splits: name one of them, as {path}/train")
    if path.is_dir() and not (path / SAVED[0]).exists():
        held = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
        name = f"name one file, such as {held[0]}" if held else "name a file"
        raise DataError(
            f"{path}: a folder must be one that `datasets` saved; found no {SAVED[0]} in it: {name}, or save it anew"
        )
    if path.exists() and not path.is_dir() and not path.is_file():
        raise DataError(f"{path}: a data file must be a file; found a device or a pipe: write the rows to a file")
    if path.is_file() and not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: a data file must end in {', '.join(SUFFIXES)}; found {path.suffix!r}: convert the file")


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
    import pyarrow.parquet  # here, for most processes of a run read none

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
    if fields is None or name not in fields or name not in CONVERSATIONS or not inner:
        return fields is None or name in fields
    named = [part for part in inner if part not in ("list", "element", "item")]  # what parquet's writers call the levels
    return not named or (named[0] in MESSAGE_FIELDS and (len(named) == 1 or named[-1] in PART_FIELDS))


def _dataset_records(source: str, dataset: Any, fields: Collection[str] | None) -> Iterator[Record]:
    columns = [name for name in dataset.column_names if fields is None or name in fields]
    for number, record in enumerate(dataset.select_columns(columns) if columns else (), start=1):
        yield f"{source}, row {number}", record


def _saved_dataset(path: Path) -> Any:
    import pyarrow

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
            f"or name a file"
        )
    import datasets

    return datasets
