"""Draws what `semion train` shows as pictures: the display itself, fed with the records of a finished run, at several widths,
on a dark and on a light terminal. It runs nothing and needs no terminal.

    .venv/bin/python tools/screens.py RUN [--output docs/screens]
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, SVG_EXPORT_THEME, TerminalTheme

from engine.commands.common import evaluation_note
from engine.commands.training import pace_of
from engine.config.load import load_config
from engine.observe.answers import greedy_answers
from engine.observe.progress import Progress
from engine.observe.telling import Activity
from engine.observe.timeline import EVENTS, STARTUP
from engine.run.metrics import catalogue

THEMES: dict[str, TerminalTheme] = {"dark": SVG_EXPORT_THEME, "light": DEFAULT_TERMINAL_THEME}
PICTURES = (
    ("start", 80, "dark"),
    ("running", 60, "dark"),
    ("running", 80, "dark"),
    ("running", 120, "dark"),
    ("running", 80, "light"),
)
FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # rich's, which a browser would fetch from elsewhere


class Happening(NamedTuple):
    """Something that the display is told, and when."""

    unix_seconds: float
    kind: str  # "activity", "note", "step" or "evaluation"
    what: dict[str, Any]


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def happenings(run: Path) -> list[Happening]:
    """All that the records of a run say of it, in order. An evaluation is known when it is done."""
    judged = {f"step {row['step']} on {row['set']}": row for row in rows(run / "evaluations.jsonl")}
    found = [Happening(row["unix_seconds"], "step", row) for row in rows(run / "metrics.jsonl")]
    for row in rows(run / EVENTS):
        if row["kind"] == "note":
            found.append(Happening(row["unix_seconds"], "note", row))
            continue
        began = row["unix_seconds"] - row["seconds"]
        found.append(Happening(began, "activity", row | {"state": "begins", "seconds": 0.0, "done": 0}))
        found.append(Happening(row["unix_seconds"], "activity", row | {"state": "done"}))
        if row["what"] == "evaluation":
            found.append(Happening(row["unix_seconds"], "evaluation", judged[row["about"]]))
    return sorted(found, key=lambda happening: happening.unix_seconds)


def moments(run: Path, events: list[Happening]) -> dict[str, float]:
    """Two times to look at: while the last engine loads, and after a step two thirds through the run."""
    engines = [phase for phase in rows(run / STARTUP)[0]["phases"] if phase["name"] in ("engine", "weights")]
    began = rows(run / STARTUP)[0]["unix_seconds"]
    steps = [happening for happening in events if happening.kind == "step"]
    last = max(engines, key=lambda phase: phase["after_seconds"] + phase["seconds"])
    return {
        "start": began + last["after_seconds"] + last["seconds"] - 0.01,
        "running": steps[len(steps) * 2 // 3].unix_seconds + 0.01,
    }


def picture(run: Path, events: list[Happening], until: float, width: int, height: int, theme: str, title: str) -> str:
    """The last `height` lines of a terminal at a time, as SVG."""
    config, began = load_config(run / "config.toml"), rows(run / STARTUP)[0]["unix_seconds"]
    now = [began]
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, legacy_windows=False)
    progress = Progress(
        config.run.steps, "train", catalogue(config.algorithm), console, pace=pace_of(config), clock=lambda: now[0]
    )
    for happening in events:
        if happening.unix_seconds > until:
            break
        now[0] = happening.unix_seconds
        match happening.kind:
            case "activity":
                progress.activity(Activity.of(happening.what))
            case "note":
                progress.note(happening.what["text"])
            case "evaluation":
                progress.note(evaluation_note(happening.what))
                progress.answers(greedy_answers(run, happening.what["step"], happening.what["set"], 2))
            case "step":
                progress.update(happening.what)
    now[0] = until
    with console.capture() as drawn:
        console.print(progress.display())
    said = console.file.getvalue().splitlines() if isinstance(console.file, io.StringIO) else []
    shown = list(wrapped([*said, *drawn.get().splitlines()], width))[-height:]
    paper = Console(file=io.StringIO(), width=width, record=True, force_terminal=True, color_system="truecolor")
    for line in shown:
        paper.print(ansi(line), soft_wrap=True, highlight=False, end="\n")
    svg = paper.export_svg(title=title, theme=THEMES[theme], unique_id=f"semion-{theme}-{width}")
    return FONTS.sub("", svg).replace("Fira Code, monospace", "monospace")


def ansi(line: str) -> Any:
    """A line with its escape sequences as styled text."""
    from rich.text import Text

    return Text.from_ansi(line)


def wrapped(lines: list[str], width: int) -> Iterator[str]:
    """Lines as a terminal breaks those that are longer than it is wide; only plain ones are."""
    for line in lines:
        if len(ansi(line).plain) <= width:
            yield line
        else:
            yield from (line[first : first + width] for first in range(0, len(line), width))


def main() -> None:
    """Draws all pictures of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the directory of a finished run with held-out problems")
    parser.add_argument("--output", type=Path, default=Path("docs/screens"), help="folder for the pictures (docs/screens)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    events = happenings(options.run)
    for moment, width, theme in PICTURES:
        file = options.output / f"{moment}_{width}{'' if theme == 'dark' else f'_{theme}'}.svg"
        until = moments(options.run, events)[moment]
        file.write_text(picture(options.run, events, until, width, 24, theme, "semion train"), encoding="utf-8")
        print(file)


if __name__ == "__main__":
    main()
