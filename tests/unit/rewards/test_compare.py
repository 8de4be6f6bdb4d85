"""The parts of the comparison alone: one way of writing, written numbers, quantities, choices, regions, names of equations, and
that what cannot be equal is refused before anything dear is computed. Verdicts are the table's (test_verifier.py).
"""

from __future__ import annotations

import subprocess
import sys
import time
from fractions import Fraction

import pytest

from engine.rewards.math import compare, forms, regions
from engine.rewards.math.normal import key, normal
from engine.rewards.math.numbers import number
from engine.rewards.math.quantities import compounds_equal, quantity
from engine.rewards.math.worker import judge


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("4.5e3", Fraction(4500)),
        (r"-1.5\,\mathrm{E}{-2}", Fraction(-3, 200)),
        (r"6.02 x 10^23", Fraction(602) * 10**21),
        ("0.1(6)", Fraction(1, 6)),
        (r"0.1\dot{2}3\dot{4}", Fraction(137, 1110)),
        ("0.1666...", Fraction(1, 6)),
        ("3.14159...", Fraction("3.14159")),
        ("2 3/4", Fraction(11, 4)),
        (r"-1\frac12", Fraction(-3, 2)),
        ("1'234'567.5", Fraction("1234567.5")),
        ("½", Fraction(1, 2)),
        ("3e^2", None),
        ("1 2", None),
        ("2 5/3", None),
        (r"1 \text{ and } \frac12", None),
        ("52_8", None),
        (r"\frac{1}{0}", None),
        ("1e999999999", None),
    ],
)
def test_written_numbers(written: str, value: Fraction | None) -> None:
    found = number(normal(written))
    assert (found.value if found is not None else None) == value


def test_words_and_units_behind_a_value() -> None:
    found = quantity(normal(r"12 \text{ km/h east}"))
    assert (found.value, found.words, found.units) == ("12", {"east"}, {"km", "h"})
    assert quantity(normal(r"3 \text{ million dollars}")).factor == 10**6
    assert quantity(normal("2t")).value == "2t" and quantity(normal(r"\mathrm{e}^{2}")).value == r"\text{e}^{2}"
    assert quantity(normal(r"57\text{ or 3}")).goes_on and not quantity(normal(r"57\text{ m}^2")).goes_on


def test_quantities_of_several_units_count_all_of_them() -> None:
    gold = normal(r"2 \text{ hr } 30 \text{ min}")
    for same in ("2h 30m", r"150 \text{ minutes}", r"\text{2 hours and 30 minutes}", r"2.5 \text{ hours}"):
        assert compounds_equal(gold, normal(same)) is True, same
    for other in ("2", r"2 \text{ hr } 45 \text{ min}", r"30 \text{ hr } 2 \text{ min}", r"150"):
        assert compounds_equal(gold, normal(other)) is False, other
    assert compounds_equal(normal(r"3 \text{ cm}, 4 \text{ cm}"), normal(r"7 \text{ cm}")) is None


@pytest.mark.parametrize(
    ("text", "letter", "rest"),
    [
        (r"\textbf{(A)}", "A", ""),
        ("A.", "A", ""),
        (r"\text{Option A}", "A", ""),
        (r"\mathrm{(C) \ } 7", "C", "7"),
        ("(A) or (B)", None, None),
        ("(A) 5 (B) 6", None, None),
        ("AB", None, None),
        ("(A)^2", None, None),
        ("x", None, None),
    ],
)
def test_choices(text: str, letter: str | None, rest: str | None) -> None:
    found = forms.choice(normal(text))
    assert (found.letter if found else None, found.rest if found else None) == (letter, rest)


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("5 > x >= 2", "[2,5)"),
        (r"\{t \mid t \ne 2\}", r"(-\infty,2)\cup(2,\infty)"),
        (r"x > 1 \text{ and } x \le 3", "(1,3]"),
        ("]2;5]", "(2,5]"),
        (r"\text{all reals except } 1", r"(-\infty,1)\cup(1,\infty)"),
        (r"-\infty < x \le 3", r"(-\infty,3]"),
        ("x > y", None),
        ("3x+4 > 10", None),
        ("x = 2", None),
        ("(1,2,3)", None),
        ("1 < x > 0", None),
    ],
)
def test_regions(text: str, latex: str | None) -> None:
    found = regions.region(normal(text))
    assert (found.latex if found else None) == latex


NAMES = (
    "x",
    "AB",
    "x_1",
    "f(x)",
    "f'(x)",
    "f^{-1}(x)",
    "E[X]",
    r"P(A \cap B)",
    "y(0)",
    r"\text{Area}",
    r"\angle ABC",
    "|AB|",
    "[ABC]",
)
MORE_NAMES = (r"\frac{dy}{dx}", r"\theta", "S_{ABC}", "(x,y)")
NO_NAMES = (
    "2x",
    "x-5",
    "x(x-22)",
    "a(b+c)",
    "n(n+1)",
    "xy",
    "x^2",
    "|x|",
    r"\sin x",
    r"\cos\theta",
    r"\sqrt{x}",
    "x+y",
    r"\log(x)",
    "n!",
)


def test_what_stands_on_the_left_of_a_value() -> None:
    assert [name for name in NAMES + MORE_NAMES if not forms.is_name(normal(name))] == []
    assert [other for other in NO_NAMES if forms.is_name(normal(other))] == []


def test_functions_are_equal_wherever_both_are_real() -> None:
    def same(a: str, b: str) -> bool:
        return compare.same_function(compare._parsed(a), compare._parsed(b))

    assert same(r"\sqrt{\frac{1}{n}}", r"\frac{1}{\sqrt{n}}") and same(r"\binom{2n}{n}", r"\frac{(2n)!}{(n!)^{2}}")
    assert not same(r"\sqrt{x^{2}}", "x") and not same(r"\ln(x^{2})", r"2\ln(x)") and not same("x", "y") and not same("2", "2")


def test_what_cannot_be_equal_is_refused_without_algebra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solution of a differential equation for a number took 17 seconds; so did other pairs of equations."""

    def dear(*_: object, **__: object) -> bool:
        raise AssertionError("Math-Verify was asked")

    monkeypatch.setattr(compare, "verify", dear)
    for gold, answer in (
        (r"x=\frac{9}{2}", r"y=e^{-x/2}(c_1\cos\frac{3x}{2}+c_2\sin\frac{3x}{2})"),
        (r"y=c_1 e^{2x}+c_2 e^{-2x}", r"y=e^{-x/2}(c_1\cos\frac{3x}{2}+c_2\sin\frac{3x}{2})"),
        (r"\frac{1}{3}", r"\sqrt{2}"),
        ("57", r"58 \text{ cm}"),
        ("2x+1", "2x+2"),
        (r"\sqrt{x^2+1}", r"x+y+1"),
    ):
        assert judge(gold, rf"\boxed{{{answer}}}", False) == (0.0, "ok"), (gold, answer)


def test_text_is_read_in_linear_time() -> None:
    pieces = [
        "x",
        "1 ",
        "123 ",
        "1.",
        r"\text{a}",
        "{",
        "(",
        "=",
        r"\approx ",
        "<",
        "^{",
        "'",
        r"\frac",
        "$",
        r"\,",
        "1e1",
        "5 cm ",
        "A) ",
    ]
    pieces += [r"\dot{1}", "...", "so the answer is ", "6 ft ", r"\{", "x>", r"\circ", "|", "or "]
    started = time.process_time()
    for piece in pieces:
        text = normal((piece * 4000)[:4000])
        key(text)
        for read in (
            forms.unlabelled,
            forms.choice,
            regions.region,
            forms.is_name,
            forms.marks,
            forms.in_radians,
            forms.entries,
        ):
            read(text)
        for convert in (forms.members, forms.oriented, forms.readable, quantity, number):
            convert(text)
    assert time.process_time() - started < 15


def test_the_text_half_imports_no_algebra() -> None:
    modules = "normal, numbers, quantities, forms, answers"
    heavy = "{'sympy', 'torch', 'math_verify'}"
    code = f"import sys; from engine.rewards.math import {modules}; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("gold", "answer", "value"),
    [
        (r"\sum_{k=1}^n k^2", r"\sum_{k=1}^m k^2", 0.0),
        (r"\sum_{k=1}^n \frac{1}{k^3+1}", r"\sum_{k=1}^m \frac{1}{k^3+1}", 0.0),
        (r"\sum_{k=0}^n \binom{n}{k} x^k", r"(1+x)^n", 1.0),
        (r"\binom{2n}{n}", r"\frac{(2n)!}{n!(n+1)!}", 0.0),
        (r"\prod_{i=1}^n i", "n!", 1.0),
        (r"\sum_{i=1}^n i", r"\binom{n+1}{2}", 1.0),
    ],
)
def test_what_is_counted_with_is_compared_at_whole_numbers_and_at_once(gold: str, answer: str, value: float) -> None:
    """Math-Verify alone takes seconds of CPU time for each, or does not come back."""
    started = time.process_time()
    assert judge(gold, rf"\boxed{{{answer}}}", False) == (value, "ok")
    assert time.process_time() - started < 1.0
