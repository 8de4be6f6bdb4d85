"""An output layer in float32: an engine that has none although model.head asks for one does not start, and the layer that a
vLLM without one gets is the product that it says (tests/e2e/test_head.py has it in a whole engine)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.core.errors import ConfigError
from engine.inference.vllm_engine import VllmEngine
from tests.builders import config

TOKENS, HIDDEN, PADDED, VOCABULARY = 5, 48, 16, 11


class Workers:
    """Two workers that answer with the types of their output layers."""

    def __init__(self, *dtypes):
        self.dtypes, self.asked = dtypes, []

    def collective_rpc(self, method):
        self.asked.append(method)
        return list(self.dtypes)


def checked(head, *dtypes):
    engine = VllmEngine.__new__(VllmEngine)
    model = {"path": "seed", "dtype": "bfloat16", "head": head}
    engine._config = config(model=model, trainer={"fused_lm_head": True})
    engine._llm = Workers(*dtypes)
    engine._check_head()
    return engine._llm.asked


def test_a_head_in_float32_must_be_one_on_every_worker():
    assert checked("float32", "float32", "float32") == ["semion_head_dtype"]
    assert checked("model") == [], "the default asks nothing"
    for found in (("bfloat16",), ("float32", "the model's")):
        with pytest.raises(ConfigError, match=f"needs engines whose output layer is in float32; found {', '.join(found)}"):
            checked("float32", *found)


@pytest.fixture
def made(monkeypatch):
    """Makes our layer as it is made for a model whose config says so, with an output weight; no rank gathers anything."""
    from vllm.model_executor.layers import logits_processor
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    from engine.inference import head

    def make(wanted: str | None, runner: str = "generate", *, method: Any = None) -> tuple[Any, Any]:
        model = SimpleNamespace(runner_type=runner, hf_config=SimpleNamespace(), head_dtype=torch.bfloat16)
        if wanted is not None:
            model.hf_config.head_dtype = wanted
        for place in (head, logits_processor):
            name = "get_current_vllm_config"
            monkeypatch.setattr(place, name, lambda: SimpleNamespace(model_config=model), raising=False)
        layer = head.Float32Head(PADDED, VOCABULARY)
        monkeypatch.setattr(layer, "_gather_logits", lambda logits: logits)
        torch.manual_seed(0)
        weight = torch.randn(PADDED, HIDDEN).bfloat16()
        return layer, SimpleNamespace(quant_method=method or UnquantizedEmbeddingMethod(), weight=weight, tp_size=1)

    return make


@pytest.mark.parametrize("with_bias", [False, True])
def test_our_layer_multiplies_and_sums_in_float32(made, with_bias):
    layer, output = made("float32")
    hidden = torch.randn(TOKENS, HIDDEN).bfloat16()
    bias = torch.randn(PADDED).bfloat16() if with_bias else None
    exact = hidden.double() @ output.weight.double().t() + (0 if bias is None else bias.double())
    logits = layer._get_logits(hidden, output, bias)
    assert logits.dtype == layer.head_dtype == torch.float32 and logits.shape == (TOKENS, VOCABULARY)
    torch.testing.assert_close(logits.double(), exact[:, :VOCABULARY], rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError, match="a plain weight"):
        layer._get_logits(hidden, made("float32", method=object())[1], None)


@pytest.mark.parametrize(("wanted", "runner"), [(None, "generate"), ("float32", "pooling")])
def test_it_is_vllms_own_where_nothing_else_is_asked_for(made, wanted, runner):
    layer, output = made(wanted, runner)
    assert layer.head_dtype is None
    output.quant_method = SimpleNamespace(apply=lambda layer, hidden, bias: torch.zeros(len(hidden), PADDED))
    assert not layer._get_logits(torch.ones(TOKENS, HIDDEN).bfloat16(), output, None).any()


def test_only_a_vllm_without_such_a_head_is_given_ours(monkeypatch):
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    from engine.inference import head

    for own, replaced in ((True, {}), (False, {"LogitsProcessor": head.Float32Head})):
        registry: dict[str, type] = {}
        monkeypatch.setattr(head, "op_registry_oot", registry)
        monkeypatch.setattr("vllm.model_executor.custom_op.op_registry_oot", registry)
        if own:
            monkeypatch.setattr(LogitsProcessor, "_apply_head", None, raising=False)
        else:
            monkeypatch.delattr(LogitsProcessor, "_apply_head", raising=False)
        head.register()
        head.register()
        assert registry == replaced
