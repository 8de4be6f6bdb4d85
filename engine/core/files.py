"""Writing so that a reader finds the old or the new and never a half: sync to disk, and folders that appear whole. What cannot
be written is a StorageError that says so, and leaves nothing behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from engine.core.errors import ConfigError, StorageError

# What the system says where a file cannot be written and a retry would find the same, and what helps.
UNWRITABLE = {
    errno.ENOSPC: ("the disk is full", "free some"),
    errno.EDQUOT: ("the quota is used up", "free some, or ask for more"),
    errno.EFBIG: ("a file may not be so large here", "raise the limit (ulimit -f)"),
    errno.EROFS: ("the file system is read-only", "mount it for writing"),
    errno.EACCES: ("there is no permission", "change the permissions"),
    errno.EPERM: ("it is not permitted", "change the permissions"),
}
_CODE_IN_TEXT = re.compile(r"\(os error (\d+)\)")  # as Rust's libraries, safetensors among them, tell it


def unwritable(error: BaseException) -> int | None:
    """The code of UNWRITABLE that an error tells, by its number or in its text; None where it is about something else."""
    code = error.errno if isinstance(error, OSError) else None
    if code is None and (told := _CODE_IN_TEXT.search(str(error))) is not None:
        code = int(told[1])
    return code if code in UNWRITABLE else None


def storage_error(folder: Path, code: int, needed_bytes: int | None = None) -> StorageError:
    """What an error of UNWRITABLE means for what was to be written into `folder`. `needed_bytes`: so many were known to be
    needed at least."""
    why, fix = UNWRITABLE[code]
    whole = folder.absolute()
    there = next(place for place in (whole, *whole.parents) if place.exists())
    needed = f"{needed_bytes:,} bytes needed and " if needed_bytes else ""
    free = shutil.disk_usage(there).free
    return StorageError(f"{folder} cannot be written: {why}, {needed}{free:,} free at {there}: {fix}, or name another folder")


@contextmanager
def storing(folder: Path, needed_bytes: Callable[[], int] | None = None) -> Iterator[None]:
    """A block that writes into `folder`: StorageError where that cannot be written, any other error as it is. `needed_bytes`:
    asked then."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = unwritable(error)
        if code is None:
            raise
        raise storage_error(folder, code, needed_bytes() if needed_bytes is not None else None) from error


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
    next attempt replaces it; but StorageError where the folder cannot be written, and then nothing stays."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with storing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            part.unlink(missing_ok=True)
            yield part
            if durable:
                sync(part)
            os.replace(part, path)
            if durable:
                sync(path.parent)
    except StorageError:
        with suppress(OSError):
            part.unlink()
        raise


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
def writing(folder: Path, patience_seconds: float = 120.0, *, waits: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Keeps the records in `folder` to this process while the block runs: those of a command outlive it by seconds where it is
    killed, and would go on writing. Where another process has them `waits` is called, and ConfigError comes after
    `patience_seconds`."""
    deadline = time.monotonic() + patience_seconds
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".records.lock").open("w") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"run.directory must be written by one run at a time; found a process of a killed command that still "
                        f"writes to {folder} after {patience_seconds:g} s: end it, or name another directory"
                    ) from error
            if not told:
                waits()
                told = True
            time.sleep(0.1)
        yield


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A folder to fill beside `final`; when the block ends without an error it is synced and takes `final`'s place.
    StorageError where it cannot be written. After an error nothing of it stays."""
    staging, former = (final.with_name(f".{final.name}.{role}") for role in ("staging", "former"))
    try:
        with storing(final.parent):
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
    except BaseException:  # an interrupt too
        shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(former, ignore_errors=True)
