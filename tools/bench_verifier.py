r"""How many answers a second one process judges, this checkout's verifier beside another's (`--peer`, any checkout with
`judge`), on the same answers block by block in turn. CPU seconds, so that a busy machine counts little; every process judges
a few answers before it is measured, so that nothing is set up within. Also where the two disagree. Starts no pool and measures
no pipes.

    python -m tools.bench_verifier --golds FILE.jsonl ... [--hostile 200] [--peer CHECKOUT] [--blocks 5] [--rows N]
                                   [--json PATH] [--disagreements PATH]

The rows of FILE hold `answer`, what follows a `####` in it where there is one. Of each four answers are made: the gold itself,
the gold rewritten (same value), a digit changed in it, and the gold of another row. `--hostile` adds so many answers that are
made to hang or fool a verifier (tests/unit/rewards/hostile.py).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.config.options import Rewards
from tests.unit.rewards.hostile import hostile_answers

LIBRARIES = ("math-verify", "latex2sympy2_extended", "sympy")
KINDS = ("same", "rewritten", "digit", "other", "hostile")
DEADLINE_SECONDS = Rewards().deadline_seconds  # of one answer; what is later counts as such and as so many seconds
CLOCK_SECONDS = 1e-6  # what the clock of a process can tell apart, about
CHILD = """
import importlib, json, logging, os, resource, signal, sys, time
logging.disable(logging.CRITICAL)
try:
    judge = importlib.import_module("engine.rewards.math.worker").judge
except ModuleNotFoundError:
    judge = importlib.import_module("engine.rewards.math_worker").judge

for gold, text in (("1/2", "2/4"), ("x^2+1", "1+x^2"), ("(1,2)", "(1,3)"), ("{1,2}", "2,1"), ("[0,1]", "0<x<1"), ("3 cm", "4")):
    for form in ("%s", r"$\\frac{%s}{1}$", r"\\begin{pmatrix} %s \\end{pmatrix}"):  # what is set up once
        judge(form % gold, r"\\boxed{" + form % text + "}", False)

def judged(deadline, items, place, out):
    # In a child that the signal of its own clock ends, as the pool's children end: no handler waits for one long operation.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
    for gold, text in items[place:]:
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, deadline)
        try:
            value = judge(gold, text, False)[0]
        except Exception:
            value = 0.0
        signal.setitimer(signal.ITIMER_PROF, 0)
        out.write(json.dumps((value, time.process_time() - started)) + chr(10))
        out.flush()

for line in sys.stdin:
    deadline, items = json.loads(line)
    found = []
    while len(found) < len(items):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            with os.fdopen(writing, "w") as out:
                judged(deadline, items, len(found), out)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as results:
            found += map(json.loads, results)
        os.waitpid(child, 0)
        if len(found) < len(items):
            found.append((None, deadline))
    print(json.dumps(found), flush=True)
"""


class Verifier:
    """One process of one checkout that judges what it is sent."""

    def __init__(self, checkout: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=checkout,
        )

    def __call__(self, items: list[tuple[str, str]]) -> list[tuple[float | None, float]]:
        """(value, CPU seconds) of each (gold, completion); the value is None past the deadline."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps((DEADLINE_SECONDS, items)) + "\n")
        self._process.stdin.flush()
        found: list[tuple[float | None, float]] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def rewritten(gold: str) -> str:
    """The same answer as another hand would write it."""
    text = gold.replace(r"\frac", r"\dfrac").replace("(", r"\left(").replace(")", r"\right)")
    return re.sub(r"\s*([+=])\s*", r" \1 ", text)


def with_other_digit(gold: str) -> str:
    """The gold with its last digit one higher; an x behind it where it has none."""
    return re.sub(r"\d(?=\D*$)", lambda found: str((int(found[0]) + 1) % 10), gold) if re.search(r"\d", gold) else gold + "x"


def answers(golds: list[str], num_hostile: int = 0, seed: int = 0) -> list[tuple[str, str, str]]:
    """(kind, gold, completion), in a fixed random order."""
    draw = random.Random(seed)
    made = []
    for gold in golds:
        given = gold, rewritten(gold), with_other_digit(gold), draw.choice(golds)
        made += [(kind, gold, rf"The final answer is $\boxed{{{text}}}$.") for kind, text in zip(KINDS[:4], given, strict=True)]
    made += [("hostile", gold, text) for gold, text in hostile_answers(num_hostile, seed)]
    draw.shuffle(made)
    return made


def rates(blocks: list[list[tuple[float | None, float]]]) -> dict[str, float]:
    """What (value, CPU seconds) by blocks, some of them empty, come to. The clock may read nothing for a few fast answers."""
    values = [value for block in blocks for value, _ in block]
    return {
        "num_answers": len(values),
        "answers_per_second": statistics.median(
            len(block) / max(sum(seconds for _, seconds in block), CLOCK_SECONDS) for block in blocks if block
        ),
        "share_right": sum(value == 1.0 for value in values) / len(values),
        "num_late": values.count(None),
    }


def measure(checkouts: dict[str, Path], items: list[tuple[str, str, str]], num_blocks: int) -> dict[str, Any]:
    """Per checkout and kind: answers a CPU second (median of the blocks that hold such), share that scores 1, how many are
    late. No more blocks than items; kinds without items are left out."""
    verifiers = {name: Verifier(checkout) for name, checkout in checkouts.items()}
    blocks = [items[start::num_blocks] for start in range(min(num_blocks, len(items)))]
    found: dict[str, list[list[tuple[float | None, float]]]] = {name: [] for name in checkouts}
    for number, block in enumerate(blocks):
        for name in list(verifiers) if number % 2 == 0 else reversed(list(verifiers)):
            found[name].append(verifiers[name]([(gold, text) for _, gold, text in block]))
    for verifier in verifiers.values():
        verifier.close()
    figures: dict[str, Any] = {}
    for name, results in found.items():
        judged = [
            [(kind, *pair) for (kind, *_), pair in zip(block, result, strict=True)]
            for block, result in zip(blocks, results, strict=True)
        ]
        figures[name] = {"all": rates([[row[1:] for row in block] for block in judged])}
        for kind in KINDS:
            chosen = [[row[1:] for row in block if row[0] == kind] for block in judged]
            if any(chosen):
                figures[name][kind] = rates(chosen)
    figures["disagreements"] = [
        {"kind": kind, "answer": gold, "completion": text, **dict(zip(found, (pair[0] for pair in pairs), strict=True))}
        for number, block in enumerate(blocks)
        for (kind, gold, text), *pairs in zip(block, *(results[number] for results in found.values()), strict=True)
        if len({pair[0] for pair in pairs}) > 1
    ]
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golds", type=Path, nargs="+", required=True, metavar="FILE", help="JSON lines with `answer`")
    parser.add_argument("--hostile", type=int, default=0, metavar="N", help="so many hostile answers too")
    parser.add_argument(
        "--peer", type=Path, metavar="CHECKOUT", help="another checkout of the engine, measured in turn with this one"
    )
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--rows", type=int, help="only so many rows of each file")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file too")
    parser.add_argument("--disagreements", type=Path, metavar="PATH", help="write the answers judged differently, JSON lines")
    options = parser.parse_args()
    golds = [
        str(json.loads(line)["answer"]).rpartition("#### ")[2]
        for path in options.golds
        for line in path.read_text("utf-8").splitlines()[: options.rows]
    ]
    if not golds:
        parser.error("the files of --golds hold no rows: give JSON lines with `answer`, and --rows of at least 1")
    if options.blocks < 1:
        parser.error(f"--blocks must be at least 1, found {options.blocks}")
    checkouts = {"here": Path(__file__).parents[1]} | ({"peer": options.peer} if options.peer else {})
    figures = measure(checkouts, answers(golds, options.hostile), options.blocks)
    disagreements = figures.pop("disagreements")
    print(f"{'verifier':9}{'answers':11}{'a second':>9}{'score 1':>9}{'late':>6}")
    for name, kinds in figures.items():
        for kind, row in kinds.items():
            print(f"{name:9}{kind:11}{row['answers_per_second']:9.1f}{row['share_right']:9.1%}{row['num_late']:6}")
    if options.peer:
        ratio = figures["here"]["all"]["answers_per_second"] / figures["peer"]["all"]["answers_per_second"]
        print(f"here / peer, all answers: {ratio:.2f}; judged differently: {len(disagreements)}")
    report = {
        "num_golds": len(golds),
        "versions": {name: version(name) for name in LIBRARIES},
        "figures": figures,
        "num_disagreements": len(disagreements),
    }
    print(json.dumps(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.disagreements:
        options.disagreements.write_text("".join(json.dumps(row) + "\n" for row in disagreements), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
