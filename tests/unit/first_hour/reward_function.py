"""Reward functions of the user's: what cannot be loaded is told by `check`, what fails while it judges by `score`."""

from __future__ import annotations

from tests.unit.first_hour.case import Case, Made, accepted, refused, text

MINE = "mine.py"
CHECK = "check run.toml data.reward=mine.py:f"
SCORE = "score answers.jsonl --reward mine.py:f --deadline-seconds 1"


def code(*lines: str) -> Made:
    """mine.py of these lines."""
    return text(MINE, "\n".join(lines) + "\n")


def judged(result: str, *before: str) -> Made:
    """A function of the usual signature that returns this."""
    return code(*before, "def f(problem, answer, completion):", f"    return {result}")


def ran(*body: str) -> Made:
    """A function of the usual signature that does this."""
    return code("def f(problem, answer, completion):", *[f"    {each}" for each in body])


CASES: list[Case] = [
    # told before anything starts
    refused("no such file", "check run.toml data.reward=gone.py:f", 2, "data.reward", "gone.py"),
    refused("no such module", "check run.toml data.reward=gone.module:f", 2, "data.reward", "gone.module"),
    refused("no colon", "check run.toml data.reward=rewards.py", 2, "data.reward", "rewards.py:NAME"),
    refused("no name behind the colon", "check run.toml data.reward=rewards.py:", 2, "data.reward", "rewards.py:"),
    refused("another name", CHECK, 2, "data.reward", "no f", "g", made=code("def g(completion): return 1")),
    refused("a folder", "check run.toml data.reward=model:f", 2, "data.reward", "model"),
    refused(
        "a file without .py",
        "check run.toml data.reward=mine.txt:f",
        2,
        "data.reward",
        "mine.txt",
        made=text("mine.txt", "def f(): ..."),
    ),
    refused("a broken line", CHECK, 2, "mine.py", "line 1", "SyntaxError", made=code("def f(:")),
    refused(
        "tabs and blanks",
        CHECK,
        2,
        "mine.py",
        "TabError",
        made=code("def f(completion):", "\tif 1:", "        return 1", "\treturn 2"),
    ),
    refused(
        "an import that is not there", CHECK, 2, "mine.py", "no_such_library", made=judged("1.0", "import no_such_library")
    ),
    refused("a failure while it is imported", CHECK, 2, "mine.py", "ZeroDivisionError", "line 1", made=judged("1.0", "1 / 0")),
    refused("an exit while it is imported", CHECK, 2, "mine.py", "SystemExit", made=judged("1.0", "raise SystemExit(3)")),
    refused("a hard exit while it is imported", CHECK, 2, "mine.py", made=judged("1.0", "import os", "os._exit(3)")),
    refused(
        "other parameters",
        CHECK,
        2,
        "data.reward",
        "prompt, response",
        "completion",
        made=code("def f(prompt, response): return 1"),
    ),
    refused(
        "the parameters of TRL",
        CHECK,
        2,
        "data.reward",
        "completions",
        "completion",
        made=code("def f(completions, **kwargs): return [1.0 for c in completions]"),
    ),
    refused(
        "the parameters of verl",
        CHECK,
        2,
        "data.reward",
        "data_source",
        "completion",
        made=code("def f(data_source, solution_str, ground_truth, extra_info=None): return 1"),
    ),
    refused("no parameters", CHECK, 2, "data.reward", "no parameters", made=code("def f(): return 1")),
    refused("a number", CHECK, 2, "data.reward", "1", made=code("f = 1")),
    refused("a class of another kind", CHECK, 2, "data.reward", "class", made=code("class f: ...")),
    refused("a generator", CHECK, 2, "data.reward", "yields", made=code("def f(completion): yield 1.0")),
    refused("bytes", CHECK, 2, "mine.py", made=text(MINE, bytes(range(128, 256)))),
    refused("an empty file", CHECK, 2, "mine.py", "nothing", made=text(MINE, "")),
    refused(
        "a variable that is not set",
        "check run.toml data.reward=rewards.py:right 'rewards.environment=[\"GONE_KEY\"]'",
        2,
        "rewards.environment",
        "GONE_KEY",
    ),
    refused("one wrong, of several", 'check run.toml \'data.reward=["math", "gone.py:f"]\'', 2, "gone.py"),
    refused(
        "a reward model for a function",
        "check run.toml data.reward=function rewards.function=gone.py:f",
        2,
        "rewards.function",
        "gone.py",
    ),
    refused(
        "another number of weights",
        "check run.toml 'data.reward=[\"math\", \"rewards.py:right\"]' 'data.reward_weights=[1.0]'",
        2,
        "data.reward_weights",
    ),
    refused(
        "a deadline of nothing",
        "check run.toml data.reward=rewards.py:right rewards.timeout_seconds=0",
        2,
        "rewards.timeout_seconds",
    ),
    # told when it judges
    accepted("a function", SCORE, "1.0000", made=judged("float(answer in completion)")),
    accepted(
        "an async function",
        SCORE,
        "1.0000",
        made=code("import asyncio", "async def f(completion):", "    await asyncio.sleep(0)", "    return 1.0"),
    ),
    accepted("a boolean", SCORE, "1.0000", made=judged("answer in completion")),
    accepted("named parts", SCORE, "1.0000", made=judged("{'right': 0.5, 'form': 0.5}")),
    accepted("a function that prints a lot", SCORE, "1.0000", made=ran("print('x' * 1000000)", "return 1.0")),
    accepted(
        "a function that changes folder and environment",
        SCORE,
        "1.0000",
        made=ran("import os; os.chdir('/'); os.environ['HOME'] = '/gone'", "return 1.0"),
    ),
    accepted(
        "a function that starts a thread",
        SCORE,
        "1.0000",
        made=ran("import threading; threading.Thread(target=print, daemon=True).start()", "return 1.0"),
    ),
    accepted(
        "a function that starts a process",
        SCORE,
        "1.0000",
        made=ran("import subprocess; subprocess.Popen(['sleep', '60'])", "return 1.0"),
    ),
    refused("a function that raises", SCORE, 3, "answers.jsonl", "boom", "invalid", made=ran("raise RuntimeError('boom')")),
    refused("None", SCORE, 3, "answers.jsonl", "None", "finite number", made=judged("None")),
    refused("a text", SCORE, 3, "answers.jsonl", "'1.0'", "finite number", made=judged("'1.0'")),
    refused("no number", SCORE, 3, "answers.jsonl", "nan", "finite number", made=judged("float('nan')")),
    refused("infinity", SCORE, 3, "answers.jsonl", "inf", "finite number", made=judged("float('inf')")),
    refused("a list", SCORE, 3, "answers.jsonl", "[1.0]", "finite number", made=judged("[1.0]")),
    refused("a complex number", SCORE, 3, "answers.jsonl", "1j", "finite number", made=judged("1j")),
    refused("no parts", SCORE, 3, "answers.jsonl", "{}", "finite number", made=judged("{}")),
    refused("a part that is no number", SCORE, 3, "answers.jsonl", "None", "finite number", made=judged("{'right': None}")),
    refused("a part without a name", SCORE, 3, "answers.jsonl", "finite number", made=judged("{1: 1.0}")),
    refused(
        "a coroutine that is not awaited",
        SCORE,
        3,
        "answers.jsonl",
        "coroutine",
        made=judged("g()", "async def g(): return 1.0"),
    ),
    refused("a function that hangs", SCORE, 3, "answers.jsonl", "timeout", made=ran("while True: pass")),
    refused("a function that sleeps", SCORE, 3, "answers.jsonl", "timeout", made=ran("import time; time.sleep(60)")),
    refused("a function that exits", SCORE, 3, "answers.jsonl", made=ran("raise SystemExit(0)")),
    refused("a function that exits hard", SCORE, 3, "answers.jsonl", made=ran("import os; os._exit(0)")),
    refused(
        "a function that kills itself",
        SCORE,
        3,
        "answers.jsonl",
        made=ran("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
    ),
    refused(
        "a function that takes all memory",
        SCORE + " --memory-mebibytes 400",
        3,
        "answers.jsonl",
        made=ran("x = bytearray(1 << 30)", "return 1.0"),
    ),
    refused(
        "a function without an end of calls",
        SCORE,
        3,
        "answers.jsonl",
        "RecursionError",
        made=ran("return f(problem, answer, completion)"),
    ),
    refused(
        "a group that is answered with one number",
        SCORE,
        3,
        "answers.jsonl",
        "list of 1",
        made=code("def f(group): return 1.0"),
    ),
]
