"""What the processes of a run tell the command while they work: notes, evaluations, and activities, which are what takes a
while (reading weights, an evaluation, a checkpoint). Each process writes a line, before anything else happens, to a small file
beside its log; the command reads these files and shows the lines as they come. It shows nothing itself and changes no record.

Of the trainer ranks rank 0 speaks. Every line has the time of day, so that a person sees where a slow start was spent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.core.errors import StorageError
from engine.core.jsonl import JsonlLedger, parsed, read_lines

LOGGER = "engine"  # the parent of all our loggers
TOLD = ".told.jsonl"  # the ending of a process's file, until the command has read it and goes
AGAIN_SECONDS = 2.0  # the shortest time between two words on how far an activity has come
COMMAND = "the command"
BYTES = "bytes"  # the unit that is shown as MiB or GiB

State = Literal["begins", "goes on", "done"]
Event = dict[str, Any]  # {"kind", ...}, as processes send it

# What an activity is called while it lasts, and when it is done.
WORDS: dict[str, tuple[str, str]] = {
    "imports": ("loading libraries", "libraries are loaded"),
    "preflight": ("checking the run", "the run is checked"),
    "ray": ("starting Ray", "Ray is up"),
    "processes": ("starting the trainer's processes", "the trainer's first process is up"),
    "ranks": ("waiting for all {total} trainer ranks", "all {total} trainer ranks are up"),
    "model": ("building the model", "the model is built"),
    "weights": ("reading the weights", "the weights are read"),
    "resume": ("reading the checkpoint", "the checkpoint is read"),
    "tokenizer": ("reading the tokenizer", "the tokenizer is read"),
    "prompts": ("reading the prompts{about}", "the prompts{about} are read"),
    "engine": ("{where} is loading", "{where} is up"),
    "engines": ("waiting for the engines", "all engines are up"),
    "connect": ("connecting trainer and engines", "trainer and engines are connected"),
    "evaluation": ("evaluating{about}", "evaluated{about}"),
    "last sync": ("sending the last weights to the engines", "the last weights are sent to the engines"),
    "checkpoint": ("saving a checkpoint{about}", "a checkpoint{about} is saved"),
    "export": ("writing the model", "the model is written"),
    "end": ("ending the processes", "the processes have ended"),
}
COUNTED_IN_WORDS = ("ranks", "engine")  # whose total the words have


@dataclass(frozen=True, slots=True)
class Activity:
    """Something that takes a while begins, goes on, or is done. `what` is one of `WORDS`."""

    where: str  # the process, as errors call it, or "the command"
    what: str
    state: State
    about: str = ""  # of what: the step of a checkpoint, the set of an evaluation
    seconds: float = 0.0  # since it began
    done: int | None = None  # of `total` units, where they can be counted
    total: int | None = None
    unit: str = ""
    unix_seconds: float = field(default=0.0, compare=False)

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> Activity:
        """As processes write it down."""
        return cls(**{name: event[name] for name in cls.__slots__})

    def __str__(self) -> str:
        """As people read it."""
        under_way, finished = WORDS[self.what]
        where = f"{self.where} (of {self.total})" if self.what == "engine" and self.total else self.where
        about = f" {self.about}" if self.about else ""
        words = (finished if self.state == "done" else under_way).format(where=where, about=about, total=self.total)
        return f"{words}{self._amount()}, {duration(self.seconds)}"

    def _amount(self) -> str:
        """How much of it is done; how much there was, once it is."""
        if self.total is None or self.what in COUNTED_IN_WORDS:
            return ""
        if self.unit == BYTES:
            size, unit = (1 << 30, "GiB") if self.total >= 1 << 28 else (1 << 20, "MiB")
            done, total, unit = f"{(self.done or 0) / size:.1f}", f"{self.total / size:.1f}", f" {unit}"
        else:
            done, total, unit = str(self.done or 0), str(self.total), f" {self.unit}".rstrip()
        return f": {total}{unit}" if self.state == "done" else f": {done} of {total}{unit}"


def duration(seconds: float) -> str:
    """Tenths of a second below ten of them, whole ones below two minutes, then minutes."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


class Doing:
    """An activity as it goes on in this process; what it says are events of kind "activity"."""

    def __init__(self, what: str, about: str = "", *, total: int | None = None, unit: str = "", where: str = COMMAND) -> None:
        assert what in WORDS, what
        self._what, self._about, self._total, self._unit, self._where = what, about, total, unit, where
        self._began = self._said = time.monotonic()
        self._done: int | None = None if total is None else 0

    def event(self, state: State) -> dict[str, Any]:
        """Where it stands now."""
        return {
            "kind": "activity",
            "unix_seconds": time.time(),
            "where": self._where,
            "what": self._what,
            "state": state,
            "about": self._about,
            "seconds": time.monotonic() - self._began,
            "done": self._done,
            "total": self._total,
            "unit": self._unit,
        }

    def at(self, done: int) -> None:
        """So much of `total` is done; told at most every two seconds."""
        self._done = done
        if time.monotonic() - self._said >= AGAIN_SECONDS:
            self._said = time.monotonic()
            tell(self.event("goes on"))

    def more(self, units: int) -> None:
        """So much more of `total` is done."""
        self.at((self._done or 0) + units)


def tell(event: Event) -> None:
    """Hands an event ({"kind", ...}) to whoever has started this process; nobody hears it in a process without a journal."""
    told: Event = {"unix_seconds": time.time()} | event
    text = str(Activity.of({"where": COMMAND} | told)) if event["kind"] == "activity" else event.get("text", event["kind"])
    logging.getLogger(LOGGER).info("%s", text, extra={"told": told})


@contextmanager
def activity(what: str, about: str = "", *, total: int | None = None, unit: str = "") -> Iterator[Doing]:
    """Tells that the block begins and, unless it raises, that it is done."""
    doing = Doing(what, about, total=total, unit=unit)
    tell(doing.event("begins"))
    yield doing
    tell(doing.event("done"))


class TellingHandler(logging.Handler):
    """Writes what this process tells to its own file."""

    def __init__(self, path: Path, process: str) -> None:
        super().__init__(logging.INFO)
        self._ledger, self._process = JsonlLedger(path), process

    def emit(self, record: logging.LogRecord) -> None:
        """Writes it down; what cannot be written is told on stderr and stops nothing, as logging has it."""
        told: dict[str, Any] | None = getattr(record, "told", None)
        if told is None:
            return
        where = {"where": self._process} if told["kind"] == "activity" else {}
        try:
            self._ledger.append([told | where])
        except (OSError, StorageError):
            self.handleError(record)


class Told:
    """The command's side: what the processes of a folder tell, in the order of its times. One at a time for a folder; what a
    command that was killed did not read is old and goes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}  # bytes of each process's file
        self._remove()

    def fresh(self) -> list[dict[str, Any]]:
        """What came since the last call."""
        rows = []
        for path in self._folder.glob(f"*{TOLD}"):
            for line in read_lines(path, self._read.get(path, 0)):
                self._read[path] = line.end
                rows.append(parsed(line.where, line.data))
        return sorted(rows, key=lambda row: row["unix_seconds"])

    def close(self) -> None:
        """Once the processes have ended."""
        self._remove()

    def _remove(self) -> None:
        for path in self._folder.glob(f"*{TOLD}"):
            path.unlink()


def in_order(fresh: Callable[[], Iterable[Event]], events: Iterable[Event | None]) -> Iterator[Event]:
    """`events`, with what is told beside them (`fresh`) in its place: before an event that happened later. None among the
    events: there is none for now, so that nothing is to be waited for."""
    held: list[Event] = []
    for event in events:
        held += fresh()
        until = float("inf") if event is None else event.get("unix_seconds", float("inf"))
        yield from (told for told in held if told.get("unix_seconds", 0.0) <= until)
        held = [told for told in held if told.get("unix_seconds", 0.0) > until]
        if event is not None:
            yield event
    yield from held
