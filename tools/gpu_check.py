"""Everything that only a GPU can prove, one section after another, each in a process of its own with a deadline: what fails or
is late stops nothing else, and the report is whole after every section, whatever ends this program. Never run on a GPU so far.

    tools/gpu_check [--only NAME ...] [--budget-seconds 540] [--output FOLDER] [--offline-stack FOLDER]

Leaves report.json, report.md and details.zip (each section's log and figures) in the output folder ($OUT, or runs/gpu_check),
and the report in docs/results/gpu-DATE.md too. What is not installed is named before the first section, by the requirement that
would bring it; a section that lacks something is not run. `machine` fails where the doctor misses anything, Ray too.

A machine without a network needs python3 3.12 with torch 2.11 for CUDA 13, transformers, psutil and pytest, and nvcc 13; then

    tools/gpu_check --offline-stack FOLDER

is the whole command. The archives (*.tar.xz of a site folder) and wheels in FOLDER are unpacked outside the repository.
They bring megatron-core, Transformer Engine's three packages and vLLM, and of these what the machine has not, in the versions
of requirements/: for megatron-core and the engine pydantic, pydantic_core, annotated-types, typing-inspection, rich,
markdown-it-py, mdurl, Pygments; for Transformer Engine onnxscript, onnx_ir, onnx, ml-dtypes, protobuf, einops; for turns on
one GPU tensorboard, absl-py; for vLLM what it requires. The quickstart also takes Ray and Math-Verify. PYTHONPATH, CUDNN_HOME
and the like are set here; LD_LIBRARY_PATH need not be.

Exit codes: 0 nothing failed, 1 a section failed, 2 no GPU, torch sees none, or a wrong option. This file needs the standard
library alone, but for the list of sections in tools/gpu_sections.py.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from tools.gpu_sections import SECTIONS, Section

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"PIL": "pillow", "cpuinfo": "py-cpuinfo"}  # of distributions, where a module's name does not say it
MIN_SECONDS = 5.0  # left of the budget, or a section is not begun
TAIL_LINES = 6
ABSENT = """
import importlib.util, sys
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent
        return False
print(*(name for name in sys.argv[1:] if not there(name)))
"""


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


class Report:
    """The outcomes so far, and the files that hold them: JSON, Markdown, or an archive of the folder `details`."""

    def __init__(self, sections: Sequence[Section], targets: Sequence[Path], about: dict[str, Any], details: Path) -> None:
        self.details = details
        self.about = about
        self.outcomes = {s.name: Outcome(s.name, s.proves, shown(s)) for s in sections}
        self._targets = targets
        self.write()

    def write(self) -> None:
        """Every target, each appearing whole."""
        everything = {"about": self.about, "sections": [asdict(outcome) for outcome in self.outcomes.values()]}
        for target in self._targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            staged = target.with_name(f".{target.name}.{os.getpid()}")
            if target.suffix == ".zip":
                with zipfile.ZipFile(staged, "w", zipfile.ZIP_DEFLATED) as packed:
                    for path in sorted(self.details.iterdir()):
                        packed.write(path, path.name)
            else:
                text = json.dumps(everything, indent=1) + "\n" if target.suffix == ".json" else self.markdown()
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
    command = [sys.executable, "-c", ABSENT, *section.modules]
    absent = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    return f"not installed: {', '.join(map(requirement, absent))}" if absent else None


def requirement(module: str) -> str:
    """The line of requirements/ that brings a module, or its own name."""
    name = re.sub(r"[-_.]", "[-_.]", NAMES.get(module, module))
    files = (ROOT / "requirements" / file for file in ("common.txt", "gpu.txt"))
    found = (re.search(rf"(?mi)^{name}==\S+", file.read_text("utf-8")) for file in files if file.exists())
    return next((line[0] for line in found if line), module)


def run_section(section: Section, outcome: Outcome, details: Path, environment: dict[str, str], seconds: float) -> None:
    """Runs it for at most so many seconds, ends whatever it has started in its process group, and fills the outcome."""
    figures, junit = details / f"{section.name}.json", details / f"{section.name}.xml"
    parts = [part.replace("{json}", str(figures)).replace("{junit}", str(junit)) for part in section.command]
    command = [sys.executable, *parts]
    log = details / f"{section.name}.log"
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
    unfit = [row for row in outcome.figures if row.get("verdict", "ok") != "ok"]  # the doctor's
    if unfit:
        outcome.reason = "; ".join(f"{row.get('what')}: {row.get('found')}: {row['verdict']}" for row in unfit)
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


def run_sections(sections: Sequence[Section], report: Report, environment: dict[str, str], budget_seconds: float) -> int:
    """Runs them in order within the budget, writing the report after each; returns the exit code."""
    end = time.monotonic() + budget_seconds
    lacking = {section.name: missing(section, environment) for section in sections}
    for name, lack in lacking.items():
        if lack is not None:
            print(f"gpu_check: {name} will not run: {lack}", flush=True)
    for section in sections:
        outcome, left = report.outcomes[section.name], end - time.monotonic()
        lack = lacking[section.name]
        if lack is not None:
            outcome.reason = lack
        elif left < MIN_SECONDS:
            outcome.reason = f"the budget of {budget_seconds:.0f} s was spent"
        else:
            print(f"== {section.name}: {section.proves}", flush=True)
            try:
                run_section(section, outcome, report.details, environment, min(section.seconds, left))
            finally:
                report.write()  # its log too, where this program is asked to end
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
        "CUDNN_HOME": str(cudnn),
        "NVTE_CUDA_INCLUDE_DIR": "/usr/local/cuda/include",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # both would compile at run time
        "VLLM_USE_DEEP_GEMM": "0",
    }
    return {**os.environ, **fixed}


def unpack(stack: Path, site: Path) -> list[str]:
    """Archives and wheels of a folder into one site folder; returns their names."""
    archives, wheels = sorted(stack.glob("*.tar.xz")), sorted(stack.glob("*.whl"))
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
    parser.add_argument("--offline-stack", type=Path, metavar="FOLDER", help="archives and wheels to unpack; see above")
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
        site = None if options.offline_stack is None else Path(scratch) / "site"
        details = Path(scratch) / "details"
        details.mkdir()
        environment = section_environment(site)
        if not torch_sees_one(environment):
            print(f"gpu_check: torch must see the GPU; {sys.executable}'s sees none: name another in PYTHON", file=sys.stderr)
            return 2
        targets = (output / "report.json", output / "report.md", output / "details.zip", published)
        report = Report(sections, targets, about, details)
        if site is not None:
            about["offline stack"] = ", ".join(unpack(options.offline_stack, site))
        left = options.budget_seconds - (time.monotonic() - started)
        code = run_sections(sections, report, environment, left)
    print(report.markdown())
    return code


if __name__ == "__main__":
    sys.exit(main())
