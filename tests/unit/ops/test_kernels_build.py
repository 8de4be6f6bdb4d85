"""The CPU kernels as C++: no warning in any file of the CPU half, and a driver without torch that runs every instruction
set of this processor under the address and undefined-behaviour sanitizers. setup.py's own commands are what is built.
"""

import os
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).resolve().parents[3]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g"]


@pytest.fixture(scope="module")
def packaging():
    """What setup.py defines, without running the set-up."""
    before = os.getcwd()
    os.chdir(ROOT)  # where pip runs it
    try:
        with patch("setuptools.setup"):
            yield runpy.run_path("setup.py")
    finally:
        os.chdir(before)


def run_all(commands):
    def run(command):
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)

    with ThreadPoolExecutor(2) as threads:
        failed = [done.stderr[-4000:] for done in threads.map(run, commands) if done.returncode]
    assert not failed, "\n".join(failed)


def test_no_file_of_the_cpu_half_has_a_warning(packaging, tmp_path):
    """Every file and instruction set with -Wall -Wextra as errors, AVX-512 included where no processor here runs it."""
    commands = packaging["cpu_commands"](tmp_path)
    names = {target.stem for target, _ in commands}
    assert {"logprob_cpu_baseline", "logprob_cpu_avx2", "logprob_cpu_avx512", "registration_"} <= names
    run_all([*command, "-Werror"] for _, command in commands)


def test_the_cuda_half_has_code_for_each_generation_and_ptx_for_later_ones(packaging, tmp_path):
    """No code of an architecture's own features, which would run on no later one."""
    commands = [command for _, command in packaging["cuda_commands"](tmp_path, Path("/cuda")) if "nvcc" in command[0]]
    assert len(commands) == len(list(ROOT.glob("csrc/**/*_kernel.cu")))
    for command in commands:
        codes = [part.split(",code=")[1] for part in command if part.startswith("-gencode")]
        assert codes == ["sm_80", "sm_90", "sm_100", "compute_100"]


def test_kernels_are_right_and_clean_under_the_sanitizers(packaging, tmp_path):
    """Reads or writes past any array, misaligned access, overflow or invalid shifts stop the driver."""
    commands = packaging["cpu_commands"](tmp_path)
    kernels = [(target, command) for target, command in commands if target.stem not in ("cpu_bindings_", "registration_")]
    driver = tmp_path / "driver.o"
    source = "tests/unit/ops/kernels_driver.cpp"
    command = [packaging["COMPILER"], *packaging["FLAGS"], "-Icsrc", "-c", source, "-o", str(driver)]
    run_all([*c, *SANITIZED] for c in [*(c for _, c in kernels), command])
    program = tmp_path / "driver"
    run_all([[packaging["COMPILER"], *SANITIZED, *(str(t) for t, _ in kernels), str(driver), "-o", str(program)]])
    # LeakSanitizer needs ptrace, which a container may forbid; nothing is held here but vectors.
    environment = {"PATH": os.environ["PATH"], "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checked baseline" in done.stdout
    for flag, isa in (("avx2", "avx2"), ("avx512f", "avx512")):
        if flag in Path("/proc/cpuinfo").read_text().split():
            assert f"checked {isa}" in done.stdout


@pytest.mark.nightly  # half a minute of compilation
def test_cuda_kernels_touch_nothing_beside_their_arrays(packaging, tmp_path):
    """The simulator's build of every .cu file, under the sanitizers: rows that end where their memory does."""
    flags = ["-std=c++20", "-DSEMION_SIMT", "-Icsrc", "-Itests/unit/ops", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
    sources = [*sorted(ROOT.glob("csrc/**/*_kernel.cu")), ROOT / "tests/unit/ops/simt_sanitized.cpp"]
    targets = [tmp_path / f"{source.stem}.o" for source in sources]
    run_all(
        [packaging["COMPILER"], "-x", "c++", *flags, *SANITIZED, "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, targets, strict=True)
    )
    program = tmp_path / "sanitized"
    run_all([[packaging["COMPILER"], *SANITIZED, *map(str, targets), "-o", str(program)]])
    environment = {"PATH": os.environ["PATH"], "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    done = subprocess.run([program], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "checked the CUDA kernels" in done.stdout


def test_the_library_holds_no_path_of_this_machine(packaging):
    """It is found by name among the libraries that torch has loaded, so that a wheel or a copy works elsewhere."""
    readelf = shutil.which("readelf")
    assert readelf is not None, "readelf comes with the compiler"
    library = ROOT / "engine/ops/_semion_cpu.so"
    dynamic = subprocess.run([readelf, "-d", library], capture_output=True, text=True, check=True).stdout
    assert "RUNPATH" not in dynamic
    assert "RPATH" not in dynamic
