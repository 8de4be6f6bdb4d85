"""Hugging Face folders: what is read, what is refused and in which words, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.core.errors import CheckpointError, ConfigError
from engine.models.base import Llama3Scaling
from engine.models.config_file import read_shape
from engine.models.hf import HfCheckpoint, write_hf_checkpoint

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 67,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def folder_with(tmp_path: Path, **changes: Any) -> Path:
    """A folder whose config.json is CONFIG with changes."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    return tmp_path


def test_both_spellings_of_the_rotary_table_are_read(tmp_path: Path) -> None:
    """transformers 4 keeps theta beside rope_scaling, transformers 5 inside rope_parameters; same shape."""
    old = read_shape(folder_with(tmp_path, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **SCALING}))
    new = read_shape(folder_with(tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **SCALING}))
    assert old == new
    assert new.rope_theta == 5e5
    assert new.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    assert (new.head_dim, new.num_kv_heads, new.tied) == (8, 2, False)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"attention_bias": True}, "attention_bias = False; found True"),
        ({"mlp_bias": True}, "mlp_bias = False; found True"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    """One sentence: plain Llama, the file, the rule, what was found."""
    with pytest.raises(ConfigError, match="must be a plain Llama") as caught:
        read_shape(folder_with(tmp_path, **changes))
    assert found in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_torn_folders_name_file_and_tensor(tmp_path: Path) -> None:
    """No config, no tensors, a missing tensor, a wrong shape, a truncated file: CheckpointError each."""
    with pytest.raises(CheckpointError, match=r"with config\.json; found an empty folder"):
        read_shape(tmp_path)
    with pytest.raises(CheckpointError, match="found neither"):
        HfCheckpoint(tmp_path)
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    opened = HfCheckpoint(tmp_path)
    assert opened.tensor("a", (2, 3)).shape == (2, 3)
    with pytest.raises(CheckpointError, match="has no tensor b"):
        opened.tensor("b")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor a must be \[3, 2\].*found \[2, 3\]"):
        opened.tensor("a", (3, 2))
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 7)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        HfCheckpoint(tmp_path)


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 10_000])
def test_transformers_loads_what_is_written(tmp_path: Path, max_shard_bytes: int) -> None:
    """One file and an index of several: equal tensors in transformers, dtype updated, tokenizer files alongside."""
    from transformers import LlamaConfig, LlamaForCausalLM

    kept = {key: value for key, value in CONFIG.items() if key != "torch_dtype"}
    template, target = tmp_path / "seed", tmp_path / "out"
    model = LlamaForCausalLM(LlamaConfig(**kept)).to(torch.bfloat16)
    model.save_pretrained(template)
    (template / "tokenizer_config.json").write_text("{}")
    write_hf_checkpoint(target, ((n, t.float()) for n, t in model.state_dict().items()), template, max_shard_bytes)
    loaded, info = LlamaForCausalLM.from_pretrained(target, output_loading_info=True)
    assert loaded.dtype == torch.float32
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].float()), name
    assert (target / "tokenizer_config.json").exists()
    assert (target / "model.safetensors").exists() is (max_shard_bytes > 10_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "seed"]
    source = HfCheckpoint(target)
    assert source.names() == set(loaded.state_dict())
    assert torch.equal(source.tensor("model.norm.weight"), loaded.model.norm.weight)


def test_what_is_written_names_every_end_token(tmp_path: Path) -> None:
    """In the generation config, which is otherwise as it was; a folder that names them all is copied to the byte."""
    (tmp_path / "seed").mkdir()
    template = folder_with(tmp_path / "seed")

    def written(end_ids: list[int]) -> dict[str, Any] | None:
        write_hf_checkpoint(tmp_path / "out", [("a", torch.zeros(1))], template, end_ids=end_ids)
        file = tmp_path / "out" / "generation_config.json"
        return json.loads(file.read_text()) if file.exists() else None

    assert written([]) is None
    assert written([7, 8]) == {"eos_token_id": [7, 8]}
    (template / "generation_config.json").write_text('{"eos_token_id":7,  "top_p": 0.9}')
    assert written([7, 8]) == {"eos_token_id": [7, 8], "top_p": 0.9}
    written([7])
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"eos_token_id":7,  "top_p": 0.9}'


def test_a_checkpoint_is_replaced_but_nothing_else(tmp_path: Path) -> None:
    """Writing twice leaves the second; a folder of other files stays as it is; a failed write leaves the first."""
    (tmp_path / "seed").mkdir()
    template = folder_with(tmp_path / "seed")
    write_hf_checkpoint(tmp_path / "out", [("a", torch.zeros(1))], template)
    write_hf_checkpoint(tmp_path / "out", [("a", torch.ones(1))], template)
    assert HfCheckpoint(tmp_path / "out").tensor("a").item() == 1

    def breaking() -> Any:
        yield "a", torch.full((1,), 2.0)
        raise RuntimeError("lost a rank")

    with pytest.raises(RuntimeError, match="lost a rank"):
        write_hf_checkpoint(tmp_path / "out", breaking(), template)
    assert HfCheckpoint(tmp_path / "out").tensor("a").item() == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="found other files"):
        write_hf_checkpoint(tmp_path / "mine", [("a", torch.zeros(1))], template)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
