"""Compiles every CUDA kernel of csrc for each GPU generation without a GPU, prints registers, shared memory and spills,
and fails on a spill or a warning. It links nothing and keeps nothing; tests/unit/ops/test_cuda_kernels.py runs it.

    python tools/check_cuda.py [NAME ...]        only files whose path holds a NAME

Needs nvcc 13 in PATH or in /usr/local/cuda/bin.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90", "100")  # A100, H100 and H200, B200: those that setup.py builds for
FLAGS = ["-std=c++17", "-O3", "-Xptxas=-v,--warn-on-spills", "-Xcompiler=-Wall,-Wextra", "--Werror=cross-execution-space-call"]
TYPES = {"f": "float", "d": "double", "h": "uint8", "t": "uint16", "j": "uint32", "m": "uint64"}  # as mangled
ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<architecture>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


class Usage(NamedTuple):
    """What one kernel takes on one architecture: registers a thread, bytes of shared memory a block and of spills."""

    kernel: str
    architecture: str
    registers: int
    shared_bytes: int
    spill_bytes: int


def find_nvcc() -> str | None:
    """The compiler's path, if there is one."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def kernel_name(symbol: str) -> str:
    """A readable name of a mangled kernel, template arguments in the order of the source: backward_kernel<1, true>."""
    name = re.search(r"\d((?:[a-z]+_)+kernel)(?=I|E|P|v|l)", symbol)
    assert name is not None, symbol
    rest = symbol[name.end() :]
    if rest[0] != "I":
        return name.group(1)
    values = re.findall(r"L(?:NS_\d+[A-Za-z]+)?(E|b|i)(\d+)", rest.split("EEEv")[0])
    shown = [TYPES[rest[1]]] if rest[1] in TYPES else []
    shown += [("false", "true")[int(value)] if kind == "b" else value for kind, value in values]
    return f"{name.group(1)}<{', '.join(shown)}>"


def compile_one(nvcc: str, source: Path, architecture: str) -> tuple[list[Usage], list[str]]:
    """Usage of the kernels of one file, and the compiler's complaints (warnings, and errors where it fails)."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        command = [nvcc, *FLAGS, code, "-cubin", str(source), "-o", f"{folder}/out.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    usages = [
        Usage(
            kernel_name(entry["symbol"]),
            f"sm_{architecture}",
            int(entry["registers"]),
            int(entry["shared"] or 0),
            int(entry["stores"]) + int(entry["loads"]),
        )
        for entry in ENTRY.finditer(output)
    ]
    complaints = [line for line in output.splitlines() if re.search(r"\b(warning|error|fatal)\b", line)]
    if done.returncode != 0 and not complaints:
        complaints.append(f"{source.name}: nvcc ended with {done.returncode}: {output[-500:]}")
    return usages, complaints


def check(nvcc: str, names: list[str]) -> tuple[list[Usage], list[str]]:
    """Usage of every kernel on every architecture, and what is wrong: complaints, and files without a kernel."""
    sources = [path for path in sorted((ROOT / "csrc").rglob("*.cu")) if not names or any(n in str(path) for n in names)]
    work = [(source, architecture) for source in sources for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        results = list(threads.map(lambda item: compile_one(nvcc, *item), work))
    usages = [usage for found, _ in results for usage in found]
    wrong = [complaint for _, complaints in results for complaint in complaints]
    wrong += [
        f"{usage.kernel} spills {usage.spill_bytes} bytes on {usage.architecture}" for usage in usages if usage.spill_bytes
    ]
    wrong += [f"{s.name}: no kernel found for sm_{a}" for (s, a), (found, _) in zip(work, results, strict=True) if not found]
    return usages, wrong if work else ["csrc holds no .cu file of these names"]


def table(usages: list[Usage]) -> str:
    """Registers / bytes of shared memory / bytes of spills per kernel and architecture."""
    columns = [f"sm_{architecture}" for architecture in ARCHITECTURES]
    rows: dict[str, dict[str, str]] = {}
    for usage in usages:
        rows.setdefault(usage.kernel, {})[usage.architecture] = f"{usage.registers}/{usage.shared_bytes}/{usage.spill_bytes}"
    lines = [f"{'registers/shared/spills':44}" + "".join(f"{column:>14}" for column in columns)]
    lines += [f"{kernel:44}" + "".join(f"{found.get(c, '-'):>14}" for c in columns) for kernel, found in sorted(rows.items())]
    return "\n".join(lines)


def main(names: list[str]) -> int:
    """The exit code: 0 without a spill or a warning, 1 with, 2 without nvcc."""
    nvcc = find_nvcc()
    if nvcc is None:
        print("check_cuda: nvcc must be in PATH; found none: install the CUDA toolkit 13", file=sys.stderr)
        return 2
    usages, wrong = check(nvcc, names)
    print(table(usages))
    for sentence in wrong:
        print(f"check_cuda: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
