"""What a model family is, as data: which fields of config.json it has, its tensors, what they are called in a trainer and in an
engine, and how they are cut. A family of your own is a class that extends `Family`; `model.family` names it. It builds no
module and reads no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Section = Literal["first", "layer", "last"]  # before the layers, one of them, after them


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's stretching of the rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Every size that decides the tensors and the arithmetic of a decoder with grouped-query attention."""

    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden: int
    vocab_size: int
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    norm_eps: float
    tied: bool  # the output layer is the embedding
    max_positions: int
    family: str = "llama"  # by name, or a user's own as every process finds it

    @property
    def attention_cost(self) -> float:
        """What a query's look at a key costs (4 operations an element of its heads) next to a token's products with all
        matrices (2 a parameter): of Llama 3.1 8B 1 / 28,600, so that half the work of a sequence of 57,000 tokens is attention.
        """
        width = self.num_heads * self.head_dim
        layer = 2 * self.hidden * (width + self.num_kv_heads * self.head_dim) + 3 * self.hidden * self.ffn_hidden
        return 2 * self.num_layers * width / (self.num_layers * layer + self.vocab_size * self.hidden)


@dataclass(frozen=True, slots=True)
class TensorMapping:
    """One Hugging Face tensor and the parameters that hold it in a trainer and in an engine. `{}` stands for the layer's
    number. Tensors of one parameter are fused in it, in the order of the table."""

    name: str
    rows: Literal["vocabulary", "heads", "kv_heads", "ffn", "hidden", "head_dim"]
    cols: Literal["hidden", "heads", "ffn", "one"]  # "one": a vector, such as a norm's weight or a bias
    cut: Literal["vocabulary", "heads", "rows", "columns", "whole"]  # over tensor-parallel ranks
    section: Section  # the pipeline stage that owns it
    trainer: str  # megatron-core's parameter, local spec
    engine: str  # vLLM's parameter


# Fields of config.json that every family has and that change neither tensors nor arithmetic: names, labels, token ids, what
# generation (of transformers 4, which kept it here) and training from scratch are told, what tools leave behind.
INERT_FIELDS = frozenset(
    [
        "attn_implementation",
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "length_penalty",
        "max_length",
        "min_length",
        "model_max_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "prefix",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "temperature",
        "tf_legacy_loss",
        "top_k",
        "top_p",
        "typical_p",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "dtype",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "label2id",
        "max_sequence_length",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    ]
)
# Fields that every family has and that must have one of these values, or be missing or null.
PLAIN_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0,),  # inert in an engine, and the trainer has none: a file that asks for it is not read over
    "quantization_config": (),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({},),
    "partial_rotary_factor": (1,),
}
ROPE_FIELDS: Mapping[str, frozenset[str]] = {  # by type: what the rotary table may say, besides type and theta
    "default": frozenset(),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}


class Family:
    """The models of one `model_type`: a decoder with RMSNorm, rotary grouped-query attention and SwiGLU, and what sets this
    family apart. A class that is never instantiated."""

    model_type: ClassVar[str]  # of config.json
    title: ClassVar[str]  # for messages: "a plain Llama"
    table: ClassVar[tuple[TensorMapping, ...]]  # every tensor, in the order of export
    transformer_engine_names: ClassVar[Mapping[str, str]]  # of the table's trainer parameters, where that spec has others
    defaults: ClassVar[Mapping[str, Any]]  # what a size is that config.json does not tell, as in transformers
    plain_fields: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # besides PLAIN_FIELDS
    inert_fields: ClassVar[frozenset[str]] = frozenset()  # besides INERT_FIELDS
    rope_types: ClassVar[tuple[str, ...]] = ("default", "llama3")

    @classmethod
    def megatron_options(cls, shape: ModelShape) -> dict[str, Any]:
        """Fields of megatron-core's TransformerConfig besides those that follow from the shape."""
        return {}

    @classmethod
    def embedding(cls) -> str:
        """The Hugging Face name of the embedding."""
        return next(mapping.name for mapping in cls.table if mapping.section == "first" and mapping.cut == "vocabulary")

    @classmethod
    def head(cls) -> str:
        """The Hugging Face name of the output layer, which a tied model does not store."""
        return next(mapping.name for mapping in cls.table if mapping.section == "last" and mapping.cut == "vocabulary")

    @classmethod
    def has_head_norms(cls) -> bool:
        """Whether queries and keys are normalized head by head."""
        return any(mapping.rows == "head_dim" for mapping in cls.table)

    @classmethod
    def local_name(cls, parameter: str) -> str:
        """What a trainer's parameter of a layer, or of the whole model, is called in megatron-core's local spec."""
        for local, fused in cls.transformer_engine_names.items():
            if (tail := fused.rpartition("{}")[2]) and parameter.endswith(tail):
                return parameter.removesuffix(tail) + local.rpartition("{}")[2]
        return parameter
