"""Writes the documents that are made from declarations: docs/metrics.md from the metrics that the code declares,
docs/options.md from the options.

    tools/document.py           writes them
    tools/document.py --check   says whether they are up to date, and writes nothing
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from engine.config.reference import SectionText, sections
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
TOML file with these tables; `section.key=value` on the command line sets an option anew. `semion init` writes a file with the
right values for your model and machine and all other options as comments, `semion options trainer optimizer.eps` prints what is
here, and `semion check CONFIG --toml` prints the resolved tree. Rules across options stand in `rules.py`, `sync_rules.py` and
`trainer_rules.py` of `engine/config`, and in each loss's own file.

An option that would change nothing is never taken in silence (`engine/config/unused.py`). It is refused where only a mistake
sets it without what gives it a meaning. It is told, as a warning of `check`, `train` and `sft` that names it, where a file may
keep it while something else is off: `evaluation.*` without `data.held_out`, shares of a guard that is off, a profile's window.

`null` means unset. Paths are relative to the directory that the command is started in, not to the file. A unit of "of 1" is a
share between 0 and 1; "no unit" is a pure number.

"""


def metrics_document() -> str:
    """What docs/metrics.md should hold."""
    return METRICS_HEAD + table(catalogue())


def options_document() -> str:
    """What docs/options.md should hold."""
    return "\n".join([OPTIONS_HEAD, *map(_section, sections())])


def _section(section: SectionText) -> str:
    rows = [f"## {section.title}\n", f"{section.text}\n", "| option | default | values | unit | what it is |"]
    rows.append("|---|---|---|---|---|")
    for option in section.options:
        default = option.default if option.default == "required" else f"`{option.default}`"
        values = re.sub(r'"[^"]*"', lambda found: f"`{found[0]}`", option.values)
        rows.append(f"| `{option.name}` | {default} | {values} | {option.unit} | {option.text} |")
    return "\n".join(rows) + "\n"


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
