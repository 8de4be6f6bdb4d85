"""The `semion` command. It reads options, starts what was asked for, shows progress and turns every typed error into
one line and an exit code; the work is done by other packages.

Exit codes: 0 done, 1 a failed doctor or a report whose records contradict their regime, 2 configuration, 3 data, 4 checkpoint,
or what cannot be written, 5 inference, 6 weight sync, 7 numerics, 8 watchdog, 70 a mistake in the code, 75 asked to stop, to be
continued, 130 interrupted, 141 nobody reads the output any more (a shell's number for SIGPIPE).
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.commands import (
    checking,
    evaluating,
    explaining,
    forking,
    initializing,
    planning,
    preparing,
    sampling,
    scoring,
    showing,
    training,
)
from engine.commands import profile as profiles
from engine.commands import report as reports
from engine.commands.common import check_targets, write_figures
from engine.config.load import load_config
from engine.core.errors import CheckpointError, ConfigError, SemionError, StorageError
from engine.core.files import UNWRITABLE, storage_error, unwritable
from engine.core.places import CONTROL
from engine.core.provenance import installed

CLOSED = 141  # 128 and SIGPIPE, as a shell has it
OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+|\[\d+\])+=")  # section.key=value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code. Without the network, unless the user has set HF_HUB_OFFLINE=0."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub's library is imported: no command has, yet
    for stream in (sys.stdout, sys.stderr):  # what a terminal's alphabet lacks is escaped; None where it is closed
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = _parsed(arguments)
    try:
        _require_working_directory()
        check_targets(options)
        code = int(options.command(options) or 0)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where it can be told that it fails
        return code
    except SemionError as error:
        if getattr(options, "verbose", False):
            traceback.print_exc()
        return _told(error)
    except KeyboardInterrupt:
        print("semion: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _let_go_of_output()
        return CLOSED
    except SystemExit as left:
        if left.code != 1:
            raise
        return CLOSED  # what rich makes of a broken pipe; no command of ours ends so
    except OSError as error:
        code = unwritable(error) or 0
        if not code:
            raise
        if error.filename:
            return _told(storage_error(Path(str(error.filename)), code))
        _let_go_of_output()
        return _told(StorageError(f"standard output cannot be written: {UNWRITABLE[code][0]}: write it elsewhere"))


def _told(error: SemionError) -> int:
    """Says a line for each fault; the exit code."""
    for fault in error.faults:
        text = CONTROL.sub(lambda found: repr(found[0])[1:-1], str(fault))  # a file's name may hold a line break
        if sys.stderr is not None:
            with suppress(OSError):  # there is nowhere else to say it
                print(f"semion: {text}", file=sys.stderr)
    return error.exit_code


def _require_working_directory() -> None:
    """ConfigError where the shell's folder was removed: every relative path would fail in words of its own."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError("the working directory must be there; found that it was removed: change to another one") from error


def _let_go_of_output() -> None:
    """Gives standard output to nobody, so that the interpreter does not fail at it once more when it ends."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with section.key=value taken wherever it stands: behind an option, and out of a list of files too."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if hasattr(options, "overrides"):
        for name in ("suite",):  # lists of files, which swallow what follows them
            files = getattr(options, name, None) or []
            rest += [file for file in files if OVERRIDE.match(file)]
            if files:
                setattr(options, name, [file for file in files if not OVERRIDE.match(file)])
        options.overrides = [*options.overrides, *(argument for argument in rest if OVERRIDE.match(argument))]
        rest = [argument for argument in rest if not OVERRIDE.match(argument)]
    if rest:
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}; {_instead(rest, options)}")
    return options


def _instead(rest: list[str], options: argparse.Namespace) -> str:
    """What may be meant by arguments that nobody knows."""
    word, equals, value = rest[0].partition("=")
    if hasattr(options, "overrides") and OVERRIDE.match(f"{word.lstrip('-')}="):
        following = [*options.overrides, *rest[1:]]
        value = value if equals else following[0] if following else "VALUE"
        return f"options of a run are written without the dashes: {word.lstrip('-')}={value}"
    if near := get_close_matches(word, options.parser.flags, 1):
        return f"did you mean {near[0]}?"
    return f"semion {options.command_name} --help lists what there is"


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints offer what may be meant."""

    @property
    def flags(self) -> list[str]:
        """Every flag there is."""
        return [flag for action in self._actions for flag in action.option_strings]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if not isinstance(action, argparse._SubParsersAction) or value in action.choices:
            super()._check_value(action, value)
            return
        near = get_close_matches(value, action.choices, 1)
        if near:
            meant = f"did you mean {near[0]}?"
        elif value.endswith(".toml"):
            meant = f"a command comes first, as in semion train {value}"
        else:
            meant = f"the commands are {', '.join(action.choices)}"
        raise argparse.ArgumentError(action, f"must be a command; found {value!r}: {meant}")


class _Version(argparse.Action):
    """Prints the versions of Semion and of what its numbers depend on, and imports none of them."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"semion {version('semion')}, Python {platform.python_version()}")
        for name, number in installed().items():
            print(name, number)
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="semion", description="Offline, semi-online and online RL for Llama models.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions of Semion and its libraries")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int | None], text: str, *, config: bool = True) -> Any:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command, command_name=name, parser=sub)
        if config:
            sub.add_argument("config", metavar="CONFIG", help="TOML file")
            sub.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="options set anew")
        return sub

    def add_running(name: str, command: Callable[[argparse.Namespace], int | None], text: str) -> Any:
        sub = add(name, command, text)
        sub.add_argument("--json", metavar="PATH", help="write the figures to this file too")
        sub.add_argument("--verbose", action="store_true", help="print what every process logs")
        return sub

    init = add("init", initializing.initialize, "write the first configuration for a model, data and a machine", config=False)
    initializing.add_flags(init)
    check = add("check", checking.check, "find all that can be seen wrong with a run, and print the run as resolved")
    checking.add_flags(check)
    explaining.add_flags(add("options", explaining.explain, "say what an option is, its unit and default", config=False))
    train = add_running("train", training.train, "train with DPO or GRPO, offline to online")
    train.add_argument("--resume", choices=["auto"], help="auto: continue from the newest checkpoint, if there is one")
    training.add_flags(train)
    training.add_samples_flags(train)
    training.add_flags(add_running("sft", training.fine_tune, "supervised fine-tuning on worked solutions"))
    rollout = add_running("rollout", sampling.rollout, "sample rollouts of run.steps steps from model.path, scored, to disk")
    rollout.add_argument(
        "--output", required=True, metavar="PLACE", help="folder to make, or where it ends in .jsonl one file of JSON lines"
    )
    _add_evaluating(add, add_running)
    scoring.add_flags(add("score", scoring.score, "judge the rows of a file with a reward, without training", config=False))
    prepare = add("prepare", preparing.prepare, "filter and split NuminaMath or WildChat into training data", config=False)
    preparing.add_arguments(prepare)
    forking.add_flags(
        add("fork", forking.fork, "start a new run from a checkpoint of another, with other options", config=False)
    )
    planning.add_flags(add("plan", planning.plan, "say what a run moves, holds and takes, and what binds; starts nothing"))
    calibrating = add("calibrate", planning.calibrate, "measure this machine's constants for `semion plan`", config=False)
    planning.add_calibrate_flags(calibrating)
    export = add("export", _export, "verify a checkpoint and copy its policy as a Hugging Face model", config=False)
    export.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a run's directory (its newest checkpoint) or one checkpoint's folder"
    )
    export.add_argument("destination", metavar="DESTINATION", help="folder to make")
    export.add_argument(
        "--dtype",
        choices=["saved", "seed", "float32", "bfloat16"],
        default="saved",
        help="of the weights: as the run had them (saved), as model.path has them (seed), or by name",
    )
    export.add_argument("--best", action="store_true", help="of a run: the checkpoint of the best held-out score")
    report = add("report", reports.report, "show what runs wrote down, and prove their regime from it", config=False)
    report.set_defaults(folders=("plots",))
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory; several are laid over each other")
    report.add_argument("--output", metavar="FILE", help="HTML file to write (report.html in the first RUN)")
    report.add_argument("--json", metavar="PATH", help="write regimes, evaluations and the guard's findings to this file")
    report.add_argument(
        "--calibration",
        metavar="FILE",
        help="constants of the runs' machine to forecast by (calibration.json in each RUN)",
    )
    report.add_argument("--plots", metavar="FOLDER", help="write every plot as an SVG file too")
    report.add_argument("--serve", action="store_true", help="show the page in a browser while the runs go on; Ctrl-C ends it")
    report.add_argument("--port", type=int, default=6007, metavar="N", help="with --serve (6007); 0: one that is free")
    report.add_argument(
        "--host", default="127.0.0.1", metavar="NAME", help="with --serve: where to listen (127.0.0.1: here alone)"
    )
    showing.add_flags(add("show", showing.show, "print rollouts of a run beside their problems", config=False))
    profile = add("profile", profiles.profile, "say where the time of a profiled run went, by process and phase", config=False)
    profile.add_argument("paths", nargs="+", metavar="RUN|FILE", help="a run's directory, or a trace or exported nsys report")
    profile.add_argument("--json", metavar="PATH", help="write the figures to this file too")
    doctor = add("doctor", _doctor, "say what this machine has and lacks", config=False)
    doctor.add_argument("--config", metavar="FILE", help="a run's TOML file: is there room for its checkpoints?")
    doctor.add_argument("--folder", metavar="FOLDER", help="where runs will be written (run.directory, or the current folder)")
    doctor.add_argument("--json", metavar="PATH", help="write the findings to this file too")
    return parser


def _add_evaluating(add: Callable[..., Any], add_running: Callable[..., Any]) -> None:
    evaluation = add_running("eval", evaluating.evaluate_model, "accuracy and pass@k of model.path")
    evaluation.set_defaults(folders=("output",))
    evaluation.add_argument("--suite", nargs="+", action="extend", metavar="FILE", help="files of problems (data.held_out)")
    evaluation.add_argument("--model", metavar="FOLDER", help="evaluate this model instead of model.path")
    evaluation.add_argument("--output", metavar="FOLDER", help="keep records and figures here; what is done is not done again")
    generate = add_running("generate", evaluating.generate, "answer open-ended questions, for a benchmark's judge")
    generate.add_argument("--questions", required=True, metavar="FILE", help="AlpacaEval's .json or Arena-Hard's .jsonl")
    generate.add_argument("--format", required=True, choices=["alpaca_eval", "arena_hard"], help="of the answers")
    generate.add_argument("--output", required=True, metavar="FILE", help="file to make")
    generate.add_argument("--model", metavar="FOLDER", help="ask this model instead of model.path")
    generate.add_argument("--name", help="what the answers call the model (its folder's name)")
    judge = add("judge", evaluating.judge, "compare answers with a baseline's through a chat endpoint", config=False)
    judge.add_argument("answers", metavar="ANSWERS", help="the model's answers, as `semion generate` writes them")
    judge.add_argument("--against", required=True, metavar="FILE", help="the baseline's answers")
    judge.add_argument("--questions", metavar="FILE", help="the questions; Arena-Hard's answers do not repeat them")
    judge.add_argument("--endpoint", required=True, metavar="URL", help="such as https://api.openai.com/v1")
    judge.add_argument("--model", required=True, metavar="NAME", help="the judge, as the endpoint calls it")
    judge.add_argument("--output", required=True, metavar="FILE", help="JSONL of replies; those it holds are not asked again")
    judge.add_argument("--key-env", metavar="NAME", help="environment variable that holds the key")
    judge.add_argument("--concurrency", type=int, default=8, help="requests under way at once (8)")
    judge.add_argument("--timeout-seconds", type=float, default=120.0, help="longest attempt at one request (120)")
    judge.add_argument("--length-controlled", action="store_true", help="AlpacaEval's length-controlled win rate too")
    judge.add_argument("--json", metavar="PATH", help="write the figures to this file too")
    judge.add_argument("--verbose", action="store_true", help="print where an error came from")


def _export(options: argparse.Namespace) -> None:
    from engine.run.card import complete
    from engine.run.checkpoint import BEST, MANIFEST, best, export, latest

    folder = Path(options.checkpoint)
    checkpoint: Path | None = folder
    if options.best:
        checkpoint = best(folder / "checkpoints")
        if checkpoint is None:
            raise CheckpointError(
                f"{folder}/checkpoints must hold {BEST} for --best; found none: name a run with checkpoint.best_by, after its "
                f"first judged checkpoint"
            )
    elif not (folder / MANIFEST).exists():
        checkpoint = latest(folder / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{folder} must be a run or a checkpoint; found neither: name the run's directory")
    exported = export(checkpoint, Path(options.destination), options.dtype)
    complete(exported, checkpoint)
    print(f"{exported}: the policy of {checkpoint.name}, verified; README.md says what it is and how to ask it")


def _doctor(options: argparse.Namespace) -> int:
    from engine.commands.doctor import examine
    from engine.observe.progress import print_table

    folder, needed = Path(options.folder) if options.folder else None, None
    if options.config:
        from engine.api.faults.machine import checkpoint_bytes
        from engine.run.spec import resolve

        config = load_config(options.config)
        needed = checkpoint_bytes(config, resolve(config, digests=False).shape)
        folder = folder or config.run_directory
    findings = examine(folder, needed)
    print_table("semion doctor", [("what", "found", "verdict"), *((f.what, f.found, f.verdict) for f in findings)])
    write_figures({f.what: {"found": f.found, "verdict": f.verdict} for f in findings}, None, options.json)
    return int(any(f.verdict != "ok" for f in findings))


if __name__ == "__main__":
    sys.exit(main())
