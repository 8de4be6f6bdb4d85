"""tools/gpu_check's runner with made-up sections: what passes, fails, is late, lacks something or leaves figures; and that a
report is whole whenever the runner is killed. No section of the real list runs here.
"""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch

from tests.parallel import pool
from tools import gpu_check, gpu_sections
from tools.gpu_check import Report, Section, run_sections

ENVIRONMENT = dict(os.environ)
WRITE = "import json, sys; json.dump({figures!r}, open(sys.argv[1], 'w'))"


def section(name: str, code: str, *arguments: str, seconds: float = 20, **needs) -> Section:
    return Section(name, f"proves {name}", ("-c", code, *arguments), seconds, **needs)


def run(tmp_path: Path, sections, budget: float = 60) -> tuple[int, dict, str]:
    """Exit code, sections of report.json by name, report.md."""
    targets = [tmp_path / "report.json", tmp_path / "report.md"]
    report = Report(sections, targets, {"date": "today", "GPUs": "made up"}, tmp_path)
    code = run_sections(sections, report, ENVIRONMENT, budget)
    found = json.loads(targets[0].read_text("utf-8"))["sections"]
    return code, {row["name"]: row for row in found}, targets[1].read_text("utf-8")


def test_a_section_that_fails_or_is_late_stops_nothing(tmp_path):
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    sections = [
        section("breaks", "raise SystemExit('it broke')"),
        section("hangs", child + "print('half way', flush=True); time.sleep(60)", seconds=1.5),
        section("passes", WRITE.format(figures=[{"a": 1.0}]), "{json}"),
        section("lacks", "", modules=("json", "no_such_module", "no_such.module", "antlr4_python3_runtime")),
        section("needs", "", files=("no/such/file",)),
        section("wants", "", programs=("no-such-program",)),
    ]
    code, found, text = run(tmp_path, sections)
    assert code == 1
    assert {name: row["verdict"] for name, row in found.items()} == {
        "breaks": "FAIL",
        "hangs": "FAIL",
        "passes": "PASS",
        "lacks": "NOT RUN",
        "needs": "NOT RUN",
        "wants": "NOT RUN",
    }
    assert found["breaks"]["reason"] == "exit code 1: it broke"
    assert found["hangs"]["reason"] == "late after 2 s: half way"
    assert found["hangs"]["seconds"] < 20
    assert found["lacks"]["reason"] == "not installed: no_such_module, no_such.module, antlr4-python3-runtime==4.13.2"
    assert found["needs"]["reason"] == "file missing: no/such/file"
    assert found["wants"]["reason"] == "no-such-program is not in PATH"
    assert found["passes"]["figures"] == [{"a": 1.0}]
    assert "`tools/gpu_check --only hangs`" in text and "`tools/gpu_check --only passes`" not in text


def test_figures_written_before_a_deadline_are_kept_and_old_ones_are_not(tmp_path):
    (tmp_path / "silent.json").write_text('[{"old": 1}]')
    early = WRITE.format(figures=[{"case": "first", "ms": 2.5}]) + "; import time; sys.stdout.flush(); time.sleep(60)"
    cut = "import sys; open(sys.argv[1], 'w').write('[{\"case\"')"
    sections = [section("late", early, "{json}", seconds=3), section("cut", cut, "{json}"), section("silent", "")]
    _, found, text = run(tmp_path, sections)
    assert found["late"]["verdict"] == "FAIL"
    assert found["late"]["figures"] == [{"case": "first", "ms": 2.5}]
    assert "| first | 2.5 |" in text
    assert "figures cut off" in found["cut"]["reason"]
    assert found["silent"]["figures"] == []


def test_a_spent_budget_is_said(tmp_path):
    sections = [section("first", "import time; time.sleep(60)"), section("second", "")]
    code, found, _ = run(tmp_path, sections, budget=gpu_check.MIN_SECONDS + 3.0)
    assert code == 1
    assert found["first"]["reason"].startswith("late")
    assert found["second"]["verdict"] == "NOT RUN"
    assert "budget" in found["second"]["reason"]


CASES = {
    "test_good.py": "def test_a(): pass",
    "test_bad.py": "def test_b(): assert 1 == 2\ndef test_c(): pass",
    "test_skipped.py": "import pytest\ndef test_d(): pytest.skip('no GPU')",
}


def test_pytest_is_counted_from_its_own_report(tmp_path):
    sections = []
    for name, text in CASES.items():
        (tmp_path / name).write_text(text)
        command = (*gpu_sections.PYTEST, "-p", "no:hypothesispytest", str(tmp_path / name), "--rootdir", str(tmp_path))
        sections.append(Section(name[5:-3], "", command, 60))
    _, found, _ = run(tmp_path, sections, budget=150)
    assert found["good"]["verdict"] == "PASS", found["good"]["reason"]
    assert found["good"]["figures"] == [{"passed": 1, "failure": 0, "error": 0, "skipped": 0}]
    assert (found["bad"]["verdict"], found["bad"]["reason"]) == ("FAIL", "failed: test_b")
    assert (found["skipped"]["verdict"], found["skipped"]["reason"]) == ("NOT RUN", "every test was skipped")


def test_tests_that_are_late_are_counted_by_what_they_printed(tmp_path):
    """pytest writes its own report at its end only."""
    lines = "a.py::test_a[x] PASSED [ 30%]", "a.py::test_b FAILED [ 60%]", "a.py::test_c PASSED [ 90%]", "a.py::test_d "
    code = f"print({chr(10).join(lines)!r}, flush=True); import time; time.sleep(15)"
    status, found, _ = run(tmp_path, [section("tests", code, seconds=2)])
    assert status == 1 and found["tests"]["figures"] == [{"passed": 2, "failed": 1, "cut off": True}]


def test_a_report_of_tests_that_is_cut_off_is_told_and_what_was_printed_counts(tmp_path):
    """As of a section that is killed while pytest writes it; one that ends well so has proven nothing."""
    code = "import sys; open(sys.argv[1], 'w').write('<testsuites><testcase'); print('a.py::test_a PASSED'); sys.exit({})"
    sections = [section("ends", code.format(0), "{junit}"), section("fails", code.format(2), "{junit}")]
    status, found, _ = run(tmp_path, sections)
    assert status == 1
    for name in ("ends", "fails"):
        assert found[name]["verdict"] == "FAIL" and "report of the tests cut off" in found[name]["reason"]
        assert found[name]["figures"] == [{"passed": 1, "failed": 0, "cut off": True}]


def test_all_sections_are_killed_and_the_report_written_whatever_one_of_them_left(tmp_path, monkeypatch):
    """Both run when this program is asked to end; the first has begun to write its report. Figures of an earlier call are not
    taken for those of this one."""
    code = "import os, sys, time; open(sys.argv[1], 'w').write('<testsuites>'); print(os.getpid(), flush=True); time.sleep(60)"
    sections = [section("one", code, "{junit}"), section("two", code, "{junit}", beside="one")]
    targets = [tmp_path / "report.json"]
    report = Report(sections, targets, {"date": "today"}, tmp_path)
    for outcome in report.outcomes.values():
        outcome.verdict, outcome.figures = "FAIL", [{"old": 1}]
    logs = [tmp_path / "one.log", tmp_path / "two.log"]

    def asked_to_end(seconds):
        if all(log.exists() and log.read_text().strip() for log in logs):
            raise SystemExit(143)

    monkeypatch.setattr(gpu_check.time, "sleep", asked_to_end)
    with pytest.raises(SystemExit):
        run_sections(sections, report, ENVIRONMENT, 60)
    for row, log in zip(json.loads(targets[0].read_text())["sections"], logs, strict=True):
        assert (row["verdict"], row["reason"]) == ("NOT RUN", "gpu_check was asked to end while it ran")
        assert row["figures"] == [] and not Path(f"/proc/{int(log.read_text())}").exists()


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_runner_leaves_a_whole_report(tmp_path, ending):
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import signal, sys\nfrom pathlib import Path\nfrom tools.gpu_check import *\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "folder = Path(sys.argv[1])\n"
        "NAMES = ['report.json', 'report.md', 'details.zip']\n"
        "sleep = 'import time, os, sys; open(sys.argv[1], \\'w\\').write(\\'[{\"so far\": 1}]\\'); '\n"
        "sleep += 'print(os.getpid(), flush=True); time.sleep(15)'\n"
        "two = Section('two', '', ('-c', sleep, '{json}'), 20)\n"
        "sections = [Section('one', '', ('-c', ''), 20), two, Section('three', '', (), 1)]\n"
        "report = Report(sections, [folder / n for n in NAMES], {'date': 'today'}, folder / 'details')\n"
        "run_sections(sections, report, dict(os.environ), 60)\n"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": str(gpu_check.ROOT)}
    runner = subprocess.Popen([sys.executable, str(driver), str(tmp_path)], env=environment)
    (tmp_path / "details").mkdir()
    log = tmp_path / "details" / "two.log"
    end = time.monotonic() + 30
    while not (log.exists() and log.read_text().strip()) and time.monotonic() < end:
        time.sleep(0.05)
    section_pid = int(log.read_text())
    runner.send_signal(ending)
    assert runner.wait(10) == (128 + ending if ending == signal.SIGTERM else -ending)
    found = json.loads((tmp_path / "report.json").read_text())["sections"]
    assert [(row["name"], row["verdict"], row["reason"]) for row in found] == [
        ("one", "PASS", ""),
        ("two", "NOT RUN", "gpu_check was asked to end while it ran" if ending == signal.SIGTERM else "not reached"),
        ("three", "NOT RUN", "not reached"),
    ]
    assert found[1]["figures"] == ([{"so far": 1}] if ending == signal.SIGTERM else [])
    with zipfile.ZipFile(tmp_path / "details.zip") as packed:
        assert packed.testzip() is None
        assert packed.namelist() == (["one.log", "two.json", "two.log"] if ending == signal.SIGTERM else ["one.log"])
    if ending == signal.SIGTERM:
        assert not Path(f"/proc/{section_pid}").exists()
    else:
        os.kill(section_pid, signal.SIGKILL)  # nothing outlives this test
    assert "| three | NOT RUN |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("figures", "rows"),
    [
        ({"figures": [{"a": 1}], "machine": {}}, [{"a": 1}]),
        ({"torch": {"found": "2", "verdict": "ok"}}, [{"what": "torch", "found": "2", "verdict": "ok"}]),
        ({"seconds": 3, "phases": {"a": 1}}, [{"seconds": 3, "phases": {"a": 1}}]),
        ([{"a": 1}], [{"a": 1}]),
    ],
)
def test_figures_of_every_form_become_rows(figures, rows):
    assert gpu_check.rows_of(figures) == rows


def test_a_table_survives_bars_newlines_and_missing_columns():
    lines = gpu_check.table([{"a": "x|y\nz"}, {"b": 0.123456}])
    assert lines == ["| a | b |", "|---|---|", "| x\\|y z |  |", "|  | 0.1235 |"]


def test_what_the_doctor_misses_is_the_reason(tmp_path):
    rows = {"torch": {"found": "2", "verdict": "ok"}, "ray": {"found": "none", "verdict": "install it"}}
    code = WRITE.format(figures=rows) + "; sys.stdout.flush(); sys.exit(1)"
    _, found, _ = run(tmp_path, [section("machine", code, "{json}")])
    assert (found["machine"]["verdict"], found["machine"]["reason"]) == ("FAIL", "ray: none: install it")


def test_a_stack_is_unpacked_and_imported_from(tmp_path):
    (tmp_path / "stack").mkdir()
    for module in ("packed_module", "wheel_module"):
        (tmp_path / f"{module}.py").write_text("value = 7\n")
    with tarfile.open(tmp_path / "stack" / "site.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "packed_module.py", "./packed_module.py")
    with zipfile.ZipFile(tmp_path / "stack" / "wheel_module-1.0-cp312-abi3-linux_x86_64.whl", "w") as wheel:
        wheel.write(tmp_path / "wheel_module.py", "wheel_module.py")
    site = tmp_path / "site"
    assert gpu_check.unpack(tmp_path / "stack", site) == ["site.tar.xz", "wheel_module-1.0-cp312-abi3-linux_x86_64.whl"]
    environment = gpu_check.section_environment(site)
    command = [sys.executable, "-c", "import packed_module as p, wheel_module as w, engine; print(p.value + w.value)"]
    assert subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout == "14\n"


def test_the_trainer_tests_processes_import_from_the_stack_too(monkeypatch):
    def popen(*_: object, env: dict[str, str], **__: object) -> None:
        raise RuntimeError(env["PYTHONPATH"])

    monkeypatch.setenv("PYTHONPATH", "/unpacked")
    monkeypatch.setattr(pool.subprocess, "Popen", popen)
    with pytest.raises(RuntimeError, match=f"^{gpu_check.ROOT}{os.pathsep}/unpacked$"):
        pool.WorkerPool().run("any", 1)


def test_without_a_gpu_it_says_so(tmp_path):
    (tmp_path / "bash").symlink_to("/bin/bash")
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    environment = {**ENVIRONMENT, "PATH": str(tmp_path), "PYTHON": sys.executable}
    command = ["tools/gpu_check", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=gpu_check.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "gpu_check: an NVIDIA GPU must be here; nvidia-smi found none: run it on a GPU machine\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
def test_a_gpu_that_torch_does_not_see_is_not_enough(tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\n")
    tool.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{ENVIRONMENT['PATH']}"
    environment = {**ENVIRONMENT, "PATH": path, "PYTHON": sys.executable}
    command = ["tools/gpu_check", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=gpu_check.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torch must see the GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_sections_run_beside_another_until_each_has_ended(tmp_path):
    waits = "import pathlib, sys, time; end = time.monotonic() + 15\nwhile not pathlib.Path(sys.argv[1]).exists(): "
    waits += "time.sleep(0.05); assert time.monotonic() < end"
    makes = "import pathlib, sys; pathlib.Path(sys.argv[1]).touch()"
    flag = str(tmp_path / "flag")
    sections = [
        section("leader", waits, flag),
        section("beside", makes, flag, beside="leader"),
        section("late", "import time; time.sleep(60)", seconds=1.0, beside="leader"),
        section("alone", "", beside="nobody"),
    ]
    code, found, _ = run(tmp_path, sections)
    verdicts = {name: row["verdict"] for name, row in found.items()}
    assert (code, verdicts) == (1, {"leader": "PASS", "beside": "PASS", "late": "FAIL", "alone": "PASS"})
    assert [[s.name for s in group] for group in gpu_check.groups(sections)] == [["leader", "beside", "late"], ["alone"]]


def test_what_stands_on_a_failure_is_not_tried(tmp_path):
    sections = [section("probe", "raise SystemExit(1)"), section("colocated", "", after="probe"), section("other", "")]
    _, found, _ = run(tmp_path, sections)
    assert (found["colocated"]["verdict"], found["colocated"]["reason"]) == ("NOT RUN", "probe failed")
    assert found["other"]["verdict"] == "PASS"
    _, found, _ = run(tmp_path, [section("colocated", "", after="probe")])
    assert found["colocated"]["verdict"] == "PASS", "what has not been tried is no failure"


def test_a_second_call_goes_on_where_the_first_ended(tmp_path):
    run(tmp_path, [section("first", WRITE.format(figures=[{"a": 1}]), "{json}"), section("broken", "raise SystemExit(3)")])
    sections = [section("first", "raise SystemExit('never again')"), section("broken", ""), section("second", "")]
    report = Report(sections, [tmp_path / "report.json"], {"date": "today"}, tmp_path)
    report.go_on(tmp_path / "report.json")
    assert [outcome.verdict for outcome in report.outcomes.values()] == ["PASS", "FAIL", "NOT RUN"]
    assert run_sections([s for s in sections if report.outcomes[s.name].verdict != "PASS"], report, ENVIRONMENT, 60) == 0
    assert [outcome.verdict for outcome in report.outcomes.values()] == ["PASS", "PASS", "PASS"]
    assert report.outcomes["first"].figures == [{"a": 1}]


def test_an_archive_is_unpacked_once(tmp_path):
    (tmp_path / "stack").mkdir()
    (tmp_path / "module.py").write_text("value = 1\n")
    archive = tmp_path / "stack" / "site_stack.tar.xz"
    with tarfile.open(archive, "w:xz") as packed:
        packed.add(tmp_path / "module.py", "module.py")
    site = tmp_path / "site"
    gpu_check.unpack(tmp_path / "stack", site)
    (site / "module.py").write_text("value = 2\n")
    gpu_check.unpack(tmp_path / "stack", site)
    assert (site / "module.py").read_text() == "value = 2\n"


def test_what_each_call_takes_along_is_told(tmp_path):
    for name, size in (("a_stack_x.tar.xz", 40), ("ray.tar.xz", 30), ("math.whl", 1)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size << 20)
    lines, fits = gpu_check.carried(tmp_path, 5.0)
    assert fits and [line[:7] for line in lines] == ["call 1,", "call 2,", "call 3,"]
    assert lines[0].endswith("a_stack_x.tar.xz (40.0); 45.0 of 64 MiB")
    assert lines[1].endswith("ray.tar.xz (30.0), math.whl (1.0); 36.0 of 64 MiB")
    assert not gpu_check.carried(tmp_path, 25.0)[1]


def test_the_real_sections_name_files_that_are_there_and_fit_their_calls():
    modules = [part for s in gpu_check.SECTIONS for part in s.command if part.startswith("tools.")]
    tools = [f"{module.replace('.', '/')}.py" for module in modules] + ["tools/quickstart.py", "setup.py"]
    assert len(set(modules)) == 9 and all((gpu_check.ROOT / tool).exists() for tool in tools), tools
    names = [s.name for s in gpu_check.SECTIONS]
    assert len(set(names)) == len(names)
    asked = {module for s in gpu_check.SECTIONS for module in s.modules}
    assert [module for module in asked if "==" not in gpu_check.requirement(module)] == []
    assert {name for s in gpu_check.SECTIONS for name in (s.beside, s.after) if name} <= set(names)
    assert [s.call for s in gpu_check.SECTIONS] == sorted(s.call for s in gpu_check.SECTIONS)
    assert sum(gpu_check.CALLS[call].seconds for call in (1, 2)) <= 15 * 60 - 120, "two calls and the start of a machine"
