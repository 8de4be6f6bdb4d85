"""Whether a layout fits a model; a ConfigError names the option that does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.core.errors import ConfigError
from engine.models.sharding import VLLM_VOCABULARY_MULTIPLE, EngineLayout, TrainerLayout, padded_vocab, stage_sizes

if TYPE_CHECKING:
    from engine.models.base import ModelShape


def check_layout(shape: ModelShape, layout: TrainerLayout) -> None:
    """ConfigError when tensor ranks or pipeline stages cannot share this model."""
    _check_heads(shape, layout.tp_size, "trainer.tensor_parallel")
    fused = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    _check_divides(layout.tp_size, fused, "trainer.tensor_parallel", "rows of fused queries, keys and values")
    first, last, virtual = layout.first_stage_layers, layout.last_stage_layers, layout.vpp_size
    if first is None and last is None:
        option = "trainer.pipeline_parallel * trainer.virtual_pipeline"
        _check_divides(layout.pp_size * virtual, shape.num_layers, option, "layers")
        return
    ends = "trainer.first_stage_layers and trainer.last_stage_layers"
    given = [count for count in (first, last) if count is not None]
    between, left = layout.pp_size - len(given), shape.num_layers - sum(given)
    if between < 0 or left < 0 or (left % between if between else left) or (between and not left):
        raise ConfigError(
            f"{ends} must leave a multiple of the stages between them of the model's {shape.num_layers} layers; found "
            f"{first} and {last}, which leave {left} for {between} stages: choose others, or another trainer.pipeline_parallel"
        )
    sizes = stage_sizes(shape, layout)
    if any(size % virtual for size in sizes):
        raise ConfigError(
            f"trainer.virtual_pipeline must divide the layers of every stage; found {virtual} with stages of {list(sizes)} "
            f"layers: change it or {ends}"
        )
    if virtual > 1 and not between:
        raise ConfigError(
            f"{ends} must not both be set on two stages with trainer.virtual_pipeline > 1, which megatron-core cannot place; "
            f"found {first} and {last} with {virtual}: unset one, the other stage takes the rest"
        )


def check_engine_layout(shape: ModelShape, layout: EngineLayout, section: str = "inference") -> None:
    """ConfigError when the ranks of a vLLM engine, whose options are in that section, cannot share this model."""
    if not layout.whole:
        _check_heads(shape, layout.tp_size, f"{section}.tensor_parallel")
        what = f"vocabulary rows padded to a multiple of {VLLM_VOCABULARY_MULTIPLE}"
        _check_divides(layout.tp_size, padded_vocab(shape, layout), f"{section}.tensor_parallel", what)


def _check_heads(shape: ModelShape, size: int, option: str) -> None:
    groups = shape.num_kv_heads
    if groups % size and size % groups:
        raise ConfigError(
            f"{option} must divide the model's {groups} key-value heads or be a multiple of them; found {size}: use a divisor "
            f"or a multiple of {groups}"
        )
    _check_divides(size, shape.num_heads, option, "attention heads")
    _check_divides(size, shape.ffn_hidden, option, "feed-forward columns")


def _check_divides(size: int, count: int, option: str, what: str) -> None:
    if count % size:
        raise ConfigError(f"{option} must divide the model's {count} {what}; found {size}: use a divisor of {count}")
