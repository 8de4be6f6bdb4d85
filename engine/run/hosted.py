"""What runs in a process of a run: an object of ours, made there of the run's Spec, with a journal. Of Ray, whose
actor it is, it knows the daemon, with which it ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from engine.core.importing import uncollected
from engine.core.lifetimes import die_with_parent
from engine.observe.journal import Journal, traced
from engine.run.descriptors import raise_limit
from engine.run.spec import Spec

Needs = Literal["spec", "config"]

RAY_DAEMON = "raylet"  # as the kernel names what starts an actor
# What the processes run, imported there.
RANK = "engine.run.rank:TrainerRank"
ENGINE = "engine.inference.vllm_engine:VllmEngine"
REWARD_ENGINE = "engine.inference.reward_engine:RewardEngine"
JUDGES = "engine.rewards.serving:NodeJudges"


class Hosted:
    """What a process of ours runs: an object of a class that is imported there and nowhere else, so that the command needs
    no vLLM and no megatron-core. `kind` is "module:Class"; a test's own class may come as it is. What the process logs, and
    every error that leaves it, goes to `journal`. `text` is the run's Spec as JSON; the object is made of the Spec, or of its
    configuration where that is all it `needs`, and of `arguments`.

    The process ends with Ray's daemon, and that with a command that is killed: by itself it could go on for a minute, writing
    records and holding GPUs, while it asks a Ray that is gone."""

    def __init__(self, journal: Journal, kind: str | type, needs: Needs, text: str, *arguments: Any) -> None:
        if Path(f"/proc/{os.getppid()}/comm").read_text("utf-8").strip() == RAY_DAEMON:  # not a profiler between
            die_with_parent()
        journal.open()
        with traced(str(kind)):
            raise_limit()
            if isinstance(kind, str):
                kind = _imported(kind)
            assert isinstance(kind, type)
            spec = Spec.from_json(text)
            self._object = kind(spec if needs == "spec" else spec.config, *arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        """The value of one of its methods."""
        with traced(method):
            return getattr(self._object, method)(*arguments)

    def stream(self, method: str, *arguments: Any) -> Iterator[Any]:
        """What one of its methods yields."""
        with traced(method):
            yield from getattr(self._object, method)(*arguments)


def _imported(kind: str) -> type:
    """The class "module:Class"; a trainer rank's, after megatron-core."""
    module, _, name = kind.partition(":")
    with uncollected():
        if kind == RANK:
            from engine.megatron.importing import import_trainer

            import_trainer()
        found: type = getattr(import_module(module), name)
    return found


def hosting(kind: str | type) -> type:
    """`Hosted` under the name of what it hosts, which is how the process is then listed."""
    return type(kind.rpartition(":")[2] if isinstance(kind, str) else kind.__name__, (Hosted,), {})
