"""Ends: signals, pipes whose other end is gone, streams that are closed. Each is a process; what a run does when it is asked to
stop is told by tests/e2e."""

from __future__ import annotations

from tests.unit.first_hour.case import Case, shell, text

MISTAKE = "semion check run.toml run.steps=0"
SLEEPS = text(
    "mine.py",
    "import pathlib, time\n\n\ndef f(completion):\n    pathlib.Path('begun').touch()\n    time.sleep(60)\n    return 1.0\n",
)
SCORE = "env --default-signal=INT semion score answers.jsonl --reward mine.py:f --deadline-seconds 60 & pid=$!; "
SCORE += "while [ ! -e begun ]; do sleep 0.05; done; rm begun; "
CASES: list[Case] = [
    shell("| head", "semion check run.toml --toml | head -1; exit ${PIPESTATUS[0]}", 0, "[run]"),
    shell("| true", "semion check run.toml --toml | true; [ ${PIPESTATUS[0]} = 141 ] || [ ${PIPESTATUS[0]} = 0 ]", 0),
    shell("a pipe that nobody reads", "exec 3> >(exec true); sleep 0.2; semion check run.toml >&3", 141),
    shell(
        "output on a full disk",
        "semion check run.toml > /dev/full",
        4,
        "standard output cannot be written: the disk is full",
        sentences=1,
    ),
    shell("no standard output", "semion check run.toml >&-", 0),
    shell("no standard input", "semion check run.toml <&-", 0, "as resolved"),
    shell("no standard error", f"{MISTAKE} 2>&-", 2),
    shell("no standard streams at all", f"{MISTAKE} <&- >&- 2>&-", 2),
    shell("a mistake on a full disk", f"{MISTAKE} 2> /dev/full", 2),
    shell("help | true", "semion train --help | true; s=${PIPESTATUS[0]}; [ $s = 141 ] || [ $s = 0 ]", 0),
    shell("Ctrl-C", SCORE + "kill -INT $pid; wait $pid", 130, "interrupted", made=SLEEPS, sentences=1),
    shell("Ctrl-C twice", SCORE + "kill -INT $pid; kill -INT $pid; wait $pid", 130, made=SLEEPS, sentences=1),
    shell("SIGTERM", SCORE + "kill -TERM $pid; wait $pid", 143, made=SLEEPS),
    shell("SIGKILL", SCORE + "kill -KILL $pid; wait $pid 2>&-", 137, made=SLEEPS),
    shell("SIGHUP, as of a lost connection", SCORE + "kill -HUP $pid; wait $pid", 129, made=SLEEPS),
]
