"""A script, not a test: what we know of `nsys`. `profile` runs the program behind its options and, when that has ended, leaves
a report that holds its own command line; `export` turns a report into the tables that the real one exports, with a window of
two seconds and a forward of one in it."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

PID, MAIN = 77, 1
LINGERS = "FAKE_NSYS_LINGERS"  # variable: seconds that writing a report takes
SCHEMA = """
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER, category INTEGER,
    color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER, domainId INTEGER);
"""
CUDA_SCHEMA = """
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL,
    globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    correlationId INTEGER, globalPid INTEGER);
"""


def thread_id(thread: int, pid: int = PID) -> int:
    """nsys's globalTid; with thread 0 its globalPid."""
    return (pid << 24) + thread


def write_export(
    file: Path,
    ranges: list[tuple[str, int, int, int]],
    kernels: list[tuple[int, int, int, int]] | None = None,
    *,
    as_text: bool = False,
) -> None:
    """`ranges`: name, thread, start, end; `kernels`: thread and time of the launch, start, end. All in ns."""
    file.unlink(missing_ok=True)
    connection = sqlite3.connect(file)
    connection.executescript(SCHEMA + (CUDA_SCHEMA if kernels is not None else ""))
    for number, (name, thread, start, end) in enumerate(ranges):
        connection.execute("INSERT INTO StringIds VALUES (?, ?)", (number, "wrong" if as_text else name))
        row = (start, end, 59, name if as_text else None, thread_id(thread), number, 0)
        columns = "start, end, eventType, text, globalTid, textId, domainId"
        connection.execute(f"INSERT INTO NVTX_EVENTS ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    for number, (thread, launched, start, end) in enumerate(kernels or ()):
        launch = (launched, launched + 5, 0, thread_id(thread), number, 0)
        connection.execute("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, ?, ?, ?)", launch)
        kernel = (start, end, 0, number, thread_id(0))
        connection.execute("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, ?, ?, ?)", kernel)
    connection.commit()
    connection.close()


def main() -> int:
    what, *arguments = sys.argv[1:]
    if what == "export":
        if arguments[:4] != ["--type", "sqlite", "--force-overwrite", "true"] or arguments[4] != "--output":
            print("unknown options", file=sys.stderr)
            return 1
        json.loads(Path(arguments[6]).read_text())
        second = 10**9
        ranges = [("semion.window", MAIN, 0, 2 * second), ("semion.forward", MAIN, second, 2 * second)]
        write_export(Path(arguments[5]), ranges, [(MAIN, second + 3, second + 9, second + 9 + second // 4)])
        return 0
    options = [argument for argument in arguments if argument.startswith("--")]
    program = arguments[next(i for i, argument in enumerate(arguments) if not argument.startswith("--")) :]
    code = subprocess.run(program, check=False).returncode
    time.sleep(float(os.environ.get(LINGERS, "0")))
    (output,) = [option.removeprefix("--output=") for option in options if option.startswith("--output=")]
    Path(output).write_text(json.dumps(sys.argv[1:]))
    return code


def install(folder: Path) -> Path:
    """Makes `folder` one that PATH may name to find this."""
    folder.mkdir(parents=True, exist_ok=True)
    command = folder / "nsys"
    command.write_text(f"#!{sys.executable}\n" + Path(__file__).read_text())
    command.chmod(0o755)
    return folder


if __name__ == "__main__":
    sys.exit(main())
