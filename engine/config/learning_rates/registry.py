"""The learning-rate schedules by name, and the one that a configuration asks for."""

from __future__ import annotations

from engine.config.learning_rates.base import LearningRate
from engine.config.options import Optimizer
from engine.core.errors import ConfigError
from engine.core.registry import Registry

LEARNING_RATES: Registry[LearningRate] = Registry(
    "optimizer.schedule",
    "engine.config.learning_rates",
    "engine.config.learning_rates.base:LearningRate",
    support=("registry",),
)


def learning_rate_of(options: Optimizer) -> LearningRate:
    """The learning rate of every step. ConfigError for a name without a class."""
    made = LEARNING_RATES.load(options.schedule)
    return made(options.learning_rate, options.warmup_steps, options.decay_steps, options.floor_share * options.learning_rate)


def broken_learning_rate_rules(options: Optimizer) -> list[str]:
    """Sentences for options that the schedule lacks or has no use for: keys, rule, values found, fix."""
    o = options
    try:
        decays = LEARNING_RATES.load(o.schedule).decays
    except ConfigError as error:
        return [str(error)]
    if not decays and (o.decay_steps is not None or o.floor_share):
        return [
            f"optimizer.decay_steps and optimizer.floor_share are of schedules that decay; found {o.decay_steps} and "
            f"{o.floor_share} with optimizer.schedule = {o.schedule!r}: remove them, or choose another schedule"
        ]
    if decays and o.decay_steps is None:
        return [
            f"optimizer.schedule = {o.schedule!r} needs optimizer.decay_steps, the step from which on the learning rate "
            f"stays at its floor, warm-up included; found none: set it to run.steps, and leave it when the run is prolonged"
        ]
    if decays and o.decay_steps is not None and o.decay_steps <= o.warmup_steps:
        return [
            f"optimizer.decay_steps counts from step 0 and must exceed optimizer.warmup_steps; found {o.decay_steps} and "
            f"{o.warmup_steps}: raise it"
        ]
    return []
