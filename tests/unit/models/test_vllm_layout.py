"""The engine's half of every family's table against vLLM itself: its own model, told that it is one rank of several, loads a
numbered model by its own loaders; every parameter must have the name, shape and content that the table says. No rank talks.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.capacity.memory import reward_engine
from engine.models.config_file import read_shape
from engine.models.sharding import EngineLayout
from tests import builders
from tests.unit.models.test_sharding import fill, model_of

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}


OUTSIDE = f"{Path(__file__).parent / 'qwen2_from_outside.py'}:Qwen2"
CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def load_rank(folder: str, kind: str, model: dict[str, torch.Tensor], rank: int, size: int, patch: pytest.MonkeyPatch) -> Any:
    """vLLM's model of that type on one tensor rank, its parameters as its loaders leave them over zeros."""
    from vllm.config import CacheConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs

    ends = {"is_first_rank": True, "is_last_rank": True}
    patch.setattr(parallel_state, "_TP", SimpleNamespace(world_size=size, rank_in_group=rank, **ends))
    patch.setattr(parallel_state, "_PP", SimpleNamespace(world_size=1, rank_in_group=0, **ends))
    arguments = EngineArgs(model=folder, dtype="float32", skip_tokenizer_init=True, enforce_eager=True)
    config = VllmConfig(model_config=arguments.create_model_config(), cache_config=CacheConfig(block_size=32))
    with set_current_vllm_config(config):
        made = getattr(import_module(f"vllm.model_executor.models.{kind}"), CLASSES[kind])(vllm_config=config)
        for parameter in made.parameters():
            parameter.data.zero_()
        made.load_weights((name, value.float()) for name, value in model.items())
    return made


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("size", "kv_heads", "vocab_size", "tied"),
    [(1, 2, 67, False), (2, 2, 130, True), (4, 2, 67, False), (8, 1, 65, False), (8, 8, 64, True)],
)
def test_every_rank_of_vllm_holds_what_the_table_says(size, kv_heads, vocab_size, tied, tmp_path, monkeypatch):
    """TP 1 to 8, more ranks than key-value heads, padded vocabularies, tied and not; padding is left alone."""
    tree = LLAMA | {"num_key_value_heads": kv_heads, "vocab_size": vocab_size, "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    shape = read_shape(tmp_path)
    model = model_of(shape)
    for rank in range(size):
        loaded = dict(load_rank(str(tmp_path), "llama", model, rank, size, monkeypatch).named_parameters())
        wanted = fill(shape, EngineLayout(size), model, rank)
        assert loaded.keys() == wanted.keys()
        for name, values in wanted.items():
            assert torch.equal(loaded[name].data.long(), values), (rank, name)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kind", "family"), [("qwen3", "auto"), ("qwen2", OUTSIDE)])
@pytest.mark.parametrize(
    ("size", "kv_heads", "vocab_size", "tied"), [(1, 2, 67, False), (2, 2, 130, True), (4, 2, 67, False), (8, 8, 64, False)]
)
def test_every_rank_of_another_family_does(kind, family, size, kv_heads, vocab_size, tied, tmp_path, monkeypatch):
    """Norms of queries and keys, whole on every rank; biases, cut and repeated as the matrices are."""
    sizes = {"hidden_size": 32, "num_key_value_heads": kv_heads, "vocab_size": vocab_size, "tie_word_embeddings": tied}
    tree = LLAMA | {"model_type": kind, "architectures": [CLASSES[kind]]} | sizes
    (tmp_path / "config.json").write_text(json.dumps(tree))
    shape = read_shape(tmp_path, family=family)
    model = model_of(shape)
    for rank in range(size):
        loaded = dict(load_rank(str(tmp_path), kind, model, rank, size, monkeypatch).named_parameters())
        wanted = fill(shape, EngineLayout(size), model, rank)
        assert loaded.keys() == wanted.keys()
        for name, values in wanted.items():
            assert torch.equal(loaded[name].data.long(), values), (rank, name)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_vllms_reward_model_holds_what_its_estimate_counts(tied, tmp_path, monkeypatch):
    """In bfloat16, with a padded vocabulary: no output layer, and a head in float32. Rotary tables, buffers, do not count."""
    from vllm.config import CacheConfig, PoolerConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.torch_utils import set_default_torch_dtype

    from engine.inference.athene import AtheneForSequenceClassification

    tree = LLAMA | {"num_key_value_heads": 2, "vocab_size": 67, "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    alone = SimpleNamespace(world_size=1, rank_in_group=0, is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(parallel_state, "_TP", alone)
    monkeypatch.setattr(parallel_state, "_PP", alone)
    arguments = EngineArgs(
        model=str(tmp_path),
        runner="pooling",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=True,
        pooler_config=PoolerConfig(use_activation=False),
        hf_overrides={"architectures": ["LlamaForSequenceClassification"], "num_labels": 1},
    )
    config = VllmConfig(model_config=arguments.create_model_config(), cache_config=CacheConfig(block_size=32))
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        made = AtheneForSequenceClassification(vllm_config=config)
    run = builders.config(data={"reward": "model"}, reward_model={"path": str(tmp_path), "dtype": "bfloat16"})
    counted = reward_engine(read_shape(tmp_path), run.reward_model)["engine: weights"]
    assert counted == sum(parameter.nbytes for parameter in made.parameters())
