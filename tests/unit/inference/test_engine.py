"""What an engine does with vLLM's answers, without vLLM: a prefix cache that is not dropped, and a start that fails."""

import sys
from types import SimpleNamespace

import pytest

from engine.capacity.kv_cache import KvCache
from engine.core.errors import EngineLostError, InferenceError
from engine.inference.vllm_engine import VllmEngine, to_try
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
        ("torch._inductor failed to compile", "set inference.vllm.enforce_eager = true"),
        ("something else", "set inference.vllm.enforce_eager = true"),
    ],
)
def test_an_engine_that_does_not_start_says_what_to_try(why, first):
    told = to_try(why, config(), on_gpu=True)
    assert told.startswith(f"; try, in this order: {first}") and "VLLM_USE_V2_MODEL_RUNNER=0" in told
    given = config(inference={"vllm": {"enforce_eager": True}})
    assert to_try(why, given, on_gpu=True).startswith("; try, in this order: remove what [inference.vllm] sets")


def test_on_a_cpu_only_what_helps_there_is_said(monkeypatch):
    assert to_try("something else", config(), on_gpu=False) == ""

    def fail(self):
        raise ValueError("no  available\nmemory")

    monkeypatch.setattr(VllmEngine, "_load", fail)
    with pytest.raises(InferenceError, match="could not start from unused: no available memory; try, in this order: lower"):
        VllmEngine(config(), 0, KvCache(1, 1, 1, None, 0))
