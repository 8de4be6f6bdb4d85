"""A disk that fails at the n-th thing that is done to it, for tests: every operation of this process that changes a file or a
folder is counted, and one of them is the one at which the process is killed, the power is cut, or the disk is full.

Killed: the operation does not happen (a write happens by half), and every later one raises too, so that no cleaning up runs
that a killed process could not have run. Power cut: what was not synced is then taken back too, the bytes of files and names in
folders; that is the other extreme of what a disk may have kept. Full: it and all later ones that need room fail.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

Kind = Literal["kill", "power", "full"]
FREEING = {"unlink", "rmdir"}  # what a full disk still does; rename needs no room for a file
ROOMLESS = FREEING | {"rename", "replace", "fsync"}


class Killed(BaseException):
    """The process is gone from here on."""


class _Names:
    """What can be taken back of a folder's names until the folder is synced."""

    def __init__(self) -> None:
        self.undo: list[tuple[str, Callable[[], None]]] = []  # (folder, how), the oldest first
        self.kept = tempfile.mkdtemp(prefix="kept-")  # contents of what was replaced or removed

    def keep(self, path: str) -> str:
        held = tempfile.mktemp(dir=self.kept)
        real["link"](path, held)
        return held


real: dict[str, Any] = {
    name: getattr(os, name) for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "link", "open")
}
REMOVE, OPEN, SENDFILE = os.remove, io.open, getattr(os, "sendfile", None)


class Disk:
    """Counts operations below `root` and fails at one of them."""

    def __init__(self, root: Path, at: int | None = None, kind: Kind = "kill") -> None:
        self._root, self._at, self.kind = os.path.realpath(root), at, kind
        self._lock = threading.RLock()
        self.log: list[str] = []  # every operation, by its name and the file's
        self.dead = False
        self._names, self._synced = _Names(), dict[str, int]()  # bytes on disk of files opened for writing, by path
        self._folders: dict[int, str] = {}

    def _counts(self, path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(os.fspath(path)).startswith(self._root)

    def step(self, operation: str, path: Any) -> bool:
        """Counts one; whether it is the one that fails here. Raises where the process is gone already or the disk is full."""
        with self._lock:
            if self.dead:
                raise Killed
            self.log.append(f"{operation} {os.path.basename(str(path))}")
            number = len(self.log) - 1
            if self._at is None or number < self._at:
                return False
            if self.kind == "full":
                if (operation in ROOMLESS and number > self._at) or operation in FREEING:
                    return False
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            self.dead = True
            return True

    def _undoable(self, path: str, how: Callable[[], None]) -> None:
        self._names.undo.append((os.path.dirname(os.path.abspath(path)), how))

    def mkdir(self, path: Any, *arguments: Any, **more: Any) -> None:
        if self._counts(path) and not os.path.isdir(path):
            if self.step("mkdir", path):
                raise Killed
            real["mkdir"](path, *arguments, **more)
            self._undoable(path, lambda: shutil.rmtree(path, ignore_errors=True))
            return
        real["mkdir"](path, *arguments, **more)

    def _move(self, name: str, source: Any, target: Any) -> None:
        if not self._counts(source):
            real[name](source, target)
            return
        if self.step(name, target):
            raise Killed
        source, target = os.path.abspath(source), os.path.abspath(target)
        held = self._names.keep(target) if os.path.isfile(target) else None
        real[name](source, target)
        for table in (self._synced,):
            for path in [path for path in table if path == source or path.startswith(source + os.sep)]:
                table[target + path[len(source) :]] = table.pop(path)

        def back() -> None:
            real["rename"](target, source)
            if held is not None:
                real["link"](held, target)
            for path in [path for path in self._synced if path == target or path.startswith(target + os.sep)]:
                self._synced[source + path[len(target) :]] = self._synced.pop(path)

        self._undoable(target, back)

    def rename(self, source: Any, target: Any, **_: Any) -> None:
        self._move("rename", source, target)

    def replace(self, source: Any, target: Any, **_: Any) -> None:
        self._move("replace", source, target)

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        whole = os.path.join(self._folders.get(dir_fd, ""), path) if dir_fd is not None else path
        if not self._counts(whole) or not os.path.exists(whole):
            real["unlink"](path, dir_fd=dir_fd)
            return
        if self.step("unlink", whole):
            raise Killed
        held = self._names.keep(whole)
        real["unlink"](path, dir_fd=dir_fd)
        self._undoable(whole, lambda: real["link"](held, whole))

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        whole = os.path.join(self._folders.get(dir_fd, ""), path) if dir_fd is not None else path
        if self._counts(whole):
            if self.step("rmdir", whole):
                raise Killed
            real["rmdir"](path, dir_fd=dir_fd)
            self._undoable(whole, lambda: os.makedirs(whole, exist_ok=True))
            return
        real["rmdir"](path, dir_fd=dir_fd)

    def open_descriptor(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        whole = os.path.join(self._folders.get(dir_fd, ""), path) if dir_fd is not None else path
        found: int = real["open"](path, flags, mode, dir_fd=dir_fd)
        if self._counts(whole):
            self._folders[found] = os.path.abspath(whole)
        return found

    def fsync(self, descriptor: int) -> None:
        path = os.path.realpath(f"/proc/self/fd/{descriptor}")
        if self._counts(path):
            if self.step("fsync", path):
                raise Killed
            if os.path.isdir(path):
                self._names.undo = [(folder, how) for folder, how in self._names.undo if folder != path]
            else:
                self._synced[path] = os.path.getsize(path)
            return
        real["fsync"](descriptor)

    def open(self, file: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        writes = set(mode) & set("wax+")
        if not writes or not self._counts(file):
            return OPEN(file, mode, *arguments, **more)
        path = os.path.abspath(os.fspath(file))
        is_new = not os.path.exists(path)
        if self.step("open", path):
            raise Killed
        opened = OPEN(file, mode, *arguments, **more)
        if is_new:
            self._undoable(path, lambda: REMOVE(path))
        self._synced.setdefault(path, 0 if "w" in mode or is_new else os.path.getsize(path))
        return _File(self, opened, path)

    def cut(self) -> None:
        """Takes back what was not synced; outside of `failing`."""
        for path, size in self._synced.items():
            if os.path.isfile(path) and os.path.getsize(path) > size:
                os.truncate(path, size)
        for _, how in reversed(self._names.undo):
            try:
                how()
            except OSError:
                continue  # of something in a folder that is gone by now
        self._names.undo = []

    def close(self) -> None:
        """Forgets what was kept."""
        shutil.rmtree(self._names.kept, ignore_errors=True)


class _File:
    """A file that is written through a Disk: nothing waits in a buffer of the process."""

    def __init__(self, disk: Disk, opened: Any, path: str) -> None:
        self._disk, self._opened, self._path = disk, opened, path

    def write(self, data: Any) -> Any:
        if self._disk.step("write", self._path):
            half = data[: len(data) // 2]
            self._opened.write(half)
            self._opened.flush()
            raise Killed
        written = self._opened.write(data)
        self._opened.flush()
        return written

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)


@contextmanager
def failing(disk: Disk) -> Iterator[Disk]:
    """While entered, whatever this process does to files below the disk's root goes through it."""
    ours = {"mkdir": disk.mkdir, "rename": disk.rename, "replace": disk.replace, "unlink": disk.unlink, "remove": disk.unlink}
    ours |= {"rmdir": disk.rmdir, "fsync": disk.fsync, "open": disk.open_descriptor}
    before = {name: getattr(os, name) for name in ours}
    for name, function in ours.items():
        setattr(os, name, function)
    io.open = builtins.open = disk.open  # type: ignore[assignment]
    if SENDFILE is not None:
        del os.sendfile  # so that a copy is read and written
    try:
        yield disk
    finally:
        for name, function in before.items():
            setattr(os, name, function)
        io.open = builtins.open = OPEN
        if SENDFILE is not None:
            os.sendfile = SENDFILE  # type: ignore[assignment]
