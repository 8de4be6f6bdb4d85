"""The pool of trainer processes and the small checkpoints they share, one of each for the whole session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.pool import WorkerPool

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
WIDE: dict[str, Any] = {  # every product in whole blocks of 128, as FP8 recipes ask
    **{"hidden_size": 256, "intermediate_size": 512, "vocab_size": 320},
    **{"num_attention_heads": 8, "num_key_value_heads": 4},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True, "rope_parameters": LLAMA31},
    "wide": WIDE | {"num_hidden_layers": 2},
    "deep": WIDE,  # a layer for each of two virtual stages of two
    "odd": {"vocab_size": 67, "head_dim": 16, "rope_parameters": LLAMA31},
}


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Processes that outlive single tests and files. Even idle they take time of a core, and each has taken seconds to start:
    a file that has processes of its own ends them first."""
    shared = WorkerPool()
    yield shared
    shared.close()


@pytest.fixture(scope="module")
def pool(workers: WorkerPool) -> WorkerPool:
    """The processes that cases run in."""
    return workers


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a small Llama by variant, with norms off 1 and weights large enough to tell layouts apart."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made: dict[str, Path] = {}

    def make(variant: str) -> Path:
        if variant not in made:
            torch.manual_seed(3)
            model = LlamaForCausalLM(LlamaConfig(**(SMALL | VARIANTS[variant])))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    drawn = torch.randn_like(parameter)
                    parameter.copy_(1 + 0.1 * drawn if "norm" in name else 0.08 * drawn)
            made[variant] = tmp_path_factory.mktemp(variant)
            model.save_pretrained(made[variant])
        return made[variant]

    return make
