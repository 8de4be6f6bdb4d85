"""Packaging of the distribution `semion`: the package `engine`, the command `semion`, vLLM's plugin entry point, and the
kernels of csrc/ as two shared libraries beside engine/ops. It lists no requirements: the versions that belong together
are pinned in requirements/ and nowhere else.

The libraries use torch's stable ABI, so that one build serves every torch from 2.11 on; they are no Python modules and
need only a C++ compiler. The CUDA half is built where nvcc is found and the installed torch is a CUDA build.
"""

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
COMPILER = os.environ.get("CXX", "c++")
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Exceptions and errno are of no use to a kernel; the rest of IEEE arithmetic stays.
KERNEL_FLAGS = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
CUDA_ARCHITECTURES = ("80", "90", "100")  # A100, H100 and H200, B200; later GPUs compile the last one's PTX when they load it


def torch_folder() -> Path:
    """Where torch is installed; it is not imported."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch must be installed before semion is built; found none: run tools/environment.sh")
    return Path(spec.origin).parent


def cuda_folder() -> Path | None:
    """The CUDA toolkit's folder, if there is one and torch is a CUDA build. The nvcc in PATH may be a script elsewhere that
    calls the real one, so a folder counts by its headers."""
    nvcc = shutil.which("nvcc")
    built_for_cuda = re.search(r"^cuda\b.*= '", (torch_folder() / "version.py").read_text("utf-8"), re.MULTILINE)
    if nvcc is None or built_for_cuda is None:
        return None
    named = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    folders = [*named, Path(nvcc).resolve().parents[1], Path("/usr/local/cuda")]
    for folder in folders:
        if (folder / "include/cuda_runtime_api.h").exists():
            return folder
    raise SystemExit(f"CUDA's headers must be beside {nvcc}; found none in {', '.join(map(str, folders))}: set CUDA_HOME")


def cpu_commands(objects: Path) -> list[tuple[Path, list[str]]]:
    """(object, command) of every source of the CPU half: files *_cpu.cpp once an instruction set."""
    includes = ["-isystem", str(torch_folder() / "include")]
    found = []
    for source in sorted(CSRC.rglob("*.cpp")):
        if source.name == "cuda_bindings.cpp":
            continue
        if source.stem.endswith("_cpu"):
            variants = {name: KERNEL_FLAGS + flags for name, flags in INSTRUCTION_SETS.items()}
        else:
            variants = {"": STABLE_ABI + includes}
        for name, flags in variants.items():
            target = objects / f"{source.stem}_{name}.o"
            found.append((target, [COMPILER, *FLAGS, *flags, "-c", str(source), "-o", str(target)]))
    return found


def cuda_commands(objects: Path, cuda: Path) -> list[tuple[Path, list[str]]]:
    """(object, command) of every source of the CUDA half."""
    includes = ["-isystem", str(torch_folder() / "include"), "-isystem", str(cuda / "include")]
    bindings = objects / "cuda_bindings.o"
    command = [COMPILER, *FLAGS, *STABLE_ABI, "-DUSE_CUDA", *includes, "-c", str(CSRC / "cuda_bindings.cpp")]
    found = [(bindings, [*command, "-o", str(bindings)])]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
    codes.append(f"-gencode=arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}")
    for source in sorted(CSRC.rglob("*_kernel.cu")):
        target = objects / f"{source.stem}.o"
        nvcc = [str(cuda / "bin/nvcc"), "-O3", "-std=c++17", "-Xcompiler", "-fPIC", *codes]
        found.append((target, [*nvcc, "-c", str(source), "-o", str(target)]))
    return found


class BuildKernels(build_ext):
    """Compiles and links the libraries; where pip looks for Python modules it finds them under their plain names."""

    def get_ext_filename(self, fullname: str) -> str:
        """A path without Python's version in it: the library does not depend on that."""
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        """One library."""
        objects = Path(self.build_temp) / ext.name
        objects.mkdir(parents=True, exist_ok=True)
        cuda = cuda_folder()
        if ext.name.endswith("_cuda"):
            assert cuda is not None, "the CUDA half without a toolkit"
            commands = cuda_commands(objects, cuda)
            libraries = [f"-L{cuda}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            torch_libraries = ["-ltorch_cpu", "-ltorch_cuda"]  # torch's current stream is in the second
        else:
            commands, libraries, torch_libraries = cpu_commands(objects), [], ["-ltorch_cpu"]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(self.spawn, [command for _, command in commands]))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Resolved by name among the libraries that importing torch has loaded: no path of this machine goes in.
        libraries += [f"-L{torch_folder() / 'lib'}", "-Wl,--no-as-needed", *torch_libraries]
        self.spawn([COMPILER, "-shared", *(str(path) for path, _ in commands), *libraries, "-o", str(target)])


EXTENSIONS = [Extension("engine.ops._semion_cpu", [])]
if cuda_folder() is not None and (CSRC / "cuda_bindings.cpp").exists():
    EXTENSIONS.append(Extension("engine.ops._semion_cuda", []))

setup(
    name="semion",
    version="0.1.0",
    description="RL post-training for Llama: one number moves a run from offline to semi-online to online",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["engine", "engine.*"]),
    package_data={"engine.rewards.math": ["cases.jsonl"]},
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildKernels},
    entry_points={
        "console_scripts": ["semion = engine.__main__:main"],
        "vllm.general_plugins": ["semion = engine.inference.receiver:register"],
    },
)
