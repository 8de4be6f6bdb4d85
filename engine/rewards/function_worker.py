"""The process that calls a user's function, started by engine/rewards/pool/workers.py. It loads the function from a file or a
module and checks name and signature; deadline, memory and what becomes of an exception are engine/rewards/pool/worker.py's.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from types import ModuleType

from engine.rewards.pool.worker import Judge, run

ARGUMENTS = ("problem", "answer", "completion")


def load(arguments: list[str]) -> Judge | str:
    """The judge around the function that the one argument names; a sentence of a ConfigError when there is none."""
    (name,) = arguments
    place, _, attribute = name.rpartition(":")
    is_file = place.endswith(".py")
    if not place or not attribute:
        return f"rewards.function must read path/to/file.py:name or package.module:name; found {name!r}: add the colon"
    if is_file and not Path(place).is_file():
        return f"rewards.function must name a file that exists; found none at {place}: check the path"
    try:
        module = _module_of_file(Path(place)) if is_file else importlib.import_module(place)
    except (ImportError, SyntaxError) as error:
        return f"rewards.function must name a module that can be imported; found {place} with {error!r}: mend it"
    function = getattr(module, attribute, None)
    if not callable(function):
        return f"rewards.function must name a function of {place}; found {attribute} as {function!r}: check the name"
    try:
        inspect.signature(function).bind(**dict.fromkeys(ARGUMENTS, ""))
    except (TypeError, ValueError) as error:
        return (
            f"rewards.function must take the arguments {', '.join(ARGUMENTS)} by name; found {attribute} in {place}: "
            f"{error}: change its signature"
        )
    return _judge_of(function)


def _module_of_file(path: Path) -> ModuleType:
    """The file as a module; what lies beside it can be imported, as when Python runs it."""
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location("rewards_function", path)  # no library's name, whatever the file's
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as an import does, before the code runs: dataclasses look there
    spec.loader.exec_module(module)
    return module


def _judge_of(function: Callable[..., object]) -> Judge:
    def judge(problem: str, answer: str, completion: str) -> tuple[float, str]:
        value = function(problem=problem, answer=answer, completion=completion)
        if not isinstance(value, Real) or not math.isfinite(value):
            raise TypeError(f"rewards.function must return a finite number; found {value!r}")
        return float(value), "ok"

    return judge


if __name__ == "__main__":
    run(load, silent=False)
