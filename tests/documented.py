"""What the documents say, for the tests that hold them to it: their fenced blocks, the commands in these, the pieces of code.

A command is a line of a block without a language that begins with one of `PROGRAMS`. A word in capitals stands for something of
the reader's, `[...]` may be left out, and `...` for more that is needed. In a table of commands, all of whose lines have a
blank before column DESCRIBED_AT, what follows there says what they do; elsewhere a run of four blanks or a # begins that.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
GENERATED = [*sorted((DOCS / "rows").glob("*.md")), DOCS / "options.md", DOCS / "metrics.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PLACEHOLDER = re.compile(r"(?<![\w./-])(?:[A-Z][A-Z_]+|N|K)(?![\w.])")
PROGRAMS = ("semion", ".venv/bin/", "python ", "tools/", "sbatch", "docker", "pip ", "hf ", "SEMION_REQUIREMENTS=")
DESCRIBED_AT = 50
COMMAND_LANGUAGES = ("", "bash", "console")


@dataclass(frozen=True)
class Command:
    """A command that a page shows."""

    page: str
    words: tuple[str, ...]
    is_whole: bool = True  # nothing that is needed is left out

    @property
    def placeholders(self) -> list[str]:
        return [word for word in self.words if PLACEHOLDER.search(word)]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of every fenced block."""
    for found in BLOCK.finditer(page.read_text("utf-8")):
        yield found[1], found[2]


def command_lines(page: Path) -> Iterator[str]:
    """The lines of a page that are commands, as they stand there."""
    for language, text in blocks(page):
        lines = text.splitlines() if language in COMMAND_LANGUAGES else []
        is_table = len(lines) > 8 and all(len(line) > DESCRIBED_AT and line[DESCRIBED_AT - 1] == " " for line in lines)
        for line in lines:
            shown = line[:DESCRIBED_AT] if is_table else line
            if shown.removeprefix("$ ").startswith(PROGRAMS):
                yield shown.removeprefix("$ ").strip()
    for line in page.read_text("utf-8").splitlines():  # blocks by indentation
        if line.startswith("    ") and line.strip().startswith(PROGRAMS[:4]):
            yield line.strip()


def commands(page: Path) -> Iterator[Command]:
    """The commands of a page, without what may be left out and without what is said behind them."""
    for line in command_lines(page):
        text = re.split(r"(?<=.{14}) {4,}", line)[0].split("  #")[0].split(" # ")[0]
        for part in re.sub(r"\[[^\]]*\]", "", text).split(" && "):
            yield Command(str(page.relative_to(ROOT)), tuple(shlex.split(part.replace("...", ""))), "..." not in part)


def semion_commands(pages: list[Path] = PAGES) -> list[Command]:
    """The commands of `semion`, from whichever environment, without its name."""
    found = []
    for page in pages:
        for command in commands(page):
            if Path(command.words[0]).name == "semion":
                found.append(Command(command.page, command.words[1:], command.is_whole))
    return found
