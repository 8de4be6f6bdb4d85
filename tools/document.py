"""Writes the documents that are made from declarations: docs/metrics.md from the metrics that the code declares,
docs/options.md from the options.

    tools/document.py           writes them
    tools/document.py --check   says whether they are up to date, and writes nothing
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from engine.config.options import LOSSES, AlgorithmOptions, Options
from engine.run.metrics import catalogue, table

DOCS = Path(__file__).resolve().parents[1] / "docs"
METRICS_HEAD = """# What a person watches

This file is written by `tools/document.py` from the metrics that the code declares, each beside what computes it.

`metrics.jsonl` has a row a step, TensorBoard the same names. A mean of nothing is null. A mean is over all microbatches and
data-parallel ranks of the step. `elsewhere` is what other libraries call the same; where their definition differs in a detail,
it is the nearest. `rollout_entropy` is unbiased at `sampling.temperature` = 1 and `sampling.top_p` = 1, and at any temperature
with a loss that uses ratios, whose log-probs are of what was sampled ([algorithms](algorithms.md)). A loss of the user's own
adds its metrics under the names that it declares; `semion report` draws and explains them.

"""


OPTIONS_HEAD = """# Options

This file is written by `tools/document.py` from `engine/config/options.py` and the files of the losses. A configuration is a
TOML file with these tables; `section.key=value` on the command line sets an option anew. `semion check CONFIG --toml` prints
the resolved tree. Rules across options stand in `engine/config/rules.py` and in each loss's own file.

"""


def metrics_document() -> str:
    """What docs/metrics.md should hold."""
    return METRICS_HEAD + table(catalogue())


def options_document() -> str:
    """What docs/options.md should hold."""
    parts = [OPTIONS_HEAD]
    for name, field in Options.model_fields.items():
        section: Any = AlgorithmOptions if name == "algorithm" else field.annotation
        assert issubclass(section, BaseModel), name
        parts.append(_section(f"[{name}]", section, set()))
        if name == "algorithm":
            parts += [
                _section(f"[algorithm] with loss = {loss!r}", LOSSES.load(loss).Options, set(AlgorithmOptions.model_fields))
                for loss in LOSSES.names
            ]
    return "\n".join(parts)


def _section(title: str, section: type[BaseModel], known: set[str]) -> str:
    rows = [f"## {title}\n", " ".join((section.__doc__ or "").split()) + "\n", "| option | default | values | what it is |"]
    rows.append("|---|---|---|---|")
    for name, field in section.model_fields.items():
        if name not in known:
            default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
            rows.append(f"| `{name}` | {default} | {_values(field)} | {field.description or ''} |")
    return "\n".join(rows) + "\n"


def _values(field: Any) -> str:
    """The type of an option and its bounds, as people write them."""
    bounds = [text for meta in field.metadata if (text := _bound(meta))]
    return ", ".join([_kind(field.annotation), *bounds])


def _kind(annotation: Any) -> str:
    """A type in words: its values where it lists them."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_kind, inner)))
    if origin is Annotated:
        return _kind(inner[0])
    if origin is tuple:
        return f"list of {_kind(inner[0])}"
    if origin is dict:
        return "table"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    return {str: "text", int: "integer", float: "number", bool: "true or false", NoneType: "unset"}[annotation]


def _bound(meta: Any) -> str:
    for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
        if (value := getattr(meta, name, None)) is not None:
            return f"{sign} {value}"
    return ""


DOCUMENTS = {"metrics.md": metrics_document, "options.md": options_document}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check, stale = parser.parse_args().check, []
    for name, document in DOCUMENTS.items():
        if check and (not (DOCS / name).exists() or (DOCS / name).read_text(encoding="utf-8") != document()):
            stale.append(name)
        elif not check:
            (DOCS / name).write_text(document(), encoding="utf-8")
            print(DOCS / name)
    if check:
        print(f"{' and '.join(stale)} differ from the declarations: run tools/document.py" if stale else "up to date")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
