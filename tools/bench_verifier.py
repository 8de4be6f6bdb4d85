r"""How many answers a second one process judges, this checkout's verifier beside another's (`--peer`, any checkout with
`judge`), on the same answers block by block in turn. CPU seconds, so that a busy machine counts little; every process judges
the first block once before it is measured. Also where the two disagree. Starts no pool and measures no pipes.

    python -m tools.bench_verifier --golds FILE.jsonl [--peer CHECKOUT] [--blocks 5] [--json PATH] [--disagreements PATH]

The rows of FILE hold `answer`. Of each four answers are made: the gold itself, the gold rewritten (same value), a digit changed
in it, and the gold of another row.
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

LIBRARIES = ("math-verify", "latex2sympy2_extended", "sympy")
KINDS = ("same", "rewritten", "digit", "other")
DEADLINE_SECONDS = 10.0  # of one answer; what is later counts as such and as so many seconds
CHILD = """
import importlib, json, logging, signal, sys, time
logging.disable(logging.CRITICAL)
try:
    judge = importlib.import_module("engine.rewards.math.worker").judge
except ModuleNotFoundError:
    judge = importlib.import_module("engine.rewards.math_worker").judge
class Late(BaseException): pass
def late(*_): raise Late
signal.signal(signal.SIGPROF, late)
for line in sys.stdin:
    deadline, items = json.loads(line)
    found = []
    for gold, text in items:
        started = time.process_time()
        try:
            signal.setitimer(signal.ITIMER_PROF, deadline)
            value = judge(gold, text, False)[0]
        except Late:
            value = None
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        found.append((value, time.process_time() - started))
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


def answers(golds: list[str], seed: int = 0) -> list[tuple[str, str, str]]:
    """(kind, gold, completion), in a fixed random order."""
    draw = random.Random(seed)
    made = []
    for gold in golds:
        given = gold, rewritten(gold), with_other_digit(gold), draw.choice(golds)
        made += [(kind, gold, rf"The final answer is $\boxed{{{text}}}$.") for kind, text in zip(KINDS, given, strict=True)]
    draw.shuffle(made)
    return made


def measure(checkouts: dict[str, Path], items: list[tuple[str, str, str]], num_blocks: int) -> dict[str, Any]:
    """Per checkout and kind: answers a CPU second (median of the blocks), share that scores 1, how many are late."""
    verifiers = {name: Verifier(checkout) for name, checkout in checkouts.items()}
    blocks = [items[start::num_blocks] for start in range(num_blocks)]
    found: dict[str, list[list[tuple[float | None, float]]]] = {name: [] for name in checkouts}
    for verifier in verifiers.values():
        verifier([(gold, text) for _, gold, text in blocks[0][: len(blocks[0]) // 2]])
    for number, block in enumerate(blocks):
        for name in list(verifiers) if number % 2 == 0 else reversed(list(verifiers)):
            found[name].append(verifiers[name]([(gold, text) for _, gold, text in block]))
    for verifier in verifiers.values():
        verifier.close()
    figures: dict[str, Any] = {}
    for name, results in found.items():
        figures[name] = {}
        for kind in (*KINDS, "all"):
            rates, values = [], []
            for block, result in zip(blocks, results, strict=True):
                chosen = [pair for (of, *_), pair in zip(block, result, strict=True) if kind in (of, "all")]
                rates.append(len(chosen) / sum(seconds for _, seconds in chosen))
                values += [value for value, _ in chosen]
            figures[name][kind] = {
                "answers_per_second": statistics.median(rates),
                "share_right": sum(value == 1.0 for value in values) / len(values),
                "num_late": values.count(None),
            }
    figures["disagreements"] = [
        {"kind": kind, "answer": gold, "completion": text, **dict(zip(found, (pair[0] for pair in pairs), strict=True))}
        for number, block in enumerate(blocks)
        for (kind, gold, text), *pairs in zip(block, *(results[number] for results in found.values()), strict=True)
        if len({pair[0] for pair in pairs}) > 1
    ]
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golds", type=Path, required=True, metavar="FILE", help="JSON lines with `answer`")
    parser.add_argument(
        "--peer", type=Path, metavar="CHECKOUT", help="another checkout of the engine, measured in turn with this one"
    )
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--rows", type=int, help="only so many rows of the file")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file too")
    parser.add_argument("--disagreements", type=Path, metavar="PATH", help="write the answers judged differently, JSON lines")
    options = parser.parse_args()
    golds = [str(json.loads(line)["answer"]) for line in options.golds.read_text("utf-8").splitlines()][: options.rows]
    checkouts = {"here": Path(__file__).parents[1]} | ({"peer": options.peer} if options.peer else {})
    figures = measure(checkouts, answers(golds), options.blocks)
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
