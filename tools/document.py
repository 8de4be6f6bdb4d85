"""Writes the documents that are made from declarations: docs/metrics.md, from the metrics that the code declares.

    tools/document.py           writes it
    tools/document.py --check   says whether it is up to date, and writes nothing
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.run.metrics import catalogue, table

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
HEAD = """# What a person watches

This file is written by `tools/document.py` from the metrics that the code declares, each beside what computes it.

`metrics.jsonl` has a row a step, TensorBoard the same names. A mean of nothing is null. A mean is over all microbatches and
data-parallel ranks of the step. `elsewhere` is what other libraries call the same; where their definition differs in a detail,
it is the nearest. `rollout_entropy` is unbiased at `sampling.temperature` = 1 and `sampling.top_p` = 1, since log-probs are
those before both. A loss of the user's own adds its metrics under the names that it declares; `semion report` draws and
explains them.

"""


def document() -> str:
    """What docs/metrics.md should hold."""
    return HEAD + table(catalogue())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        up_to_date = DOCUMENT.read_text(encoding="utf-8") == document()
        print("up to date" if up_to_date else f"{DOCUMENT.name} differs from the declarations: run tools/document.py")
        return int(not up_to_date)
    DOCUMENT.write_text(document(), encoding="utf-8")
    print(DOCUMENT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
