"""What tests build configurations from: the least that a run needs, in tables that any test may change, and such a run resolved
without a model on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from engine.config.load import RunConfig
from engine.config.options import AlgorithmOptions, options_class
from engine.models.base import ModelShape
from engine.models.config_file import read_shape
from engine.models.sharding import tensors
from engine.run.spec import Spec, assemble

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMALL = ModelShape(4, 8, 4, 2, 2, 12, 100, 1e4, None, 1e-5, False, 16)
LEAST: dict[str, dict[str, Any]] = {
    "run": {"directory": "unused", "steps": 4},
    "model": {"path": "unused"},
    "data": {"train": "unused"},
    "sampling": {"max_tokens": 8},
}

LLAMA: dict[str, Any] = {  # the config.json of a model of the tests' tokenizer
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 260,
    "eos_token_id": 259,
    "max_position_embeddings": 4096,
}


def make_model(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """A model's folder with weights of zero. A tokenizer and a config.json that are there already stay."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps(LLAMA))
    sizes = tensors(read_shape(folder))
    save_file({name: torch.zeros(size, dtype=torch.bfloat16) for name, size in sizes.items()}, folder / "model.safetensors")


def merged(*trees: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The tables of all; an option of a later one wins."""
    tree: dict[str, dict[str, Any]] = {}
    for name, table in ((name, table) for tables in trees for name, table in tables.items()):
        tree[name] = tree.get(name, {}) | dict(table)
    return tree


def config(directory: str | Path = "unused", /, **tables: Mapping[str, Any]) -> RunConfig:
    """A configuration that breaks no rule; `tables` set options anew, beside those of `LEAST`."""
    return RunConfig.model_validate(merged(LEAST, tables, {"run": {"directory": str(directory)}}))


def algorithm_options(values: Mapping[str, Any]) -> AlgorithmOptions:
    """The [algorithm] table as the class of its loss reads it."""
    return options_class(values).model_validate(dict(values))


def spec(made: RunConfig | None = None, shape: ModelShape = SMALL, **known: Any) -> Spec:
    """A run as resolved, of a model that is nowhere; `known` as `assemble` takes it."""
    return assemble(config() if made is None else made, shape, **known)
