"""A chat-completions endpoint on the loopback interface for tests: real HTTP, replies from a function of the test's."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]


def completion(text: Any) -> Reply:
    """What a healthy endpoint sends."""
    return 200, {}, json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}).encode()


class ChatServer:
    """Answers POST with `reply(request, number of this request)`; remembers paths, headers and bodies."""

    def __init__(self, reply: Callable[[dict[str, Any], int], Reply]) -> None:
        self.reply, self.asked = reply, list[dict[str, Any]]()
        self.headers, self.paths = list[dict[str, str]](), list[str]()
        self.piece_seconds = 0.0  # pause between the bytes of a reply
        self.ending = threading.Event()  # whoever waits in a reply waits on this
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.asked.append(body)
                    server.headers.append(dict(self.headers))
                    server.paths.append(self.path)
                    number = len(server.asked)
                status, headers, data = server.reply(body, number)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                size = 1 if server.piece_seconds else max(1, len(data))
                for start in range(0, len(data), size):
                    if server.ending.wait(server.piece_seconds):
                        return
                    self.wfile.write(data[start : start + size])
                    self.wfile.flush()

            def log_message(self, *arguments: Any) -> None:
                """Nothing on stderr."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *arguments: None  # type: ignore[method-assign]  # a client may leave
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> ChatServer:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.ending.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
