"""One OpenAI-compatible chat-completions endpoint: a question goes out, a text comes back, within deadlines and attempts.
What is asked and what the text means is judge.py's.

Standard library only, so that it is the same on every machine. Redirects are not followed, because the key would go along.
The key is sent in a header and nowhere else: it is cut out of every text that comes back.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.message import Message
from typing import IO, Any
from urllib.parse import urlsplit

from engine.core.errors import ConfigError, InferenceError, RequestError

HOPELESS = {401, 403, 404}  # the key, its rights, the path or the model's name are wrong: no other request would fare better
AGAIN = {408, 409, 425, 429}  # beside 5xx
MAX_WAIT_SECONDS = 60.0  # between two attempts, whatever the server asks for
MAX_REPLY_BYTES = 8 << 20
MAX_TOKENS = 4096  # of a reply: the length that Arena-Hard gives its judge


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to ask, whom, and for how long. Threads may share it."""

    url: str  # such as https://api.openai.com/v1
    model: str
    key: str = field(default="", repr=False)
    timeout_seconds: float = 120.0  # of one attempt
    attempts: int = 5
    backoff_seconds: float = 1.0  # before the second attempt; doubled before each further one

    def body(self, messages: Sequence[dict[str, str]]) -> bytes:
        """The request of these messages, at temperature 0."""
        asked = {"model": self.model, "messages": list(messages), "temperature": 0.0, "max_tokens": MAX_TOKENS}
        return json.dumps(asked, sort_keys=True).encode()

    def ask(self, body: bytes, stopped: threading.Event) -> str:
        """The text of the reply, which may be empty. RequestError when this request fails in every attempt, is refused, or is
        given up because `stopped` is set; InferenceError when no request could succeed, and `stopped` is set for the others."""
        if stopped.is_set():
            raise RequestError(f"{self.url} was not asked any more")
        attempt, why = 0, ""
        for attempt in range(self.attempts):
            reply = self._post(body)
            content = _content(reply.data) if reply.status == 200 else None
            if content is not None:
                return self._without_key(content)
            why = reply.words(self._without_key)
            if reply.status in HOPELESS or 300 <= reply.status < 400:
                stopped.set()
                raise InferenceError(f"--endpoint {self.url} must serve --model {self.model}; {why}: check both and the key")
            if 400 <= reply.status < 500 and reply.status not in AGAIN:
                raise RequestError(f"{self.url} refused a request: {why}")
            pause = min(MAX_WAIT_SECONDS, max(reply.wait_seconds, self.backoff_seconds * 2**attempt))
            if attempt + 1 < self.attempts and stopped.wait(pause):
                break
        raise RequestError(f"{self.url} failed in {attempt + 1} attempts, the last time: {why}")

    def _post(self, body: bytes) -> _Reply:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        opener = urllib.request.build_opener(_NoRedirect())
        deadline = time.monotonic() + self.timeout_seconds
        try:
            try:
                response = opener.open(request, timeout=self.timeout_seconds)
            except urllib.error.HTTPError as error:
                response = error  # any status but 2xx; it is read like the others
            with response:
                wait_seconds = _seconds(response.headers.get("Retry-After"))
                return _Reply(response.status, _read(response, deadline), wait_seconds)
        except (OSError, http.client.HTTPException) as error:
            return _Reply(0, f"{type(error).__name__}: {error}".encode())

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "[key]") if self.key else text


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int  # 0: there was none
    data: bytes  # or why there was none
    wait_seconds: float = 0.0

    def words(self, cleaned: Callable[[str], str]) -> str:
        """One line for a person; cleaned before it is cut, so that no part of a key is left."""
        said = " ".join(cleaned(self.data.decode("utf-8", "replace")).split())[:200]
        return f"found status {self.status}, {said!r}" if self.status else f"found no answer, {said}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def open_endpoint(url: str, model: str, key_env: str | None, timeout_seconds: float) -> Endpoint:
    """The endpoint that the options name; the key is read from the environment variable `key_env`. ConfigError."""
    if not _is_address(url):
        raise ConfigError(
            "--endpoint must read http(s)://host[:port]/path, without a user or a query; found something else, which is not "
            "repeated here as it may hold a password: write such as https://api.openai.com/v1, and name the key with --key-env"
        )
    if not 0 < timeout_seconds < float("inf"):
        raise ConfigError(f"--timeout-seconds must be a number above 0; found {timeout_seconds}: give one such as 120")
    key = os.environ.get(key_env, "").strip() if key_env else ""
    if key_env and not key:
        raise ConfigError(f"--key-env must name an environment variable that holds the key; found nothing in {key_env}: set it")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"--key-env must name a variable with one word of ASCII; found something else in {key_env}: mend it")
    return Endpoint(url, model, key, timeout_seconds)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return (
            parts.scheme in ("http", "https")
            and bool((parts.hostname or "").encode("idna"))  # as it is looked up
            and parts.path.isascii()
            and not ("@" in parts.netloc or parts.query or parts.fragment or parts.port == 0)
        )
    except ValueError:  # a port, an address in brackets or a name that is none
        return False


def _read(response: Any, deadline: float) -> bytes:
    """The body, in pieces, so that a server that dribbles meets the deadline too."""
    data = b""
    while piece := response.read1(1 << 16):
        data += piece
        if time.monotonic() > deadline or len(data) > MAX_REPLY_BYTES:
            raise TimeoutError(f"the reply was not whole in time, or is longer than {MAX_REPLY_BYTES} bytes")
    return data


def _content(data: bytes) -> str | None:
    """The text of a chat completion; None where the reply is none. A null is the empty text: of a refusal, or of a model that
    reasoned until it had no tokens left. It would be the same again, and it is paid."""
    try:
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return "" if content is None else content if isinstance(content, str) else None


def _seconds(header: str | None) -> float:
    """Retry-After as seconds; a date, which the header may hold too, counts as no wish."""
    return float(header) if header and header.strip().isdecimal() else 0.0
