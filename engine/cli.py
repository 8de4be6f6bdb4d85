"""The `semion` command. It reads options, starts what was asked for, shows progress and turns every typed error into
one line and an exit code; what is done is done in other rooms.

Exit codes: 0 done, 1 a failed doctor, 2 configuration, 3 data, 4 checkpoint, 5 inference, 6 weight sync, 7 numerics,
8 watchdog.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from engine.config import RunConfig, dump_config, load_config
from engine.errors import CheckpointError, ConfigError, DataError, SemionError
from engine.files import locked


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options) or 0)
    except SemionError as error:
        if getattr(options, "verbose", False):
            traceback.print_exc()
        print(f"semion: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("semion: interrupted; a training run continues with --resume auto from its newest checkpoint", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="semion", description="Offline, semi-online and online RL for Llama models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int | None], text: str, *, config: bool = True) -> Any:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        if config:
            sub.add_argument("config", help="TOML file")
            sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="options set anew")
        return sub

    def add_running(name: str, command: Callable[[argparse.Namespace], int | None], text: str) -> Any:
        sub = add(name, command, text)
        sub.add_argument("--json", metavar="PATH", help="write the figures to this file too")
        sub.add_argument("--verbose", action="store_true", help="print what every process logs")
        return sub

    add("check", _check, "validate a configuration and print the resolved tree")
    train = add_running("train", _train, "train with DPO or GRPO, offline to online")
    train.add_argument("--resume", choices=["auto"], help="auto: continue from the newest checkpoint, if there is one")
    add_running("sft", _sft, "supervised fine-tuning on worked solutions")
    rollout = add_running("rollout", _rollout, "sample rollouts of run.steps steps from model.path, scored, to a file")
    rollout.add_argument("--output", required=True, metavar="FILE", help="JSONL file to make")
    add_running("eval", _eval, "held-out accuracy of model.path")
    plan = add("plan", _plan, "say what a weight sync will move, by which links and how fast, without starting anything")
    plan.add_argument("--network-gigabytes-per-second", type=float, default=45.0, help="of one GPU, between nodes (45)")
    plan.add_argument("--nvlink-gigabytes-per-second", type=float, default=350.0, help="of one GPU, inside a node (350)")
    plan.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of an inference node (8)")
    plan.add_argument("--json", metavar="PATH", help="write the figures to this file too")
    export = add("export", _export, "verify a checkpoint and copy its policy as a Hugging Face model", config=False)
    export.add_argument("checkpoint", help="a run's directory (its newest checkpoint) or one checkpoint's folder")
    export.add_argument("destination", help="folder to make")
    doctor = add("doctor", _doctor, "say what this machine has and lacks", config=False)
    doctor.add_argument("--json", metavar="PATH", help="write the findings to this file too")
    return parser


def _check(options: argparse.Namespace) -> None:
    print(dump_config(load_config(options.config, options.overrides)), end="")


def _train(options: argparse.Namespace) -> None:
    from engine.checkpoint import latest
    from engine.cluster import Cluster

    config = _runnable(options)
    if config.sft.checkpoint_out is not None:
        raise ConfigError(f"sft.checkpoint_out is for `semion sft`; found {config.sft.checkpoint_out!r}: remove it")
    directory = config.run_directory
    with locked(directory):
        resume = options.resume == "auto" and latest(directory / "checkpoints") is not None
        if not resume:
            _check_fresh(config, may_start_over=options.resume == "auto")
        with Cluster(config, verbose=options.verbose) as cluster:
            summary = _show(config, "train", config.inference.engines, cluster.train(resume=resume))
        if summary["evaluations"]:
            _print_accuracies(summary["evaluations"])
        _write(summary, directory / "summary.json", options.json)


def _sft(options: argparse.Namespace) -> None:
    from engine.cluster import Cluster
    from engine.llama.hf import check_destination

    config = _runnable(options)
    if config.sft.checkpoint_out is None:
        raise ConfigError("sft.checkpoint_out is required by `semion sft` and missing: name the folder to make")
    check_destination(config.sft.checkpoint_out)
    with locked(config.run_directory):
        _check_fresh(config, may_start_over=False)
        (config.run_directory / "config.toml").write_text(dump_config(config), encoding="utf-8")
        with Cluster(config, verbose=options.verbose) as cluster:
            summary = _show(config, "sft", 0, cluster.fine_tune())
        print(f"checkpoint: {config.sft.checkpoint_out}")
        _write(summary, config.run_directory / "summary.json", options.json)


def _check_fresh(config: RunConfig, *, may_start_over: bool) -> None:
    """ConfigError when run.directory holds records that starting anew would take away.

    A run that was stopped before its first checkpoint may start over under --resume auto: equal configurations write equal
    records again.
    """
    directory = config.run_directory
    if not (directory / "metrics.jsonl").exists():
        return
    before = directory / "config.toml"
    same = before.exists() and before.read_text(encoding="utf-8") == dump_config(config)
    if not may_start_over:
        raise ConfigError(f"run.directory must be new; found a run in {directory}: add --resume auto, or name another one")
    if not same:
        raise ConfigError(
            f"run.directory must be new or hold this run; found one with other options and no checkpoint in {directory}: use "
            f"the options it had, or name another directory"
        )
    print("no checkpoint was written before the run was stopped: starting over", flush=True)


def _rollout(options: argparse.Namespace) -> None:
    options.overrides += ["sync.sync_interval=never", "sync.reference=never"]  # the weights of model.path, for every step
    config = _runnable(options)
    from engine.cluster import Cluster
    from engine.inference.pool import Pool
    from engine.observe.sinks import JsonlLedger, finite
    from engine.rewards.math import MathReward
    from engine.rollouts import RolloutSource
    from engine.worker import load_prompts

    if Path(options.output).exists():
        raise ConfigError(f"--output must be a new file; found {options.output}: name another")
    prompts, figures = load_prompts(config, config.data.train), []
    with Cluster(config, verbose=options.verbose) as cluster, MathReward(config.rewards) as reward:
        pool = Pool(cluster.start_engines(), config.inference.timeout_seconds)
        ledger = JsonlLedger(options.output)
        source = RolloutSource(config, prompts, pool, reward, ledger)
        for step in range(config.run.steps):
            if steps := config.schedule.opens(step):
                source.open(steps)
            data = source.next(step)
            figures.append({"step": step} | finite(data.metrics))
            print(f"step {step}: reward {data.metrics['reward_mean']:.3f}, {data.num_prompts} prompts", flush=True)
        source.close()
        ledger.close()
    rewards = [figure["reward_mean"] for figure in figures if figure["reward_mean"] is not None]
    mean = sum(rewards) / len(rewards) if rewards else None
    print(f"{options.output}: mean reward {mean} over {len(figures)} steps")
    _write({"reward_mean": mean, "steps": figures}, None, options.json)


def _eval(options: argparse.Namespace) -> None:
    config = _runnable(options)
    from engine.cluster import Cluster
    from engine.evaluation.accuracy import evaluate
    from engine.inference.pool import Pool
    from engine.rewards.math import MathReward
    from engine.worker import load_prompts

    if config.data.held_out is None:
        raise ConfigError("data.held_out is required by `semion eval` and missing: name a file of problems")
    held_out = load_prompts(config, config.data.held_out)
    print(f"data.held_out: {held_out}", flush=True)
    with Cluster(config, verbose=options.verbose) as cluster, MathReward(config.rewards) as reward:
        result = evaluate(config, held_out.prompts, Pool(cluster.start_engines(), config.inference.timeout_seconds), reward)
    _print_accuracies([{"step": config.model.path} | result.summary()])
    _write(result.summary() | {"records": list(result.records)}, None, options.json)


def _plan(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    from engine.observe.progress import print_table
    from engine.planner import Machine, plan_sync, table

    machine = Machine(
        options.network_gigabytes_per_second, options.nvlink_gigabytes_per_second, options.gpus_per_node
    )
    figures = plan_sync(config, machine)
    print_table(f"semion plan {options.config}", table(figures))
    _write(figures, None, options.json)


def _export(options: argparse.Namespace) -> None:
    from engine.checkpoint import MANIFEST, export, latest

    folder = Path(options.checkpoint)
    checkpoint: Path | None = folder
    if not (folder / MANIFEST).exists():
        checkpoint = latest(folder / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{folder} must be a run or a checkpoint; found neither: name the run's directory")
    print(f"{export(checkpoint, Path(options.destination))}: the policy of {checkpoint.name}, verified")


def _doctor(options: argparse.Namespace) -> int:
    from engine.doctor import examine
    from engine.observe.progress import print_table

    findings = examine()
    print_table("semion doctor", [("what", "found", "verdict"), *((f.what, f.found, f.verdict) for f in findings)])
    _write({f.what: {"found": f.found, "verdict": f.verdict} for f in findings}, None, options.json)
    return int(any(f.verdict != "ok" for f in findings))


def _runnable(options: argparse.Namespace) -> RunConfig:
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
    for key, path in (("data.train", config.data.train), ("data.held_out", config.data.held_out)):
        if path is not None and not Path(path).is_file():
            raise DataError(f"{key} must be a file; found none at {path}: check the path")
    return config


def _show(config: RunConfig, title: str, engines: int, events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Shows a run's events while they come; the summary of the run from its records."""
    from engine.observe.progress import Progress
    from engine.observe.summary import summarize

    trainer, started, versions = config.trainer, time.monotonic(), {}
    with Progress(config.run.steps, title) as progress:
        progress.note(
            f"starting {trainer.world_size} trainer ranks (tensor {trainer.tensor_parallel}, pipeline "
            f"{trainer.pipeline_parallel}, data {trainer.data_parallel}) and {engines} engines; --verbose shows their logs"
        )
        for event in events:
            kind = event.pop("kind")
            if kind == "step":
                progress.update(event)
            elif kind == "evaluation":
                progress.note(
                    f"step {event['step']}: held-out accuracy {event['mean']:.1%} ± {event['standard_error']:.1%} "
                    f"({event['num_problems']} problems, {event['num_seeds']} seeds)"
                )
            elif kind == "note":
                progress.note(event["text"])
            else:
                versions = event.get("engine_versions", {})
    return summarize(config.run_directory) | {"seconds": time.monotonic() - started, "versions": versions}


def _print_accuracies(evaluations: list[dict[str, Any]]) -> None:
    from engine.observe.progress import print_table

    rows = [
        (
            str(e["step"]),
            f"{e['mean']:.1%} ± {e['standard_error']:.1%}",
            f"± {e['seed_spread']:.1%}",
            f"{e['num_problems']} × {e['num_seeds']}",
            f"{e['completion_tokens_mean']:.1f}",
        )
        for e in evaluations
    ]
    print_table("held-out accuracy", [("step", "mean ± s.e.", "over seeds", "problems × seeds", "tokens"), *rows])


def _write(document: dict[str, Any], *paths: str | Path | None) -> None:
    from engine.observe.sinks import write_json

    for path in paths:
        if path is not None:
            write_json(path, document)


if __name__ == "__main__":
    sys.exit(main())
