"""The command's side of sinks: starts a process for each, hears what it warns of, and at the end says how the run ended and
waits for a bounded time. A sink that fails is told of and counted as any warning is, and ends nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from engine.core.errors import PreemptedError
from engine.core.jsonl import JsonlLedger
from engine.observe.journal import LOGS, SUFFIX, WARNINGS, Warnings
from engine.observe.sinks.base import End, State
from engine.observe.sinks.follow import FOLDER, STOP_SECONDS
from engine.observe.sinks.redact import redacted
from engine.observe.sinks.registry import label

ROOT = Path(__file__).resolve().parents[3]  # where this package lies
FINISH_SECONDS = 60.0  # that sinks are given to send the rest of a run that has finished
STARTED_AGAIN = 3  # how often a sink whose process died gets another
GRACE_SECONDS = 5.0  # beyond those, to say that they were not enough


class Followers:
    """The sinks of one run, as a context manager; `names` as run.sinks has them."""

    def __init__(
        self,
        names: Sequence[str],
        directory: Path,
        options: Mapping[str, Any],
        metrics: Mapping[str, Mapping[str, str]],
        *,
        verbose: bool = False,
        finish_seconds: float = FINISH_SECONDS,
    ) -> None:
        """`options`: of the configuration by full names, as JSON holds them; `metrics`: "unit", "help" and "title" of each."""
        self._names, self._directory, self._verbose = tuple(names), directory, verbose
        self._document = {"options": options, "metrics": metrics, "finish_seconds": finish_seconds}
        self._finish_seconds = finish_seconds
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._logs = directory / LOGS / FOLDER
        self._warnings: Warnings | None = None
        self._losses: dict[str, int] = {}  # by name, how often its process was lost
        self._ending = False

    def __enter__(self) -> Followers:
        self._logs.mkdir(parents=True, exist_ok=True)
        self._warnings = Warnings(self._logs, self._directory / WARNINGS)
        for name in self._names:
            self._start(name)
        return self

    def _start(self, name: str) -> None:
        document = self._document | {
            "sink": name,
            "directory": str(self._directory),
            "name": self._directory.resolve().name,
            "verbose": self._verbose,
        }
        log = self._logs / f"sink_{label(name)}.log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "engine.observe.sinks.follow"],  # a folder called engine here is not ours
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL if not self._verbose else None,
                stderr=file if not self._verbose else None,
                start_new_session=True,  # a Ctrl-C on the terminal is for the command
            )
        self._processes[name] = process
        self._say(process, document)

    def fresh(self) -> list[dict[str, Any]]:
        """{"kind": "warning", "where", "text", "count"} of what sinks warned of since the last call and is to be told. A sink
        whose process has died gets another, a few times, which goes on where it stood."""
        for name, process in list(self._processes.items()):
            if process.poll() is None or not process.returncode:
                continue
            self._kill(self._processes.pop(name))
            self._lost(name, f"ended with code {process.returncode}")
            if self._losses[name] <= STARTED_AGAIN and not self._ending:
                self._start(name)
        assert self._warnings is not None
        return self._warnings.fresh()

    def end(self, end: End) -> list[dict[str, Any]]:
        """Says how the run ended, waits until all sinks know all of it, ends those that take longer; what they warned of."""
        before = self.fresh()
        self._ending = True
        seconds = self._finish_seconds if end.state == "finished" else min(STOP_SECONDS, self._finish_seconds)
        for process in self._processes.values():
            self._say(process, asdict(End(end.state, redacted(end.text))))
        last = time.monotonic() + seconds + (GRACE_SECONDS if end.state == "finished" else 0.0)
        try:
            for name, process in self._processes.items():
                try:
                    process.wait(max(0.0, last - time.monotonic()))
                except subprocess.TimeoutExpired:
                    self._lost(name, f"had not sent all of the run after {seconds:.0f} s, and was ended")
            found = [*before, *self.fresh()]
        finally:
            for process in self._processes.values():
                self._kill(process)
            self._processes.clear()
        assert self._warnings is not None
        return [*found, *self._warnings.close()]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self._processes:
            return
        stopped = (PreemptedError, KeyboardInterrupt, GeneratorExit)
        state: State = "failed" if error is not None and not isinstance(error, stopped) else "stopped"
        self.end(End(state, "" if error is None else str(error) or type(error).__name__))

    def _lost(self, name: str, what: str) -> None:
        """Has the loss of a sink told and written down."""
        count = self._losses[name] = self._losses.get(name, 0) + 1
        log = self._logs / f"sink_{label(name)}.log"
        text = f"{what}, and the run goes on; {log} says why. It is started again {STARTED_AGAIN} times, and by --resume auto"
        ledger = JsonlLedger(self._logs / f"command_{label(name)}{SUFFIX}")
        ledger.append([{"unix_seconds": time.time(), "process": f"sink {label(name)}", "text": text, "count": count}])
        ledger.close()

    def _say(self, process: subprocess.Popen[bytes], document: Mapping[str, Any]) -> None:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; `fresh` tells
            process.stdin.write((json.dumps(document) + "\n").encode())
            process.stdin.flush()

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        """Ends what is left of the process and of those that it started, some of which have sessions of their own."""
        started: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(process.pid).children(recursive=True)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for child in started:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
