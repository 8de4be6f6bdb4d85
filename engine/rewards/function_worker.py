"""The process that calls a user's function, started by engine/rewards/pool/workers.py. It loads the function from a file or a
module, says what its parameters ask for, and checks what it returns; deadline, memory and what becomes of an exception are
engine/rewards/pool's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from numbers import Real
from typing import Any

from engine.core.errors import ConfigError
from engine.core.registry import load_object
from engine.rewards.base import Reward, frozen_row
from engine.rewards.pool.worker import Judge, Loaded, run

OFFERED = ("problem", "answer", "completion", "row", "num_tokens", "finish_reason")  # what **kwargs takes, too
ASKED_FOR = (*OFFERED, "group", "parts")  # `parts` is a combining rule's
OF_AN_ANSWER = {"completion", "num_tokens", "finish_reason", "group", "parts"}
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def load(arguments: list[str]) -> Loaded | str:
    """The judge around the function that the second argument names and the first is the option of; a sentence of a ConfigError
    when there is none. A class that extends Reward is only said to be one: it judges on our side."""
    option, name = arguments
    try:
        function = load_object(name, option)
        if isinstance(function, type) and issubclass(function, Reward):
            return Loaded(_no_judge, {"is_class": True})
        asks, parts = _asks(function, name, option), _parts(function, name, option)
    except ConfigError as error:
        return str(error)
    facts = {
        "is_class": False,
        "asks": asks,
        "verifiable": bool(getattr(function, "verifiable", False)),
        "deterministic": bool(getattr(function, "deterministic", True)),
        "needs_answer": bool(getattr(function, "needs_answer", False)),
        "parts": parts,
    }
    return Loaded(_judge_of(function, asks), facts)


def _no_judge(*_: object) -> tuple[Any, str]:
    raise AssertionError("a class judges in the process that opens it")


def _parts(function: Any, name: str, option: str) -> list[str]:
    """The names that the function declares for the parts of its result."""
    parts = getattr(function, "parts", ())
    if isinstance(parts, str) or not isinstance(parts, Collection) or not all(isinstance(part, str) for part in parts):
        raise ConfigError(f"{option}: @reward(parts=...) must be a list of names; found {parts!r} of {name}: mend it")
    return list(parts)


def _is(kind: Callable[[Any], bool], function: Any) -> bool:
    """Whether a function, or the `__call__` of an object, is of this kind."""
    return kind(function) or kind(getattr(type(function), "__call__", None))  # noqa: B004, its kind is asked, not whether it is


def _asks(function: Any, name: str, option: str) -> list[str]:
    """The parameters that the function is passed. ConfigError names what cannot be."""
    if not callable(function) or isinstance(function, type):
        raise ConfigError(
            f"{option} must name a function, or a class that extends engine.rewards.base.Reward; found {name} as {function!r}"
        )
    if _is(inspect.isgeneratorfunction, function) or _is(inspect.isasyncgenfunction, function):
        raise ConfigError(f"{option} must name a function that returns its result; found {name}, which yields: use return")
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise ConfigError(f"{option} must name a function with a signature; found {name}: {error}: wrap it in one") from error
    asks = [parameter.name for parameter in parameters if parameter.kind in NAMED and parameter.name in ASKED_FOR]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        per_group = ("completion",) if "group" in asks else ()
        asks += [offered for offered in OFFERED if offered not in (*asks, *per_group)]
    unknown = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.name not in asks
        and parameter.kind in (*NAMED, parameter.POSITIONAL_ONLY)
    ]
    if unknown or not OF_AN_ANSWER & set(asks) or {"group", "completion"} <= set(asks):
        raise ConfigError(
            f"{option} must name a function that takes, by name, some of {', '.join(OFFERED)}, or `group` instead of "
            f"`completion`; found {name} with {', '.join(p.name for p in parameters) or 'no parameters'}: change its signature"
        )
    return asks


def _judge_of(function: Callable[..., Any], asks: list[str]) -> Judge:
    """The function as a judge of requests, which hold a value for each parameter that it asks for."""

    def arguments(request: tuple[Any, ...]) -> dict[str, Any]:
        named = dict(zip(asks, request, strict=True))
        for name in ("group", "num_tokens", "finish_reason"):
            if isinstance(named.get(name), list):
                named[name] = tuple(named[name])
        if "row" in named:
            named["row"] = frozen_row(named["row"])
        if "parts" in named:
            named["parts"] = dict(named["parts"])
        return named

    def checked(result: Any, named: dict[str, Any]) -> tuple[Any, str]:
        if "group" not in named:
            return _result(result), "ok"
        size = len(named["group"])
        if not isinstance(result, (list, tuple)) or len(result) != size:
            raise TypeError(f"a reward of a group must return a list of {size} results, in order; found {result!r:.200}")
        return [_result(each) for each in result], "ok"

    if _is(inspect.iscoroutinefunction, function):

        async def judge_awaited(*request: Any) -> tuple[Any, str]:
            named = arguments(request)
            return checked(await function(**named), named)

        return judge_awaited

    def judge(*request: Any) -> tuple[Any, str]:
        named = arguments(request)
        return checked(function(**named), named)

    return judge


def _result(value: Any) -> float | dict[str, float]:
    """A number, or named ones, as JSON can hold them. TypeError for anything else."""
    if isinstance(value, Mapping) and value and all(isinstance(name, str) for name in value):
        return {name: _number(part) for name, part in value.items()}
    return _number(value)


def _number(value: Any) -> float:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise TypeError(f"a reward must be a finite number, or a mapping of names to such; found {value!r:.200}")
    return float(value)


if __name__ == "__main__":
    run(load, silent=False)
