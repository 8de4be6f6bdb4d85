"""Which arguments of vLLM the table [inference.vllm] may not set, and why: those that other options set, and those with which
rollouts, their log-probs or a weight sync would no longer be what the engine promises. Everything else is passed on as it
stands; whether the installed vLLM has it is looked up in engine/inference/arguments.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final

from engine.config.options import BATCHED, CACHED, Options

OPTION_OF: Final = {  # argument, or a pattern of its name -> the option that sets it
    "model": "model.path",
    "model_weights": "model.path",
    "served_model_name": "model.path",
    "tokenizer": "model.path",
    "tokenizer_mode": "model.path",
    "hf_config_path": "model.path",
    "*revision": "model.path",
    "config_format": "model.path",
    "dtype": "model.dtype",
    "override_attention_dtype": "model.dtype",
    "hf_overrides": "model.head",
    "seed": "run.seed",
    "max_model_len": "inference.max_model_tokens",
    "max_num_seqs": "inference.max_concurrent",
    "max_num_active_seqs": "inference.max_concurrent",
    "kv_cache_memory_bytes": "inference.kv_cache",
    "gpu_memory_utilization": "inference.kv_cache",
    "num_gpu_blocks_override": "inference.kv_cache",
    "watermark": "inference.kv_cache",
    "enable_sleep_mode": "inference.placement",
    "enable_cumem_allocator": "inference.placement",
    "enable_nccl_comm_suspend": "inference.placement",
    "tensor_parallel_size": "inference.tensor_parallel",
    "data_parallel_*": "inference.engines",
    "dp_*": "inference.engines",
    "*_for_dp_*": "inference.engines",
    "load_format": "inference.packed_weights",
    "quantization": "inference.quantization",
    "max_logprobs": "sampling.temperature",
    "logprobs_mode": "sampling.temperature",
    "generation_config": "sampling.temperature",
    "override_generation_config": "sampling.temperature",
    "profiler_config": "profile.tool",
}

_WEIGHTS = "a weight sync writes, and verifies, every weight where vLLM's own Llama or Qwen3 keeps it"
_PROCESSES = "an engine is one process of its own, or its tensor-parallel workers on one machine"
_TOKENS = "prompts and answers are tokens, of a language model that samples"
_DRAFT = "a draft has no weight sync, and what is accepted depends on the rest of the batch"
_STALE = "keys and values of earlier weights would outlive a weight sync"
_CUT = "prompts are cut on GPUs and whole on CPUs, whose generators a cut prompt would draw from"
_ROUNDED = "the KV cache's scales would come from the first prompts of an engine, and stay when its weights change"
_LAYERS = "no model family has such layers, and what they hold is not counted as memory"
_OUTPUTS = "an answer is its tokens and their log-probs, and nothing else is kept or counted as memory"
_ORDER = "what decodes together follows from the order of calls alone"
_DISTRIBUTION = "log-probs would be of another distribution than the trainer's"
_HALVES = "a forward is not cut in halves: vLLM's newer model runner, which engines ask for, refuses it"
_TIMED = "kernels would be chosen by how long they took at this start, and another start would round otherwise"
_TOLD = "what a run tells others goes through run.sinks"
_ITSELF = "vLLM writes it down while it starts, and takes no value"
_AMD = "it is of AMD's GPUs, where no engine has run"
REASONS: Final = {  # argument, or a pattern of its name -> why nobody may set it
    "quantization?*": _WEIGHTS,
    "*?quantization": _WEIGHTS,
    "*lora*": _WEIGHTS,
    "*offload*": _WEIGHTS,
    "model_impl": _WEIGHTS,
    "model_class_overrides": _WEIGHTS,
    "model_loader_extra_config": _WEIGHTS,
    "weight_transfer_config": _WEIGHTS,
    "sleep_*": _WEIGHTS,
    "ignore_patterns": _WEIGHTS,
    "*eplb*": _WEIGHTS,
    "enable_ep_*": _WEIGHTS,
    "expert_*": _WEIGHTS,
    "moe_backend": _WEIGHTS,
    "pipeline_parallel_size": _PROCESSES,
    "*context_parallel_size": _PROCESSES,
    "dcp_*": _PROCESSES,
    "cp_*": _PROCESSES,
    "all2all_backend": _PROCESSES,
    "*fault_tolerance*": _PROCESSES,
    "ray_*": _PROCESSES,
    "*expert_parallel": _PROCESSES,
    "*elastic_ep*": _PROCESSES,
    "distributed_executor_backend": _PROCESSES,
    "worker_*cls": _PROCESSES,
    "nnodes": _PROCESSES,
    "node_rank": _PROCESSES,
    "master_*": _PROCESSES,
    "device_ids": _PROCESSES,
    "trust_remote_code": "no code of a model's folder is run",
    "hf_token": "a secret would stand in the run's records; nothing is fetched, for model.path is a folder",
    "skip_tokenizer_init": _TOKENS,
    "runner": _TOKENS,
    "convert": _TOKENS,
    "pooler_config": _TOKENS,
    "enable_prompt_embeds": _TOKENS,
    "io_processor_plugin": _TOKENS,
    "tokens_only": _TOKENS,
    "language_model_only": _TOKENS,
    "*media*": _TOKENS,
    "mm_*": _TOKENS,
    "*_mm_*": _TOKENS,
    "video_*": _TOKENS,
    "reasoning_*": _TOKENS,
    "structured_outputs_config": _DISTRIBUTION,
    "logits_processors": _DISTRIBUTION,
    "disable_sliding_window": _DISTRIBUTION,
    "enable_batch_sharded_sampling": "tokens are drawn from whole rows of logits, on one rank",
    "enable_return_routed_experts": _OUTPUTS,
    "return_sampling_mask": _OUTPUTS,
    "aux_output_config": _OUTPUTS,
    "enable_trace_replay": _OUTPUTS,
    "speculative_config": _DRAFT,
    "spec_*": _DRAFT,
    "*_spec_*": _DRAFT,
    "diffusion_config": _DRAFT,
    "*watermark*": "tokens would not be drawn from the policy alone",
    "kv_transfer_config": _STALE,
    "kv_events_config": _STALE,
    "ec_*": _STALE,
    "calculate_kv_scales": _ROUNDED,
    "kv_cache_dtype_skip_layers": "the KV cache's room is counted as if every layer stored what kv_cache_dtype says",
    "kv_sharing_*": "each layer has keys and values of its own, and vLLM's newer model runner refuses it",
    "enable_shm_tensor_arena": "the room in /dev/shm is counted without it",
    "*mamba*": _LAYERS,
    "*replayssm*": _LAYERS,
    "gdn_*": _LAYERS,
    "kda_*": _LAYERS,
    "swa_*": _LAYERS,
    "engram_*": _LAYERS,
    "sparse_indexer_*": _LAYERS,
    "enable_hc_sp": _LAYERS,
    "block_size": "the KV cache's room is counted in blocks that hold 32 tokens",
    "enable_chunked_prefill": _CUT,
    "long_prefill_*": _CUT,
    "*_partial_prefills": _CUT,
    "max_num_scheduled_tokens": _CUT,
    "max_num_queued_*": "every request that was submitted is answered",
    "enable_dbo": _HALVES,
    "dbo_*": _HALVES,
    "ubatch_size": _HALVES,
    "scheduler_cls": _ORDER,
    "scheduling_policy": f"{_ORDER}: another policy than 'fcfs' orders requests by the clock",
    "additional_config": "it says nothing that the engine can check",
    "disable_log_stats": "nobody reads these figures; semion's own metrics say what engines do",
    "otlp_*": _TOLD,
    "collect_detailed_traces": _TOLD,
    "log_config_file": _TOLD,
    "linear_backend": _TIMED,
}
INSIDE: Final = {  # the same of an argument inside a table that may be set, or inside a table of that one
    "attention_config.use_non_causal": _DISTRIBUTION,
    "attention_config.*mla*": _LAYERS,
    "attention_config.*indexer_*": _LAYERS,
    "attention_config.hisparse_config": _LAYERS,
    "attention_config.minimax_*": _LAYERS,
    "attention_config.use_prefill_query_quantization": _LAYERS,
    "attention_config.tq_*": "no engine has a KV cache in TurboQuant's types",
    "attention_config.use_prefill_decode_attention": _AMD,
    "compilation_config.compile_sizes": _TIMED,
    "compilation_config.compile_ranges_endpoints": f"{_TIMED}, where a range is of one size",
    "compilation_config.inductor_*": _TIMED,
    "compilation_config.backend": "it may name any module, whose code would run and not be on record",
    "compilation_config.cache_dir": "vLLM's own is named by what code is compiled for; from another it takes what it finds",
    "compilation_config.compile_cache_save_format": "engines compile at the same time, which vLLM's own choice allows",
    "compilation_config.splitting_ops": "which operators a CUDA graph cannot hold is known to vLLM's attention alone",
    "compilation_config.*lora": _WEIGHTS,
    "compilation_config.*_moe_*": _LAYERS,
    "compilation_config.*decoder_replay*": _LAYERS,
    "compilation_config.*_mm_*": _TOKENS,
    "compilation_config.encoder_cudagraph_*": _TOKENS,
    "compilation_config.*compilation_time": _ITSELF,
    "compilation_config.*abled_custom_ops": _ITSELF,
    "compilation_config.static_forward_context": _ITSELF,
    "compilation_config.traced_files": _ITSELF,
    "compilation_config.local_cache_dir": _ITSELF,
    "compilation_config.dynamic_shapes_config.assume_32_bit_indexing": (
        "an activation of more than 2^31 elements would be read at wrong places, without an error"
    ),
    "compilation_config.pass_config.*mla*": _LAYERS,
    "compilation_config.pass_config.fuse_gemm_comms": "its buffers are not counted as memory",
    "compilation_config.pass_config.fuse_act_padding": _AMD,
    "compilation_config.pass_config.*rope_kvcache*": _AMD,
    "*ir_op_priority.gelu_and_mul_sparse": _LAYERS,
    "kernel_config.moe_backend": _WEIGHTS,
    "kernel_config.sparse_*": _LAYERS,
    "kernel_config.linear_backend*": _TIMED,
    "kernel_config.enable_rocm_*": _AMD,
    "logging_config.pylogging_config_file": _TOLD,
}
SECRETS: Final = frozenset({"hf_token"})  # whose values are not printed
CACHE_DTYPES: Final = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2")  # whose bytes are known


def broken_vllm_rules(c: Options) -> list[str]:
    """Sentences for arguments of [inference.vllm] that are the engine's own, or that it cannot count memory with."""
    table = c.inference.vllm
    broken = list(_refused(table))
    batched, cached = table.get(BATCHED), table.get(CACHED, "auto")
    if isinstance(batched, int) and batched < c.inference.max_model_tokens:
        broken.append(
            f"inference.vllm.{BATCHED} must be at least inference.max_model_tokens = {c.inference.max_model_tokens}, so that a "
            f"prompt fits into one forward; found {batched}: raise it, or lower max_model_tokens"
        )
    if cached not in CACHE_DTYPES:
        broken.append(
            f"inference.vllm.{CACHED} must be one of {', '.join(CACHE_DTYPES)}, whose bytes the KV cache is counted in; found "
            f"{cached!r}: choose one"
        )
    return broken


def option_of(name: str) -> str | None:
    """The option that sets an argument in place of the table; None where none does."""
    return None if "." in name else _found(name, OPTION_OF)


def reason_against(name: str) -> str | None:
    """Why nobody may set an argument, one inside tables by their names too (`table.argument`); None where anybody may."""
    return _found(name, INSIDE if "." in name else REASONS)


def _refused(table: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Sentences for arguments of a table, and for those of tables in it unless a table is refused as a whole."""
    for name, value in ((f"{place}{name}", value) for name, value in table.items()):
        found = "a secret" if name in SECRETS else repr(value)
        if option := option_of(name):
            yield f"inference.vllm.{name} is what {option} sets; found {found}: remove it, and set {option} instead"
        elif why := reason_against(name):
            yield f"inference.vllm.{name} must stay as the engine sets it: {why}; found {found}: remove it"
        elif isinstance(value, Mapping):
            yield from _refused(value, f"{name}.")


def _found(name: str, table: dict[str, str]) -> str | None:
    return next((text for pattern, text in table.items() if fnmatchcase(name, pattern)), None)
