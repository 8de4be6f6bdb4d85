"""`semion prepare`: a folder of training data from a public dataset, filtered and split as the paper has it."""

from __future__ import annotations

import argparse
from typing import Any

from engine.commands.common import write_figures
from engine.core.errors import ConfigError


def add_arguments(parser: Any) -> None:
    """The command's arguments."""
    parser.add_argument("dataset", metavar="DATASET", choices=["numinamath", "wildchat"], help="which filters to apply")
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="JSONL or parquet files, dataset folders, or hf://owner/name"
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder to make")
    parser.add_argument("--validation", type=_count, help="rows held out to select checkpoints (1980; wildchat 470)")
    parser.add_argument("--test", type=_count, help="rows held out to report (1980; wildchat 0)")
    parser.add_argument("--train", type=_count, help="rows to train on at most (all others)")
    parser.add_argument("--seed", type=_count, default=0, help="decides the splits (0)")
    parser.add_argument("--exclude", action="append", default=[], metavar="FILE", help="problems to keep out; repeatable")
    parser.add_argument("--language", action="append", default=[], help="of WildChat, keep only this; repeatable (all)")
    parser.add_argument("--json", metavar="PATH", help="write the manifest to this file too")


def prepare(options: argparse.Namespace) -> None:
    """Filters, splits, writes, and shows what became of the rows."""
    from engine.data import filters
    from engine.data.prepare import Sizes
    from engine.data.prepare import prepare as fill
    from engine.observe.progress import print_table

    if options.language and options.dataset != "wildchat":
        raise ConfigError(f"--language is WildChat's; found {options.language[0]!r} with {options.dataset}: remove it")
    recipe = filters.wildchat(options.language) if options.dataset == "wildchat" else filters.numinamath()
    sizes = Sizes(
        recipe.validation if options.validation is None else options.validation,
        recipe.test if options.test is None else options.test,
        options.train,
        options.seed,
    )
    manifest = fill(recipe, options.sources, options.folder, sizes, options.exclude)
    counts = [(reason.replace("_", " "), f"{count:,}") for reason, count in manifest["counts"].items()]
    print_table(f"semion prepare {options.dataset}", [("rows", "number"), *counts])
    files = [(name, f"{file['rows']:,}", file["sha256"][:16]) for name, file in manifest["files"].items()]
    print_table(str(options.folder), [("file", "rows", "sha256"), *files])
    write_figures(manifest, None, options.json)


def _count(text: str) -> int:
    """A number that is not negative; argparse says what was wrong."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more; found {text!r}")
    return int(text)
