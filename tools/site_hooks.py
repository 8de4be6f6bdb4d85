"""What mkdocs is told beside mkdocs.yml: CONTRIBUTING.md, which lies outside docs/, is a page; a new page is in the menu before
somebody gives it its place there; and a diagram in Mermaid's language, which GitHub draws and the site could only with a script
from the network, becomes the lines of its arrows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DIAGRAM = re.compile(r"^```mermaid\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NODE = re.compile(r"(\w+)\[\(?([^\])]+)\)?\]")
PARTICIPANT = re.compile(r"participant (\w+) as (.+)")
MESSAGE = re.compile(r"^\s*(\w+)->>(\w+): (.+)$")
NOTE = re.compile(r"^\s*Note over [\w,]+: (.+)$")
ARROW = re.compile(r"^\s*(.+?)\s*(<?-->|-\.->)(?:\|(.+?)\|)?\s*(.+?)\s*$")


def on_config(config: Any) -> Any:
    """Puts a page that the menu of mkdocs.yml does not have at the end of the menu's last part."""
    listed = set(_listed(config["nav"]))
    docs = Path(config["docs_dir"])
    (manuals,) = config["nav"][-1].values()
    manuals += [name for name in sorted(str(page.relative_to(docs)) for page in docs.rglob("*.md")) if name not in listed]
    return config


def _listed(menu: Any) -> Iterator[str]:
    if isinstance(menu, str):
        yield menu
    for part in menu.values() if isinstance(menu, dict) else menu if isinstance(menu, list) else ():
        yield from _listed(part)


def on_files(files: Files, config: Any) -> Files:
    """Adds the page of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "contributing.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text as the site has it."""
    return DIAGRAM.sub(lambda found: told(found[1]), markdown.replace("](../CONTRIBUTING.md", "](contributing.md"))


def told(diagram: str) -> str:
    """A diagram as a block of text."""
    lines = messages(diagram) if diagram.startswith("sequenceDiagram") else arrows(diagram)
    return f"```text\n{lines}\n```"


def messages(diagram: str) -> str:
    """The messages and notes of a sequence, in their order."""
    labels, lines = dict(PARTICIPANT.findall(diagram)), []
    for line in diagram.splitlines():
        if found := MESSAGE.match(line):
            lines.append(f"{labels[found[1]]} → {labels[found[2]]}: {found[3]}")
        elif found := NOTE.match(line):
            lines.append(found[1])
    return "\n".join(lines)


def arrows(diagram: str) -> str:
    """The arrows of a flowchart, one a line, by the labels of its nodes."""
    labels = dict(NODE.findall(diagram))
    lines = []

    def shown(side: str) -> str:
        names = [re.sub(r"\[.*\]$", "", name.strip()) for name in side.split("&")]
        return " and ".join(labels.get(name, name) for name in names)

    for line in diagram.splitlines():
        if found := ARROW.match(line):
            left, arrow, label, right = found.groups()
            sign = "↔" if arrow.startswith("<") else "→"
            lines.append(f"{shown(left)}  {sign}  {shown(right)}" + (f" ({label})" if label else ""))
    return "\n".join(lines)
