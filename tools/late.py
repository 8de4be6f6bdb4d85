"""What waits in the runs of tools/probe_in_flight.py: an engine, a trainer rank and a reward function that now and then do
nothing for up to two seconds, before a call, a step or a judgement, and otherwise are what every run has. When engine and rank
wait is drawn from a seed, and each of their waits is written down, so that a probe without any would be seen.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from engine.capacity.kv_cache import KvCache
from engine.config.load import RunConfig
from engine.core.importing import uncollected
from engine.inference.vllm_engine import VllmEngine
from engine.rewards.base import reward
from engine.rewards.registry import Judges
from engine.run.signals import Event
from engine.run.spec import Spec

MOST_SECONDS = 2.0  # of one wait
CALLS_SHARE, STEPS_SHARE, ANSWERS_SHARE = 0.2, 0.5, 0.1  # how many of an engine's calls, a rank's steps, a run's answers wait
WAITS = "waits"  # the file, in the folder of the runs
REWARDS_WAIT = "SEMION_PROBE_REWARDS_WAIT"  # "1" in the environment of a run whose reward is to wait (rewards.environment)


class Waits:
    """Draws from a seed whether to wait, and how long."""

    def __init__(self, seed: str, share: float, file: Path) -> None:
        self._draw, self._share, self._file = random.Random(seed), share, file

    def wait(self) -> None:
        """Perhaps waits."""
        chance, seconds = self._draw.random(), self._draw.uniform(0.0, MOST_SECONDS)
        if chance < self._share:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{seconds}\n")
            time.sleep(seconds)

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which perhaps waits first."""

        @wraps(function)
        def late(*arguments: Any, **options: Any) -> Any:
            self.wait()
            return function(*arguments, **options)

        return late


class LateEngine(VllmEngine):
    """The engine of a run, which waits before some of its calls."""

    def __init__(self, config: RunConfig, index: int, kv_cache: KvCache, seed: int) -> None:
        super().__init__(config, index, kv_cache)
        waits = Waits(f"{seed} engine {index}", CALLS_SHARE, config.run_directory.parent / WAITS)
        for name in ("submit", "collect", "steps_so_far", "go_on", "pause", "receive"):
            setattr(self, name, waits.before(getattr(self, name)))


class LateRank:
    """A trainer rank, which waits before it scores some steps and before it trains on some."""

    def __init__(self, spec: Spec, rank: int, host: str) -> None:
        from engine.megatron.importing import import_trainer

        with uncollected():
            import_trainer()
        from engine.run.rank import TrainerRank

        self._directory, self._index = spec.config.run_directory, rank
        self._rank = TrainerRank(spec, rank, host)

    def serve(self) -> int:
        """As TrainerRank."""
        return self._rank.serve()

    def train(self, port: int, engines: Any, judges: Judges, resume: bool) -> Iterator[Event]:
        """As TrainerRank."""
        from engine.megatron.policy import Policy

        seed = f"{self._directory.name} rank {self._index}{' resumed' * resume}"
        waits, policy = Waits(seed, STEPS_SHARE, self._directory.parent / WAITS), Policy
        for name in ("score", "train_step"):
            setattr(policy, name, waits.before(getattr(policy, name)))
        return self._rank.train(port, engines, judges, resume)


_answers = random.Random(os.getpid())


@reward(deterministic=False)  # else equal answers would be judged once
async def late(completion: str) -> float:
    """Worth nothing, and late for some answers."""
    if os.environ[REWARDS_WAIT] == "1" and _answers.random() < ANSWERS_SHARE:
        await asyncio.sleep(_answers.uniform(0.0, MOST_SECONDS))
    return 0.0
