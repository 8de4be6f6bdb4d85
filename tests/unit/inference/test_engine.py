"""What an engine does with vLLM's answers, without vLLM: a prefix cache that is not dropped, and a start that fails."""

import sys
from types import SimpleNamespace

import pytest

from engine.capacity.kv_cache import KvCache
from engine.core.errors import EngineLostError, InferenceError
from engine.inference.advice import policy_advice, reward_advice
from engine.inference.reward_engine import RewardEngine
from engine.inference.vllm_engine import VllmEngine
from tests.builders import config


class Vllm:
    def __init__(self, dropped):
        self.dropped = dropped

    def reset_prefix_cache(self):
        return self.dropped

    def collective_rpc(self, method, args=()):
        return [("", False, "")]


def engine(dropped):
    made = VllmEngine.__new__(VllmEngine)
    made._config, made._index, made._llm, made._version = config(), 2, Vllm(dropped), 3
    made._open, made._asleep, made._busy_seconds = {}, [], 0.0
    return made


def test_an_engine_whose_prefix_cache_stays_answers_nothing(monkeypatch):
    for name in ("vllm", "vllm.sampling_params"):  # nothing of it is needed, and importing it takes seconds
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(SamplingParams=None, RequestOutputKind=None))
    one = engine(False)
    with pytest.raises(EngineLostError, match=r"engine 2 must drop its prefix cache.*though no request is in flight"):
        one.submit([], 3)
    with pytest.raises(EngineLostError, match="must drop its prefix cache"):
        one.receive(4, {})
    assert one._version < 0, "in doubt until a sync succeeds"
    other = engine(True)
    other.submit([], 3)
    assert other.receive(4, {}) == (4, ("",))


@pytest.mark.parametrize(
    ("why", "first"),
    [
        ("CUDA out of memory", "lower inference.kv_cache"),
        ("no kernel image is available", "set inference.vllm.attention_backend"),
        ("Could not find nvcc and default cuda_home='/usr/local/cuda'", "set inference.vllm.attention_backend"),
        ("torch._inductor failed to compile", "set inference.vllm.enforce_eager = true"),
        ("something else", "set inference.vllm.enforce_eager = true"),
    ],
)
def test_an_engine_that_does_not_start_says_what_policy_advice(why, first):
    told = policy_advice(why, config(), on_gpu=True)
    assert told.startswith(f"; try, in this order: {first}") and "VLLM_USE_V2_MODEL_RUNNER=0" in told
    assert ("VLLM_USE_FLASHINFER_SAMPLER=0" in told and "nvcc of CUDA 13" in told) == ("nvcc" in why)
    given = config(inference={"vllm": {"enforce_eager": True}})
    assert policy_advice(why, given, on_gpu=True).startswith("; try, in this order: remove what [inference.vllm] sets")


def test_on_a_cpu_only_what_helps_there_is_said(monkeypatch):
    assert policy_advice("something else", config(), on_gpu=False) == ""

    def fail(self):
        raise ValueError("no  available\nmemory")

    monkeypatch.setattr(VllmEngine, "_load", fail)
    with pytest.raises(InferenceError, match="could not start from unused: no available memory; try, in this order: lower"):
        VllmEngine(config(), 0, KvCache(1, 1, 1, None, 0))


def test_fp8_weights_that_were_loaded_wrong_are_an_engine_that_could_not_start(monkeypatch):
    """With the model's path, the worker and what can be tried; where all are right, the digest of each worker."""
    answers = [("", "abc"), ("parameter layer.weight must be finite", "")]
    asked = []

    def ask(method):
        asked.append(method)
        return answers

    def load(self):
        self._on_gpu = True
        self._llm = SimpleNamespace(collective_rpc=ask)

    monkeypatch.setattr(VllmEngine, "_load", load)
    made = config(model={"path": "seed", "dtype": "bfloat16"}, inference={"quantization": "fp8"})
    expected = r"engine 3 could not start from seed: worker 1: parameter layer.weight must be finite; try, in this order: "
    with pytest.raises(InferenceError, match=expected):
        VllmEngine(made, 3, KvCache(1, 1, 1, None, 0))
    answers[1] = ("", "def")
    assert VllmEngine(made, 3, KvCache(1, 1, 1, None, 0))._loaded == {"quantized": "abc def"}
    assert asked == ["semion_quantized"] * 2


def test_a_reward_engine_that_does_not_start_says_what_can_be_set_for_it(monkeypatch):
    for why, first in (
        ("CUDA out of memory", "lower reward_model.kv_cache or reward_model.max_tokens, or raise reward_model.tensor_parallel"),
        ("FlashInfer: Ninja build failed", "leave VLLM_USE_FLASHINFER_SAMPLER=0 and VLLM_USE_DEEP_GEMM=0 as engines have them"),
        ("something else", "set VLLM_USE_V2_MODEL_RUNNER=0"),
    ):
        told = reward_advice(why, config(), on_gpu=True)
        assert told.startswith(f"; try, in this order: {first}") and "inference." not in told
    assert reward_advice("something else", config(), on_gpu=False) == ""

    def fail(self, config):
        raise ValueError("no  available\nmemory")

    monkeypatch.setattr(RewardEngine, "_load", fail)
    monkeypatch.setattr("engine.data.conversations.Conversations", lambda options: None)
    with pytest.raises(InferenceError, match=r"reward engine could not start .*: no available memory; try, in this order: l"):
        RewardEngine(config())
