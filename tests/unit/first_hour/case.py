"""What a case of the first hour is: one mistake, or one state of the machine, that a person meets with a model, data and a
reward of their own, and what `semion` must answer. The cases stand in one file a group beside this one, and test_first_hour.py
makes them.

A case is fine when the command ends with the documented exit code, says one plain sentence for each mistake and no traceback,
starts no engine and no trainer for a run that cannot be, and leaves nothing behind. To add one: a `Case` in the list of its
group, and its number in the table of docs/results.md.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

Made = Callable[[Path], object]  # changes something in the folder of the case, where the command is run


def nothing(folder: Path) -> None:
    """Leaves all as it is."""


@dataclass(frozen=True)
class Case:
    """One command line in a folder in which all is well but for what `made` changes."""

    name: str
    line: str  # what follows `semion`, as a shell reads it
    code: int
    says: tuple[str, ...] = ()  # parts of what stands on stderr, or of stdout where the command succeeds
    made: Made = nothing
    sentences: int = 1  # on stderr, where the command is refused
    environment: dict[str, str | None] = field(default_factory=dict)  # None: unset
    is_usage: bool = False  # refused by the parser, which prints the usage first
    leaves: tuple[str, ...] = ()  # files that the command makes, as it was asked to
    in_process: bool = True  # whether `semion` is called here; else `line` is of a shell, with a process of its own for it

    @property
    def arguments(self) -> list[str]:
        """The command line as a list."""
        return shlex.split(self.line)


def refused(name: str, line: str, code: int, *says: str, made: Made = nothing, sentences: int = 1, **env: str | None) -> Case:
    """A command that must say what is wrong, in so many sentences."""
    return Case(name, line, code, says, made, sentences, env)


def accepted(name: str, line: str, *says: str, made: Made = nothing, leaves: tuple[str, ...] = (), **env: str | None) -> Case:
    """A command that must do what it was asked to."""
    return Case(name, line, 0, says, made, 0, env, leaves=leaves)


def shell(name: str, line: str, code: int, *says: str, made: Made = nothing, sentences: int = 0) -> Case:
    """A line of bash, in which `semion` is a process."""
    return Case(name, line, code, says, made, sentences, in_process=False)


def usage(name: str, line: str, *says: str) -> Case:
    """A command line that makes no sense: argparse's exit code and form, in our words."""
    return Case(name, line, 2, says, is_usage=True)


# -- what `made` is put together of


def text(file: str, content: str | bytes) -> Made:
    """A file with this content, instead of what it was."""
    data = content if isinstance(content, bytes) else content.encode()

    def made(folder: Path) -> None:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)

    return made


def rows(file: str, *found: Any) -> Made:
    """A JSONL file of these objects."""
    return text(file, "".join(json.dumps(row) + "\n" for row in found))


def gone(*files: str) -> Made:
    """Without these files."""

    def made(folder: Path) -> None:
        for file in files:
            (folder / file).unlink(missing_ok=True)

    return made


def both(*several: Made) -> Made:
    """One after the other."""

    def made(folder: Path) -> None:
        for each in several:
            each(folder)

    return made


def folders(*names: str) -> Made:
    """Empty folders."""

    def made(folder: Path) -> None:
        for name in names:
            (folder / name).mkdir(parents=True)

    return made


def fields(file: str, **changes: Any) -> Made:
    """A JSON file with fields set anew; one that is set to ... is taken out."""

    def made(folder: Path) -> None:
        path = folder / file
        tree = (json.loads(path.read_text()) if path.exists() else {}) | changes
        path.write_text(json.dumps({key: value for key, value in tree.items() if value is not ...}))

    return made


def config_lines(*lines: str) -> Made:
    """run.toml with further lines behind it."""

    def made(folder: Path) -> None:
        with (folder / "run.toml").open("a") as file:
            file.write("\n".join(["", *lines, ""]))

    return made


def replaced(file: str, old: str, new: str) -> Made:
    """A file with one text of it replaced."""

    def made(folder: Path) -> None:
        found = (folder / file).read_text()
        assert old in found, old
        (folder / file).write_text(found.replace(old, new))

    return made


def tensors(change: Callable[[dict[str, Any]], object]) -> Made:
    """The model's weights, changed in place."""

    def made(folder: Path) -> None:
        file = folder / "model" / "model.safetensors"
        found = load_file(file)
        change(found)
        save_file(found, file)

    return made
