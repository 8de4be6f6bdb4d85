"""megatron-core's configuration from ours, where no process group is needed: what FP8 asks of a model's sizes, and that each
option becomes megatron's own, off by default."""

from dataclasses import replace

import pytest
import torch

from engine.config.options import Trainer
from engine.core.errors import ConfigError
from engine.megatron.build import AMAX_HISTORY, megatron_config
from engine.models.base import ModelShape
from engine.models.sharding import trainer_layout

SHAPE = ModelShape(
    num_layers=2,
    hidden=64,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    ffn_hidden=96,
    vocab_size=64,
    rope_theta=10000.0,
    rope_scaling=None,
    norm_eps=1e-5,
    tied=False,
    max_positions=64,
)


def made(shape=SHAPE, **options):
    trainer = Trainer(**{"fuse_gradient_accumulation": False} | options)
    return megatron_config(shape, trainer_layout(trainer), trainer, torch.bfloat16)


def test_nothing_of_transformer_engine_or_apex_by_default():
    config = made()
    assert (config.transformer_impl, config.fp8, config.tp_comm_overlap) == ("local", None, False)
    assert not config.gradient_accumulation_fusion
    assert made(fuse_gradient_accumulation=True).gradient_accumulation_fusion
    assert not config.bias_activation_fusion and not config.apply_rope_fusion


@pytest.mark.parametrize(
    ("fp8", "formats", "recipe"),
    [("delayed", "hybrid", "delayed"), ("current", "hybrid", "tensorwise"), ("blockwise", "e4m3", "blockwise")],
)
def test_recipes_have_megatrons_names(fp8, formats, recipe):
    config = made(layers="transformer_engine", fp8=fp8)
    assert (config.transformer_impl, config.fp8, config.fp8_recipe) == ("transformer_engine", formats, recipe)
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (AMAX_HISTORY, "max")
    assert not config.fp8_param and config.apply_rope_fusion and config.bias_activation_fusion


@pytest.mark.parametrize(
    ("changes", "size", "what"),
    [
        ({"hidden": 72}, 1, "hidden size to be a multiple of 16; found 72"),
        ({"head_dim": 2}, 4, "rows of queries, keys and values on a rank to be a multiple of 16; found 8"),
        ({"num_kv_heads": 8}, 8, "rows of queries, keys and values on a rank to be a multiple of 16; found 24"),
        ({"num_kv_heads": 4, "head_dim": 16}, 8, "feed-forward columns on a rank to be a multiple of 16; found 12"),
        ({"head_dim": 4}, 4, "attention columns on a rank to be a multiple of 16; found 8"),
    ],
)
def test_sizes_that_fp8_products_refuse_are_refused_at_the_start(changes, size, what):
    shape = replace(SHAPE, **changes)
    options = {"layers": "transformer_engine", "tensor_parallel": size}
    with pytest.raises(ConfigError, match=f"trainer.fp8 needs the model's {what} with trainer.tensor_parallel = {size}: lower"):
        made(shape, fp8="current", **options)
    made(shape, fp8="none", **options)
