"""The two sections of tools/gpu_check that need nvcc or a GPU, as far as a machine without a GPU can take them: their own
command lines, with what they call. So a wrong argument, a missing file, a test that was renamed or does not run is found here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from tests.unit.tools.gpu_stand_in import ONLY_ON_A_GPU
from tools.check_cuda import find_nvcc
from tools.gpu_check import ROOT
from tools.gpu_sections import SECTIONS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tools/gpu_check itself is for GPUs")
COMMANDS = {section.name: section.command for section in SECTIONS}


def ran(folder: Path, *arguments: str, path: str = "", **environment: str) -> str:
    """What a section's process printed; it must end with 0."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "PATH": os.pathsep.join(filter(None, [path, os.environ["PATH"]]))}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=variables | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_kernels_tests_run(tmp_path: Path) -> None:
    """Every one of them, on the CPU's kernels and with large sizes made small; but those that a CPU cannot stand in for."""
    report = tmp_path / "report.xml"
    arguments = [part.replace("{junit}", str(report)) for part in COMMANDS["kernel_tests"]]
    ran(ROOT, *arguments[:2], "-p", "tests.unit.tools.gpu_stand_in", *arguments[2:])
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    skipped = {str(case.get("name")).partition("[")[0] for case in cases if case.find("skipped") is not None}
    assert skipped == {*ONLY_ON_A_GPU, "test_token_log_probs_equal_float64_and_repeat"}, "of the last those of 128,256 columns"
    passed = {str(case.get("name")).partition("[")[0] for case in cases if case.find("skipped") is None}
    tests = re.findall(r"^def (test_\w+)", (ROOT / arguments[-1]).read_text("utf-8"), re.MULTILINE)
    assert passed == {*tests} - {*ONLY_ON_A_GPU}


def test_without_a_gpu_the_kernels_tests_are_skipped(tmp_path: Path) -> None:
    """As they are, they are collected and none of them runs, which gpu_check then reports as not run."""
    report = tmp_path / "report.xml"
    ran(ROOT, *(part.replace("{junit}", str(report)) for part in COMMANDS["kernel_tests"]))
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    assert len(cases) > 40 and all(case.find("skipped") is not None for case in cases)


def cuda_torch(folder: Path) -> Path:
    """A folder from which `torch` is found as a build for CUDA: this one's headers and libraries, and for libtorch_cuda.so a
    library with the one function of it that the bindings call."""
    (package := folder / "torch").mkdir(parents=True)
    (libraries := package / "lib").mkdir()
    real = Path(torch.__file__).parent
    (package / "__init__.py").write_text("", "utf-8")
    (package / "version.py").write_text("cuda: str | None = '13.0'\n", "utf-8")
    (package / "include").symlink_to(real / "include")
    for library in (real / "lib").glob("*.so*"):
        (libraries / library.name).symlink_to(library)
    source = folder / "stream.cpp"
    source.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n', "utf-8")
    name = "libtorch_cuda.so"
    linked = ["-shared", "-fPIC", f"-Wl,-soname,{name}", str(source), "-o", str(libraries / name)]
    subprocess.run(["c++", *linked], check=True)
    return folder


@pytest.mark.nightly  # minutes of compilers
@pytest.mark.timeout(1800)
@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc of CUDA 13")
def test_the_build_makes_both_halves_and_the_cuda_half_loads(tmp_path: Path) -> None:
    """Without a warning, and with nothing left unresolved but what torch brings: the CUDA half loads beside the stand-in for
    torch's CUDA library, and its operators are there."""
    nvcc = Path(str(find_nvcc())).resolve()
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    shutil.copy(ROOT / "setup.py", checkout)
    shutil.copytree(ROOT / "csrc", checkout / "csrc")
    (checkout / "engine" / "ops").mkdir(parents=True)
    stand_in = cuda_torch(tmp_path / "site")
    printed = ran(checkout, *COMMANDS["extension"], path=str(nvcc.parent), PYTHONPATH=str(stand_in))
    assert not re.findall(r"(?m)^.*\bwarning\b.*$", printed)
    halves = [checkout / "engine" / "ops" / f"_semion_{half}.so" for half in ("cpu", "cuda")]
    assert all(half.exists() for half in halves)
    load = (
        "import ctypes, sys, torch; ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL); "
        "[torch.ops.load_library(path) for path in sys.argv[2:]]; "
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('semion::log_prob_parts', 'CUDA'))"
    )
    library = stand_in / "torch" / "lib" / "libtorch_cuda.so"
    assert ran(ROOT, "-c", load, str(library), *map(str, halves)).splitlines()[-1] == "True"
