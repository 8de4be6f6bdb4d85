"""Which arguments of vLLM the table [inference.vllm] may not set, and why: those that other options set, and those with which
rollouts, their log-probs or a weight sync would no longer be what the engine promises. Everything else is passed on as it
stands; whether the installed vLLM has it is looked up in engine/inference/arguments.py.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Final

from engine.config.options import BATCHED, CACHED, Options

OPTION_OF: Final = {  # argument, or a pattern of its name -> the option that sets it
    "model": "model.path",
    "model_weights": "model.path",
    "served_model_name": "model.path",
    "tokenizer": "model.path",
    "tokenizer_mode": "model.path",
    "hf_config_path": "model.path",
    "*revision": "model.path",
    "dtype": "model.dtype",
    "hf_overrides": "model.head",
    "seed": "run.seed",
    "max_model_len": "inference.max_model_tokens",
    "max_num_seqs": "inference.max_concurrent",
    "kv_cache_memory_bytes": "inference.kv_cache",
    "gpu_memory_utilization": "inference.kv_cache",
    "num_gpu_blocks_override": "inference.kv_cache",
    "enable_sleep_mode": "inference.placement",
    "tensor_parallel_size": "inference.tensor_parallel",
    "data_parallel_*": "inference.engines",
    "load_format": "inference.packed_weights",
    "quantization": "inference.quantization",
    "max_logprobs": "sampling.temperature",
    "logprobs_mode": "sampling.temperature",
    "generation_config": "sampling.temperature",
    "override_generation_config": "sampling.temperature",
}

_WEIGHTS = "a weight sync writes, and verifies, every weight where vLLM's own Llama or Qwen3 keeps it"
_PROCESSES = "an engine is one process of its own, or its tensor-parallel workers on one machine"
_TOKENS = "prompts and answers are tokens, of a language model that samples"
_DRAFT = "a draft has no weight sync, and what is accepted depends on the rest of the batch"
_STALE = "keys and values of earlier weights would outlive a weight sync"
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
    "pipeline_parallel_size": _PROCESSES,
    "*context_parallel_size": _PROCESSES,
    "*expert_parallel": _PROCESSES,
    "*elastic_ep*": _PROCESSES,
    "distributed_executor_backend": _PROCESSES,
    "worker_*cls": _PROCESSES,
    "nnodes": _PROCESSES,
    "node_rank": _PROCESSES,
    "master_*": _PROCESSES,
    "device_ids": _PROCESSES,
    "trust_remote_code": "no code of a model's folder is run",
    "skip_tokenizer_init": _TOKENS,
    "runner": _TOKENS,
    "convert": _TOKENS,
    "pooler_config": _TOKENS,
    "enable_prompt_embeds": _TOKENS,
    "io_processor_plugin": _TOKENS,
    "logits_processors": "log-probs would be of another distribution than the trainer's",
    "speculative_config": _DRAFT,
    "spec_*": _DRAFT,
    "diffusion_config": _DRAFT,
    "*watermark*": "tokens would not be drawn from the policy alone",
    "kv_transfer_config": _STALE,
    "kv_events_config": _STALE,
    "ec_*": _STALE,
    "block_size": "the KV cache's room is counted in blocks that hold 32 tokens",
    "enable_chunked_prefill": "prompts are cut on GPUs and whole on CPUs, whose generators a cut prompt would draw from",
    "scheduler_cls": "what decodes together follows from the order of calls alone",
    "additional_config": "it says nothing that the engine can check",
    "disable_log_stats": "nobody reads these figures; semion's own metrics say what engines do",
}
CACHE_DTYPES: Final = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2")  # whose bytes are known


def broken_vllm_rules(c: Options) -> list[str]:
    """Sentences for arguments of [inference.vllm] that are the engine's own, or that it cannot count memory with."""
    table, broken = c.inference.vllm, list[str]()
    for name, value in table.items():
        if option := _found(name, OPTION_OF):
            broken.append(f"inference.vllm.{name} is what {option} sets; found {value!r}: remove it, and set {option} instead")
        elif why := _found(name, REASONS):
            broken.append(f"inference.vllm.{name} must stay as the engine sets it: {why}; found {value!r}: remove it")
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


def _found(name: str, table: dict[str, str]) -> str | None:
    return next((text for pattern, text in table.items() if fnmatchcase(name, pattern)), None)
