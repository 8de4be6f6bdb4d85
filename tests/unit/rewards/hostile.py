"""Answers made to hang, crash or fool a verifier, from a fixed seed: towers of powers, factorials, binomials, long sums, deep
and wide expressions, malformed text. None of them equals its gold answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

Draw = random.Random

GOLDS = (
    *("57", r"\frac{1}{2^{99}}", r"\pi", "0.125", "x^2+1=0", "y = 2x+3", "(1,2)", r"\{1,2\}", "[0,1]", r"\text{even}"),
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
)


def size(draw: Draw, largest: int) -> int:
    """From 2 to `largest`, small as often as large."""
    return round(2 * (largest / 2) ** draw.random())


def digits(draw: Draw, most: int) -> str:
    return "".join(draw.choices("123456789", k=size(draw, most)))


def tower(draw: Draw) -> str:
    height = draw.randint(2, 6)
    return "^{".join(digits(draw, 6) for _ in range(height)) + "}" * (height - 1)


def nested(draw: Draw, before: str, middle: str, after: str, deepest: int) -> str:
    depth = size(draw, deepest)
    return before * depth + middle + after * depth


def polynomial(draw: Draw) -> str:
    return "+".join(f"{draw.randint(2, 99)}x^{{{draw.randint(2, 60)}}}" for _ in range(size(draw, 40)))


def noise(draw: Draw) -> str:
    pieces = [*"\\{}$^_=", "\\frac", "\\sqrt", "\\boxed", "\\text{", *"²½\x00\udcff<7"]
    return "".join(draw.choices(pieces, k=size(draw, 2000)))


BOXED: tuple[Callable[[Draw], str], ...] = (
    tower,
    lambda d: f"{digits(d, 9)}" + "!" * d.randint(1, 6),
    lambda d: rf"\binom{{{digits(d, 10)}}}{{{digits(d, 10)}}}",
    lambda d: rf"\sum_{{i=1}}^{{{digits(d, 10)}}} \frac{{1}}{{i^{d.randint(1, 5)}+7}}",
    lambda d: rf"\prod_{{i=1}}^{{{digits(d, 10)}}} (i^2+1)",
    lambda d: rf"\int_0^1 x^{{{tower(d)}}} e^{{-x^x}} dx",
    lambda d: rf"\lim_{{x\to 0}} \frac{{\sin({polynomial(d)})}}{{{polynomial(d)}}}",
    lambda d: rf"{digits(d, 6)}^{{{digits(d, 10)}}} \bmod {digits(d, 5)}",
    lambda d: rf"\log_{{{digits(d, 5)}}} ({tower(d)})",
    lambda d: rf"\sin({tower(d)})",
    lambda d: digits(d, 1_000_000),
    lambda d: "0." + digits(d, 1_000_000),
    lambda d: nested(d, "(", "3", ")", 2000),
    lambda d: nested(d, r"\frac{1}{1+", "3", "}", 2000),
    lambda d: nested(d, r"\sqrt{2+", "3", "}", 1000),
    lambda d: nested(d, r"\left\{", "3", r"\right\}", 500),
    lambda d: nested(d, r"\boxed{", "3", "}", 2000),
    lambda d: r"\{" + ",".join(map(str, range(3, 3 + size(d, 3000)))) + r"\}",
    lambda d: r"\cup".join(f"({2 * i + 3},{2 * i + 4})" for i in range(size(d, 300))),
    lambda d: r"\begin{pmatrix}" + r"\\".join(tower(d) for _ in range(size(d, 50))) + r"\end{pmatrix}",
    lambda d: rf"({polynomial(d)})^{{{digits(d, 4)}}}",
    lambda d: f"{polynomial(d)} = {polynomial(d)}",
    lambda d: rf"\frac{{{polynomial(d)}}}{{{polynomial(d)}}} = 0",
    lambda d: "x=" + "=".join(map(str, range(60, 60 + size(d, 1000)))),
    lambda d: r"\approx ".join(tower(d) for _ in range(size(d, 30))),
    lambda d: rf"|x-{digits(d, 5)}| < {tower(d)}",
    lambda d: r"\pm ".join(digits(d, 3) for _ in range(size(d, 40))),
    lambda d: r"3\text{ or }" * size(d, 300),
    noise,
)
WHOLE: tuple[Callable[[Draw], str], ...] = (
    lambda d: r"\boxed{3}" * size(d, 100_000),
    lambda d: r"\boxed{" * size(d, 100_000),
    lambda d: "<think>" * size(d, 100_000) + "</think>" * size(d, 3),
    lambda d: "the answer is " + "^".join(digits(d, 3) for _ in range(d.randint(2, 6))),
    lambda d: "$" * size(d, 3000) + "3" + "$" * size(d, 3000),
    lambda d: "final answer is " * size(d, 200) + "$3$",
    lambda d: "3 , " * size(d, 1000),
    noise,
)


def hostile_answers(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """(gold answer, completion), every kind in turn."""
    draw = random.Random(seed)
    kinds = len(BOXED) + len(WHOLE)
    for index in range(count):
        kind = index % kinds
        text = rf"\boxed{{{BOXED[kind](draw)}}}" if kind < len(BOXED) else WHOLE[kind - len(BOXED)](draw)
        yield draw.choice(GOLDS), text
