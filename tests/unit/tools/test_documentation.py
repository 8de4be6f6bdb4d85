"""The documents hold: the site builds strictly and fetches nothing, every command in them is one that the parser takes, every
configuration, option, file and message that they name exists. Commands that read a run are run in tests/e2e."""

import ast
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from engine import cli
from engine.config.load import RunConfig, load_config, read_config
from engine.config.options import LOSSES, Options
from engine.core import errors
from engine.data.rows import load_rows
from tests.documented import DOCS, GENERATED, PAGES, ROOT, Command, blocks, commands, semion_commands
from tools.docs import PAGES as ROWS
from tools.docs import site
from tools.site_hooks import arrows, messages, on_config

ENGINE = ROOT / "engine"
GAP = "…"
SEMION = semion_commands()
HAND_WRITTEN = [page for page in PAGES if page not in GENERATED]


class Fetched(HTMLParser):
    """Addresses that a browser fetches by itself when it opens a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        of = dict(attributes)
        if tag in ("script", "img", "iframe", "source"):
            self.found.append(of.get("src") or "")
        elif tag == "link" and of.get("rel") != "canonical":
            self.found.append(of.get("href") or "")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site."""
    folder = tmp_path_factory.mktemp("site")
    said = io.StringIO()
    with redirect_stdout(said):
        assert site(folder) == 0, "mkdocs says above which link or anchor is broken"
    assert str(folder / "index.html") in said.getvalue()
    return folder


def test_the_site_has_every_page_and_fetches_nothing(built: Path) -> None:
    for page in (*DOCS.rglob("*.md"), DOCS / "contributing.md"):
        assert (built / page.relative_to(DOCS)).with_suffix(".html").exists(), page
    for page in built.rglob("*.html"):
        parser = Fetched()
        parser.feed(page.read_text("utf-8"))
        assert parser.found and not [address for address in parser.found if "//" in address], page
        assert 'class="mermaid"' not in page.read_text("utf-8"), "the theme would fetch Mermaid from the network"
    for sheet in built.rglob("*.css"):
        assert "url(http" not in sheet.read_text("utf-8") and "@import" not in sheet.read_text("utf-8"), sheet


def test_a_page_without_a_place_in_the_menu_gets_one(tmp_path: Path) -> None:
    for name in ("a.md", "rows/b.md", "new.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    config = {"docs_dir": str(tmp_path), "nav": ["a.md", {"Rows": [{"One": "rows/b.md"}]}, {"Manuals": ["c.md"]}]}
    assert on_config(config)["nav"][-1] == {"Manuals": ["c.md", "new.md"]}


def test_what_builds_the_site_is_pinned_and_installed_where_tests_run() -> None:
    lines = (ROOT / "requirements" / "docs.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert {name: version(name) for name in pins} == pins
    for name in ("cpu.txt", "cpu_py312.txt"):
        assert "-r docs.txt" in (ROOT / "requirements" / name).read_text("utf-8").splitlines()
    assert "requirements/docs.txt" in (ROOT / "tools" / "environment.sh").read_text("utf-8"), "of the packages' digest"


def test_a_diagram_is_told_line_by_line_on_the_site() -> None:
    flow = "flowchart LR\n    a[first] --> b[second: more]\n    b & c[third] <-->|both ways| a\n"
    assert arrows(flow).splitlines() == ["first  →  second: more", "second: more and third  ↔  first (both ways)"]
    talk = "sequenceDiagram\n    participant P as one\n    participant Q as two\n    P->>Q: hello\n    Note over P,Q: done\n"
    assert messages(talk).splitlines() == ["one → two: hello", "done"]
    for page in PAGES:
        for language, text in blocks(page):
            if language == "mermaid":
                told = messages(text) if text.startswith("sequence") else arrows(text)
                assert len(told.splitlines()) > 4 and "[" not in told, page


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_of_pages_outside_the_site(page: Path, built: Path) -> None:
    """Those of the pages of docs/ are mkdocs' business."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        assert (page.parent / file).exists(), target
        if anchor:
            html = (built / Path(file).relative_to("docs")).with_suffix(".html").read_text("utf-8")
            assert f'id="{anchor}"' in html, target


@pytest.mark.parametrize("command", SEMION, ids=str)
def test_a_command_of_semion_is_one_that_its_parser_takes(command: Command) -> None:
    """And its configuration can be loaded with its overrides, where it names one that is there; or the page shows what is wrong
    with it."""
    words = [re.sub(r"^(N|STEPS)$", "1", word) for word in command.words]
    words = [word.split("|")[0] if "=" not in word and not word.startswith("RUN|") else word for word in words]
    if not command.is_whole:
        assert {word for word in words if word.startswith("--")} <= _flags(words[0])
        return
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            options = cli._parsed(words)
    except SystemExit:
        pytest.fail(complaint.getvalue())
    if not str(getattr(options, "config", "")).startswith("configs/"):
        _options_exist(getattr(options, "overrides", []))
        return
    faults = read_config(ROOT / options.config, options.overrides).faults
    shown = (ROOT / command.page).read_text("utf-8")
    assert not [fault for fault in faults if f"semion: {fault}" not in shown]


def _flags(name: str) -> set[str]:
    parser: Any = cli._parser()
    (choices,) = (action.choices for action in parser._actions if action.choices)
    return {flag for action in choices[name]._actions for flag in action.option_strings}


def test_the_documents_show_every_command() -> None:
    shown = {command.words[0] for command in SEMION}
    parser: Any = cli._parser()
    (choices,) = (action.choices for action in parser._actions if action.choices)
    assert shown == choices.keys(), "a command that no page shows, or one that is gone"


def _options_exist(overrides: list[str]) -> None:
    known = set(_known())
    for override in overrides:
        assert override.partition("=")[0] in known, override


def _known() -> Iterator[str]:
    for section, field in Options.model_fields.items():
        kind: Any = field.annotation
        yield from (f"{section}.{name}" for name in kind.model_fields)
    for loss in LOSSES.names:
        yield from (f"algorithm.{name}" for name in LOSSES.load(loss).Options.model_fields)
    yield "algorithm.loss"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_other_commands_name_files_that_are_there(page: Path) -> None:
    for command in commands(page):
        for word in command.words:
            if re.match(r"(\.venv/bin/python|python|pip)$", word) or word in command.placeholders:
                continue
            if re.match(r"(tools|configs|examples|requirements|tests)/[\w./-]+$", word):
                assert (ROOT / word).exists(), command


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """In code: paths below the repository's own folders, and `engine/a/b.py:name` without the name."""
    text = BLOCKS.sub("", page.read_text("utf-8"))
    for name in re.findall(r"`((?:engine|tools|configs|examples|tests|docs|csrc|requirements)/[\w./-]+)", text):
        if not re.search(r"\b[A-Z]{4,}\b", name.partition("README")[0]):
            assert (ROOT / name.rstrip(".")).exists() or name.startswith(MADE), (page, name)


BLOCKS = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
MADE = ("docs/results/", "engine/ops/_semion")  # by tools/gpu_check, and by the build


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_configurations_in_a_page_have_options_that_exist(page: Path) -> None:
    for language, text in blocks(page):
        if language == "toml":
            _options_exist([f"{name}=" for name in _named(tomllib.loads(text))])


def _named(tree: dict[str, Any]) -> Iterator[str]:
    for section, table in tree.items():
        for name, value in table.items():
            if name == "mix":
                yield from (f"{section}.{key}" for row in value for key in row)
            else:
                yield f"{section}.{name}"


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_a_page_is_python_and_examples_are_those_of_the_repository(page: Path) -> None:
    for language, text in blocks(page):
        if language == "python":
            ast.parse(text)
            first, _, rest = text.partition("\n")
            if first.startswith("# examples/"):
                assert rest.strip() in (ROOT / first.removeprefix("# ")).read_text("utf-8"), first


RUN_HERE = [  # what needs neither a run nor a model with weights, of the pages that people wrote
    command
    for command in semion_commands(HAND_WRITTEN)
    if command.words[0] == "plan" and not command.placeholders and (ROOT / command.words[1]).is_file()
]


@pytest.mark.parametrize("command", RUN_HERE, ids=str)
def test_plans_of_the_guides_are_made(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    said = io.StringIO()
    with redirect_stdout(said):
        assert cli.main(command.words) == 0
    assert "fits GPUs of 139.0 GiB" in said.getvalue()


def test_the_plans_are_not_none() -> None:
    assert len(RUN_HERE) >= 2


def test_the_reward_of_the_guide_judges_the_rows_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command, run as it stands there."""
    page = DOCS / "own_reward.md"
    (rows,) = (text for language, text in blocks(page) if language == "jsonl")
    (command,) = semion_commands([page])
    assert command.words[:2] == ("score", "FILE")
    (tmp_path / "rows.jsonl").write_text(rows)
    monkeypatch.chdir(ROOT)
    figures = tmp_path / "figures.json"
    with redirect_stdout(io.StringIO()):
        assert cli.main(["score", str(tmp_path / "rows.jsonl"), *command.words[2:], "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["agreement"] == 1.0


def test_the_class_of_the_guide_judges_as_it_says(tmp_path: Path) -> None:
    """Written to a file, as it stands there, it judges rows of two problems."""
    (text,) = (text for language, text in blocks(DOCS / "own_reward.md") if language == "python" and "class Diverse" in text)
    (tmp_path / "reward.py").write_text(text)
    rows = [("1+1", "two", 0.5), ("1+1", "two ", 0.5), ("1+1", "2", 1.0), ("2+2", "two", 1.0)]
    lines = [json.dumps({"problem": p, "completion": c, "answer": "", "expected": e}) for p, c, e in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    figures, command = tmp_path / "figures.json", ["score", str(tmp_path / "rows.jsonl"), "--reward"]
    with redirect_stdout(io.StringIO()):
        assert cli.main([*command, f"{tmp_path}/reward.py:Diverse", "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["agreement"] == 1.0


@pytest.mark.parametrize("page", ["own_data.md", "own_reward.md"])
def test_the_rows_of_a_guide_are_rows(page: str, tmp_path: Path) -> None:
    for number, text in enumerate(text for language, text in blocks(DOCS / page) if language == "jsonl"):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(text)
        assert len(load_rows(file)) == text.count("\n")


def test_the_readme_shows_what_a_mistake_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line after `$ semion ...` is what the command says."""
    monkeypatch.chdir(ROOT)
    shown = [
        pair
        for page in HAND_WRITTEN
        for _, text in blocks(page)
        for pair in re.findall(r"^\$ semion (.+)\n(semion: .+)$", text, re.MULTILINE)
    ]
    assert shown
    for command, said in shown:
        stderr = io.StringIO()
        with redirect_stderr(stderr), redirect_stdout(io.StringIO()):
            assert cli.main(shlex.split(command)) != 0
        assert said in stderr.getvalue()


def templates() -> set[str]:
    """Every text of the engine's code, with a gap for each value that is put in."""
    found = set()
    for path in ENGINE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    """A changed message is noticed here: copy the new one, with … for values, and look whether cause and fix still fit."""
    known = templates()
    told = [" ".join(text.split()) for language, text in blocks(DOCS / "troubleshooting.md") if language == "text"]
    assert len(told) > 30
    for message in told:
        assert len(message.replace(GAP, "")) > 12, message
        assert any(message in template for template in known), f"no message of the code reads: {message}"


def test_troubleshooting_has_every_exit_code() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SemionError)]
    codes = {kind.exit_code for kind in kinds}
    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    assert codes == {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}


def test_the_pages_of_the_rows_are_up_to_date() -> None:
    for name, page in ROWS.items():
        assert (DOCS / name).read_text("utf-8") == page(), f"{name} differs from configs/paper: run tools/docs.py"


def test_every_page_of_a_row_names_its_files() -> None:
    for page in (DOCS / "rows").glob("*_*.md"):
        config = load_config(ROOT / "configs" / "paper" / f"{page.stem}.toml")
        assert isinstance(config, RunConfig) and (ROOT / "configs" / "tiny" / f"{page.stem}.toml").exists()
        assert f"configs/paper/{page.stem}.toml" in page.read_text("utf-8")


def test_the_command_builds_the_site_where_git_ignores_it() -> None:
    ignored = subprocess.run(["git", "check-ignore", "build/site"], cwd=ROOT, capture_output=True, check=False)
    assert ignored.returncode == 0
    help = subprocess.run([sys.executable, "tools/docs.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "site" in help.stdout


def test_commands_of_tools_find_what_they_import():
    """`python tools/NAME.py` puts tools/ into the path and not the repository: a tool that imports another one, or the tests,
    is called as `python -m tools.NAME`, wherever a document or a tool itself says how."""
    texts = [path for pattern in ("*.md", "docs/*.md", "tools/*.py", "examples/**/*.md") for path in ROOT.glob(pattern)]
    called = {name for path in texts for name in re.findall(r"python3? tools/(\w+)\.py", path.read_text("utf-8"))}
    assert len(called) > 5
    for name in sorted(called):
        source = (ROOT / "tools" / f"{name}.py").read_text("utf-8")
        if "sys.path.insert" not in source:
            assert not re.search(r"^(from|import) (tools|tests)\b", source, re.MULTILINE), f"say python -m tools.{name}"
