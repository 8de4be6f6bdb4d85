"""What options of [trainer] and [optimizer] may not be combined, with each other and with other tables: the layout, the layers
and number formats of the libraries, the optimizer, and the output layer. Each broken rule is a sentence with keys, rule, values
found and fix.
"""

from __future__ import annotations

from engine.config.options import Options


def broken_layout_rules(c: Options) -> list[str]:
    """Sentences for a trainer that is cut, or packs its rows, as it cannot."""
    broken = list[str]()
    if c.trainer.sequence_parallel and c.trainer.tensor_parallel == 1:
        broken.append("trainer.sequence_parallel needs trainer.tensor_parallel > 1; found 1: set it to false")
    if c.trainer.virtual_pipeline > 1 and c.trainer.pipeline_parallel == 1:
        broken.append(
            f"trainer.virtual_pipeline needs trainer.pipeline_parallel > 1; found {c.trainer.virtual_pipeline} "
            f"with 1 stage: set it to 1"
        )
    if c.trainer.share_prompts is True and c.trainer.uses_te:
        broken.append(
            f"trainer.share_prompts needs trainer.layers = 'local', for Transformer Engine's attention cannot go on from a "
            f"segment that others share; found true with {c.trainer.layers!r}: set it to 'auto' or false, or use local layers"
        )
    ends = (c.trainer.first_stage_layers, c.trainer.last_stage_layers)
    if ends != (None, None) and c.trainer.pipeline_parallel == 1:
        broken.append(
            f"trainer.first_stage_layers and trainer.last_stage_layers need trainer.pipeline_parallel > 1; found {ends[0]} "
            f"and {ends[1]} with 1 stage: remove them"
        )
    return broken


def broken_library_rules(c: Options) -> list[str]:
    """Sentences for what Transformer Engine's layers, FP8, overlap and gradients need of each other."""
    t, o, broken = c.trainer, c.optimizer, []
    if t.uses_te and c.model.dtype != "bfloat16":
        broken.append(
            f"trainer.layers = 'transformer_engine' needs model.dtype = 'bfloat16', which its fused attention computes in; "
            f"found {c.model.dtype!r}: set model.dtype = 'bfloat16'"
        )
    if t.fp8 != "none" and not c.may_use_te:
        broken.append(
            f"trainer.fp8 needs trainer.layers = 'transformer_engine'; found {t.fp8!r} with {t.layers!r}: set trainer.layers, "
            f"or fp8 = 'none'"
        )
    if t.fp8_parameters and (t.fp8 not in ("current", "blockwise") or not t.distributed_optimizer or o.offload_share):
        broken.append(
            f"trainer.fp8_parameters needs trainer.fp8 = 'current' or 'blockwise', trainer.distributed_optimizer and "
            f"optimizer.offload_share = 0; found {t.fp8!r}, {t.distributed_optimizer} and {o.offload_share}: set all three, or "
            f"fp8_parameters = false"
        )
    if t.overlap_tensor_parallel and (not c.may_use_te or not t.sequence_parallel):
        broken.append(
            f"trainer.overlap_tensor_parallel needs trainer.layers = 'transformer_engine' and trainer.sequence_parallel; found "
            f"{t.layers!r} and {t.sequence_parallel}: set both, or overlap_tensor_parallel = false"
        )
    if t.gradient_dtype == "bfloat16" and (c.model.dtype != "bfloat16" or t.fp8_parameters or o.moment_dtype != "float32"):
        broken.append(
            f"trainer.gradient_dtype = 'bfloat16' needs model.dtype = 'bfloat16', trainer.fp8_parameters = false and "
            f"optimizer.moment_dtype = 'float32'; found {c.model.dtype!r}, {t.fp8_parameters} and {o.moment_dtype!r}: set all "
            f"three, or gradient_dtype = 'float32'"
        )
    if t.gradient_dtype == "bfloat16" and o.offload_share:
        broken.append(
            f"trainer.gradient_dtype = 'bfloat16' needs optimizer.offload_share = 0, for the host's AdamW reads gradients in "
            f"float32; found {o.offload_share}: set one of them otherwise"
        )
    if t.overlap_gradients and (t.data_parallel == 1 or t.virtual_pipeline > 1):
        broken.append(
            f"trainer.overlap_gradients needs trainer.data_parallel > 1, whose ranks sum gradients, and "
            f"trainer.virtual_pipeline = 1; found {t.data_parallel} and {t.virtual_pipeline}: set overlap_gradients = false"
        )
    if t.reference_memory == "host" and t.fp8_parameters:
        broken.append(
            "trainer.reference_memory = 'host' needs trainer.fp8_parameters = false, whose copies have a form of their own; "
            "found true: set one of them otherwise"
        )
    if t.reference_memory == "host" and c.sync.reference == "never" == c.sync.sync_interval:
        broken.append(
            "trainer.reference_memory = 'host' needs sync.sync_interval or sync.reference other than 'never': an offline run "
            "may send its reference to the engines as the seed model; found both 'never': set reference_memory = 'device'"
        )
    if t.overlap_tensor_parallel and t.fp8 == "blockwise":
        broken.append(
            "trainer.overlap_tensor_parallel has no buffers for trainer.fp8 = 'blockwise'; found both: set trainer.fp8 = "
            "'current' or 'delayed'"
        )
    if t.overlap_tensor_parallel and t.microbatch_tokens % t.row_block:
        broken.append(
            f"trainer.microbatch_tokens must be a multiple of {t.row_block}, since trainer.overlap_tensor_parallel makes every "
            f"row as long; found {t.microbatch_tokens}: use {-(-t.microbatch_tokens // t.row_block) * t.row_block}"
        )
    return broken


def broken_optimizer_rules(c: Options) -> list[str]:
    """Sentences for what the optimizer's types and the place of its state need."""
    t, o, broken = c.trainer, c.optimizer, list[str]()
    te = o.implementation == "te" and t.distributed_optimizer and c.model.dtype == "bfloat16"
    if o.moment_dtype != "float32" and not te:
        broken.append(
            f"optimizer.moment_dtype needs optimizer.implementation = 'te', trainer.distributed_optimizer and model.dtype = "
            f"'bfloat16'; found {o.moment_dtype!r} with {o.implementation!r}, {t.distributed_optimizer} and {c.model.dtype!r}: "
            f"set all three, or moment_dtype = 'float32'"
        )
    if o.offload_share and not (t.distributed_optimizer and c.model.dtype == "bfloat16"):
        broken.append(
            f"optimizer.offload_share needs trainer.distributed_optimizer and model.dtype = 'bfloat16', megatron-core cuts no "
            f"other weights; found {o.offload_share} with {t.distributed_optimizer} and {c.model.dtype!r}: set both, or "
            f"offload_share = 0"
        )
    if o.memory_while_sampling == "host" and c.inference.placement != "colocated":
        broken.append(
            f"optimizer.memory_while_sampling = 'host' makes room for engines on the trainer's devices, so it needs "
            f"inference.placement = 'colocated'; found {c.inference.placement!r}: set memory_while_sampling = 'device'"
        )
    if o.memory_while_sampling == "host" and o.offload_share:
        broken.append(
            f"optimizer.memory_while_sampling = 'host' needs optimizer.offload_share = 0, whose state is on the host at any "
            f"time; found {o.offload_share}: set one of them otherwise"
        )
    if o.offload_share and o.moment_dtype != "float32":
        broken.append(
            f"optimizer.offload_share needs optimizer.moment_dtype = 'float32', the host's AdamW knows no other; found "
            f"{o.offload_share} with {o.moment_dtype!r}: set moment_dtype to 'float32'"
        )
    return broken


def broken_head_rules(c: Options) -> list[str]:
    """Sentences for an output layer in float32 that trainer or engines cannot have."""
    if c.model.head == "model" or c.model.dtype == "float32":
        return []
    broken = []
    if not c.trainer.fused_lm_head:
        broken.append(
            "model.head = 'float32' needs trainer.fused_lm_head, which makes float32 logits a few rows at a time; found false: "
            "set trainer.fused_lm_head = true"
        )
    if c.inference.packed_weights:
        broken.append(
            "model.head = 'float32' needs inference.packed_weights = false, for vLLM widens the output layer's plain weight; "
            "found true: set it to false"
        )
    return broken
