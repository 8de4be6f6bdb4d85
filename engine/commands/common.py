"""What several commands share: the configuration checked before any process starts, and figures for people and machines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from engine.config import RunConfig, load_config
from engine.errors import ConfigError, DataError


def runnable(options: argparse.Namespace) -> RunConfig:
    """The configuration, with what can be seen wrong before any process starts."""
    config = load_config(options.config, options.overrides)
    from engine.llama.hf import read_shape
    from engine.llama.layout import check_engine_layout, check_layout, engine_layout, trainer_layout

    shape = read_shape(config.model.path)
    check_layout(shape, trainer_layout(config.trainer))
    check_engine_layout(shape, engine_layout(config.inference))
    if config.sft.checkpoint_out is None and config.inference.max_model_tokens > shape.max_positions:
        raise ConfigError(
            f"inference.max_model_tokens must not exceed the model's {shape.max_positions} positions; found "
            f"{config.inference.max_model_tokens}: lower it"
        )
    _check_files(config)
    if config.profile.tool == "nsys":
        from engine.observe.nsight import check_installed

        check_installed()
    if config.sft.checkpoint_out is None and config.uses_engines:
        _check_rewards(config)
    return config


def _check_files(config: RunConfig) -> None:
    """DataError for a file that the run reads and is not there. A preference file is replayed without data.train."""
    from engine.replay import replay_kind

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


def _check_rewards(config: RunConfig) -> None:
    """ConfigError when a reward that judges the run's samples could not."""
    if config.reward_model.path is not None:
        from engine.data.conversations import Conversations

        Conversations(config.reward_model)
    if any(source.reward == "function" for source in config.data.sources):
        from engine.rewards.function import FunctionReward

        FunctionReward(config.rewards).close()


def print_evaluations(evaluations: list[dict[str, Any]]) -> None:
    """A table of evaluations (`Accuracy.summary`, with the step and the set)."""
    from engine.observe.progress import print_table

    rows = [
        (
            str(e["step"]),
            e["set"],
            f"{shown(e, 'mean')} ± {shown(e, 'standard_error')}",
            f"± {shown(e, 'seed_spread')}",
            f"{e['num_problems']} × {e['num_seeds']}",
            f"{e['completion_tokens_mean']:.1f}",
        )
        for e in evaluations
    ]
    heading = ("step", "set", "mean ± s.e.", "over seeds", "problems × seeds", "tokens")
    print_table("held-out accuracy, or reward of graded sets", [heading, *rows])


def evaluation_note(e: dict[str, Any]) -> str:
    """An evaluation in a line."""
    return (
        f"step {e['step']}: held-out {e['measure']} {shown(e, 'mean')} ± {shown(e, 'standard_error')} "
        f"({e['set']}: {e['num_problems']} problems, {e['num_seeds']} seeds)"
    )


def shown(evaluation: dict[str, Any], name: str) -> str:
    """A share in percent, a reward as it is, and a dash for what is not known."""
    if evaluation[name] is None:
        return "-"
    return f"{evaluation[name]:.3f}" if evaluation["measure"] == "reward" else f"{evaluation[name]:.1%}"


def write_figures(document: dict[str, Any], *paths: str | Path | None) -> None:
    """Writes the figures as JSON to every path that was asked for."""
    from engine.observe.sinks import write_json

    for path in paths:
        if path is not None:
            write_json(path, document)
