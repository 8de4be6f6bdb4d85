"""tools/golden_check.py shares no code with the engine, and its Llama is that of transformers."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tools import golden_check

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 131072,
}
LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def test_nothing_of_the_engine_is_imported() -> None:
    tree = ast.parse(Path(golden_check.__file__).read_text("utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} == {
        *("__future__", "argparse", "collections", "dataclasses", "functools", "hashlib", "json", "math", "pathlib", "random"),
        *("sys", "tomllib", "typing", "pyarrow", "safetensors", "torch", "transformers"),
    }


@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": True, "head_dim": 16, "rope_parameters": LLAMA31}])
def test_logits_are_those_of_transformers(more: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**(SMALL | more))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 61, (40,))
    with torch.no_grad():
        wanted = model(ids[None]).logits[0]
    found = golden_check.Llama(tmp_path).logits(ids.tolist())
    assert (found - wanted).abs().max() < 1e-5, "transformers takes its rotations in float32"


def test_each_token_is_held_against_the_version_that_sampled_it(tmp_path: Path) -> None:
    """A response of five tokens, the last two under other weights, which read the first three again."""
    models = {}
    for version in (0, 2):
        torch.manual_seed(version)
        LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / str(version))
        models[version] = golden_check.Llama(tmp_path / str(version))
    row: dict[str, Any] = {"version": 0, "spans": [[0, 3], [2, 2]], "token_ids": [5, 6, 7, 8, 9]}
    old, new = (golden_check.Sample(row, (1, 2)).log_probs(models[version], 1.0)[0].tolist() for version in (0, 2))
    row["log_probs"] = [*old[:3], *new[3:]]
    assert max(golden_check.sampling_gaps(golden_check.Sample(row, (1, 2)), models, 1.0)) < 1e-12
    row["spans"] = [[0, 4], [2, 1]]
    assert max(golden_check.sampling_gaps(golden_check.Sample(row, (1, 2)), models, 1.0)) > 1e-3
    assert list(golden_check.sampling_gaps(golden_check.Sample(row, (1, 2)), {}, 1.0)) == [], "nothing is on disk"


def test_optimal_advantages_of_small_betas_and_of_nobody() -> None:
    assert golden_check.optimal_advantages([0.0, 1.0], 0.001) == pytest.approx(
        [-1.0 + 0.001 * 0.6931471805599453, 0.0006931471805]
    )
    assert golden_check.optimal_advantages([], 1.0) == [] and golden_check.optimal_advantages([0.5, 0.5], 1.0) == [0.0, 0.0]


def test_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(golden_check.CannotCheckError, match="must be 'llama'; found 'qwen3'"):
        golden_check.Llama(tmp_path)


@pytest.mark.parametrize(
    ("normalize", "wanted"),
    [("mean", [0.75, -0.25, -0.25, -0.25]), ("leave_one_out", [1.0, -1 / 3, -1 / 3, -1 / 3])],
)
def test_advantages_by_hand(normalize: str, wanted: list[float]) -> None:
    assert golden_check.advantages([1.0, 0.0, 0.0, 0.0], normalize) == pytest.approx(wanted)
    assert golden_check.advantages([0.1, 0.1, 0.1], normalize) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "recorded", "found", "agrees"),
    [
        ("loss", 1e-3, 1e-3 * (1 + 2e-6), False),
        ("loss", 1e3, 1e3 * (1 + 5e-7), True),
        ("loss", 0.0, 0.0, True),
        ("kl_mean", 1e-7, 2e-7, True),
        ("loss", 1.0, float("nan"), False),
    ],
)
def test_a_loss_is_compared_relatively(name: str, recorded: float, found: float, agrees: bool) -> None:
    floor = golden_check.TINY if name == "loss" else 1.0
    assert golden_check.Comparison(0, name, recorded, found, 1e-6, floor).agrees is agrees
