"""`semion init`: asks on a terminal, or takes by flags, what a run is to be of, and writes its first configuration. Without a
terminal nothing is asked: a flag that is missing is named. What is right for a model and a machine is engine/api/initial.py's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from engine.config.options import LOSSES
from engine.core.errors import ConfigError


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What would be asked else."""
    add = parser.add_argument
    add("--model", metavar="FOLDER", help="a Hugging Face checkpoint with its tokenizer")
    add("--train", metavar="FILE", help="problems to train on (docs/data.md says what is read)")
    add("--held-out", metavar="FILE", help="problems for evaluation, never trained on (none)")
    add("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="what columns are called, as answer=final_answer")
    add("--reward", help="math (the default), model, or a function of yours as path/to/file.py:name")
    add("--reward-model", metavar="FOLDER", help="with --reward model")
    add("--gpus", type=int, metavar="N", help="of each machine (those of this one); 0: CPUs")
    add("--gpu-gibibytes", type=float, metavar="GIB", help="memory of a GPU (this machine's); 79: H100 of 80 GB, 139: H200")
    add("--nodes", type=int, default=1, metavar="N", help="machines (1)")
    add("--loss", choices=LOSSES.names, help="(dpo)")
    add(
        "--sync-interval",
        type=_interval,
        metavar="S",
        help="optimizer steps between weight syncs, or never (10; grpo and cispo: 1)",
    )
    add("--directory", default="runs/first", metavar="FOLDER", help="of the run (runs/first)")
    add("--output", metavar="FILE", help="file to write (run.toml)")
    add("--force", action="store_true", help="overwrite it")


def initialize(options: argparse.Namespace) -> None:
    """Writes the file and says what it holds. ConfigError where something is missing, does not fit, or is there already."""
    gpus, memory = _machine(options)
    _ask(options, gpus, memory)
    output = Path(options.output)
    if output.exists() and not options.force:
        raise ConfigError(f"--output must be a new file; found {output}: name another, or add --force to overwrite it")
    from engine.api.initial import choose, look_at
    from engine.api.initial_file import text_of
    from engine.api.initial_values import Wishes

    wishes = Wishes(
        model=options.model,
        train=options.train,
        held_out=options.held_out or None,
        columns=_columns(options.columns),
        gpus_per_node=options.gpus,
        nodes=options.nodes,
        gpu_gibibytes=options.gpu_gibibytes,
        loss=options.loss,
        interval=options.sync_interval,
        reward=options.reward,
        reward_model=options.reward_model,
        directory=options.directory,
    )
    choice = choose(wishes, look_at(wishes))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text_of(choice, options.output), encoding="utf-8")
    print(f"{output}: {choice.summary}\nnext: semion check {output}, then semion train {output}")


def _ask(options: argparse.Namespace, gpus: int, memory: float | None) -> None:
    """Fills in what no flag says: by asking on a terminal, else by defaults; ConfigError names what has none."""
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    missing = [flag for flag, value in (("--model FOLDER", options.model), ("--train FILE", options.train)) if value is None]
    if options.gpus and options.gpu_gibibytes is None and memory is None:
        missing.append("--gpu-gibibytes GIB")
    if missing and not asks:
        raise ConfigError(f"semion init needs {' and '.join(missing)} where there is no terminal to ask on: add them")
    question = _question if asks else _default
    options.model = options.model or question("model's folder", None, str)
    options.train = options.train or question("file with problems to train on", None, str)
    if options.held_out is None:
        options.held_out = question("file with held-out problems, or nothing", "", str)
    if options.gpus is None:
        options.gpus = question("GPUs of each machine, 0 for CPUs", gpus, int)
    if options.gpu_gibibytes is None:
        options.gpu_gibibytes = (
            question("GiB of memory of a GPU (79: H100 of 80 GB, 139: H200)", memory or 139.0, float) if options.gpus else 139.0
        )
    options.reward = options.reward or ("model" if options.reward_model else "math")
    if options.loss is None:
        options.loss = question(f"loss ({', '.join(LOSSES.names)})", "dpo", _loss)
    if options.sync_interval is None:
        usual = 1 if options.loss in ("grpo", "cispo") else 10  # the paper has GRPO online alone
        options.sync_interval = question("s: optimizer steps between weight syncs", usual, _interval)
    if options.output is None:
        options.output = question("file to write", "run.toml", str)


def _default(text: str, default: Any, kind: Callable[[str], Any]) -> Any:
    return default


def _question(text: str, default: Any, kind: Callable[[str], Any]) -> Any:
    """Asks until the answer can be used. ConfigError at the end of the input."""
    shown = f" [{default}]" if default not in (None, "") else ""
    while True:
        try:
            answer = input(f"{text}{shown}: ").strip()
        except EOFError as error:
            raise ConfigError(f"semion init needs an answer to '{text}'; found the end of the input: use its flags") from error
        if not answer and default is not None:
            return default
        try:
            if answer:
                return kind(answer)
        except (ValueError, argparse.ArgumentTypeError) as error:
            print(f"  {error}")


def _interval(text: str) -> int | Literal["never"]:
    if text == "never":
        return "never"
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of steps, 1 or more, or never; found {text!r}")
    return int(text)


def _loss(text: str) -> str:
    if text not in LOSSES.names:
        raise ValueError(f"must be one of {', '.join(LOSSES.names)}; found {text!r}")
    return text


def _columns(pairs: list[str]) -> dict[str, str] | None:
    broken = [pair for pair in pairs if not pair.partition("=")[2]]
    if broken:
        raise ConfigError(f"--columns must read NAME=COLUMN, such as answer=final_answer; found {broken[0]!r}: write it so")
    return {name: column for name, _, column in (pair.partition("=") for pair in pairs)} or None


def _machine(options: argparse.Namespace) -> tuple[int, float | None]:
    """(GPUs of this machine, GiB of the smallest), where no flag says both."""
    if options.gpus is not None and options.gpu_gibibytes is not None:
        return options.gpus, options.gpu_gibibytes
    from engine.run.machine import least_gpu_bytes, listed_gpus

    gpus, _ = listed_gpus()
    least = least_gpu_bytes(gpus)
    return len(gpus), least >> 30 if least is not None else None
