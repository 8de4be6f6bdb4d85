"""What the doctor says of a machine: the real one, and machines with GPUs as a made-up nvidia-smi describes them."""

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.commands import doctor
from engine.commands.doctor import examine
from engine.run import machine


def findings() -> dict[str, doctor.Finding]:
    found = examine()
    by_name = {finding.what: finding for finding in found}
    assert len(by_name) == len(found), "two findings of one name"
    return by_name


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch):
    """Puts an executable of that name first in PATH that answers our query, and no other."""

    def make(output: str, code: int = 0) -> None:
        tool = tmp_path / "nvidia-smi"
        query = f"--query-gpu={','.join(machine.QUERY)} --format=csv,noheader,nounits"
        tool.write_text(f'#!/bin/sh\n[ "$*" = "{query}" ] || exit 9\ncat <<END\n{output}\nEND\nexit {code}\n')
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return make


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/unit/commands/test_doctor.py asks a machine without a GPU")
def test_a_cpu_machine_hears_nothing_of_gpus(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, **_: None if name == "nvidia-smi" else f"/usr/bin/{name}")
    found = findings()
    assert found["device"] == doctor.Finding("device", f"CPU, {os.cpu_count()} cores", "ok")
    assert not found.keys() & {"driver", "GPU 0", "NCCL", "CUDA kernels", "nsys", "nvidia-smi"}


def test_the_disk_is_that_of_the_folder_and_what_the_configuration_needs(tmp_path):
    found = {finding.what: finding for finding in examine(tmp_path / "not" / "there", needed_bytes=1)}
    assert found["free disk"].verdict == "ok" and found["free disk"].found.endswith(f"at {tmp_path}")
    short = {finding.what: finding for finding in examine(tmp_path, needed_bytes=1 << 60)}["free disk"]
    assert short.verdict == f"free some: the run's checkpoints want {1 << 30}.0 GiB"


def test_shared_memory_that_cannot_be_written_or_is_not_there_is_named(tmp_path, monkeypatch):
    assert findings()["shared memory"].verdict == "ok"
    real = os.statvfs
    whole = real("/dev/shm")
    as_read_only = SimpleNamespace(**{name: getattr(whole, name) for name in dir(whole) if name.startswith("f_")})
    as_read_only.f_flag |= os.ST_RDONLY
    monkeypatch.setattr(os, "statvfs", lambda path: as_read_only if str(path) == "/dev/shm" else real(path))
    assert findings()["shared memory"].verdict.startswith("mount /dev/shm writable")
    monkeypatch.setattr(doctor, "SHARED_FOLDER", str(tmp_path / "gone"))
    assert findings()["shared memory"].verdict.startswith("mount a tmpfs at")


def test_a_driver_that_hangs_is_named(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(machine, "QUERY_SECONDS", 0.2)
    assert machine.listed_gpus() == ([], "gave no answer within 0 s")
    assert findings()["nvidia-smi"].verdict == "mend the NVIDIA driver"


@pytest.mark.skipif(torch.version.cuda is not None, reason="the words are those of a CPU build of torch")
def test_gpus_that_torch_cannot_use_are_named_with_the_fix(nvidia_smi):
    later = "NVIDIA GB300, 284208, 10.3, 580.95.05\nNVIDIA RTX PRO 6000, 97887, 12.0, 580.95.05"  # code of 10.0, and its PTX
    nvidia_smi(f"NVIDIA H200, 143771, 9.0, 580.95.05\nNVIDIA A100-SXM4-40GB, 40960, 8.0, 580.95.05\n{later}")
    found = findings()
    assert found["driver"] == doctor.Finding("driver", "580.95.05", "ok")
    assert found["GPU 0"] == doctor.Finding("GPU 0", "NVIDIA H200, 143771 MiB, compute capability 9.0", "ok")
    assert [found[f"GPU {index}"].verdict for index in (1, 2, 3)] == ["ok"] * 3
    assert "a CPU build, sees none of 4 GPUs" in found["device"].found
    assert found["device"].verdict == found["NCCL"].verdict == "install requirements/gpu.txt"
    assert found["CUDA kernels"].verdict.startswith("build them")
    assert "_semion_cuda.so" in found["CUDA kernels"].found
    for name in (*doctor.OPTIONAL, "nvcc", "nsys"):
        assert found[name].verdict == "ok", "information only"


@pytest.mark.parametrize(
    ("line", "what", "verdict"),
    [
        ("NVIDIA H100, 81559, 9.0, 570.12", "driver", "install driver 580 or newer"),
        ("Tesla V100, 16384, 7.0, 580.1", "GPU 0", "compute capability 8.0 or more"),
        ("NVIDIA L40S, 46068, 8.9, 580.1", "GPU 0", "ok"),
        ("NVIDIA GB300, 284208, 10.3, 580.1", "GPU 0", "ok"),
        ("NVIDIA RTX PRO 6000, 97887, 12.0, 580.1", "GPU 0", "ok"),
        ("NVIDIA GH200, [N/A], 9.0, [N/A]", "driver", "install driver"),
    ],
)
def test_a_driver_or_gpu_that_does_not_fit_is_named(nvidia_smi, line, what, verdict):
    nvidia_smi(line)
    assert verdict in findings()[what].verdict


@pytest.mark.parametrize(
    ("states", "environment", "said"),
    [
        ({}, {}, ["none / ok", "none / ok"]),
        ({"mlx5_0": "4: ACTIVE", "mlx5_1": "1: DOWN"}, {"NCCL_IB_HCA": "=mlx5_0:1"}, ["mlx5_0 / ok", "=mlx5_0:1 / ok"]),
        ({"mlx5_0": "1: DOWN"}, {}, ["none active of mlx5_0 / bring a port up", "none / ok"]),
        ({"mlx5_0": "4: ACTIVE"}, {"NCCL_IB_DISABLE": "1"}, ["mlx5_0 / ok", "1 / unset NCCL_IB_DISABLE"]),
        ({"mlx5_0": "4: ACTIVE"}, {"NCCL_IB_HCA": "ib7"}, ["mlx5_0 / ok", "ib7 / name adapters in NCCL_IB_HCA .*: mlx5_0"]),
        ({"mlx5_0": "4: ACTIVE"}, {"NCCL_IB_HCA": "^mlx5_9"}, ["mlx5_0 / ok", "mlx5_9 / ok"]),
        (
            {},
            {"NCCL_P2P_DISABLE": "1", "NCCL_NVLS_ENABLE": "0"},
            ["none / ok", "0, NCCL_P2P_DISABLE=1 / unset NCCL_P2P_DISABLE", "0: no sums inside NVLink's switches.* / ok"],
        ),
        (
            {},
            {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "yes"},
            [
                "none / ok",
                "yes / ok",
                "yes: unknown / unset NCCL_NVLS_ENABLE, or set it to 0 or 1 or 2",
                "1: buffers from CUDA's virtual memory functions.* / ok",
            ],
        ),
        ({}, {"NCCL_SOCKET_IFNAME": "eth9"}, ["none / ok", "eth9 / unset NCCL_SOCKET_IFNAME: semion sets it"]),
        ({}, {"SEMION_INTERFACE": "lo"}, ["none / ok", "none / ok", "lo / ok"]),
        ({}, {"SEMION_INTERFACE": "ib9"}, ["none / ok", "none / ok", "ib9 / name an interface .*lo"]),
    ],
)
def test_what_leads_to_other_nodes_and_what_keeps_a_run_from_it(states, environment, said, tmp_path, monkeypatch):
    for name, state in states.items():
        (tmp_path / name / "ports" / "1").mkdir(parents=True)
        (tmp_path / name / "ports" / "1" / "state").write_text(state + "\n")
    monkeypatch.setattr(doctor, "INFINIBAND", tmp_path)
    found = [f"{finding.found} / {finding.verdict}" for finding in doctor._network(environment)]
    assert len(found) == len(said)
    for text, part in zip(found, said, strict=True):
        assert re.search(re.escape(part) if "*" not in part else part, text), (text, part)


@pytest.mark.parametrize("there", [True, False])
def test_what_engines_on_blackwell_do_without_nvcc_is_said(there, nvidia_smi, monkeypatch):
    nvidia_smi("NVIDIA B200, 183359, 10.0, 580.1\nNVIDIA H200, 143771, 9.0, 580.1")
    monkeypatch.setattr(doctor, "find_nvcc", lambda: "/usr/local/cuda/bin/nvcc" if there else None)
    found = findings()
    told = {name: one for name, one in found.items() if name.startswith("attention of engines")}
    assert found["nvcc"].found.startswith("/usr" if there else "none")
    if there:
        assert not told
    else:
        (one,) = told.values()
        assert one.what.endswith("on 10.0") and one.found.startswith("FLASH_ATTN, unless") and one.verdict == "ok"


def test_a_driver_that_fails_is_no_cpu_machine(nvidia_smi):
    nvidia_smi("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", code=9)
    found = findings()
    assert found["nvidia-smi"].found.startswith("NVIDIA-SMI has failed")
    assert found["nvidia-smi"].verdict == "mend the NVIDIA driver"
    assert "driver" not in found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the driver, NCCL and the CUDA kernels need a GPU; unverified")
@pytest.mark.gpu
def test_a_real_gpu_is_found():
    found = findings()
    assert {"driver", "GPU 0", "NCCL", "CUDA kernels"} <= found.keys()
    assert found["CUDA kernels"].verdict == "ok"
