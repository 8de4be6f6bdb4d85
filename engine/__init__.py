"""Offline, semi-online and online RL post-training for Llama models. The names below are the Python API; what else is in the
package may change. They are imported when they are first used, so that `import engine` costs nothing and needs no torch.

    config = engine.load_config("configs/quickstart.toml", ["sync.sync_interval=10"])
    for event in engine.train(engine.override(config, {"run.seed": 1, "run.directory": "runs/seed-1"})):
        if isinstance(event, engine.Step):
            print(event.step, event.metrics["reward_mean"])

- `load_config(path, overrides)` and `override(config, {"section.key": value})` make configurations.
- `resolve(config)` says what follows from one (`Spec`), `check(config)` also whether anything can be seen wrong with it.
- `train(config, resume)` and `fine_tune(config)` run it and yield events: `Step`, `Evaluation`, `Note`, `Warning`,
  `Restart`, `Activity` (something that takes a while begins, goes on or is done), `Done`.
- `evaluate(config)`, `score(file, reward)` and `plan(config)` give figures.
- `register(part)` gives the name by which an option chooses a class or function of yours: an `Algorithm` (or a
  `GroupLoss` in plain torch), `Reward`, `Transport` or `Schedule`.
- Every error is a `SemionError`; its `faults` are all that was found.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PLACES = {  # of every name of the API
    "load_config": "engine.config.load",
    "override": "engine.config.load",
    "RunConfig": "engine.config.load",
    "SemionError": "engine.core.errors",
    "resolve": "engine.run.spec",
    "Spec": "engine.run.spec",
    "check": "engine.api.preflight",
    "train": "engine.api.training",
    "fine_tune": "engine.api.training",
    "evaluate": "engine.api.evaluating",
    "score": "engine.commands.scoring:score_file",
    "plan": "engine.api.planning",
    "Machine": "engine.capacity.transfer",
    "register": "engine.api.registering",
    "Step": "engine.api.events",
    "Evaluation": "engine.api.events",
    "Note": "engine.api.events",
    "Warning": "engine.api.events",
    "Restart": "engine.api.events",
    "Activity": "engine.api.events",
    "Done": "engine.api.events",
    "Algorithm": "engine.algorithms.base",
    "GroupLoss": "engine.algorithms.group",
    "Reward": "engine.rewards.base",
    "Transport": "engine.bridge.transports.base",
    "Schedule": "engine.config.schedules.base",
}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    """Imports a name of the API when it is first used."""
    if name not in _PLACES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]
