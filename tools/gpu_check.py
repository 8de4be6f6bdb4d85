"""Everything that only a GPU can prove, one section after another, each in a process of its own with a deadline: what fails or
is late stops nothing else, and the report is whole after every section, whatever ends this program. Never run on a GPU so far.

    tools/gpu_check [--only NAME ...] [--budget-seconds 540] [--output FOLDER] [--offline-stack FOLDER]

Leaves report.json, report.md, and each section's log and figures in the output folder ($OUT, or runs/gpu_check), and the
report in docs/results/gpu-DATE.md too. --offline-stack is for a machine without a network that has Python 3.12 and torch 2.11
for CUDA 13: archives (*.tar.xz of a site folder) and pure-Python wheels in that folder are unpacked outside the repository.
Beside the archives of Transformer Engine with megatron-core and of vLLM the engine needs wheels of rich, markdown-it-py, mdurl
and Pygments there; sections whose library is missing say so.

Exit codes: 0 nothing failed, 1 a section failed, 2 no GPU, torch sees none, or a wrong option. This file needs the standard
library alone.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
TE_TESTS, COLOCATED_TESTS = "tests/gpu/test_transformer_engine.py", "tests/gpu/test_colocated_gpu.py"
PYTEST = ("-m", "pytest", "-q", "-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider", "--junitxml={junit}")
MIN_SECONDS = 5.0  # left of the budget, or a section is not begun
TAIL_LINES = 6


@dataclass(frozen=True)
class Section:
    """One thing to prove. `command` follows the interpreter; {json} and {junit} are where its figures go."""

    name: str
    proves: str
    command: tuple[str, ...]
    seconds: float  # its deadline, if the budget leaves as much
    files: tuple[str, ...] = ()  # in the repository; without one of these things the section is not run
    modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What became of a section."""

    name: str
    proves: str
    command: str
    verdict: Literal["PASS", "FAIL", "NOT RUN"] = "NOT RUN"
    reason: str = "not reached"
    seconds: float = 0.0
    figures: list[dict[str, Any]] = field(default_factory=list)


# Cheap and valuable first: a budget that ends early loses the end of this list.
SECTIONS = (
    Section("extension", "our CUDA kernels build", ("setup.py", "build_ext", "--inplace"), 60, programs=("nvcc",)),
    Section("machine", "driver, versions, the kernels load", ("-m", "engine.cli", "doctor", "--json", "{json}"), 40),
    Section("kernel_tests", "our kernels are right on a GPU", (*PYTEST, "tests/gpu/test_kernels_gpu.py"), 90),
    Section(
        "transformer_engine",
        "the trainer with Transformer Engine's layers computes what it does with megatron's",
        (*PYTEST, TE_TESTS),
        70,
        files=(TE_TESTS,),
        modules=("transformer_engine",),
    ),
    Section("ceilings", "what this GPU can do at all", ("-m", "tools.bench_ceilings", "--json", "{json}"), 30),
    Section(
        "kernels",
        "our kernels against eager and megatron",
        ("-m", "tools.bench_ops", "--device", "cuda", "--json", "{json}"),
        60,
    ),
    Section(
        "layers",
        "tokens a second and MFU of 8B's layers, every precision; optimizers",
        ("-m", "tools.bench_layers", "--json", "{json}"),
        110,
    ),
    Section(
        "fp8_curve",
        "FP8 trains as bf16 does",
        ("-m", "tools.fp8_curve", "--json", "{json}"),
        110,
        modules=("transformer_engine",),
    ),
    Section(
        "sync",
        "a weight sync over CUDA IPC against a copy of as many bytes",
        ("-m", "tools.bench_sync_gpu", "--json", "{json}"),
        200,
        modules=("vllm",),
    ),
    Section(
        "colocated",
        "trainer and engine in turn on one GPU",
        (*PYTEST, COLOCATED_TESTS),
        150,
        files=(COLOCATED_TESTS,),
        modules=("vllm",),
    ),
    Section(
        "quickstart",
        "the whole engine with vLLM on one GPU",
        ("tools/quickstart.py", "--single-device", "--json", "{json}"),
        300,
        modules=("vllm", "ray", "math_verify"),
    ),
)


class Report:
    """The outcomes so far, and the files that hold them."""

    def __init__(self, sections: Sequence[Section], targets: Sequence[Path], about: dict[str, Any]) -> None:
        self.about = about
        self.outcomes = {s.name: Outcome(s.name, s.proves, shown(s)) for s in sections}
        self._targets = targets
        self.write()

    def write(self) -> None:
        """Every target, each appearing whole."""
        everything = {"about": self.about, "sections": [asdict(outcome) for outcome in self.outcomes.values()]}
        for target in self._targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(everything, indent=1) + "\n" if target.suffix == ".json" else self.markdown()
            staged = target.with_name(f".{target.name}.{os.getpid()}")
            staged.write_text(text, encoding="utf-8")
            staged.replace(target)

    def markdown(self) -> str:
        """The report to read."""
        outcomes = self.outcomes.values()
        lines = [f"# GPU check, {self.about['date']}", ""]
        lines += [f"- {key}: {value}" for key, value in self.about.items() if key != "date"]
        lines += ["", "| section | verdict | s | proves | reason, and what runs it alone |", "|---|---|---|---|---|"]
        for o in outcomes:
            why = f"{cell(o.reason)}; `tools/gpu_check --only {o.name}`" if o.verdict != "PASS" else ""
            lines.append(f"| {o.name} | {o.verdict} | {o.seconds:.0f} | {o.proves} | {why} |")
        for o in outcomes:
            if o.figures:
                lines += ["", f"## {o.name}", "", f"`{o.command}`", "", *table(o.figures)]
        return "\n".join(lines) + "\n"


def shown(section: Section) -> str:
    """Its command for people."""
    return f"python {' '.join(section.command)}".replace("{json}", "FILE").replace("{junit}", "FILE")


def cell(value: Any) -> str:
    """A value as a table shows it."""
    text = f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.split()).replace("|", "\\|")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown of rows that may lack columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return lines + [f"| {' | '.join(cell(row[c]) if c in row else '' for c in columns)} |" for row in rows]


def rows_of(figures: Any) -> list[dict[str, Any]]:
    """The figures a section wrote, as rows: a list, {"figures": list}, {name: row}, or one row."""
    if isinstance(figures, dict) and isinstance(figures.get("figures"), list):
        figures = figures["figures"]
    if isinstance(figures, dict):
        nested = figures and all(isinstance(value, dict) for value in figures.values())
        return [{"what": key, **value} for key, value in figures.items()] if nested else [figures]
    return list(figures)


def missing(section: Section, environment: dict[str, str]) -> str | None:
    """What the section cannot be run without, if it is not there."""
    for name in section.files:
        if not (ROOT / name).exists():
            return f"file missing: {name}"
    for program in section.programs:
        if shutil.which(program, path=environment["PATH"]) is None:
            return f"{program} is not in PATH"
    for module in section.modules:
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{module}') is None)"
        if subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=False).returncode:
            return f"{module} is not installed"
    return None


def run_section(section: Section, outcome: Outcome, output: Path, environment: dict[str, str], seconds: float) -> None:
    """Runs it for at most so many seconds, ends whatever it has started in its process group, and fills the outcome."""
    figures, junit = output / f"{section.name}.json", output / f"{section.name}.xml"
    parts = [part.replace("{json}", str(figures)).replace("{junit}", str(junit)) for part in section.command]
    command = [sys.executable, *parts]
    log = output / f"{section.name}.log"
    for stale in (figures, junit):
        stale.unlink(missing_ok=True)
    started = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):  # the whole group is gone
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    outcome.seconds = time.monotonic() - started
    outcome.verdict = "PASS" if code == 0 else "FAIL"
    tail = " / ".join(log.read_text("utf-8", "replace").splitlines()[-TAIL_LINES:])[-600:]
    outcome.reason = "" if code == 0 else f"late after {seconds:.0f} s: {tail}" if code is None else f"exit code {code}: {tail}"
    read_figures(outcome, figures, junit)


def read_figures(outcome: Outcome, figures: Path, junit: Path) -> None:
    """What the section left of figures, also where it was ended; a test run without a test that passed proves nothing."""
    if figures.exists():
        try:
            outcome.figures = rows_of(json.loads(figures.read_text("utf-8")))
        except json.JSONDecodeError as error:
            outcome.reason += f" (figures cut off: {error})"
    if junit.exists():
        cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
        kinds = {kind: [case for case in cases if case.find(kind) is not None] for kind in ("failure", "error", "skipped")}
        passed = len(cases) - sum(map(len, kinds.values()))
        outcome.figures = [{"passed": passed, **{kind: len(found) for kind, found in kinds.items()}}]
        failed = [str(case.get("name")) for case in (*kinds["failure"], *kinds["error"])]
        if failed:
            outcome.reason = f"failed: {', '.join(failed)[:600]}"
        elif outcome.verdict == "PASS" and not passed:
            outcome.verdict, outcome.reason = "NOT RUN", "every test was skipped"


def run_sections(
    sections: Iterable[Section], report: Report, output: Path, environment: dict[str, str], budget_seconds: float
) -> int:
    """Runs them in order within the budget, writing the report after each; returns the exit code."""
    end = time.monotonic() + budget_seconds
    for section in sections:
        outcome = report.outcomes[section.name]
        lacking, left = missing(section, environment), end - time.monotonic()
        if lacking is not None:
            outcome.reason = lacking
        elif left < MIN_SECONDS:
            outcome.reason = f"the budget of {budget_seconds:.0f} s was spent"
        else:
            print(f"== {section.name}: {section.proves}", flush=True)
            run_section(section, outcome, output, environment, min(section.seconds, left))
        print(f"{outcome.verdict} {section.name} [{outcome.seconds:.0f} s] {outcome.reason}", flush=True)
        report.about["seconds"] = round(budget_seconds - (end - time.monotonic()))
        report.write()
    return int(any(outcome.verdict == "FAIL" for outcome in report.outcomes.values()))


def section_environment(site: Path | None) -> dict[str, str]:
    """What every section's process has in its environment."""
    cudnn = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cudnn"
    path = [str(ROOT)] if site is None else [str(ROOT), str(site)]
    fixed = {
        "PATH": f"{os.environ['PATH']}{os.pathsep}/usr/local/cuda/bin",
        "PYTHONPATH": os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "8",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # megatron's tensor parallelism orders its kernels by it
        "CUDNN_HOME": str(cudnn),
        "NVTE_CUDA_INCLUDE_DIR": "/usr/local/cuda/include",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # both would compile at run time
        "VLLM_USE_DEEP_GEMM": "0",
    }
    return {**os.environ, **fixed}


def unpack(stack: Path, site: Path) -> list[str]:
    """Archives and pure-Python wheels of a folder into one site folder; returns their names."""
    archives, wheels = sorted(stack.glob("*.tar.xz")), sorted(stack.glob("*none-any.whl"))
    for archive in archives:
        with tarfile.open(archive) as packed:
            packed.extractall(site, filter="data")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as packed_wheel:
            packed_wheel.extractall(site)
    return [path.name for path in (*archives, *wheels)]


def gpus() -> list[str]:
    """One line of nvidia-smi for each GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    done = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False, timeout=30)
    return [line.split(" (UUID")[0] for line in done.stdout.splitlines()] if done.returncode == 0 else []


def torch_sees_one(environment: dict[str, str]) -> bool:
    """Whether torch would compute on it; if not, the measurements would run as their twins on the CPU."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=False).returncode == 0


def stop(number: int, _: FrameType | None) -> None:
    """A request to end becomes an exception, so that the running section is ended too."""
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [section.name for section in SECTIONS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--budget-seconds", type=float, default=540.0, help="for everything, unpacking included")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT") or ROOT / "runs" / "gpu_check"))
    parser.add_argument("--offline-stack", type=Path, metavar="FOLDER", help="archives and wheels to unpack")
    options = parser.parse_args()
    started, now = time.monotonic(), datetime.datetime.now(datetime.UTC)
    found = gpus()
    if not found:
        print("gpu_check: an NVIDIA GPU must be here; nvidia-smi found none: run it on a GPU machine", file=sys.stderr)
        return 2
    if options.offline_stack is not None and not options.offline_stack.is_dir():
        print(f"gpu_check: --offline-stack must be a folder; found {options.offline_stack}: name one", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, stop)
    output: Path = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"date": now.strftime("%Y-%m-%d %H:%M UTC"), "GPUs": "; ".join(found)}
    about |= {"Python": sys.version.split()[0], "budget, s": options.budget_seconds}
    sections = [section for section in SECTIONS if section.name in options.only]
    published = ROOT / "docs" / "results" / f"gpu-{now:%Y-%m-%d}.md"
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as scratch:
        site = None if options.offline_stack is None else Path(scratch)
        environment = section_environment(site)
        if not torch_sees_one(environment):
            print(f"gpu_check: torch must see the GPU; {sys.executable}'s sees none: name another in PYTHON", file=sys.stderr)
            return 2
        report = Report(sections, (output / "report.json", output / "report.md", published), about)
        if site is not None:
            about["offline stack"] = ", ".join(unpack(options.offline_stack, site))
        left = options.budget_seconds - (time.monotonic() - started)
        code = run_sections(sections, report, output, environment, left)
    print(report.markdown())
    return code


if __name__ == "__main__":
    sys.exit(main())
