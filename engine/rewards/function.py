"""A reward that the user wrote: a Python function that is called once a completion, in a worker process of its own.

It is named in rewards.function, as path/to/file.py:name or package.module:name, and has the signature

    def name(problem: str, answer: str, completion: str) -> float

Its arguments are passed by name; its result must be a finite number and depend on its arguments only, since equal ones are
judged once. What it prints comes out on stderr. It is loaded once a worker and called in a forked child, so a module of its
own that starts threads or opens a GPU while it is imported will not do.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from engine.config.options import Rewards
from engine.core.errors import ConfigError
from engine.core.types import Prompt
from engine.rewards.pool.workers import Request, WorkerReward


class FunctionReward(WorkerReward):
    """The user's function behind killable processes. A result that is no finite number, or an exception, has the status
    `invalid` and counts as a failure; the first error of a worker stands on stderr."""

    MODULE = "engine.rewards.function_worker"

    def __init__(self, config: Rewards) -> None:
        """Raises ConfigError when the function is not named, or its file, name or signature is not as it must be."""
        if config.function is None:
            raise ConfigError("rewards.function is required by a reward 'function' and missing: name path/to/file.py:name")
        super().__init__(config, config.function)
        self.start()

    def _request(self, prompt: Prompt, text: str) -> Request:
        return prompt.problem, prompt.answer, text


def source_file(function: str) -> Path | None:
    """The file of code that `function`, as in rewards.function, names; None for a module without one, such as a built-in.
    Nothing of the user's is imported: a module is looked for where a worker would look, the working directory first."""
    place = function.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    package, *rest = place.split(".")
    spec = PathFinder.find_spec(package, [os.getcwd(), *sys.path]) or importlib.util.find_spec(package)
    for part in rest:  # by its last name alone: the parents of a full one would have to be imported
        folders = spec.submodule_search_locations if spec is not None else None
        spec = PathFinder.find_spec(part, list(folders)) if folders else None
    found = Path(spec.origin) if spec is not None and spec.origin is not None else None
    return found if found is not None and found.is_file() else None
