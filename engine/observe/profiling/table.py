"""Turns what profilers recorded of a run's processes into a table by phase: a Chrome trace of torch's profiler, or a report of
Nsight Systems exported to SQLite. It reads files and nothing else, and knows ranges by their prefix (phases.py).

Times are integers in nanoseconds until the table. A trace is read whole into memory.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from engine.core.errors import DataError
from engine.observe.profiling.phases import PREFIX, Phase

SQLITE_MAGIC = b"SQLite format 3\0"
SLACK = 2000  # ns by which a range may outlast the one around it: a trace rounds its times
PUSH_POP = 59  # NVTX_EVENTS.eventType of nsys
PROCESS_DIVISOR = 1 << 24  # globalTid and globalPid of nsys: the process's part, with and without a thread's below it
KERNELS = ("CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_GRAPH_TRACE")  # the second: whole CUDA graphs, as nsys has them
LAUNCHES = "CUPTI_ACTIVITY_KIND_RUNTIME"


@dataclass(frozen=True, slots=True)
class Span:
    """A range as it was recorded, [ns]."""

    phase: str
    thread: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel: when and by which thread it was launched, and how long it ran, [ns]."""

    thread: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Recording:
    """What a file holds of a process."""

    spans: list[Span]
    launches: list[Launch] | None  # None where no GPU was recorded


@dataclass(frozen=True, slots=True)
class PhaseRow:
    """All occurrences of a phase in a window. An occurrence inside another of its own phase adds no seconds."""

    phase: str
    count: int
    seconds: float
    share: float  # of the window
    self_seconds: float  # outside any phase within it
    median_seconds: float  # of one occurrence
    gpu_seconds: float | None  # of the kernels launched inside it; kernels may overlap. None where no GPU was recorded


@dataclass(frozen=True, slots=True)
class ProcessProfile:
    """The table of one process, in the order of Phase."""

    process: str
    window_seconds: float
    rows: tuple[PhaseRow, ...]


@dataclass(slots=True)
class _Node:
    """A range with what lies directly inside it."""

    span: Span
    end: int
    around: _Node | None
    inside: int = 0  # ns in ranges directly within
    gpu: int = 0  # ns of kernels launched within


@dataclass(slots=True)
class _Sums:
    lengths: list[int] = field(default_factory=list)
    total: int = 0
    own: int = 0
    gpu: int = 0


def read_profile(path: Path) -> ProcessProfile:
    """The table of one file, which gives the process its name. DataError for what is no such file, or is damaged."""
    return tabulate(path.stem, read_recording(path), path)


def read_recording(path: Path) -> Recording:
    """Our ranges and all kernels of a file of either kind. DataError as `read_profile`."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(SQLITE_MAGIC))
        return _read_sqlite(path) if magic == SQLITE_MAGIC else _read_trace(path)
    except OSError as error:
        raise DataError(f"profile {path} cannot be read: {error.strerror}; check the path") from error
    except (sqlite3.Error, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise DataError(
            f"profile {path} must be a Chrome trace of torch's profiler, or a report of nsys exported with --type sqlite; "
            f"found {type(error).__name__}: {why}: profile again, or name another file"
        ) from error


def tabulate(process: str, recording: Recording, path: Path) -> ProcessProfile:
    """The table of what was recorded. DataError where there is not exactly one window, or ranges do not nest."""
    windows = [span for span in recording.spans if span.phase == Phase.WINDOW]
    if len(windows) != 1:
        raise DataError(
            f"profile {path} must hold one range {PREFIX + Phase.WINDOW!r}; found {len(windows)}: name a file of a run with "
            f"profile.tool set"
        )
    (window,) = windows
    by_thread: dict[int, list[Span]] = defaultdict(list)
    for span in recording.spans:
        if window.start - SLACK <= span.start and span.end <= window.end + SLACK:
            by_thread[span.thread].append(span)
    nodes = {thread: nested(spans, path) for thread, spans in by_thread.items()}
    for launch in recording.launches or ():
        # A backward's kernels are launched by a thread of autograd's, which has no phases: they are the main thread's.
        _credit(nodes.get(launch.thread, nodes[window.thread]), launch)
    sums: dict[str, _Sums] = defaultdict(_Sums)
    for node in (node for own in nodes.values() for node in own):
        found, length = sums[node.span.phase], node.end - node.span.start
        found.lengths.append(length)
        found.own += length - node.inside
        if not any(outer.span.phase == node.span.phase for outer in _around(node)):
            found.total += length
            found.gpu += node.gpu
    whole = max(1, window.end - window.start)
    order = [str(phase) for phase in Phase]
    rows = tuple(
        PhaseRow(
            name,
            len(found.lengths),
            found.total / 1e9,
            found.total / whole,
            found.own / 1e9,
            median(found.lengths) / 1e9,
            None if recording.launches is None else found.gpu / 1e9,
        )
        for name, found in sorted(sums.items(), key=lambda item: order.index(item[0]))
    )
    return ProcessProfile(process, whole / 1e9, rows)


def nested(spans: Iterable[Span], path: Path) -> list[_Node]:
    """The ranges of one thread in order of their start, each knowing the one around it. DataError where two overlap."""
    nodes: list[_Node] = []
    around: _Node | None = None
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        while around is not None and around.end <= span.start:
            around = around.around
        end = span.end
        if around is not None:
            if end > around.end + SLACK:
                raise DataError(
                    f"profile {path}: ranges of a thread must nest; found {span.phase!r} that ends {end - around.end} ns after "
                    f"the {around.span.phase!r} it began in: the file is damaged, profile again"
                )
            end = min(end, around.end)
            around.inside += end - span.start
        around = _Node(span, end, around)
        nodes.append(around)
    return nodes


def _around(node: _Node) -> Iterator[_Node]:
    outer = node.around
    while outer is not None:
        yield outer
        outer = outer.around


def _credit(nodes: Sequence[_Node], launch: Launch) -> None:
    """Adds a kernel to every range that it was launched in."""
    low, high = 0, len(nodes)
    while low < high:  # the last range that began before it
        middle = (low + high) // 2
        low, high = (middle + 1, high) if nodes[middle].span.start <= launch.start else (low, middle)
    node = nodes[low - 1] if low else None
    for holder in (node, *_around(node)) if node else ():
        if holder.end > launch.start:
            holder.gpu += launch.length


def _phase(name: object) -> str | None:
    """The phase that a range's name stands for; None for somebody else's. ValueError for one of ours that is unknown."""
    return Phase(name.removeprefix(PREFIX)).value if isinstance(name, str) and name.startswith(PREFIX) else None


def _read_trace(path: Path) -> Recording:
    document = json.loads(path.read_text(encoding="utf-8"))
    spans, started, kernels = [], {}, []
    for event in document["traceEvents"]:
        if not isinstance(event, dict):
            raise TypeError(f"an event must be an object, not {event!r}")
        kind = event.get("cat") if event.get("ph") == "X" else None
        if kind == "user_annotation":
            if (phase := _phase(event["name"])) is not None:
                spans.append(Span(phase, int(event["tid"]), *_times(event)))
        elif kind in ("cuda_runtime", "cuda_driver"):
            started[event["args"]["correlation"]] = (int(event["tid"]), _times(event)[0])
        elif kind == "kernel":
            start, end = _times(event)
            kernels.append((event["args"]["correlation"], end - start))
    launches = [Launch(*started[key], length) for key, length in kernels if key in started]
    return Recording(spans, launches if document.get("deviceProperties") else None)


def _times(event: dict[str, Any]) -> tuple[int, int]:
    """Start and end in ns of an event in microseconds."""
    start = round(event["ts"] * 1000)
    return start, start + round(event["dur"] * 1000)


def _read_sqlite(path: Path) -> Recording:
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    try:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        rows = connection.execute(
            "SELECT COALESCE(n.text, s.value), n.globalTid, n.start, n.end FROM NVTX_EVENTS n "
            "LEFT JOIN StringIds s ON s.id = n.textId "
            "WHERE n.eventType = ? AND COALESCE(n.domainId, 0) = 0 AND n.end IS NOT NULL",
            (PUSH_POP,),
        )
        spans = [Span(phase, int(thread), int(a), int(b)) for name, thread, a, b in rows if (phase := _phase(name))]
        found = [table for table in KERNELS if table in tables]
        if not found or LAUNCHES not in tables:
            return Recording(spans, None)
        launches = [
            Launch(int(thread), int(start), int(length))
            for table in found
            for thread, start, length in connection.execute(
                f"SELECT r.globalTid, r.start, k.end - k.start FROM {table} k JOIN {LAUNCHES} r "
                f"ON r.correlationId = k.correlationId AND r.globalTid / {PROCESS_DIVISOR} = k.globalPid / {PROCESS_DIVISOR}"
            )
        ]
        return Recording(spans, launches)
    finally:
        connection.close()


def columns(profile: ProcessProfile) -> list[tuple[str, ...]]:
    """The table for people, its heading first. A dash where nothing is known of a GPU."""
    heading = ("phase", "times", "seconds", "of window", "itself s", "median ms", "GPU s")
    return [
        heading,
        *(
            (
                row.phase,
                str(row.count),
                f"{row.seconds:.3f}",
                f"{row.share:.1%}",
                f"{row.self_seconds:.3f}",
                f"{row.median_seconds * 1e3:.2f}",
                "-" if row.gpu_seconds is None else f"{row.gpu_seconds:.3f}",
            )
            for row in profile.rows
        ),
    ]
