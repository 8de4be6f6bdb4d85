"""The commands of the guides that read a run, as the guides have them, on a run that is there; and the model card's own lines
on the model that was exported from it."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from engine.config.load import RunConfig
from engine.run.card import CARD
from tests.documented import Command, semion_commands
from tests.e2e.test_commands import semion

pytestmark = pytest.mark.timeout(1800)  # as the runs that it reads

READING = ("show", "report", "export")
A_RUN = re.compile(r"(OTHER_)?RUN|runs/quickstart/train")
STAYS = "--serve"  # of report: it ends by Ctrl-C alone
NEEDS_BEST = "--best"  # of export: the run has no best checkpoint


def of_a_run() -> list[Command]:
    """Every different command that reads a run, of whichever page."""
    found: dict[tuple[str, ...], Command] = {}
    for command in semion_commands():
        if command.words[0] in READING and any(map(A_RUN.fullmatch, command.words)) and STAYS not in command.words:
            found.setdefault(command.words, command)
    return list(found.values())


def test_commands_that_read_a_run(semi_online: tuple[RunConfig, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = semi_online
    seen = set()
    for number, command in enumerate(of_a_run()):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        name, *words = command.words
        places = [place for place, word in enumerate(words) if A_RUN.fullmatch(word)]
        if len(places) > 1:  # a report over several: the same run twice is refused
            words = [word for place, word in enumerate(words) if place not in places[1:]]
        told = {"DESTINATION": "made", "FOLDER": "plots", "N": "1", "ID": "unknown"}
        words = [str(config.run_directory) if A_RUN.fullmatch(word) else told.get(word, word) for word in words]
        words = ["made" if word.startswith("runs/") else word for word in words]
        if name == "export" and NEEDS_BEST in words:
            assert "must hold BEST for --best" in semion(name, *words, expect=4)
        else:
            assert semion(name, *words)
            seen.add(name)
    assert seen == set(READING)


def test_the_lines_of_the_card_say_what_the_run_said(
    semi_online: tuple[RunConfig, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The greedy answer that was recorded at the end of training, by another library."""
    config, _ = semi_online
    semion("export", str(config.run_directory), str(tmp_path / "made"))
    card = (tmp_path / "made" / CARD).read_text("utf-8")
    recorded = re.search(r"greedily:\n\n```\n(.*?)\n```\n", card, re.DOTALL)
    assert recorded is not None, card
    lines = next(code for code in re.findall(r"```python\n(.*?)\n```", card, re.DOTALL) if "AutoModel" in code)
    monkeypatch.chdir(tmp_path / "made")
    said = io.StringIO()
    with redirect_stdout(said):
        exec(compile(lines, "card", "exec"), {})
    assert said.getvalue() == recorded[1] + "\n"
    assert "| held_out | 0 | accuracy |" in card and f"| held_out | {config.run.steps} | accuracy |" in card
