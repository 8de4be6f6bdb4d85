"""Builds this rank's chunks of a model as megatron-core's GPTModel and fills them from a Hugging Face checkpoint. The
layer spec is chosen in one function, by trainer.layers; everything else is sizes. It trains nothing.

Shape legend: T tokens of a packed row, L of them with a target, H hidden, V_local vocabulary columns of this rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from engine.config.options import Trainer
from engine.core.errors import CheckpointError, ConfigError
from engine.megatron.attention import PackedAttention, Row, rotary_of
from engine.megatron.fp8.parameters import fill, in_fp8
from engine.megatron.parallel_state import ParallelState
from engine.models import checks
from engine.models import sharding as layout
from engine.models.base import ModelShape
from engine.models.hf import HfCheckpoint
from engine.models.registry import family_of
from engine.observe.telling import BYTES, Doing, activity
from engine.ops import rms_norm, swiglu

LAYER = re.compile(r"\blayers\.(\d+)\.")
FP8_FORMATS = {"none": None, "delayed": "hybrid", "current": "hybrid", "blockwise": "e4m3"}  # hybrid: gradients in E5M2
FP8_RECIPES = {"none": "delayed", "delayed": "delayed", "current": "tensorwise", "blockwise": "blockwise"}  # megatron's names
FP8_SIDE = 16  # an FP8 product takes matrices whose sides are multiples of it
AMAX_HISTORY = 1024  # steps of delayed scaling's memory, and their largest: Transformer Engine's own default
MEGATRON_LOW_FREQ, MEGATRON_HIGH_FREQ, MEGATRON_ORIGINAL_POSITIONS = 1.0, 4.0, 8192  # fixed in its RotaryEmbedding


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the constructor megatron calls; marks its weight so that megatron sums its gradient over
    tensor-parallel ranks when each saw only its part of the sequence."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See engine.ops.rms_norm."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(torch.nn.Module):
    """The feed-forward activation where layers are local ones: [T, 1, 2 F] -> [T, 1, F]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See engine.ops.swiglu."""
        return swiglu(x)


class RowModel(GPTModel):
    """A GPTModel that takes packed rows (`Row`) and ends in the logits [1, L, V_local] of the positions with a target, or where
    `headless` in their hidden states [1, L, H], whose log-probs take a few rows of logits at a time. Under either every
    tensor-parallel rank gets the whole gradient of the hidden states."""

    def __init__(self, *arguments: Any, headless: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._headless = headless
        self._rotates_in_attention = self.config.transformer_impl == "local"
        if self._rotates_in_attention:
            self.position_embedding_type = "none"  # megatron-core's asks the device for all lengths, in every layer
        if self.post_process and self.config.sequence_parallel:  # the sequence is gathered before, to take positions of it
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = self.config.tensor_model_parallel_size > 1

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, *arguments: Any, packed_seq_params: Row, **options: Any
    ) -> torch.Tensor:
        """See GPTModel."""
        if self._rotates_in_attention:
            dtype = self.config.params_dtype
            packed_seq_params.rotary = rotary_of(self.rotary_pos_emb.inv_freq, position_ids[0], dtype)
        output: torch.Tensor = super().forward(
            input_ids, position_ids, *arguments, packed_seq_params=packed_seq_params, **options
        )
        return output

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, packed_seq_params: Row, **__: Any) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        assert packed_seq_params.target_positions is not None
        hidden_states = hidden_states.index_select(0, packed_seq_params.target_positions)
        if not self._headless:
            tied = self.share_embeddings_and_output_weights
            weight = self.shared_embedding_or_output_weight() if tied else None
            hidden_states, _bias = self.output_layer(hidden_states, weight=weight)
        return hidden_states.transpose(0, 1).contiguous()


def layer_spec(config: TransformerConfig, chunk: int | None) -> TransformerBlockSubmodules:
    """The modules of this rank's layers, by `config.transformer_impl`: megatron's local spec with our RMSNorm and attention,
    or its Transformer Engine spec, whose attention takes packed rows as it is."""
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm), TENorm
    else:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
        norm = RMSNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        layer.submodules.mlp.submodules.activation_func = SwiGLU
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, chunk), layer_norm=norm)


def megatron_config(shape: ModelShape, axes: layout.TrainerLayout, trainer: Trainer, dtype: torch.dtype) -> TransformerConfig:
    """megatron's configuration of a model in this layout, `trainer`'s. ConfigError for a layout that cannot hold it."""
    checks.check_layout(shape, axes)
    if trainer.fp8 != "none":
        _check_fp8(shape, trainer)
    virtual = axes.vpp_size if axes.vpp_size > 1 else None
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_hidden,
        tensor_model_parallel_size=axes.tp_size,
        pipeline_model_parallel_size=axes.pp_size,
        virtual_pipeline_model_parallel_size=virtual,
        num_layers_in_first_pipeline_stage=axes.first_stage_layers,
        num_layers_in_last_pipeline_stage=axes.last_stage_layers,
        sequence_parallel=trainer.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),  # the weights are loaded over it in any case
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=trainer.uses_te,  # SwiGLU compiled into one kernel that keeps its input
        use_te_activation_func=not trainer.uses_te,  # megatron's name for an activation that the layer's spec brings
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=trainer.fuses_accumulation,
        transformer_impl=trainer.layer_spec,
        deterministic_mode=trainer.deterministic and torch.cuda.is_available(),
        fp8=FP8_FORMATS[trainer.fp8],
        fp8_recipe=FP8_RECIPES[trainer.fp8],
        fp8_amax_history_len=AMAX_HISTORY,
        fp8_amax_compute_algo="max",
        fp8_param=trainer.fp8_parameters,
        tp_comm_overlap=trainer.overlap_tensor_parallel,
        persist_layer_norm=False,
        batch_p2p_comm=virtual is None,
        overlap_p2p_comm=virtual is not None,  # two stages need it for virtual chunks
        deallocate_pipeline_outputs=virtual is None or torch.cuda.is_available(),  # overlap on gloo: corrupts sends
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # variable lengths ask for it, dense models too
        calculate_per_token_loss=True,  # DDP sums gradients: the loss carries its own denominator
        recompute_granularity="full" if trainer.recompute else None,
        recompute_method="uniform" if trainer.recompute else None,
        recompute_num_layers=1 if trainer.recompute else None,
        **family_of(shape).megatron_options(shape),
    )
    # megatron-core's own rotation asks the device for all lengths, in every layer. It looks for the kernel where the option is
    # given to it, and a configuration is also made where Transformer Engine is not.
    config.apply_rope_fusion = trainer.uses_te
    return config


def build_chunks(
    shape: ModelShape, config: TransformerConfig, parallel: ParallelState, *, headless: bool = False
) -> list[GPTModel]:
    """This rank's chunks, one per virtual stage, the last ending in vocab-parallel logits of the positions with a target, or in
    their hidden states where `headless`; weights still random.

    Raises ConfigError for a rotary scaling that megatron cannot do.
    """
    _check_scaling(shape)
    chunks = []
    for chunk in range(parallel.vpp_size):
        virtual = chunk if parallel.vpp_size > 1 else None
        chunks.append(
            RowModel(
                headless=headless,
                config=config,
                transformer_layer_spec=layer_spec(config, virtual),
                vocab_size=layout.padded_vocab(shape, layout.TrainerLayout(parallel.tp_size)),
                max_sequence_length=shape.max_positions,
                pre_process=parallel.is_first_stage and chunk == 0,
                post_process=parallel.is_last_stage and chunk == parallel.vpp_size - 1,
                parallel_output=True,
                share_embeddings_and_output_weights=shape.tied,
                position_embedding_type="rope",
                rotary_base=shape.rope_theta,
                rope_scaling=shape.rope_scaling is not None,
                rope_scaling_factor=shape.rope_scaling.factor if shape.rope_scaling else 1.0,
                vp_stage=virtual,
            )
        )
    return chunks


def output_weight(chunk: GPTModel) -> torch.nn.Parameter:
    """The last chunk's output weight [V_local, H]; where it is tied and the embedding is here too, that is it."""
    tied = chunk.share_embeddings_and_output_weights
    weight = chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight
    assert isinstance(weight, torch.nn.Parameter), type(weight)
    return weight


def _check_scaling(shape: ModelShape) -> None:
    scaling = shape.rope_scaling
    if scaling is None:
        return
    found = (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_positions)
    supported = (MEGATRON_LOW_FREQ, MEGATRON_HIGH_FREQ, MEGATRON_ORIGINAL_POSITIONS)
    if found != supported:
        raise ConfigError(
            f"model.path must have rotary low_freq_factor, high_freq_factor and original_max_position_embeddings of "
            f"{supported}, fixed in megatron-core; found {found}: use a Llama 3.1 or 3.2 checkpoint"
        )


def _check_fp8(shape: ModelShape, trainer: Trainer) -> None:
    size, heads = trainer.tensor_parallel, shape.num_heads + 2 * shape.num_kv_heads
    sides = {
        "hidden size": shape.hidden,
        "rows of queries, keys and values on a rank": heads * shape.head_dim // size,
        "attention columns on a rank": shape.num_heads * shape.head_dim // size,
        "feed-forward columns on a rank": shape.ffn_hidden // size,
    }
    for what, side in sides.items():
        if side % FP8_SIDE:
            raise ConfigError(
                f"trainer.fp8 needs the model's {what} to be a multiple of {FP8_SIDE}; found {side} with "
                f"trainer.tensor_parallel = {size}: lower that, or set trainer.fp8 = 'none'"
            )


def named_parameters(chunk: GPTModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """A chunk's parameters by their names in the whole model: local layer numbers made model-wide."""
    offset = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
    for name, parameter in chunk.named_parameters():
        yield LAYER.sub(lambda found: f"layers.{int(found[1]) + offset}.", name), parameter


@torch.no_grad()
def load_all(
    chunks: Sequence[GPTModel], shape: ModelShape, axes: layout.TrainerLayout, checkpoint: HfCheckpoint, parallel: ParallelState
) -> None:
    """`load_weights` of all chunks of this rank, telling how much of what it reads has been read."""
    sizes: dict[str, int] = {}
    for index in range(len(chunks)):
        for part in layout.shard_slices(shape, axes, parallel.tp_rank, parallel.pp_rank, index):
            sizes[part.name] = sizes.get(part.name, 0) + part.rows * part.cols
    smallest = min(sizes, key=lambda name: (sizes[name], name))
    stored_bytes = checkpoint.tensor(smallest).itemsize  # of every one, nearly always
    with activity("weights", total=stored_bytes * sum(sizes.values()), unit=BYTES) as reading:
        for index, chunk in enumerate(chunks):
            load_weights(chunk, index, shape, axes, checkpoint, parallel, reading)


def load_weights(
    chunk: GPTModel,
    index: int,
    shape: ModelShape,
    axes: layout.TrainerLayout,
    checkpoint: HfCheckpoint,
    parallel: ParallelState,
    reading: Doing,
) -> None:
    """Fills this rank's chunk of that index with its slices, padding rows with zeros. What is kept in FP8 is put together in
    the host's memory, where the optimizer then finds what its fp32 weights begin with. CheckpointError names a tensor that is
    missing or of another shape."""
    coordinates = (parallel.tp_rank, parallel.pp_rank, index)
    parameters = dict(named_parameters(chunk))
    found = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    expected = layout.shard_shapes(shape, axes, *coordinates)
    assert found == expected, set(found.items()) ^ set(expected.items())
    kept: dict[str, Any] = {name: parameter for name, parameter in parameters.items() if in_fp8(parameter)}
    initial = {name: parameter.get_high_precision_init_val() for name, parameter in kept.items()}
    read_slices(
        parameters | initial, layout.shard_slices(shape, axes, *coordinates), layout.tensors(shape), checkpoint, reading
    )
    for name, parameter in kept.items():
        fill(parameter, initial[name])


@torch.no_grad()
def read_slices(
    places: Mapping[str, torch.Tensor],
    slices: Iterable[layout.ShardSlice],
    full: Mapping[str, tuple[int, ...]],
    checkpoint: HfCheckpoint,
    reading: Doing,
) -> None:
    """Fills shards by parameter with their slices of a checkpoint's tensors, what no slice covers with zeros. Of each tensor
    only the part that the shards hold is read, once. `full`: the shapes by which the tensors are checked; `reading`
    hears of the bytes read."""
    ordered = sorted(slices, key=lambda part: part.name)
    covered = dict.fromkeys(places, 0)
    for part in ordered:
        covered[part.parameter] += part.rows * part.cols
    for name, place in places.items():
        if covered[name] < place.numel():
            place.zero_()
    for name, group in groupby(ordered, key=lambda part: part.name):  # one is held at a time
        held = list(group)
        top, left = min(p.row for p in held), min(p.col for p in held)
        bottom, right = max(p.row + p.rows for p in held), max(p.col + p.cols for p in held)
        box = checkpoint.part(name, full[name], slice(top, bottom), slice(left, right))
        if not bool(torch.isfinite(box).all()):
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} must hold finite numbers; found others: fetch the model again"
            )
        for p in held:
            into = layout.matrix_slice(places[p.parameter], p.shard_row, p.shard_col, p.rows, p.cols)
            into.copy_(layout.matrix_slice(box, p.row - top, p.col - left, p.rows, p.cols))
        reading.more(box.nbytes)
