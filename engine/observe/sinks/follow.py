"""The process of one sink: reads what the run appends to its records and tells the sink, until the command says on standard
input that the run has ended, or vanishes. What was told is noted in the run's directory, so that the next process of the same
run goes on there. It is started by followers.py, writes no record of the run, and nothing waits for it but the command's end.

The records are the queue: they are on disk anyway, so a sink that is late or unreachable costs the run neither time nor memory,
and gets all of it later.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from engine.observe.journal import LOGS, Journal
from engine.observe.sinks.base import End, Followed, Sink
from engine.observe.sinks.redact import redacted
from engine.observe.sinks.registry import SINKS, label
from engine.observe.summary import RESTARTS
from engine.observe.tail import Tail
from engine.observe.writing import write_json

FOLDER = "sinks"  # in the run's directory, and of logs/
# metrics first: whatever belongs to a step that is on record then is on record in the others, as a sink wants it in order
STREAMS = {
    "metrics": "metrics.jsonl",
    "evaluations": "evaluations.jsonl",
    "samples": "samples.jsonl",
    "guard": "guard.jsonl",
    "restarts": RESTARTS,
}
ORDER = ("evaluations", "samples", "metrics", "guard", "restarts")  # of one step
POLL_SECONDS = 1.0
MOST_ROWS = 512  # of a stream in one turn
CHUNK = 8  # rows of metrics told at once, and noted as told
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 300.0  # seconds between attempts
STOP_SECONDS = 20.0  # after the end of a run that has not finished, to tell what is left
MOST_LETTERS = 300  # of an error that are told
PATIENCE_SECONDS = 120.0  # of one call, before it is said that the sink does not answer

log = logging.getLogger("engine.observe.sinks")


class Follower:
    """What one sink was told of one run. `notes`: the file that says so."""

    def __init__(self, sink: Sink, run: Followed, notes: Path) -> None:
        self._sink, self._run, self._notes = sink, run, notes
        told = json.loads(notes.read_text("utf-8")) if notes.exists() else {"known": None, "told": {}}
        self._known: str | None = told["known"]
        self._opened = False
        # of each stream the last step told, and how many rows of it; of restarts, which never are cut, how many rows at all
        self._told: dict[str, list[int]] = {name: told["told"].get(name, [-1, 0]) for name in STREAMS}
        self._tails = {
            name: Tail(run.directory / file)
            if name == "restarts"
            else Tail.of_step(run.directory / file, max(self._told[name][0], 0))
            for name, file in STREAMS.items()
        }
        self._places = {name: [-1, 0] for name in STREAMS}  # step of the last row read, and how many rows of it
        self._waiting: list[tuple[str, list[int], dict[str, Any]]] = []  # stream, place and row of what is read and not told

    def turn(self) -> bool:
        """Tells the sink what has come; whether there may be more. Raises what the sink does; then nothing of it is lost."""
        if not self._opened:
            self._open()
        if not self._waiting:
            self._read()
        more = bool(self._waiting)
        while self._waiting:
            stream, rows = self._next()
            self._tell(stream, [row for _, _, row in rows])
            self._told[stream] = rows[-1][1]
            del self._waiting[: len(rows)]
            if stream == "metrics":
                self._note()
        if more:
            self._sink.flush()
            self._note()
        return more

    def close(self, end: End) -> None:
        """Tells the sink the end, once all else is told."""
        if self._opened:
            with _patience("to be closed"):
                self._sink.close(end)

    def _open(self) -> None:
        known = self._known
        run = Followed(self._run.directory, self._run.name, self._run.options, self._run.metrics, known)
        with _patience("to be opened"):
            self._known = self._sink.open(run)
        self._opened = True
        self._note()

    def _read(self) -> None:
        """Takes what was added to the records, in the order of steps, without what was told before the run did it again."""
        found = []
        for stream, tail in self._tails.items():
            withdrawn, rows = tail.fresh(MOST_ROWS)
            if withdrawn:  # ledgers are cut between two steps
                self._places[stream] = [-1, 0]
            for row in rows:
                place = self._places[stream]
                number = place[1] + 1 if stream == "restarts" or row["step"] == place[0] else 1
                place = self._places[stream] = [0 if stream == "restarts" else row["step"], number]
                if place > self._told[stream]:
                    found.append((stream, place, row))
        self._waiting = sorted(found, key=lambda item: (item[2]["step"], ORDER.index(item[0])))

    def _next(self) -> tuple[str, list[tuple[str, list[int], dict[str, Any]]]]:
        """What is told in one call: some rows of metrics, the answers of an evaluation, or one row."""
        stream, _, first = self._waiting[0]
        most = {"metrics": CHUNK, "samples": MOST_ROWS}.get(stream, 1)
        rows = []
        for item in self._waiting[:most]:
            if item[0] != stream or (stream == "samples" and item[2]["step"] != first["step"]):
                break
            rows.append(item)
        return stream, rows

    def _tell(self, stream: str, rows: list[dict[str, Any]]) -> None:
        with _patience(f"to take {STREAMS[stream]}"):
            if stream == "metrics":
                self._sink.metrics(rows)
            elif stream == "samples":
                self._sink.samples(rows[0]["step"], rows)
            elif stream == "evaluations":
                self._sink.evaluation({name: value for name, value in rows[0].items() if name != "records"})
            else:
                kind = "guard" if stream == "guard" else "restart"
                self._sink.finding({"kind": kind, "step": rows[0]["step"], "text": rows[0]["text"]})

    def _note(self) -> None:
        write_json(self._notes, {"known": self._known, "told": self._told})


@contextmanager
def _patience(what: str) -> Iterator[None]:
    """Says so where a call to the sink takes long."""
    timer = threading.Timer(PATIENCE_SECONDS, log.warning, (f"has been asked {what} for {PATIENCE_SECONDS:.0f} s",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def follow(follower: Follower, sink: Sink, wait: Callable[[float], End | None], finish_seconds: float) -> bool:
    """Tells until the run has ended and all is told, or for `finish_seconds` more; whether the sink knows all of it.
    `wait(seconds)`: waits so long at most for the end and returns it."""
    pause, end, last = FIRST_PAUSE, None, time.monotonic()
    told: dict[type[Exception], str] = {}  # the first words of each kind: later ones differ in addresses, and are counted
    while True:
        try:
            if not follower.turn() and end is not None:
                follower.close(end)
                return True
            rest, pause = (0.0 if end is not None else POLL_SECONDS), FIRST_PAUSE
        except sink.failures as error:
            log.warning("%s", told.setdefault(type(error), _sentence(error)))
            rest, pause = pause, min(2 * pause, LONGEST_PAUSE)
        if end is None:
            end, last = wait(rest), time.monotonic()
        elif rest:
            seconds = finish_seconds if end.state == "finished" else min(STOP_SECONDS, finish_seconds)
            if time.monotonic() + rest > last + seconds:
                return False
            time.sleep(rest)


def _sentence(error: Exception) -> str:
    words = redacted(" ".join(str(error).split()))
    return f"cannot be told of the run, which goes on; it is tried again ({type(error).__name__}: {words[:MOST_LETTERS]})"


def _ends(descriptor: int) -> Callable[[float], End | None]:
    """Waits for what the command says on `descriptor`."""
    held = bytearray()

    def wait(seconds: float) -> End | None:
        if not select.select([descriptor], [], [], seconds)[0]:
            return None
        data = os.read(descriptor, 1 << 16)
        held.extend(data)
        if not data:
            return End("lost", "the command ended without a word")
        return End(**json.loads(held)) if held.endswith(b"\n") else None

    return wait


def _first_line(descriptor: int) -> dict[str, Any]:
    held = bytearray()
    while not held.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte:
            sys.exit(1)  # the command has gone already
        held += byte
    document: dict[str, Any] = json.loads(held)
    return document


def _tell_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redacted("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, flush=True)


def main(document: Mapping[str, Any], descriptor: int) -> None:
    """Follows the run that `document` describes; its end is read from `descriptor`."""
    sys.excepthook = _tell_redacted
    directory, name = Path(document["directory"]), document["sink"]
    Journal(directory / LOGS / FOLDER, f"sink {label(name)}", document["verbose"]).open()
    options = {key: redacted(str(value)) if isinstance(value, str) else value for key, value in document["options"].items()}
    run = Followed(directory, document["name"], options, document["metrics"], None)
    sink = SINKS.load(name)()
    notes = directory / FOLDER / f"{label(name)}.json"
    notes.parent.mkdir(parents=True, exist_ok=True)
    with notes.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # that of a command which was killed may still be at work
        follower = Follower(sink, run, notes)
        if not follow(follower, sink, _ends(descriptor), document["finish_seconds"]):
            log.warning("was not told all of the run in time; semion train --resume auto sends the rest")


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the command decides when this process ends
        signal.signal(number, signal.SIG_IGN)
    main(_first_line(0), 0)
