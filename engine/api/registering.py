"""A part that a script defines, named so that every process of a run can import it: the reference that an option takes. The
file of the script is the registry; nothing is kept here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.core.errors import ConfigError


def register(part: type | Callable[..., Any]) -> str:
    """`path/to/file.py:Name` of a class or function, for the option that chooses such a part:

        override(config, {"algorithm.loss": register(MyLoss), "data.reward": register(my_reward)})

    A checkpoint records the file's SHA-256. Every process of the run loads the file anew, so a script that starts runs must
    start them under `if __name__ == "__main__":`. ConfigError for a part that no other process could find there.
    """
    name = getattr(part, "__qualname__", None)
    if name is None or not (inspect.isclass(part) or inspect.isfunction(part)):
        raise ConfigError(f"a registered part must be a class or a function; found {part!r}: define one with a name")
    if "<" in name:
        raise ConfigError(
            f"a registered part must be defined at the top of its file, where other processes find it; found {name}: move it "
            f"there"
        )
    file = getattr(sys.modules.get(part.__module__), "__file__", None)
    if file is None or not Path(file).is_file():
        raise ConfigError(
            f"a registered part must be defined in a file, which other processes load; found {name} of {part.__module__}, "
            f"which has none: write it into a file"
        )
    return f"{Path(file).resolve()}:{name}"
