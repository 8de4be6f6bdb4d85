"""Places to write to: the run's directory and every output flag, on what cannot be written. Tests may run as root, whom no mode
keeps out: /proc and /sys cannot be written by anybody, and /dev/full is a disk without room."""

from __future__ import annotations

import fcntl
from pathlib import Path

from tests.unit.first_hour.case import Case, accepted, both, folders, refused, rows, text

SCORE = "score answers.jsonl --reward math "
WRITERS = (  # commands that write a file, without its name
    "check run.toml --json",
    "train run.toml --json",
    "sft run.toml sft.checkpoint_out=out --json",
    "rollout run.toml --output",
    "rollout run.toml --output o.jsonl --json",
    "eval run.toml --json",
    "generate run.toml --questions q.json --format alpaca_eval --output",
    "plan run.toml --json",
    "score answers.jsonl --reward math --output",
    "score answers.jsonl --reward math --json",
    "report run --output",
    "report run --json",
    "profile trace.json --json",
    "doctor --json",
)
BAD = {
    "a folder": ("model", 2, "found a folder"),
    "below a file": ("run.toml/out.json", 2, "found a file"),
    "where nobody may write": ("/proc/semion/out.json", 2, "/proc"),
    "an empty name": ("''", 2, "an empty name"),
}


def taken(folder: Path) -> None:
    """A directory in which another run is at work: this process holds its lock until it ends."""
    (folder / "run").mkdir()
    file = (folder / "run" / ".lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    HELD.append(file)


HELD: list[object] = []
FINISHED = rows("run/metrics.jsonl", {"step": 0})

CASES: list[Case] = [
    *(
        refused(f"{line.split()[0]} {line.split()[-1]} {name}", f"{line} {place}", code, line.split()[-1], says)
        for line in WRITERS
        for name, (place, code, says) in BAD.items()
    ),
    refused("two outputs of one name", SCORE + "--output a --json a", 2, "--json", "--output"),
    refused("an output that is the input", SCORE + "--json answers.jsonl", 2, "--json", "answers.jsonl", "also FILE"),
    refused("an output that is the configuration", "check run.toml --json run.toml", 2, "--json", "run.toml", "also CONFIG"),
    refused("an output that is there", SCORE + "--output answers.jsonl", 2, "--output", "answers.jsonl"),
    refused(
        "rollouts into a file that is there",
        "rollout run.toml --output train.jsonl",
        2,
        "--output must be a new file",
        "train.jsonl",
    ),
    refused("a device without room", "check run.toml --json /dev/full", 2, "--json", "/dev/full"),
    refused("run.directory that is a file", "train run.toml run.directory=train.jsonl", 2, "run.directory", "found a file"),
    refused("run.directory below a file", "train run.toml run.directory=train.jsonl/run", 2, "run.directory", "found a file"),
    refused("run.directory under /proc", "train run.toml run.directory=/proc/semion", 2, "run.directory", "/proc"),
    refused("run.directory under /sys", "train run.toml run.directory=/sys/semion", 2, "run.directory", "/sys"),
    refused(
        "run.directory in the home folder in quotes",
        "check run.toml 'run.directory=~/run'",
        2,
        "run.directory",
        "~/run",
        "write the whole path",
    ),
    refused(
        "run.directory as a variable",
        "check run.toml 'run.directory=$WORK/run'",
        2,
        "run.directory",
        "$WORK/run",
        "write the whole path",
    ),
    refused("run.directory in a bucket", "check run.toml run.directory=s3://bucket/run", 2, "run.directory", "s3://bucket/run"),
    refused(
        "run.directory of a name that is too long",
        "train run.toml run.directory=" + "a" * 300,
        2,
        "run.directory",
        "a name that is too long",
    ),
    refused("run.directory with a line break", "check run.toml 'run.directory=a\nb'", 2, "run.directory"),
    refused("run.directory with a NUL", """check run.toml 'run.directory="a\\u0000b"'""", 2, "run.directory"),
    refused(
        "run.directory is a link to nothing that can be made",
        "train run.toml run.directory=link",
        2,
        "run.directory",
        made=lambda folder: (folder / "link").symlink_to("/proc/semion"),
    ),
    refused("run.directory is the model's folder", "train run.toml run.directory=model", 2, "run.directory", "model.path"),
    refused("a run is there", "train run.toml", 2, "run.directory", "add --resume auto", made=FINISHED),
    refused(
        "a run of other options is there",
        "train run.toml --resume auto run.seed=7",
        2,
        "run.directory",
        "run",
        made=both(FINISHED, text("run/config.toml", "[run]\n")),
    ),
    refused("another run is at work", "train run.toml", 2, "run.directory", "another at work", made=taken),
    refused(
        "a pointer to a checkpoint that is gone",
        "train run.toml --resume auto",
        4,
        "LATEST",
        "step_00000004",
        made=text("run/checkpoints/LATEST", "step_00000004"),
    ),
    refused("a pointer that is empty", "train run.toml --resume auto", 4, "LATEST", made=text("run/checkpoints/LATEST", "")),
    refused(
        "a pointer of bytes", "train run.toml --resume auto", 4, "LATEST", made=text("run/checkpoints/LATEST", b"\xff\xfe")
    ),
    refused(
        "a manifest that is broken",
        "train run.toml --resume auto",
        4,
        "manifest.json",
        made=both(text("run/checkpoints/LATEST", "step_00000004"), text("run/checkpoints/step_00000004/manifest.json", "{")),
    ),
    refused(
        "a manifest of another version",
        "train run.toml --resume auto",
        4,
        "manifest.json",
        made=both(text("run/checkpoints/LATEST", "step_00000004"), text("run/checkpoints/step_00000004/manifest.json", "{}")),
    ),
    refused(
        "a pointer out of the folder",
        "train run.toml --resume auto",
        4,
        "LATEST",
        made=text("run/checkpoints/LATEST", "../../model"),
    ),
    refused(
        "sft.checkpoint_out with other files",
        "sft run.toml sft.checkpoint_out=full",
        4,
        "full",
        "another folder",
        made=text("full/thesis.tex", "x"),
    ),
    refused("sft.checkpoint_out that is a file", "sft run.toml sft.checkpoint_out=train.jsonl", 2, "train.jsonl"),
    refused("sft.checkpoint_out under /proc", "sft run.toml sft.checkpoint_out=/proc/semion", 2, "sft.checkpoint_out", "/proc"),
    refused(
        "sft.checkpoint_out that is the model", "sft run.toml sft.checkpoint_out=model", 2, "sft.checkpoint_out", "model.path"
    ),
    refused("eval --output that is a file", "eval run.toml --output train.jsonl", 2, "--output", "found a file"),
    refused("eval --output under /proc", "eval run.toml --output /proc/semion", 2, "--output", "/proc"),
    refused("report --plots that is a file", "report run --plots train.jsonl", 2, "--plots", "found a file"),
    refused("prepare into a folder with files", "prepare numinamath train.jsonl model", 2, "model", "new or an empty folder"),
    refused("prepare into a file", "prepare numinamath train.jsonl rewards.py", 2, "rewards.py"),
    refused("prepare under /proc", "prepare numinamath train.jsonl /proc/semion", 2, "/proc"),
    refused("export under /proc", "export run /proc/semion", 2, "DESTINATION", "/proc"),
    refused("export over the checkpoint", "export run run", 2, "DESTINATION", "also CHECKPOINT", made=folders("run")),
    accepted(
        "figures in a folder to make",
        "check run.toml --json new/folder/spec.json",
        leaves=("new", "new/folder", "new/folder/spec.json"),
    ),
    accepted("names with a space, a quote and an umlaut", "check run.toml --json \"a 'b' ü.json\"", leaves=("a 'b' ü.json",)),
    accepted("an early end leaves a directory that is no run", "check run.toml", made=text("run/metrics.jsonl", "")),
]
