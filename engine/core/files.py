"""Writing so that a reader finds the old or the new and never a half: sync to disk, and folders that appear whole."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.core.errors import ConfigError


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """A new file PATH.part to write, which takes the place of `path` when the block ends without an error, so that a reader
    finds the old one or the new and never a half; `durable`: also after a power cut. After an error it stays as it is, and the
    next attempt replaces it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    yield part
    if durable:
        sync(part)
    os.replace(part, path)
    if durable:
        sync(path.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps `folder` (made where missing) to this process while the block runs; ConfigError when another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"run.directory must belong to one run at a time; found another at work in {folder}: wait for it, or name "
                f"another directory"
            ) from error
        yield


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A folder to fill beside `final`; when the block ends without an error it is synced and takes `final`'s place."""
    staging, former = (final.with_name(f".{final.name}.{role}") for role in ("staging", "former"))
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    for file in staging.iterdir():
        sync(file)
    sync(staging)
    shutil.rmtree(former, ignore_errors=True)
    if final.exists():
        final.rename(former)
    staging.rename(final)
    sync(final.parent)
    shutil.rmtree(former, ignore_errors=True)
