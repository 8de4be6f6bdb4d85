"""What a run's processes say beside its records. Each writes a log of its own, under its name, in one folder; what our loggers
warn of also goes, before anything else can happen, to a small file beside it, from which the command collects it into
warnings.jsonl and shows it; so does what a process tells of its work (telling.py). It decides nothing about what is worth a
warning.

The folder is on a file system that all nodes share, and every file has one writer.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.core.jsonl import JsonlLedger, parsed, read_lines, require_names
from engine.observe.telling import LOGGER, TOLD, TellingHandler

LOGS = "logs"  # the folder, in the run's directory
WARNINGS = "warnings.jsonl"  # in the run's directory; no resume cuts it back
SUFFIX = ".warnings.jsonl"  # of a process's own, until they are collected
FORM = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


def told(count: int) -> bool:
    """Whether an equal warning is told again when it comes for the `count`-th time: 1, 10, 100 and so on."""
    return count == 10 ** (len(str(count)) - 1)


@dataclass(frozen=True, slots=True)
class Journal:
    """Where one process writes; made by the command, opened in the process."""

    folder: Path
    process: str  # as errors call it: "trainer rank 1"
    verbose: bool  # the process's own output is shown, so it stays where it is

    @property
    def stem(self) -> Path:
        """The path of its files without their endings."""
        return self.folder / self.process.removeprefix("the ").replace(" ", "_")

    @property
    def log(self) -> Path:
        """Its log: our loggers from INFO on, the traceback of what failed, and unless verbose all that libraries print."""
        return self.stem.with_suffix(".log")

    def open(self) -> None:
        """Has this process write there from now on; once a process, for it changes logging, stdout and stderr for good."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.log.open("a", encoding="utf-8")
        warnings = WarningsHandler(self.stem.with_suffix(SUFFIX), self.process)
        handlers: list[logging.Handler] = [warnings, logging.StreamHandler(log)]
        if not self.process.startswith("trainer rank ") or self.process == "trainer rank 0":
            handlers.append(TellingHandler(self.stem.with_suffix(TOLD), self.process))
        if self.verbose:
            handlers.append(logging.StreamHandler())
        else:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
        logger = logging.getLogger(LOGGER)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        for handler in handlers:
            handler.setFormatter(FORM)
            logger.addHandler(handler)
        logger.info("%s: process %d on %s", self.process, os.getpid(), socket.gethostname())


class WarningsHandler(logging.Handler):
    """Writes warnings to a process's own file, equal ones as often as `told` says."""

    def __init__(self, path: Path, process: str) -> None:
        super().__init__(logging.WARNING)
        self._ledger, self._process = JsonlLedger(path), process
        self._counts: dict[str, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Writes it down; one that cannot be written is told on stderr and stops nothing, as logging has it."""
        text = " ".join(record.getMessage().split())
        count = self._counts[text] = self._counts.get(text, 0) + 1
        if told(count):
            row = {"unix_seconds": record.created, "process": self._process, "text": text, "count": count}
            try:
                self._ledger.append([row])
            except OSError:
                self.handleError(record)


@contextmanager
def traced(what: str) -> Iterator[None]:
    """Puts the traceback of what the block raises into the process's log; whoever waits for the block gets the error alone."""
    try:
        yield
    except Exception:
        logging.getLogger(LOGGER).info("%s raised", what, exc_info=True)
        raise


class Warnings:
    """The command's side: collects what the processes of `folder` warned of into `ledger`, or nowhere, and counts it.

    One at a time for a folder. What a command that was killed did not collect, the next one does.
    """

    def __init__(self, folder: Path, ledger: Path | None) -> None:
        self._folder, self._ledger = folder, ledger
        self._read: dict[Path, int] = {}  # bytes of each process's file
        self._counts: dict[tuple[str, str], int] = {}  # by process and text, over all attempts
        self._before: dict[tuple[str, str], int] = {}  # the same, without the process that runs
        self._written: dict[tuple[str, str], int] = {}  # what the ledger says of them
        if ledger is not None:
            for row in read_warnings(ledger):
                self._counts[row["process"], row["text"]] = self._written[row["process"], row["text"]] = row["count"]
        before = [row for path in self._files() for row in self._rows(path)]
        self._left = [row for row in before if (row["process"], row["text"]) not in self._counts]

    def fresh(self) -> list[dict[str, Any]]:
        """{"kind": "warning", "where", "text", "count"} of what came since the last call and is to be told."""
        rows = [*self._left, *(row for path in self._files() for row in self._rows(path))]
        self._left = []
        events = []
        for row in rows:
            key = row["process"], row["text"]
            if row["count"] == 1:  # a process that was started anew counts from 1
                self._before[key] = self._counts.get(key, 0)
            count = self._counts[key] = self._before.get(key, 0) + row["count"]
            if key not in self._written or len(str(count)) > len(str(self._written[key])):
                self._write(key, row["unix_seconds"])
                events.append({"kind": "warning", "where": key[0], "text": key[1], "count": count})
        return events

    def close(self) -> list[dict[str, Any]]:
        """The last of them, once the processes have ended, whose own files then go."""
        events = self.fresh()
        for key, count in self._counts.items():
            if self._written.get(key) != count:
                self._write(key, time.time())
        for path in self._files():
            path.unlink()
        return events

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob(f"*{SUFFIX}"))

    def _rows(self, path: Path) -> Iterator[dict[str, Any]]:
        for line in read_lines(path, self._read.get(path, 0)):
            self._read[path] = line.end
            yield parsed(line.where, line.data)

    def _write(self, key: tuple[str, str], unix_seconds: float) -> None:
        self._written[key] = self._counts[key]
        if self._ledger is not None:
            ledger = JsonlLedger(self._ledger)
            ledger.append([{"unix_seconds": unix_seconds, "process": key[0], "text": key[1], "count": self._counts[key]}])
            ledger.close()


def read_warnings(path: Path) -> list[dict[str, Any]]:
    """The warnings of a run, each once with its highest count, at least as often as it came; in the order they first came."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in read_lines(path) if path.exists() else ():
        row = parsed(line.where, line.data)
        require_names(row, ("process", "text", "count"), line)
        found.setdefault((row["process"], row["text"]), row)["count"] = row["count"]
    return list(found.values())


def sentence(event: dict[str, Any]) -> str:
    """A warning as people read it."""
    often = f" ({event['count']} times so far)" if event["count"] > 1 else ""
    return f"warning, {event['where']}: {event['text']}{often}"
