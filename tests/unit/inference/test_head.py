"""An engine whose output layer is not in the type that model.head asks for does not start. No vLLM."""

import pytest

from engine.core.errors import ConfigError
from engine.inference.vllm_engine import VllmEngine
from tests.builders import config


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
