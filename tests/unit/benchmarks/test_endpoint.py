"""The chat-completions client against a real HTTP server: what is sent, what is tried again and what is not, deadlines, and
that the key goes to the endpoint and nowhere else.
"""

import json
import threading
from contextlib import ExitStack
from dataclasses import replace

import pytest

from engine.benchmarks.endpoint import Endpoint, open_endpoint
from engine.core.errors import ConfigError, InferenceError, RequestError
from tests.unit.benchmarks.chat_server import ChatServer, completion

KEY = "sk-secret-0123456789"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def serve():
    """Starts a server that replies as told; it and an impatient endpoint for it."""
    with ExitStack() as servers:

        def start(reply, **changes):
            server = servers.enter_context(ChatServer(reply))
            endpoint = Endpoint(server.url, "judge-1", KEY, timeout_seconds=20.0, attempts=3, backoff_seconds=0.001)
            return server, replace(endpoint, **changes)

        yield start


def ask(endpoint):
    return endpoint.ask(endpoint.body(HELLO), threading.Event())


def test_one_request_as_the_protocol_wants_it(serve):
    server, endpoint = serve(lambda body, number: completion("hi"))
    assert ask(endpoint) == "hi"
    assert server.asked == [{"model": "judge-1", "messages": HELLO, "temperature": 0.0, "max_tokens": 4096}]
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert ask(replace(endpoint, key="")) == "hi"
    assert "Authorization" not in server.headers[1]


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503])
def test_what_may_pass_is_asked_again(serve, status):
    server, endpoint = serve(
        lambda body, number: completion("at last") if number == 3 else (status, {"Retry-After": "0"}, b"busy")
    )
    assert ask(endpoint) == "at last"
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    "data", [b"", b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": 3}}]}', b"[" * 100_000]
)
def test_a_malformed_reply_is_asked_again_and_then_told(serve, data):
    server, endpoint = serve(lambda body, number: (200, {}, data))
    with pytest.raises(RequestError, match="failed in 3 attempts, the last time: found status 200"):
        ask(endpoint)
    assert len(server.asked) == 3


def test_a_reply_without_words_is_one_and_is_not_asked_again(serve):
    server, endpoint = serve(lambda body, number: completion(None if number == 1 else ""))
    assert (ask(endpoint), ask(endpoint)) == ("", "")
    assert len(server.asked) == 2


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_not_asked_again(serve, status):
    server, endpoint = serve(lambda body, number: (status, {}, b"context is  too\nlong"))
    with pytest.raises(RequestError, match=f"refused a request: found status {status}, 'context is too long'"):
        ask(endpoint)
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_request_can_mend_is_another_error(serve, status):
    server, endpoint = serve(lambda body, number: (status, {}, b"no"))
    with pytest.raises(InferenceError, match=r"must serve --model judge-1; found status \d+, 'no': check both") as error:
        ask(endpoint)
    assert not isinstance(error.value, RequestError)
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_since_the_key_would_go_along(serve, status):
    other, _ = serve(lambda body, number: completion("thief"))
    server, endpoint = serve(lambda body, number: (status, {"Location": f"{other.url}/chat/completions"}, b""))
    with pytest.raises(InferenceError, match=f"found status {status}"):
        ask(endpoint)
    assert (len(server.asked), len(other.asked)) == (1, 0)


def test_the_key_is_cut_out_of_what_comes_back(serve):
    _, endpoint = serve(lambda body, number: completion(f"you sent {KEY}"))
    assert ask(endpoint) == "you sent [key]"
    _, endpoint = serve(lambda body, number: (401, {}, f"Incorrect API key provided: {KEY}".encode()))
    with pytest.raises(InferenceError, match=r"provided: \[key\]"):
        ask(endpoint)
    _, endpoint = serve(lambda body, number: (401, {}, b"." * 190 + KEY.encode()))
    with pytest.raises(InferenceError) as error:
        ask(endpoint)
    assert KEY[:8] not in str(error.value), "not even where the text is cut"
    assert KEY not in repr(endpoint)


def test_a_silent_server_meets_the_deadline(serve):
    def silent(body, number):
        server.ending.wait()
        return completion("late")

    server, endpoint = serve(silent, timeout_seconds=0.1, attempts=2)
    with pytest.raises(RequestError, match="failed in 2 attempts, the last time: found no answer, TimeoutError"):
        ask(endpoint)


def test_a_server_that_dribbles_meets_it_too(serve):
    server, endpoint = serve(lambda body, number: completion("x" * 10_000), timeout_seconds=0.2, attempts=1)
    server.piece_seconds = 0.02  # hardly ever silent for as long as the timeout: all of it would take minutes
    with pytest.raises(RequestError, match=r"not whole in time|timed out"):
        ask(endpoint)


def test_nobody_there_and_half_a_reply(serve):
    server, endpoint = serve(lambda body, number: completion("x"))
    gone = replace(endpoint, url="http://127.0.0.1:1/v1", attempts=1)
    with pytest.raises(RequestError, match=r"found no answer, URLError: .*refused"):
        ask(gone)
    server.reply = lambda body, number: (200, {"Content-Length": "999"}, json.dumps({"choices": []}).encode())
    with pytest.raises(RequestError, match="failed in 3 attempts"):
        ask(replace(endpoint, timeout_seconds=0.3))


def test_between_attempts_it_can_be_told_to_stop(serve):
    stopped = threading.Event()

    def reply(body, number):
        stopped.set()
        return 500, {}, b""

    server, endpoint = serve(reply, backoff_seconds=50.0)
    with pytest.raises(RequestError, match="failed in 1 attempts"):
        endpoint.ask(endpoint.body(HELLO), stopped)
    with pytest.raises(RequestError, match="not asked any more"):
        endpoint.ask(endpoint.body(HELLO), stopped)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "url",
    [
        *("api.openai.com/v1", "ftp://host/v1", "http://", "http://[", "http://host:port/v1"),
        *("http://a..b/v1", "http://./v1", f"http://{'a' * 64}.org/v1", "http://host/schlüssel"),
        *("https://me:secret@host/v1", "https://:secret@host/v1", "https://host/v1?key=secret"),
    ],
)
def test_an_address_that_is_none_or_holds_a_secret(url):
    with pytest.raises(ConfigError, match="--endpoint must read") as error:
        open_endpoint(url, "m", None, 1.0)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("url", ["http://[::1]:80/v1", "http://bücher.de/v1", "https://host./v1", "http://127.0.0.1:1"])
def test_an_address_of_any_kind(url):
    assert open_endpoint(url, "m", None, 1.0).url == url


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
    assert open_endpoint("https://host/v1", "m", "JUDGE_KEY", 1.0).key == KEY
    assert open_endpoint("https://host/v1", "m", None, 1.0).key == ""
    with pytest.raises(ConfigError, match="found nothing in OTHER_KEY"):
        open_endpoint("https://host/v1", "m", "OTHER_KEY", 1.0)
    with pytest.raises(ConfigError, match="--timeout-seconds"):
        open_endpoint("https://host/v1", "m", None, 0.0)
    for bad in ("two words", "new\nline", "schlüssel"):
        monkeypatch.setenv("JUDGE_KEY", bad)
        with pytest.raises(ConfigError, match="one word of ASCII") as error:
            open_endpoint("https://host/v1", "m", "JUDGE_KEY", 1.0)
        assert bad not in str(error.value)
