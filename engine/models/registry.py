"""The model families by name, by the model_type of a config.json, and of a shape."""

from __future__ import annotations

from functools import cache

from engine.core.registry import Registry
from engine.models.base import Family, ModelShape

AUTO = "auto"  # the family of the engine's own whose model_type config.json has
FAMILIES: Registry[Family] = Registry(
    "model.family",
    "engine.models",
    "engine.models.base:Family",
    support=("checks", "config_file", "export_plan", "headers", "hf", "registry", "reward_head", "sharding"),
    also=(AUTO,),
)


@cache
def family_named(name: str) -> type[Family]:
    """The class of a family. ConfigError for a name without one."""
    return FAMILIES.load(name)


def family_of(shape: ModelShape) -> type[Family]:
    """The family that a shape is of."""
    return family_named(shape.family)
