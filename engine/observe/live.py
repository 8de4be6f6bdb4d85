"""The report of runs that are going on, as a small web server: a browser asks every few seconds whether there is something new
and gets the page's content where there is. What is read is what was appended since the last look, and what is kept is bounded,
so neither grows with the age of a run; without a browser nothing is read at all. The regime is not proven here, for that takes
all rollouts. It changes nothing.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from engine.core.errors import ConfigError, DataError
from engine.core.metrics import Metric
from engine.observe.journal import WARNINGS, read_warnings
from engine.observe.origin import read_origin
from engine.observe.reading import LEDGERS, RunRecords, fill, versions_of
from engine.observe.report import content, page
from engine.observe.summary import RESTARTS, read_restarts
from engine.observe.tail import Tail
from engine.observe.timeline import STARTUP

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOOK_SECONDS = 1.0  # records are looked at no more often, however many browsers ask
ASK_SECONDS = 2  # between two questions of a browser
SCRIPT = """
let version = VERSION;
async function ask() {
  try {
    const answer = await fetch('content?since=' + version);
    if (answer.status === 200) {
      version = answer.headers.get('X-Version');
      const text = await answer.text(), main = document.querySelector('main');
      const names = () => [...main.querySelectorAll('details')];
      const key = (d) => d.querySelector('summary').textContent.split(':')[0];
      const open = new Map(names().map((d) => [key(d), d.open]));
      main.innerHTML = text;
      for (const d of names()) if (open.has(key(d))) d.open = open.get(key(d));
    }
  } catch (error) { document.getElementById('state').textContent = 'the server does not answer'; }
  setTimeout(ask, ASK * 1000);
}
document.addEventListener('DOMContentLoaded', () => setTimeout(ask, ASK * 1000));
"""


class LiveRun:
    """One run, looked at again and again."""

    def __init__(self, directory: Path, name: str, options: Mapping[str, Any]) -> None:
        self.directory = directory
        self.records = RunRecords(name, options, origin=read_origin(directory))
        self._tails = {name: Tail(directory / name, **form) for name, form in LEDGERS.items()}
        self._seen: dict[str, float] = {}  # when files that are read whole, for they are small, had changed

    @property
    def bytes_read(self) -> int:
        """Of the ledgers, so far."""
        return sum(tail.bytes_read for tail in self._tails.values())

    def look(self) -> bool:
        """Takes in what is new; whether something was. DataError for a line that is no row."""
        found = {file: tail.fresh() for file, tail in self._tails.items()}
        records = self.records
        fill(
            records,
            metrics=found["metrics.jsonl"].rows,
            evaluations=found["evaluations.jsonl"].rows,
            samples=found["samples.jsonl"].rows,
        )
        kept, findings = records.findings, found["guard.jsonl"]
        del kept[len(kept) - findings.withdrawn :]
        kept += findings.rows
        changed = any(rows or withdrawn for withdrawn, rows in found.values())
        if self._has_changed(WARNINGS):
            records.warnings, changed = read_warnings(self.directory / WARNINGS), True
        if self._has_changed(RESTARTS) | self._has_changed(STARTUP):
            records.restarts, changed = read_restarts(self.directory), True
        if self._has_changed("summary.json"):
            records.versions, changed = versions_of(self.directory / "summary.json"), True
        return changed

    def _has_changed(self, file: str) -> bool:
        path = self.directory / file
        when = path.stat().st_mtime if path.exists() else 0.0
        before, self._seen[file] = self._seen.get(file, 0.0), when
        return when != before


class LivePage:
    """The page of some runs and the number of its newest version; may be asked by several threads."""

    def __init__(self, runs: Sequence[LiveRun], metrics: Mapping[str, Metric], groups: Mapping[str, Sequence[str]]) -> None:
        self._runs, self._metrics, self._groups = runs, metrics, groups
        self._lock = threading.Lock()
        self._looked = 0.0
        self._version, self._text = 0, ""
        self._nonce = secrets.token_urlsafe(12)

    @property
    def policy(self) -> str:
        """What a browser may do with the page: run its one script, and ask this server."""
        return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{self._nonce}'; connect-src 'self'"

    def newest(self) -> tuple[int, str]:
        """The version and the content, after a look at the records where the last one is not just over."""
        with self._lock:
            if time.monotonic() - self._looked >= LOOK_SECONDS:
                try:
                    changed = [run.look() for run in self._runs]
                    if any(changed) or not self._text:
                        self._text = (
                            f"{self._state()}{content([run.records for run in self._runs], self._metrics, self._groups)}"
                        )
                        self._version += 1
                except DataError as error:
                    self._text = f'<p class="wrong">{escape(str(error))}</p>'
                    self._version += 1
                self._looked = time.monotonic()
            return self._version, self._text

    def whole(self) -> str:
        """The document that a browser is given first."""
        version, text = self.newest()
        script = SCRIPT.replace("VERSION", str(version)).replace("ASK", str(ASK_SECONDS))
        head = f'<script nonce="{self._nonce}">{script}</script>'
        return page([run.records for run in self._runs], self._metrics, self._groups, head=head, inside=text)

    def _state(self) -> str:
        told = []
        for run in self._runs:
            last = run.records.metrics.last_seconds
            when = f", the last one done at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(last))}" if last else ""
            over = "; the run has ended" if run.records.versions else ""
            told.append(f"{run.records.name}: {run.records.metrics.num_steps} steps{when}{over}")
        note = "semion report without --serve proves the regime"
        return f'<p class="note" id="state">{escape("; ".join(told))} ({note})</p>'


def make_server(live: LivePage, host: str, port: int) -> ThreadingHTTPServer:
    """A server that listens, and answers once `serve_forever` is called. ConfigError where it cannot have that port."""
    local = host in LOOPBACK

    class Handler(BaseHTTPRequestHandler):
        """GET / and GET /content?since=VERSION."""

        def do_GET(self) -> None:
            """Answers; a browser that another site has led here by a name of its own is refused."""
            address = urlsplit(self.path)
            name = (urlsplit(f"//{self.headers.get('Host', '')}").hostname) or ""
            if local and name not in LOOPBACK:
                self.send_error(HTTPStatus.FORBIDDEN, "this server answers to localhost alone")
            elif address.path == "/":
                self._answer(live.whole(), 0)
            elif address.path == "/content":
                version, text = live.newest()
                known = parse_qs(address.query).get("since", [""])[0]
                self._answer("" if known == str(version) else text, version)
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

        def _answer(self, text: str, version: int) -> None:
            data = text.encode()
            self.send_response(HTTPStatus.OK if data else HTTPStatus.NO_CONTENT)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Security-Policy", live.policy)
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Version", str(version))
            if data:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Says nothing of requests."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host and --port must be free to listen at; found {host}:{port} ({error}): name others") from error
    server.daemon_threads = True
    return server
