"""The families: which is found for a config.json, which of its fields are followed, ignored or refused, and that the tables of
all of them can be cut and put together again. What they compute is compared in tests/parallel/test_families.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from engine.bridge.terms import SyncTerms
from engine.core.errors import ConfigError
from engine.models import sharding as layout
from engine.models.base import ModelShape
from engine.models.config_file import read_shape
from engine.models.registry import FAMILIES, family_of
from engine.models.sharding import WHOLE, EngineLayout, Layout, TrainerLayout
from tests.unit.models.test_hf import CONFIG, SCALING
from tests.unit.models.test_sharding import fill, model_of

OUTSIDE = f"{Path(__file__).parent / 'qwen2_from_outside.py'}:Qwen2"
QWEN3 = CONFIG | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
QWEN2 = CONFIG | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "transformers_version": "4.42.3",
    "use_cache": True,
}
FILES = {  # the fields of config.json as published, the sizes aside
    "Llama 2": {**COMMON, "_name_or_path": "f", "pretraining_tp": 1, "rope_scaling": None, "pad_token_id": 0},
    "Llama 2, older": {k: v for k, v in COMMON.items() if "attention" not in k} | {"max_sequence_length": 2048},
    "Llama 3": {**COMMON, "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 5e5},
    "Llama 3.1 and 3.3": {**COMMON, "mlp_bias": False, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}},
    "Llama 3.2": {**COMMON, "head_dim": 8, "mlp_bias": False, "rope_scaling": {"rope_type": "llama3", **SCALING}},
    "SmolLM": {**COMMON, "is_llama_config": True, "rope_interleaved": False, "rope_scaling": None},
    "a reward model": {
        **COMMON,
        "cls_token_id": 9,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "problem_type": None,
    },
    "transformers 5": LlamaConfig().to_dict(),
    "Qwen3": {**COMMON, "model_type": "qwen3", "max_window_layers": 28, "sliding_window": None, "use_sliding_window": False},
    "Qwen3 of transformers 5": Qwen3Config().to_dict(),
}


def written(folder: Path, tree: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    return folder


@pytest.mark.parametrize("file", FILES)
def test_the_files_that_there_are_are_read(file: str, tmp_path: Path) -> None:
    shape = read_shape(written(tmp_path, CONFIG | FILES[file]))
    assert shape.family == ("qwen3" if "Qwen3" in file else "llama")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": 4096}, r"has sliding_window = 4096, which no model of type 'llama' is known to have"),
        ({"use_qk_norm": True}, "has use_qk_norm = True"),
        ({"qk_layernorm": False}, "has qk_layernorm = False"),  # even off: who has it on is another model
        ({"auto_map": {"AutoModel": "modeling.Mine"}}, "has auto_map"),
        ({"attention_dropout": 0.1}, r"must have attention_dropout = 0; found 0\.1"),
        ({"partial_rotary_factor": 0.5}, r"must have partial_rotary_factor = 1; found 0\.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "must have quantization_config = null; found .*gptq"),
        ({"rope_scaling": {"rope_type": "llama3", **SCALING, "attention_factor": 2.0}}, r"has attention_factor = 2\.0 in its"),
        ({"model_type": "qwen3", "use_sliding_window": True}, r"dense Qwen3: .* use_sliding_window = False; found True"),
        ({"model_type": "qwen3", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'default'; found 'yarn'"),
        ({"rope_interleaved": True}, "must have rope_interleaved = False; found True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "has layer_types = "),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"], "sliding_window": 5}, "has layer_types = "),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, r"has partial_rotary_factor = 0\.5 in"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "llama3", **SCALING}}, "frequencies once"),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "or the same twice; found"),
    ],
)
def test_what_would_not_be_followed_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"model\.path must be a .*{words}") as caught:
        read_shape(written(tmp_path, CONFIG | changes))
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"pretraining_tp": 2},
        {"transformers_version": "9.9", "torch_dtype": "bfloat16", "use_cache": False},
        {"max_length": 4096, "temperature": 0.9, "top_p": 0.6, "do_sample": True},
        {"layer_types": ["full_attention", "full_attention"]},
        {"rope_parameters": {"rope_type": "llama3", **SCALING}, "rope_scaling": {"type": "llama3", **SCALING}},
        {"architectures": None},
    ],
)
def test_what_changes_nothing_is_read_over(changes: dict[str, Any], tmp_path: Path) -> None:
    assert read_shape(written(tmp_path, CONFIG | changes)).family == "llama"


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaModel", "LlamaForCausalLMEagle3"])
def test_a_policy_must_have_a_language_models_head(name: str, tmp_path: Path) -> None:
    written(tmp_path, CONFIG | {"architectures": [name]})
    with pytest.raises(ConfigError, match=rf"model\.path must hold a language model, .*architectures = \['{name}'\]"):
        read_shape(tmp_path)
    assert read_shape(tmp_path, "reward_model.path").family == "llama", "whose head is told by its tensors"


def test_null_is_as_good_as_missing(tmp_path: Path) -> None:
    assert read_shape(written(tmp_path, CONFIG | {"sliding_window": None, "pretraining_tp": None})).family == "llama"


def test_the_family_is_the_files_or_the_one_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FAMILIES.names == ("llama", "qwen3")
    qwen3 = read_shape(written(tmp_path, QWEN3))
    assert (qwen3.family, qwen3.head_dim) == ("qwen3", 16)
    assert read_shape(written(tmp_path, {k: v for k, v in QWEN3.items() if k != "head_dim"})).head_dim == 128
    with pytest.raises(ConfigError, match=r"must be a plain Llama: .* must have model_type = 'llama'; found 'qwen3'"):
        read_shape(tmp_path, family="llama")
    written(tmp_path, QWEN2)
    with pytest.raises(ConfigError, match=r"must have model_type = 'llama' or 'qwen3'; found 'qwen2': .* model\.fam"):
        read_shape(tmp_path)
    monkeypatch.chdir(Path(__file__).parent)
    assert read_shape(tmp_path, family="qwen2_from_outside.py:Qwen2").family == OUTSIDE, "where other processes find it"
    with pytest.raises(ConfigError, match=r"model\.family must be one of auto, llama, qwen3, or your own"):
        read_shape(tmp_path, family="qwen2")


def shape_of(tree: dict[str, Any], folder: Path, **changes: Any) -> ModelShape:
    family = OUTSIDE if tree["model_type"] == "qwen2" else "auto"
    return read_shape(written(folder, tree | changes), family=family)


SPREADS: list[Layout] = [
    TrainerLayout(2, 2, spec="transformer_engine"),
    TrainerLayout(4),
    TrainerLayout(1, 2, 2, 2),
    EngineLayout(2),
    EngineLayout(4),
    WHOLE,
]


@pytest.mark.parametrize("spread", SPREADS, ids=str)
@pytest.mark.parametrize("tree", [CONFIG, QWEN3, QWEN2], ids=lambda tree: tree["model_type"])
def test_what_is_cut_is_all_there(tree: dict[str, Any], spread: Layout, tmp_path: Path) -> None:
    """Every element of every tensor is on some rank, where the slices say; two tensors are never mixed up."""
    shape = shape_of(tree, tmp_path, num_hidden_layers=4)
    model = model_of(shape)
    again = {name: torch.zeros_like(value) for name, value in model.items()}
    for pp_rank in range(spread.pp_size if isinstance(spread, TrainerLayout) else 1):
        for tp_rank in range(spread.tp_size):
            ranks = (tp_rank, pp_rank)
            shards = fill(shape, spread, model, *ranks)
            for p in layout.shard_slices(shape, spread, *ranks):
                part = layout.matrix_slice(shards[p.parameter], p.shard_row, p.shard_col, p.rows, p.cols)
                layout.matrix_slice(again[p.name], p.row, p.col, p.rows, p.cols).copy_(part)
    assert all(torch.equal(again[name], value) for name, value in model.items())
    if isinstance(spread, TrainerLayout):
        names = {family_of(shape).local_name(name) for name in layout.shard_shapes(shape, spread, 0)}
        assert names == set(layout.shard_shapes(shape, TrainerLayout(*_axes(spread)), 0))


def _axes(spread: TrainerLayout) -> tuple[int, int, int, int | None]:
    return spread.tp_size, spread.pp_size, spread.vpp_size, spread.first_stage_layers


def test_both_sides_of_a_sync_make_one_plan_of_a_family_from_outside(tmp_path: Path) -> None:
    """The terms cross a process boundary as text, the family by name."""
    shape = shape_of(QWEN2, tmp_path)
    terms = SyncTerms(shape, "float32", TrainerLayout(2), 1, EngineLayout(2), ((0, 1),), 1 << 10, "gloo")
    again = SyncTerms.from_json(terms.to_json())
    assert again.plan().digest == terms.plan().digest
    carried = {t.target.parameter for bucket in terms.plan().buckets for t in bucket.transfers}
    assert carried == set(layout.shard_shapes(shape, EngineLayout(2), 0))
    assert "model.layers.1.self_attn.qkv_proj.bias" in carried
