"""Everything that only a GPU can prove, one section after another, each in a process of its own with a deadline: what fails or
is late stops nothing else, and the report is whole after every section, whatever ends this program. Never run on a GPU so far.

    tools/gpu_check [--call 1|2|3] [--only NAME ...] [--budget-seconds S] [--output FOLDER] [--offline-stack FOLDER]
    tools/gpu_check --carry FOLDER         what each call takes along, and its size; needs no GPU

A machine that is lent for fifteen minutes is used in two calls, `--call 1` and then `--call 2`; the third is for one that is
there longer. Without --call all sections run, as far as the budget goes. What an earlier call passed is not run again: its
figures, what was unpacked, the model that was written stay in runs/gpu_check (--fresh forgets them). Some sections run beside
another: tests of what is right while an engine compiles. A section that cannot run says why and is no failure.

Leaves report.json, report.md, details.zip (each section's log and figures) and calibration.json (for `semion plan
--calibration`) in the output folder ($OUT, or runs/gpu_check), and the report in docs/results/gpu-DATE.md too. What is not
installed is named before the first section, by the requirement that would bring it.

A machine without a network needs python3 3.12 with torch 2.11 for CUDA 13, transformers, psutil and pytest, and nvcc 13; then
`--offline-stack FOLDER` unpacks the archives (*.tar.xz of a site folder) and wheels in FOLDER. They bring megatron-core,
Transformer Engine's three packages and vLLM, and of these what the machine has not, in the versions of requirements/: for
megatron-core and the engine pydantic, pydantic_core, annotated-types, typing-inspection, rich, markdown-it-py, mdurl, Pygments;
for Transformer Engine onnxscript, onnx_ir, onnx, ml-dtypes, protobuf, einops; for turns on one GPU tensorboard, absl-py; for
vLLM what it requires. The second call also takes Ray and Math-Verify. PYTHONPATH, CUDNN_HOME and the like are set here;
LD_LIBRARY_PATH need not be.

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
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from tools.gpu_sections import CALLS, SECTIONS, Section

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "runs" / "gpu_check"  # what one call leaves for the next; no call carries it
NAMES = {"PIL": "pillow", "cpuinfo": "py-cpuinfo"}  # of distributions, where a module's name does not say it
MIN_SECONDS = 5.0  # left of the budget, or a section is not begun
POLL_SECONDS = 0.05
TAIL_LINES = 6
CARRIED_MIB = 64.0  # that one call takes along, the checkout included
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

    def go_on(self, path: Path) -> None:
        """Takes over what an earlier call found, as report.json has it."""
        if not path.exists():
            return
        for row in json.loads(path.read_text("utf-8"))["sections"]:
            if row["name"] in self.outcomes and (row["verdict"] != "NOT RUN" or row["figures"]):
                self.outcomes[row["name"]] = Outcome(**row)

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
    return re.sub(r"\{\w+\}", "FILE", f"python {' '.join(section.command)}")


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


class Running:
    """A section's process, and its deadline."""

    def __init__(self, section: Section, outcome: Outcome, details: Path, environment: dict[str, str], seconds: float) -> None:
        self._outcome, self._seconds = outcome, seconds
        outcome.verdict, outcome.reason, outcome.figures = "NOT RUN", "not reached", []  # not those of an earlier call
        self._figures, self._junit = details / f"{section.name}.json", details / f"{section.name}.xml"
        self._log = details / f"{section.name}.log"
        for stale in (self._figures, self._junit):
            stale.unlink(missing_ok=True)
        kept = {"kept": details.parent, "report": details.parent / "report.json"}
        places = kept | {"json": self._figures, "junit": self._junit}
        parts = [re.sub(r"\{(\w+)\}", lambda found: str(places[found[1]]), part) for part in section.command]
        self._started = time.monotonic()
        with self._log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, *parts],
                cwd=ROOT,
                env=environment | dict(section.environment),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def finished(self) -> bool:
        """Whether it has ended, or is late."""
        return self._process.poll() is not None or time.monotonic() - self._started >= self._seconds

    def kill(self) -> None:
        """Ends whatever it has started in its process group."""
        with contextlib.suppress(ProcessLookupError):  # the whole group is gone
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def end(self) -> None:
        """Ends it, and fills the outcome."""
        outcome, code = self._outcome, self._process.poll()
        self.kill()
        outcome.seconds = time.monotonic() - self._started
        outcome.verdict = "PASS" if code == 0 else "FAIL"
        tail = " / ".join(self._log.read_text("utf-8", "replace").splitlines()[-TAIL_LINES:])[-600:]
        late = f"late after {self._seconds:.0f} s: {tail}"
        outcome.reason = "" if code == 0 else late if code is None else f"exit code {code}: {tail}"
        self._read()

    def cut_off(self) -> None:
        """Ends it before its time, where gpu_check itself is asked to end: its figures so far are kept, and it is run again."""
        self.kill()
        self._outcome.seconds = time.monotonic() - self._started
        self._read()
        self._outcome.reason = "gpu_check was asked to end while it ran"

    def _read(self) -> None:
        read_figures(self._outcome, self._figures, self._junit)
        if not self._outcome.figures:
            self._outcome.figures = tests_in(self._log.read_text("utf-8", "replace"))


def read_figures(outcome: Outcome, figures: Path, junit: Path) -> None:
    """What the section left of figures, also where it was ended; a test run without a test that passed proves nothing."""
    if figures.exists():
        try:
            outcome.figures = rows_of(json.loads(figures.read_text("utf-8")))
        except ValueError as error:
            outcome.reason += f" (figures cut off: {error})"
    unfit = [row for row in outcome.figures if row.get("verdict", "ok") != "ok"]  # the doctor's
    if unfit:
        outcome.reason = "; ".join(f"{row.get('what')}: {row.get('found')}: {row['verdict']}" for row in unfit)
    if junit.exists():
        try:
            cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
        except ElementTree.ParseError as error:  # ended while pytest wrote it
            outcome.reason += f" (report of the tests cut off: {error})"
            if outcome.verdict == "PASS":
                outcome.verdict = "FAIL"
            return
        kinds = {kind: [case for case in cases if case.find(kind) is not None] for kind in ("failure", "error", "skipped")}
        passed = len(cases) - sum(map(len, kinds.values()))
        outcome.figures = [{"passed": passed, **{kind: len(found) for kind, found in kinds.items()}}]
        failed = [str(case.get("name")) for case in (*kinds["failure"], *kinds["error"])]
        if failed:
            outcome.reason = f"failed: {', '.join(failed)[:600]}"
        elif outcome.verdict == "PASS" and not passed:
            outcome.verdict, outcome.reason = "NOT RUN", "every test was skipped"


def tests_in(log: str) -> list[dict[str, Any]]:
    """Of tests that were ended before their report was written: how many passed and failed, by what pytest -v printed."""
    found = re.findall(r"(?m)::\S+ (PASSED|FAILED|ERROR)\b", log)
    return [{"passed": found.count("PASSED"), "failed": len(found) - found.count("PASSED"), "cut off": True}] if found else []


def groups(sections: Sequence[Section]) -> list[list[Section]]:
    """The sections that run at the same time, in order."""
    found: list[list[Section]] = []
    for section in sections:
        if section.beside and found and found[-1][0].name == section.beside:
            found[-1].append(section)
        else:
            found.append([section])
    return found


def run_sections(sections: Sequence[Section], report: Report, environment: dict[str, str], budget_seconds: float) -> int:
    """Runs them in order within the budget, writing the report after each; returns the exit code."""
    end = time.monotonic() + budget_seconds
    lacking = {section.name: missing(section, environment) for section in sections}
    report.write()
    for name, lack in lacking.items():
        if lack is not None:
            print(f"gpu_check: {name} will not run: {lack}", flush=True)
    for group in groups(sections):
        running: dict[str, Running] = {}
        for section in group:
            outcome, left = report.outcomes[section.name], end - time.monotonic()
            before = report.outcomes.get(section.after)
            if (lack := lacking[section.name]) is not None:
                outcome.reason = lack
            elif before is not None and before.verdict == "FAIL":
                outcome.reason = f"{section.after} failed"
            elif left < MIN_SECONDS:
                outcome.reason = f"the budget of {budget_seconds:.0f} s was spent"
            else:
                print(f"== {section.name}: {section.proves}", flush=True)
                running[section.name] = Running(section, outcome, report.details, environment, min(section.seconds, left))
                continue
            print(f"NOT RUN {section.name} {outcome.reason}", flush=True)
        try:
            while running:
                for name in [name for name, one in running.items() if one.finished()]:
                    running.pop(name).end()
                    outcome = report.outcomes[name]
                    print(f"{outcome.verdict} {name} [{outcome.seconds:.0f} s] {outcome.reason}", flush=True)
                    report.write()
                time.sleep(POLL_SECONDS)
        finally:
            for one in running.values():  # where this program is asked to end: all of them, before any file is read
                one.kill()
            for one in running.values():
                one.cut_off()
            report.about["seconds"] = round(budget_seconds - (end - time.monotonic()))
            report.write()  # their logs too
    return int(any(report.outcomes[section.name].verdict == "FAIL" for section in sections))


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
    }
    return {**os.environ, **fixed}


def unpack(stack: Path, site: Path) -> list[str]:
    """Archives and wheels of a folder into one site folder, all at once, but for those that are there from an earlier call;
    returns their names."""
    found = [*sorted(stack.glob("*.tar.xz")), *sorted(stack.glob("*.whl"))]
    noted = site / ".unpacked.json"
    there: dict[str, int] = json.loads(noted.read_text("utf-8")) if noted.exists() else {}
    site.mkdir(parents=True, exist_ok=True)

    def extract(path: Path) -> None:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(site)
        elif shutil.which("tar") and shutil.which("xz"):  # several times as fast as the module
            subprocess.run(["tar", "-xJf", str(path), "-C", str(site)], check=True)
        else:
            with tarfile.open(path) as archive:
                archive.extractall(site, filter="data")

    with ThreadPoolExecutor() as pool:
        list(pool.map(extract, [path for path in found if there.get(path.name) != path.stat().st_size]))
    noted.write_text(json.dumps(there | {path.name: path.stat().st_size for path in found}), encoding="utf-8")
    return [path.name for path in found]


def carried(stack: Path, checkout_mib: float) -> tuple[list[str], bool]:
    """(what each call takes along of a folder, in lines; whether every one fits)."""
    lines, fits = [], True
    for number, call in CALLS.items():
        sizes = {path.name: path.stat().st_size / 2**20 for pattern in call.carry for path in sorted(stack.rglob(pattern))}
        total = sum(sizes.values()) + checkout_mib
        fits = fits and total <= CARRIED_MIB and bool(sizes)
        names = ", ".join(f"{name} ({size:.1f})" for name, size in sizes.items()) or f"nothing that is named {call.carry[0]}"
        lines.append(f"call {number}, {call.seconds:.0f} s, {call.proves}: {names}; {total:.1f} of {CARRIED_MIB:.0f} MiB")
    return lines, fits


def checkout_mib() -> float:
    """Of the files that travel with the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\0")
    return sum((ROOT / name).stat().st_size for name in listed if name and (ROOT / name).is_file()) / 2**20


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
    parser.add_argument("--call", type=int, choices=CALLS, help="the sections of one call (all)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"these, once more: {', '.join(names)}")
    parser.add_argument("--budget-seconds", type=float, help="for everything, unpacking included (the call's own)")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT") or KEPT))
    parser.add_argument("--offline-stack", type=Path, metavar="FOLDER", help="archives and wheels to unpack; see above")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier calls found")
    parser.add_argument("--carry", type=Path, metavar="FOLDER", help="print what each call takes along of it, and end")
    options = parser.parse_args()
    for flag, folder in (("--offline-stack", options.offline_stack), ("--carry", options.carry)):
        if folder is not None and not folder.is_dir():
            print(f"gpu_check: {flag} must be a folder; found {folder}: name one", file=sys.stderr)
            return 2
    if options.carry is not None:
        lines, fits = carried(options.carry, checkout_mib())
        print("\n".join(lines))
        return int(not fits)
    started, now = time.monotonic(), datetime.datetime.now(datetime.UTC)
    found = gpus()
    if not found:
        print("gpu_check: an NVIDIA GPU must be here; nvidia-smi found none: run it on a GPU machine", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, stop)
    output: Path = options.output.resolve()
    site = None if options.offline_stack is None else KEPT / "site"
    environment = section_environment(site)
    if not torch_sees_one(environment):
        print(f"gpu_check: torch must see the GPU; {sys.executable}'s sees none: name another in PYTHON", file=sys.stderr)
        return 2
    if options.fresh:
        shutil.rmtree(KEPT, ignore_errors=True)
    for folder in (output, KEPT / "details"):
        folder.mkdir(parents=True, exist_ok=True)
    calls = [options.call] if options.call else list(CALLS)
    budget: float = options.budget_seconds or sum(CALLS[call].seconds for call in calls)
    about: dict[str, Any] = {"date": now.strftime("%Y-%m-%d %H:%M UTC"), "GPUs": "; ".join(found)}
    about |= {"Python": sys.version.split()[0], "budget, s": budget}
    published = ROOT / "docs" / "results" / f"gpu-{now:%Y-%m-%d}.md"
    targets = {KEPT / "report.json", output / "report.json", output / "report.md", output / "details.zip", published}
    report = Report(SECTIONS, sorted(targets), about, KEPT / "details")
    report.go_on(KEPT / "report.json")
    asked = options.only or [section.name for section in SECTIONS if section.call in calls]
    sections = [
        section
        for section in SECTIONS
        if section.name in asked and (options.only or report.outcomes[section.name].verdict != "PASS")
    ]
    if options.offline_stack is not None:
        about["offline stack"] = ", ".join(unpack(options.offline_stack, KEPT / "site"))
    code = run_sections(sections, report, environment, budget - (time.monotonic() - started))
    calibration = KEPT / "calibration.json"
    if calibration.exists() and calibration.parent != output:
        shutil.copy(calibration, output)
    print(report.markdown())
    return code


if __name__ == "__main__":
    sys.exit(main())
