"""With this folder in PYTHONPATH every process of a run waits now and then, for up to SEMION_TEST_DELAY seconds drawn anew
each time: the trainer before a step, an engine before each of its calls, the reward before it judges. test_in_flight.py holds
that no bit of a run depends on it. Python imports this file by its name when it starts.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

DELAYED = {  # module: what of it waits first
    "engine.megatron.policy": ("Policy.train_step", "Policy.add_gradient"),
    "engine.inference.vllm_engine": ("VllmEngine.submit", "VllmEngine.collect", "VllmEngine.pause", "VllmEngine.receive"),
    "engine.rewards.registry": ("RoutedReward.score_as_they_arrive",),
}


def late(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which waits first."""

    @functools.wraps(function)
    def waiting(*arguments: Any, **options: Any) -> Any:
        time.sleep(random.SystemRandom().uniform(0.0, float(os.environ["SEMION_TEST_DELAY"])))
        return function(*arguments, **options)

    return waiting


class Finder(importlib.abc.MetaPathFinder):
    """Finds those modules as everybody does, and changes them once they are loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in DELAYED:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_delay(module: Any) -> None:
            load(module)
            for place in DELAYED[name]:
                *owners, last = place.split(".")
                owner = functools.reduce(getattr, owners, module)
                setattr(owner, last, late(getattr(owner, last)))

        spec.loader.exec_module = load_and_delay  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
