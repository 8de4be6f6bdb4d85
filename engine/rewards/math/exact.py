"""What is said of two answers as sympy objects beside Math-Verify: objections, made before it is asked because they are cheap
(exact values where both sides are exact, relative precision where one is a decimal, other symbols, chains of equalities that
contradict themselves), and equal functions that it does not recognise. Nothing here reads text.

Runs in the killable child alone: computing what an expression is worth may take for ever. Where sympy cannot tell, there is
no objection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from sympy import (
    Abs,
    Derivative,
    Eq,
    Expr,
    FiniteSet,
    Float,
    GreaterThan,
    I,
    Integer,
    Integral,
    Interval,
    LessThan,
    Limit,
    MatrixBase,
    Mod,
    N,
    Product,
    Rational,
    StrictGreaterThan,
    StrictLessThan,
    Sum,
    Symbol,
    Tuple,
    UnevaluatedExpr,
    binomial,
    ceiling,
    expand,
    factorial,
    floor,
    nan,
    oo,
    sign,
    solve,
    zoo,
)
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import And

DECIMAL_TOLERANCE = 1e-4  # relative, beside Math-Verify's own six digits behind the point
CHAIN_TOLERANCE = 1e-2  # between the members of "1/3 = 0.33", where people round
DIGITS, TOLERANCE = 50, Rational(1, 10**30)  # of exact values that are no ratios: relative
ROUNDING = Rational(1, 10**40)  # of what is computed to so many digits
POINTS = (Rational(3, 7), Rational(29, 11), Rational(127, 5))  # where symbolic expressions are compared
ORDERED = (Tuple, Interval)
COLLECTIONS = (*ORDERED, FiniteSet)
INEQUALITIES = (StrictLessThan, LessThan, StrictGreaterThan, GreaterThan)
NOT_BY_POINTS = (AppliedUndef, Derivative, Integral, Limit, Sum, Product, floor, ceiling, Mod, UnevaluatedExpr)
NOT_COUNTED = (AppliedUndef, Derivative, Integral, Limit, UnevaluatedExpr)
ENOUGH_POINTS = 4  # of whole numbers
MOST_TERMS = 200
IMAGINARY = {Symbol("i", real=True): I, Symbol("i", real=False): I, Symbol("i"): I}
UNDECIDED = (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError, RecursionError)


def objects(gold: Any, answer: Any, *, degrees: bool) -> bool:
    """Whether two answers are known to be unequal, as sympy objects of Math-Verify's `parse`; cheap, so that it is asked
    before Math-Verify is. The sign of `degrees` is dropped by that, so that what is equal in a chain with one (pi/2 = 90
    degrees) cannot be said."""
    try:
        return (not degrees and contradicts_itself(answer)) or differ(gold, answer)
    except UNDECIDED:
        return False


def contradict(first: Any, second: Any) -> bool:
    """Whether two values that are called about equal are known not to be."""
    try:
        return differ(first, second, CHAIN_TOLERANCE)
    except UNDECIDED:
        return False


def with_imaginary_unit(value: Any) -> Any:
    """The value with the letter i, which the parser leaves as it is, as the imaginary unit; not where it may count a sum."""
    if value.has(Sum, Product):
        return value
    try:
        return value.xreplace(IMAGINARY)
    except UNDECIDED:  # an interval of imaginary ends
        return value


def solutions_differ(gold: Any, answer: Any) -> bool:
    """Whether two equations that Math-Verify takes for equal have different solutions; solves them, so ask it last."""
    golds, answers = members_of(gold), members_of(answer)
    try:
        return bool(golds and answers) and _solutions_differ((golds[0], golds[-1]), (answers[0], answers[-1]))
    except UNDECIDED:
        return False


def same_function(gold: Any, answer: Any) -> bool:
    """Whether two expressions of the same symbols are worth the same to many digits wherever both are real: at points of
    positive numbers, where a root is what it seems, and at points with negative ones (`\\sqrt{x^2}` is no `x`)."""
    if not (isinstance(gold, Expr) and isinstance(answer, Expr)) or not gold.free_symbols:
        return False
    if gold.free_symbols != answer.free_symbols or gold.has(Float) or answer.has(Float):
        return False
    if gold.has(*NOT_BY_POINTS) or answer.has(*NOT_BY_POINTS):
        return False
    try:
        for values in (*_points(gold.free_symbols), *_points(gold.free_symbols, start=5)):
            at_gold, at_answer = _worth(gold, values), _worth(answer, values)
            if at_gold is None or at_answer is None or _apart(at_gold, at_answer, TOLERANCE):
                return False
        gold, answer = _with_real_roots(gold), _with_real_roots(answer)
        for values in _negative_points(gold.free_symbols):
            at_gold, at_answer = _worth(gold, values), _worth(answer, values)
            real = [value is not None and value.is_real for value in (at_gold, at_answer)]
            if any(real) and (not all(real) or _apart(at_gold, at_answer, TOLERANCE)):
                return False
    except UNDECIDED:
        return False
    return True


def same_number(gold: Any, answer: Any) -> bool:
    """Whether two exact numbers are worth the same to so many digits that only equal ones are: `3^{\\log_2 5}` and
    `5^{\\log_2 3}`, which no algebra turns into each other."""
    if not (is_number(gold) and is_number(answer)) or gold.has(Float, UnevaluatedExpr) or answer.has(Float, UnevaluatedExpr):
        return False
    try:
        values = [N(value, 2 * DIGITS) for value in (gold, answer)]
        if not all(value.is_finite and value.is_number for value in values):
            return False
        return bool(abs(values[0]) > 0 and abs(values[0] - values[1]) <= ROUNDING**2 * abs(values[0]))
    except UNDECIDED:
        return False


def _with_real_roots(expression: Any) -> Any:
    """The expression with odd roots of negative numbers real, as people read them, where sympy takes the complex one."""
    return expression.replace(
        lambda part: part.is_Pow and part.exp.is_Rational and part.exp.q % 2 == 1 and part.exp.q > 1,
        lambda part: (sign(part.base) * Abs(part.base) ** Rational(1, part.exp.q)) ** part.exp.p,
    )


def equal_at_integers(gold: Any, answer: Any) -> bool | None:
    """Whether two expressions of which one counts (sums and products up to a letter, factorials, binomials) are worth the same
    wherever the letters that are counted with are whole numbers: exactly, at several points. None where neither counts, or too
    few points can be computed: the algebra of such expressions takes seconds."""
    if not (isinstance(gold, Expr) and isinstance(answer, Expr)) or gold.has(Float) or answer.has(Float):
        return None
    # The parser's letters are other symbols in an expression with an i
    gold, answer = (side.xreplace({name: Symbol(name.name) for name in side.atoms(Symbol)}) for side in (gold, answer))
    counting = _counted(gold) | _counted(answer)
    if not counting or gold.has(*NOT_COUNTED) or answer.has(*NOT_COUNTED):
        return None
    num_points = 0
    try:
        for values in _whole_points(gold.free_symbols | answer.free_symbols, counting):
            both = [_counted_worth(side, values) for side in (gold, answer)]
            if None in both:
                continue
            if both[0] != both[1] and _apart(both[0], both[1], TOLERANCE):
                return False
            num_points += 1
    except UNDECIDED:
        return None
    return True if num_points >= ENOUGH_POINTS else None


def _counted(expression: Any) -> set[Any]:
    """The letters that must be whole numbers."""
    limits = {
        symbol
        for each in expression.atoms(Sum, Product)
        for limit in each.limits
        for end in limit[1:]
        for symbol in end.free_symbols
    }
    counts = {symbol for each in expression.atoms(factorial, binomial) for symbol in each.free_symbols}
    return (limits | counts) & expression.free_symbols


def _whole_points(symbols: Any, counting: set[Any]) -> Iterator[dict[Any, Any]]:
    """Points at which the letters that count are small whole numbers, the first one the smallest and the other way round."""
    names, others = sorted(counting, key=str), sorted(symbols - counting, key=str)
    for turn, start in enumerate((2, 3, 4, 1, 2, 3)):
        ordered = names if turn % 2 == 0 else names[::-1]
        values: dict[Any, Any] = {name: Integer(start + (turn // 2 + 2) * place) for place, name in enumerate(ordered)}
        yield values | {name: POINTS[turn % 3] + place * Rational(13, 17) for place, name in enumerate(others)}


def _counted_worth(expression: Any, values: dict[Any, Any]) -> Any | None:
    """The number that an expression is at a point; None where it is none, or has very many terms."""
    at_point = expression.subs(values)
    for each in at_point.atoms(Sum, Product):
        for _, start, end in each.limits:
            if not (start.is_Integer and end.is_Integer and end - start < MOST_TERMS):
                return None
    value = at_point.doit()
    return value if value.is_number and value.is_finite and value not in (nan, zoo) else None


def _worth(expression: Any, values: dict[Any, Any]) -> Any | None:
    """The number that an expression is at a point; None where it is none."""
    value = N(expression.subs(values), DIGITS)
    return value if value.is_number and value.is_finite and value not in (nan, zoo) else None


def _negative_points(symbols: Any) -> Iterator[dict[Any, Any]]:
    names = sorted(symbols, key=str)
    for signs in ((-1, -1), (-1, 1), (1, -1)):
        yield {name: signs[place % 2] * (Rational(37, 11) + place * Rational(13, 17)) for place, name in enumerate(names)}


def contradicts_itself(answer: Any) -> bool:
    """Whether two numbers in a chain of equalities differ: `1 = 2 = 3`, `x = 2 = 57`."""
    numbers = [member for member in members_of(answer) if is_number(member)]
    return any(numbers_differ(first, second, CHAIN_TOLERANCE) for first, second in pairwise(numbers))


def members_of(answer: Any) -> list[Any]:
    """The members of an equation, or of a chain in which each equation goes on where the one before ended."""
    links = _links(answer) if isinstance(answer, And) else [answer]
    if not all(isinstance(link, Eq) for link in links):
        return []
    if any(first.rhs != second.lhs for first, second in pairwise(links)):
        return []
    return [links[0].lhs, *(link.rhs for link in links)]


def _links(chain: Any) -> Sequence[Any]:
    """The relations of a chain in the order they were written, which sympy's own `args` loses."""
    links: Sequence[Any] = getattr(chain, "_unsorted_args", chain.args)
    return links


def differ(gold: Any, answer: Any, tolerance: float = DECIMAL_TOLERANCE) -> bool:
    """Whether two parsed answers are known to be unequal; kinds that cannot be compared here are not."""
    golds, answers = members_of(gold), members_of(answer)
    if golds and answers:
        return _equations_differ((golds[0], golds[-1]), (answers[0], answers[-1]), tolerance)
    gold, answer = golds[-1] if golds else gold, answers[-1] if answers else answer
    if isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase) and gold.shape == answer.shape:
        return any(differ(a, b) for a, b in zip(gold.flat(), answer.flat(), strict=True))
    if isinstance(gold, COLLECTIONS) or isinstance(answer, COLLECTIONS):
        return _collections_differ(gold, answer)
    if is_number(gold) and is_number(answer):
        return numbers_differ(gold, answer, tolerance)
    if isinstance(gold, And) and isinstance(answer, And):
        return any(differ(a, b) for a, b in zip(_links(gold), _links(answer), strict=False))
    if isinstance(gold, INEQUALITIES) and isinstance(answer, INEQUALITIES):
        return _inequalities_differ(gold, answer)
    if isinstance(gold, Expr) and isinstance(answer, Expr) and not isinstance(gold, Symbol) and not isinstance(answer, Symbol):
        return _functions_differ(gold, answer, tolerance)  # a symbol may be a word, which Math-Verify compares by its letters
    return False


def is_number(value: Any) -> bool:
    """Whether an object is an expression without symbols and without unknown functions."""
    return isinstance(value, Expr) and not value.free_symbols and not value.has(AppliedUndef)


def _collections_differ(gold: Any, answer: Any) -> bool:
    """The same of two where one at least has parts; the order counts where both have one. A set of one is its element."""
    golds, answers = _parts(gold), _parts(answer)
    if len(golds) != len(answers):
        return False
    if isinstance(gold, ORDERED) and isinstance(answer, ORDERED):
        return any(differ(a, b) for a, b in zip(golds, answers, strict=True))
    return not _same_elements(golds, answers)


def _parts(value: Any) -> Sequence[Any]:
    if isinstance(value, Interval):
        return value.start, value.end
    return value.args if isinstance(value, COLLECTIONS) else (value,)


def _same_elements(golds: Sequence[Any], answers: Sequence[Any]) -> bool:
    """Whether each element of either side has one of the other that it does not differ from."""
    return all(any(not differ(a, b) for b in answers) for a in golds) and all(
        any(not differ(a, b) for a in golds) for b in answers
    )


def numbers_differ(a: Any, b: Any, tolerance: float) -> bool:
    """Whether two expressions without symbols are worth different numbers; with a decimal among them, by more than
    `tolerance` times the larger one."""
    if a.has(UnevaluatedExpr) or b.has(UnevaluatedExpr):  # a percentage: Math-Verify lets 50% be 50 and 1/2
        return False
    a, b = a.doit(), b.doit()
    if a == b or {a, b} & {nan, oo, -oo, zoo}:
        return False
    decimal = a.has(Float) or b.has(Float)
    if isinstance(a, Rational) and isinstance(b, Rational):
        return True
    return _apart(a, b, Rational(tolerance) if decimal else TOLERANCE)


def _apart(a: Any, b: Any, tolerance: Any) -> bool:
    """Whether the distance of two values is more than `tolerance` times the larger one."""
    distance = abs(N(a - b, DIGITS))
    if distance < ROUNDING:  # as small as what rounding leaves of zero: more digits, or algebra, can tell
        if not (a.has(Float) or b.has(Float)) and abs(N(a - b, 4 * DIGITS)) < ROUNDING**3:
            return False
        return (a - b).equals(0) is False
    return bool(distance > tolerance * max(abs(N(a, DIGITS)), abs(N(b, DIGITS))))


def _functions_differ(a: Any, b: Any, tolerance: float) -> bool:
    """Whether two expressions, of the same symbols or not, differ at every point where both are tried."""
    if a.has(UnevaluatedExpr) or b.has(UnevaluatedExpr):
        return False
    decimal = a.has(Float) or b.has(Float)
    for values in _points(a.free_symbols | b.free_symbols):
        at_a, at_b = a.subs(values), b.subs(values)
        if not (at_a.is_number and at_b.is_number) or {at_a, at_b} & {nan, oo, -oo, zoo}:
            return False
        if not _apart(at_a, at_b, Rational(tolerance) if decimal else TOLERANCE):
            return False
    return True


def _points(symbols: Any, start: int = 0) -> Iterator[dict[Any, Any]]:
    names = sorted(symbols, key=str)
    for point in POINTS:
        yield {name: point + start + place * Rational(13, 17) for place, name in enumerate(names)}


def _inequalities_differ(gold: Any, answer: Any) -> bool:
    """Whether two inequalities are alike but for a constant: then one is true where the other is not."""
    a, b = ((side.lts - side.gts) for side in (gold, answer))
    difference = expand(a - b)
    return is_number(difference) and numbers_differ(difference, Integer(0), 0.0)


def _equations_differ(gold: tuple[Any, Any], answer: tuple[Any, Any], tolerance: float) -> bool:
    """Whether two equations (left, right) are unequal at first sight: of other symbols, or solved for one and the same
    symbol with right sides that differ."""
    if not all(isinstance(side, Expr) for side in (*gold, *answer)):
        return False
    symbols = (gold[0] - gold[1]).free_symbols
    if symbols != (answer[0] - answer[1]).free_symbols:
        return True
    if not symbols:
        return numbers_differ(gold[1], answer[1], tolerance)
    if gold[0] == answer[0] and isinstance(gold[0], Symbol) and gold[0] not in gold[1].free_symbols | answer[1].free_symbols:
        return differ(gold[1], answer[1], tolerance)
    return False


def _solutions_differ(gold: tuple[Any, Any], answer: tuple[Any, Any]) -> bool:
    """Whether two equations (left, right) have different solutions: neither is a multiple of the other, and solved for no
    symbol that both have do they give the same."""
    if not all(isinstance(side, Expr) for side in (*gold, *answer)):
        return False
    a, b = (left - right for left, right in (gold, answer))
    symbols = a.free_symbols
    if not symbols:
        return False
    ratios = [(a / b).subs(values) for values in _points(symbols)]
    if all(ratio.is_finite and not _apart(ratio, ratios[0], TOLERANCE) for ratio in ratios):
        return False
    for symbol in sorted(symbols, key=str):
        solutions = solve(a, symbol), solve(b, symbol)
        if all(solutions) and _same_elements(*solutions):
            return False
    return True
