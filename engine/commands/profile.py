"""`semion profile`: where the time of a profiled run went, by process and phase. It profiles nothing; profile.tool does."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from engine.commands.common import write_figures
from engine.core.errors import DataError


def profile(options: argparse.Namespace) -> None:
    """Prints the table of every file, or of the files in a run's folder `profile`."""
    from engine.observe.profiling.table import columns, read_profile
    from engine.observe.progress import print_table

    files = [file for path in options.paths for file in profiles_of(Path(path))]
    found = [read_profile(file) for file in files]
    for process in found:
        print_table(f"{process.process}: {process.window_seconds:.3f} s", columns(process))
    write_figures({"processes": [asdict(process) for process in found]}, options.json)


def profiles_of(path: Path) -> list[Path]:
    """A file itself; of a run's directory its profiles. DataError where it has none."""
    if not path.is_dir():
        return [path]
    from engine.observe.profiling.recorder import FOLDER

    files = sorted(file for file in (path / FOLDER).glob("*") if file.suffix in (".json", ".sqlite"))
    if not files:
        raise DataError(
            f"a run's directory must hold {FOLDER}/*.json or *.sqlite; found none in {path}: profile a run with "
            f"profile.tool = 'torch' or tools/nsys"
        )
    return files
