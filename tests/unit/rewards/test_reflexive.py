"""A gold answer in a box is right, letter for letter: over the golds of the shared data sets, the mathematics of their
solutions, and generated answers of many forms from a fixed seed. What must be symmetric is, and what a digit tells apart stays
apart. The judge is called in this process: equal text needs no algebra, so nothing here can run for long.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

import pytest

from engine.rewards.math.answers import boxed_answer
from engine.rewards.math.normal import key, normal
from engine.rewards.math.worker import judge
from tests.shared_data import SHARED_DATA, needs_shared_data

Draw = random.Random
RIGHT = (1.0, "ok")


def whole(draw: Draw) -> str:
    return str(draw.randint(-(10 ** draw.randint(1, 9)), 10 ** draw.randint(1, 9)))


def small(draw: Draw) -> str:
    return str(draw.randint(2, 99))


def fraction(draw: Draw) -> str:
    return rf"\{draw.choice(['frac', 'dfrac', 'tfrac'])}{{{small(draw)}}}{{{small(draw)}}}"


def value(draw: Draw) -> str:
    made: tuple[Callable[[Draw], str], ...] = (
        whole,
        fraction,
        lambda d: f"{whole(d)}.{small(d)}",
        lambda d: rf"{small(d)}\sqrt{{{small(d)}}}",
        lambda d: rf"\frac{{{small(d)}\pi}}{{{small(d)}}}",
        lambda d: f"{small(d)}x^{{{small(d)}}} {d.choice('+-')} {small(d)}",
        lambda d: rf"{small(d)} \times 10^{{{d.choice(['', '-'])}{small(d)}}}",
        lambda d: f"{small(d)}.{small(d)}e{d.choice(['', '-', '+'])}{small(d)}",
        lambda d: rf"0.\overline{{{small(d)}}}",
        lambda d: rf"{small(d)}.{small(d)}\ldots",
        lambda d: rf"\binom{{{small(d)}}}{{{small(d)}}}",
        lambda d: rf"\mathrm{{e}}^{{{small(d)}}}",
        lambda d: rf"E_{{{small(d)}}}+ f''({small(d)})",
        lambda d: rf"\operatorname{{foo}}({small(d)})",
        lambda d: rf"\sin {small(d)}^\circ",
    )
    return draw.choice(made)(draw)


FORMS: tuple[Callable[[Draw], str], ...] = (
    value,
    lambda d: f"${value(d)}$",
    lambda d: f"{value(d)}.",
    lambda d: rf"\approx {value(d)}",
    lambda d: rf"{d.choice('xyPA')} = {value(d)} \approx {value(d)}",
    lambda d: rf"x \approx {value(d)}, x \approx {value(d)}",
    lambda d: rf"\left\{{\begin{{array}}{{l}}x={value(d)} \\ y={value(d)}\end{{array}}\right.",
    lambda d: rf"\left\{{\begin{{array}}{{ll}} {value(d)} & x > {whole(d)} \\ 0 & x \le {whole(d)}\end{{array}}\right.",
    lambda d: rf"\begin{{cases}} {value(d)} & x<0 \\ {value(d)} & x\ge 0 \end{{cases}}",
    lambda d: rf"{value(d)} \text{{ {d.choice(['cm', 'apples', 'km/h east', 'million', 'm^2'])}}}",
    lambda d: rf"{small(d)} \text{{ ft }} {small(d)} \text{{ in}}",
    lambda d: f"${small(d)}$ {d.choice(['apples', 'wins', 'units to the left'])} and ${small(d)}$ pears",
    lambda d: rf"\{{{value(d)}, {value(d)}, {value(d)}\}}",
    lambda d: f"{d.choice('([')}{value(d)}, {value(d)}{d.choice(')]')}",
    lambda d: rf"(-\infty, {whole(d)}] \cup [{whole(d)}, \infty)",
    lambda d: rf"\{{x \mid x {d.choice('<>')} {value(d)}\}}",
    lambda d: rf"{whole(d)} \le x < {value(d)}",
    lambda d: rf"\begin{{pmatrix}} {value(d)} & {value(d)} \\ {value(d)} & {value(d)} \end{{pmatrix}}",
    lambda d: f"{value(d)}, {value(d)} and {value(d)}",
    lambda d: rf"{value(d)} \text{{ or }} {value(d)}",
    lambda d: rf"\text{{({d.choice('ABCDE')}) }} {value(d)}",
    lambda d: f"({d.choice('ABCDE')}) {value(d)}",
    lambda d: f"{value(d)} = 0",
    lambda d: rf"\text{{{d.choice(['No solution', 'all real numbers', '3 or 4', 'True', 'If $x$ then'])}.}}",
    lambda d: d.choice(
        ["No solution.", "none", "Monday", "even", "all reals", "C", "DNE", "yes", r"\varnothing", r"\mathbb{R}"]
    ),
    lambda d: rf"\frac{{{value(d)}",  # a brace is missing
    lambda d: f"{value(d)}}}, {{{value(d)}",
    lambda d: f"{small(d)}_{{{small(d)}}}",
    lambda d: rf"\${whole(d)}",
    lambda d: f"{small(d)}:{small(d)} p.m.",
    lambda d: rf"y = C_1 e^{{{small(d)}x}} + C_2 \cos({value(d)} x)",
    lambda d: rf"f(x) = {value(d)} \text{{ for }} x > {whole(d)}",
)


def generated(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [FORMS[place % len(FORMS)](draw) for place in range(count)]


def of_shared_data() -> set[str]:
    """The golds of the shared sets, and what their solutions put between dollars, with the dollars and without."""
    golds: set[str] = set()
    for path in sorted(SHARED_DATA.glob("*.jsonl")):
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            answer = str(row.get("answer") or "")
            golds.update((answer, answer.rpartition("####")[2].strip()))
            for inside in re.findall(r"(?<!\$)\$([^$]{1,200})\$(?!\$)", str(row.get("solution") or "")):
                golds.update((inside, f"${inside}$"))
    return {gold for gold in golds if gold.strip() and "boxed" not in gold}


def missed(golds: list[str]) -> list[str]:
    return [gold for gold in golds if judge(gold, rf"The answer is $\boxed{{{gold}}}$.", True) != RIGHT]


def test_five_thousand_generated_golds_equal_themselves() -> None:
    golds = generated(5000)
    assert len(set(golds)) > 4500, "they must differ"
    assert missed(golds) == []


@needs_shared_data()
def test_golds_of_the_shared_data_equal_themselves() -> None:
    golds = sorted(of_shared_data())
    assert len(golds) >= 5000
    assert missed(golds) == []


def test_how_an_answer_is_spaced_and_styled_says_nothing() -> None:
    """The gold in dollars, with display style, with a full stop, with other fractions, with wider spaces."""
    for gold in generated(640, seed=1):
        if boxed_answer(rf"\boxed{{{gold}}}") != gold:
            continue  # its braces do not match
        spaced = re.sub(r"(?<=[\s\d}])([+=])(?=[\s\d\\])", r"  \1  ", gold)
        for answer in (f"${gold}$", rf"\displaystyle {gold}", f"{gold}.", spaced, re.sub(r"\\[dt]frac", r"\\frac", gold)):
            assert judge(gold, rf"\boxed{{{answer}}}", False) == RIGHT, (gold, answer)


def test_a_normal_text_is_normal_at_once() -> None:
    for gold in generated(3200, seed=2):
        assert key(normal(normal(gold))) == key(normal(gold)), gold


def test_written_numbers_are_symmetric_and_other_numbers_stay_apart() -> None:
    draw = random.Random(3)
    for _ in range(500):
        digits, exponent = draw.randint(1, 999), draw.randint(-6, 6)
        written = [
            f"{digits}e{exponent}",
            f"{digits}E{exponent:+d}",
            rf"{digits} \times 10^{{{exponent}}}",
            rf"{digits}\cdot10^{{{exponent}}}",
            format(digits * 10**exponent, "d") if exponent >= 0 else rf"\frac{{{digits}}}{{{10**-exponent}}}",
        ]
        for gold in written:
            for answer in written:
                assert judge(gold, rf"\boxed{{{answer}}}", False) == RIGHT, (gold, answer)
            wrong = rf"\boxed{{{digits + 1} \times 10^{{{exponent}}}}}"
            assert judge(gold, wrong, False) == (0.0, "ok"), (gold, wrong)


@pytest.mark.parametrize(
    "forms",
    [
        [r"2 \le x < 5", "[2,5)", r"5 > x \ge 2", r"x \in [2, 5)", r"\{x \mid 2 \le x < 5\}", r"x \ge 2 \text{ and } x < 5"],
        [r"\mathbb{R}", r"(-\infty,\infty)", r"\text{all real numbers}", r"x \in \mathbb{R}", r"-\infty < x < \infty"],
        [r"\emptyset", r"\varnothing", r"\{\}", r"\text{no solution}", "No solutions."],
        [r"2\frac{3}{4}", "2 3/4", r"\frac{11}{4}", "2.75", "11/4", r"2 \dfrac34", "2¾"],
        ["1,234,567", r"1\,234\,567", "1 234 567", "1{,}234{,}567", "1.234.567", "1'234'567", "1234567", r"1{,}234{,}567.0"],
        [r"\frac13", r"0.\overline{3}", r"0.\dot{3}", "0.333...", r"0.333\ldots", "0.(3)", "1/3", "⅓"],
        [r"3 \text{ million}", "3000000", "3e6", r"3 \times 10^6", r"\$3 \text{ million}"],
        [r"\sin 30^\circ", r"\frac12", r"\sin(30^{\circ})", "0.5"],
        [
            r"6 \text{ ft } 2 \text{ in}",
            "6'2''",
            r"\text{6 feet 2 inches}",
            r"6\text{ feet and }2\text{ inches}",
            r"74\text{ inches}",
        ],
        [
            r"x < 1 \text{ or } x > 3",
            r"(-\infty,1) \cup (3,\infty)",
            r"x > 3 \text{ or } 1 > x",
            r"(3, \infty) \cup (-\infty, 1)",
        ],
    ],
)
def test_forms_of_one_answer_equal_each_other(forms: list[str]) -> None:
    wrong = [(gold, answer) for gold in forms for answer in forms if judge(gold, rf"\boxed{{{answer}}}", False) != RIGHT]
    assert wrong == []
