"""Trains with profile.tool = "nsys" and prints where the time of the profiled steps went, by process and phase. Which steps,
ranks and engines is said in [profile]. tools/nsys starts it; it needs `nsys` in PATH and a GPU.

Leaves run.directory/profile/: rank-0.nsys-rep to open in Nsight Systems and its export rank-0.sqlite, and so on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from engine.cli import main as semion
from engine.config.load import RunConfig, load_config
from engine.core.errors import DataError, SemionError
from engine.observe.profiling.nsight import check_installed, report_file


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options set anew")
    parser.add_argument("--verbose", action="store_true", help="print what every process logs")
    parser.add_argument("--json", metavar="PATH", help="write the figures to this file too")
    options = parser.parse_args(arguments)
    overrides = [*options.overrides, "profile.tool=nsys"]
    try:
        config = load_config(options.config, overrides)
        check_installed()
        if code := train(options.config, overrides, verbose=options.verbose):
            return code
        files = [export(report) for report in reports(config)]
    except SemionError as error:
        print(f"nsys: {error}", file=sys.stderr)
        return error.exit_code
    return semion(["profile", *map(str, files), *(["--json", options.json] if options.json else [])])


def train(config: str, overrides: list[str], *, verbose: bool) -> int:
    """`semion train`, in a process of its own; its exit code."""
    command = [sys.executable, "-m", "engine.cli", "train", config, *overrides, *(["--verbose"] if verbose else [])]
    return subprocess.run(command, check=False).returncode


def reports(config: RunConfig) -> list[Path]:
    """The reports that a run leaves, of the profiled trainer ranks and engines."""
    chosen = config.profile
    engines = chosen.engines if config.uses_engines else ()
    ranks = [report_file(config.run_directory, "rank", rank) for rank in chosen.ranks]
    return [*ranks, *(report_file(config.run_directory, "engine", engine) for engine in engines)]


def export(report: Path) -> Path:
    """A report as an SQLite file beside it. DataError where there is none, or nsys cannot read it."""
    if not report.exists():
        raise DataError(
            f"nsys must have written {report}; found nothing: run with --verbose and look for what nsys says of that process"
        )
    exported = report.with_suffix(".sqlite")
    command = ["nsys", "export", "--type", "sqlite", "--force-overwrite", "true", "--output", str(exported), str(report)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        said = " ".join((run.stderr or run.stdout).split())
        raise DataError(f"nsys export of {report} must succeed; found exit code {run.returncode}: {said}")
    return exported


if __name__ == "__main__":
    sys.exit(main())
