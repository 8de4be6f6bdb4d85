"""What an engine is given where there is no nvcc, so that vLLM compiles nothing with it: pretended GPUs and toolkits."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.capacity.kv_cache import KvCache
from engine.inference import reward_engine
from engine.inference.nvcc import attention_without_nvcc, find_nvcc, without_nvcc
from engine.inference.process import MODEL_RUNNER
from engine.inference.reward_engine import RewardEngine
from engine.inference.vllm_engine import VllmEngine
from tests.builders import config

BLACKWELL, HOPPER, AMPERE = (10, 0), (9, 0), (8, 0)
BFLOAT16: dict[str, Any] = {"dtype": "bfloat16", "tensor_parallel": 1}


@pytest.fixture
def toolkit(monkeypatch):
    """Pretends that these files are programs, and no other nvcc."""

    def there(*files: str) -> None:
        def which(name: str, path: str | None = None) -> str | None:
            folders = ["/in/path"] if path is None else [path]
            return next((f"{folder}/{name}" for folder in folders if f"{folder}/{name}" in files), None)

        monkeypatch.setattr(shutil, "which", which)

    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    there()
    return there


def test_nvcc_is_looked_for_where_flashinfer_looks(toolkit, monkeypatch):
    assert find_nvcc() is None
    toolkit("/usr/local/cuda/bin/nvcc")
    assert find_nvcc() == "/usr/local/cuda/bin/nvcc"
    toolkit("/usr/local/cuda/bin/nvcc", "/in/path/nvcc")
    assert find_nvcc() == "/in/path/nvcc"
    monkeypatch.setenv("CUDA_HOME", "/other")
    assert find_nvcc() is None, "it looks nowhere else then"


@pytest.mark.parametrize(
    ("capability", "dtype", "stored", "instead"),
    [
        (BLACKWELL, "bfloat16", None, "FLASH_ATTN"),
        ((10, 3), "bfloat16", None, "FLASH_ATTN"),
        (BLACKWELL, "bfloat16", "fp8", "TRITON_ATTN"),  # FlashAttention stores it on Hopper alone
        (BLACKWELL, "float32", None, None),  # which FlashInfer has not, so vLLM does not choose it
        (HOPPER, "bfloat16", None, None),
        (HOPPER, "bfloat16", "fp8", None),
        (HOPPER, "bfloat16", "fp8_e5m2", "TRITON_ATTN"),
        (AMPERE, "bfloat16", None, None),
        (AMPERE, "bfloat16", "fp8", None),  # neither has it there; what vLLM says is for people to read
        ((12, 0), "bfloat16", None, None),
    ],
)
def test_another_attention_stands_in_where_vllms_first_choice_is_compiled(capability, dtype, stored, instead):
    assert attention_without_nvcc(capability, dtype, stored) == instead


def test_what_is_asked_for_wins(toolkit):
    assert without_nvcc({}, BLACKWELL, **BFLOAT16) == {"attention_backend": "FLASH_ATTN"}
    assert without_nvcc({"attention_config": {"use_prefill_query_quantization": True}}, BLACKWELL, **BFLOAT16)
    for given in ({"attention_backend": "FLASHINFER"}, {"attention_config": {"backend": "TRITON_ATTN"}}):
        assert without_nvcc(given, BLACKWELL, **BFLOAT16) == {}
    toolkit("/in/path/nvcc")
    assert without_nvcc({}, BLACKWELL, dtype="bfloat16", tensor_parallel=2) == {}


def test_sums_and_norms_are_not_fused_over_ranks(toolkit):
    off = {"compilation_config": {"pass_config": {"fuse_allreduce_rms": False}}}
    assert without_nvcc({}, HOPPER, dtype="bfloat16", tensor_parallel=2) == off
    assert without_nvcc({}, HOPPER, **BFLOAT16) == {} == without_nvcc({}, AMPERE, dtype="bfloat16", tensor_parallel=2)
    given = {"compilation_config": {"mode": 3, "pass_config": {"fuse_norm_quant": True}}}
    assert without_nvcc(given, HOPPER, dtype="bfloat16", tensor_parallel=2)["compilation_config"] == {
        "mode": 3,
        "pass_config": {"fuse_norm_quant": True, "fuse_allreduce_rms": False},
    }
    asked = {"compilation_config": {"pass_config": {"fuse_allreduce_rms": True}}}
    assert without_nvcc(asked, HOPPER, dtype="bfloat16", tensor_parallel=2) == asked


def test_the_installed_vllm_takes_what_engines_are_given(toolkit, tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    made = EngineArgs(model=str(tmp_path), **without_nvcc({}, BLACKWELL, dtype="bfloat16", tensor_parallel=2))
    assert made.compilation_config.pass_config.fuse_allreduce_rms is False
    assert made.attention_backend == "FLASH_ATTN"


class Stopped(Exception):
    """In place of an engine: the arguments that it was to have."""


def stop(**arguments: Any) -> None:
    """Raises them."""
    raise Stopped(arguments)


@pytest.fixture
def blackwell(toolkit, monkeypatch):
    """A machine with such a GPU for torch, whose vLLM only takes arguments."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(*MODEL_RUNNER)  # which the engine sets, and other tests of this process do without
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: BLACKWELL)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=1 << 37))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


def test_both_engines_are_given_it(blackwell, monkeypatch):
    monkeypatch.setattr("vllm.LLM", stop)  # first: what it imports needs the class below
    monkeypatch.setattr("vllm.engine.arg_utils.EngineArgs", stop)
    monkeypatch.setattr("engine.inference.vllm_engine.policy_tokenizer", lambda config: None)
    monkeypatch.setattr("engine.inference.vllm_engine.end_tokens", lambda path, tokenizer: SimpleNamespace(stop=()))
    engine = VllmEngine.__new__(VllmEngine)
    engine._config = config(model={"path": "unused", "dtype": "bfloat16"})
    engine._kv_cache = KvCache(1, 1, 1, 1 << 20, 0)
    with pytest.raises(Stopped) as caught:
        engine._load()
    assert caught.value.args[0]["attention_backend"] == "FLASH_ATTN"

    monkeypatch.setattr(reward_engine, "reward_cache", lambda shape, options: SimpleNamespace(num_bytes=lambda gpu: 1))
    judge = RewardEngine.__new__(RewardEngine)
    judge._conversations = SimpleNamespace(head=SimpleNamespace(form="score", shape=None))  # type: ignore[assignment]
    with pytest.raises(Stopped) as caught:
        judge._load(config(data={"reward": "model"}, reward_model={"path": "unused", "dtype": "bfloat16"}))
    assert caught.value.args[0]["attention_backend"] == "FLASH_ATTN"
