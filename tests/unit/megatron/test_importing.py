"""What a trainer process does not load: the compiler on a build of torch without CUDA, and a library of megatron-core's that it
does not use. In a process of its own, for this one may have loaded both."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.megatron.importing import lean

ROOT = Path(__file__).resolve().parents[3]


def double(value: int) -> int:
    return 2 * value


@pytest.mark.slow
def test_a_rank_on_cpus_loads_no_compiler_and_no_sink():
    code = (
        "import sys, torch\nfrom engine.megatron.importing import import_trainer\ncompile_ = torch.compile\nimport_trainer()\n"
        "assert torch.compile is compile_\nimport engine.run.rank\n"
        "print(*{'megatron.core', 'wandb', 'torch._inductor', 'torch._dynamo'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = {"megatron.core"} if torch.version.cuda is None else {"megatron.core", "torch._inductor", "torch._dynamo"}
    assert set(done.stdout.split()) == loaded


@pytest.mark.parametrize(("cuda", "compiles"), [(None, False), ("12.8", True)])
def test_torch_compiles_only_where_it_is_built_for_gpus(cuda: str | None, compiles: bool, monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    def compile_(function: Any) -> Any:
        asked.append(function)
        return function

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch, "compile", compile_)
    with lean():
        assert torch.compile(double)(3) == 6
        assert compiles or torch.compile(dynamic=True)(double)(3) == 6
    assert bool(asked) is compiles


def test_what_is_absent_is_there_again_after(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with lean(), pytest.raises(ModuleNotFoundError):
        import wandb  # noqa: F401
    assert "wandb" not in sys.modules
    here = type(sys)("wandb")
    monkeypatch.setitem(sys.modules, "wandb", here)
    with lean():
        assert sys.modules["wandb"] is here, "a process that uses it keeps it"
