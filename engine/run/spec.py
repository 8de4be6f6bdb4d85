"""The run, checked before any process starts."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.config.load import RunConfig, load_config
from engine.core.errors import ConfigError, DataError


def runnable(options: argparse.Namespace) -> RunConfig:
    """The configuration, with what can be seen wrong before any process starts."""
    config = load_config(options.config, options.overrides)
    from engine.models.checks import check_engine_layout, check_layout
    from engine.models.hf import read_shape
    from engine.models.sharding import engine_layout, trainer_layout
    from engine.rollouts.replay import replay_kind
    from engine.run.metrics import catalogue

    if config.sft.checkpoint_out is None:
        catalogue(config.algorithm)  # a user's loss must not take the name of a metric of ours
    shape = read_shape(config.model.path, family=config.model.family)
    check_layout(shape, trainer_layout(config.trainer))
    check_engine_layout(shape, engine_layout(config.inference))
    if config.sft.checkpoint_out is None and config.inference.max_model_tokens > shape.max_positions:
        raise ConfigError(
            f"inference.max_model_tokens must not exceed the model's {shape.max_positions} positions; found "
            f"{config.inference.max_model_tokens}: lower it"
        )
    _check_files(config)
    if config.profile.tool == "nsys":
        from engine.observe.profiling.nsight import check_installed

        check_installed()
    if config.sft.checkpoint_out is None and (config.uses_engines or replay_kind(config) == "rollouts"):
        from engine.rewards.registry import check_rewards

        check_rewards(config, judges=config.uses_engines)
    return config


def _check_files(config: RunConfig) -> None:
    """DataError for a file that the run reads and is not there. A preference file is replayed without data.train."""
    from engine.rollouts.replay import replay_kind

    files = config.data.files
    if "data.replay" in files:
        _check_file("data.replay", files.pop("data.replay"))
    if replay_kind(config) == "preferences":
        del files["data.train"]
    for key, path in files.items():
        _check_file(key, path)


def _check_file(key: str, path: str) -> None:
    from engine.data.records import HUB, check_source

    if not path.startswith(HUB) and not Path(path).exists():
        raise DataError(f"{key} must be a file or a dataset's folder; found none at {path}: check the path")
    check_source(path)
