"""The judge's endpoint: what it may reply, and what may be wrong with its address, its key and the answers. A server on the
loopback interface replies; {url} in a command line is its address."""

from __future__ import annotations

import json

from tests.unit.benchmarks.chat_server import Reply, completion
from tests.unit.first_hour.case import Case, Made, both, refused, text, usage


def outputs(file: str, generator: str, output: str = "2") -> Made:
    """Answers as AlpacaEval has them."""
    return text(file, json.dumps([{"dataset": "d", "instruction": "1+1", "output": output, "generator": generator}]))


ANSWERS = both(outputs("a.json", "mine"), outputs("b.json", "theirs", "3"))
LINE = "judge a.json --against b.json --model m --output o.jsonl --endpoint "
ASK = LINE + "{url}"
REPLIES: dict[str, Reply] = {  # what the server says, by the name of the case
    "a judge that answers": completion("[[A>B]]"),
    "a judge that says nothing of use": completion("Both are nice."),
    "a key that is refused": (401, {}, b'{"error": "bad key"}'),
    "a judge that may not be asked": (403, {}, b"forbidden"),
    "a judge of another name": (404, {}, b'{"error": "no such model"}'),
    "a page for a reply": (200, {}, b"<html>log in</html>"),
    "a reply of another form": (200, {}, b'{"choices": []}'),
    "a reply that is no JSON": (200, {}, b"\xff\xfe"),
    "an address that has moved": (302, {"Location": "http://127.0.0.1:9/"}, b""),
    "a request that is refused": (400, {}, b'{"error": "too long"}'),
}
CASES: list[Case] = [
    Case("a judge that answers", ASK, 0, ("win rate",), ANSWERS, sentences=0, leaves=("o.jsonl",)),
    Case("a judge that says nothing of use", ASK, 3, ("verdict", "found none in 2", "--output"), ANSWERS, leaves=("o.jsonl",)),
    *(
        Case(name, ASK, 5, ("--endpoint", f"status {REPLIES[name][0]}"), ANSWERS, leaves=("o.jsonl",))
        for name in (
            "a key that is refused",
            "a judge that may not be asked",
            "a judge of another name",
            "an address that has moved",
        )
    ),
    Case("a request that is refused", ASK, 5, ("2 of 2", "status 400", "too long"), ANSWERS, leaves=("o.jsonl",)),
    refused("an address that is none", LINE + "api.openai.com", 2, "--endpoint", "https://", made=ANSWERS),
    refused("an address of another kind", LINE + "ftp://host/v1", 2, "--endpoint", made=ANSWERS),
    refused("a password in the address", LINE + "https://me:secret@host/v1", 2, "--endpoint", "--key-env", made=ANSWERS),
    refused("a port that is none", LINE + "http://127.0.0.1:99999/v1", 2, "--endpoint", made=ANSWERS),
    refused("a key that is not set", ASK + " --key-env GONE_KEY", 2, "--key-env", "GONE_KEY", made=ANSWERS),
    refused("a key of two words", ASK + " --key-env MY_KEY", 2, "--key-env", "MY_KEY", made=ANSWERS, MY_KEY="a b"),
    refused("nobody asked at once", ASK + " --concurrency 0", 2, "--concurrency", "0", made=ANSWERS),
    refused("a deadline of nothing", ASK + " --timeout-seconds 0", 2, "--timeout-seconds", "0", made=ANSWERS),
    refused("a deadline that is no number", ASK + " --timeout-seconds nan", 2, "--timeout-seconds", "nan", made=ANSWERS),
    refused(
        "replies over the answers",
        "judge a.json --against b.json --model m --output a.json --endpoint {url}",
        2,
        "--output",
        "a.json",
        made=ANSWERS,
    ),
    refused("no answers", ASK, 3, "a.json", made=outputs("b.json", "theirs")),
    refused("empty answers", ASK, 3, "a.json", made=both(ANSWERS, text("a.json", "[]"))),
    refused("broken answers", ASK, 3, "a.json", made=both(ANSWERS, text("a.json", "["))),
    refused("answers of another form", ASK, 3, "a.json", made=both(ANSWERS, text("a.json", '[{"text": "2"}]'))),
    refused("replies of another use", ASK, 3, "o.jsonl", made=both(ANSWERS, text("o.jsonl", '{"step": 0}\n'))),
    usage("no endpoint", "judge a.json --against b.json --model m --output o.jsonl", "--endpoint"),
    usage("concurrency as a word", ASK + " --concurrency many", "--concurrency", "'many'"),
]
