"""[inference.vllm]: what it may not set, by which name, and what memory is counted by."""

import re

import pytest

from engine.capacity.kv_cache import kv_bytes_per_token
from engine.config.load import dump_config, load_config, override
from engine.config.options import BATCHED_TOKENS
from engine.config.vllm_arguments import CACHE_DTYPES, OPTION_OF, REASONS
from engine.core.errors import ConfigError
from tests.builders import config, spec

FORBIDDEN = (
    "model",
    "dtype",
    "seed",
    "tensor_parallel_size",
    "data_parallel_size",
    "kv_cache_memory_bytes",
    "load_format",
    "quantization",
    "watermark",
    "profiler_config",
)
INEXACT = (
    "quantization_param_path",
    "enable_lora",
    "speculative_config",
    "spec_method",
    "logits_processors",
    "block_size",
    "cpu_offload_gb",
    "calculate_kv_scales",
    "kv_cache_dtype_skip_layers",
    "long_prefill_token_threshold",
    "max_num_partial_prefills",
    "max_num_scheduled_tokens",
    "kv_sharing_fast_prefill",
    "enable_dbo",
    "enable_return_routed_experts",
    "scheduling_policy",
    "mm_processor_kwargs",
    "enable_eplb",
    "mamba_cache_dtype",
    "reasoning_parser_plugin",
    "otlp_traces_endpoint",
)
PASSED = {
    "enforce_eager": True,
    "attention_backend": "FLASH_ATTN",
    "cudagraph_capture_sizes": [1, 8],
    "kv_cache_dtype": "fp8",
    "max_num_batched_tokens": 16384,
    "async_scheduling": False,
    "compilation_config": {"mode": 3, "pass_config": {"fuse_norm_quant": True}},
}


def refused(**table):
    with pytest.raises(ConfigError) as caught:
        override(config(), {"inference.vllm": table})
    return str(caught.value)


def test_what_is_not_the_engines_own_is_passed_on_and_written_as_toml(tmp_path):
    made = override(config(), {"inference.vllm": PASSED})
    assert made.inference.vllm == PASSED
    (tmp_path / "run.toml").write_text(dump_config(made))
    assert load_config(tmp_path / "run.toml") == made
    assert load_config(tmp_path / "run.toml", ["inference.vllm.enforce_eager=false"]).inference.vllm["enforce_eager"] is False


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_another_option_sets_is_refused_with_its_name(name):
    assert re.match(rf"inference\.vllm\.{name} is what \S+ sets; found 1: remove it", refused(**{name: 1}))


@pytest.mark.parametrize("name", INEXACT)
def test_what_breaks_exactness_is_refused_with_why(name):
    assert re.match(
        rf"inference\.vllm\.{name} must stay as the engine sets it: .+; found 'x': remove it", refused(**{name: "x"})
    )


def test_a_secret_is_refused_and_not_printed():
    found = refused(hf_token="hf_1234")
    assert "inference.vllm.hf_token must stay as the engine sets it: a secret would stand" in found
    assert "found a secret: remove it" in found and "hf_1234" not in found


@pytest.mark.parametrize(
    ("table", "inner", "why"),
    [
        ("attention_config", "use_non_causal", "of another distribution"),
        ("compilation_config", "compile_sizes", "how long they took"),
        ("compilation_config", "inductor_compile_config", "how long they took"),
        ("compilation_config", "cache_dir", "it takes what it finds"),
        ("compilation_config.pass_config", "fuse_gemm_comms", "not counted as memory"),
        ("kernel_config", "moe_backend", "a weight sync writes"),
    ],
)
def test_what_breaks_exactness_inside_a_table_is_refused_by_both_names(table, inner, why):
    def inside(name, value):
        for part in reversed(table.split(".")):
            name, value = part, {name: value}
        return {name: value}

    found = refused(**inside(inner, "x"))
    assert re.match(
        rf"inference\.vllm\.{re.escape(table)}\.{inner} must stay as the engine sets it: .*{why}.*; found 'x'", found
    )
    override(config(), {"inference.vllm": inside("other", 1)})


def test_a_table_that_is_refused_is_told_once():
    found = refused(compilation_config={"inductor_compile_config": {"max_autotune": True}})
    assert found.count("must stay as the engine sets it") == 1


def test_no_pattern_takes_what_people_need():
    assert not [name for name in PASSED if name in (*OPTION_OF, *REASONS)]
    override(config(), {"inference.vllm": dict.fromkeys(("async_scheduling", "kv_cache_metrics", "stream_interval"), 1)})


def test_memory_is_counted_by_what_vllm_is_told():
    made = config()
    assert made.inference.batched_tokens == BATCHED_TOKENS and made.inference.stored_dtype is None
    told = override(made, {"inference.vllm": {"max_num_batched_tokens": 20000, "kv_cache_dtype": "fp8_e4m3"}})
    assert told.inference.batched_tokens == 20000
    caches = [spec(one).kv_cache for one in (made, told)]
    assert caches[0] is not None and caches[1] is not None
    assert caches[0].token_bytes == 4 * caches[1].token_bytes == kv_bytes_per_token(spec().shape, 1, "float32")
    assert caches[1].beside_bytes > caches[0].beside_bytes, "a longer forward takes more"


def test_what_memory_cannot_be_counted_by_is_refused():
    assert "must be at least inference.max_model_tokens = 4096" in refused(max_num_batched_tokens=2048)
    found = refused(kv_cache_dtype="nvfp4")
    assert all(dtype in found for dtype in CACHE_DTYPES) and "found 'nvfp4'" in found


def test_values_are_those_of_a_file():
    for table in ({"a b": 1}, {"enforce_eager": object()}):
        with pytest.raises(ConfigError, match=r"inference\.vllm"):
            override(config(), {"inference.vllm": table})


@pytest.mark.parametrize(("option", "whole"), [("top_p", 0.5), ("top_k", 20), ("min_p", 0.1)])
def test_ratios_need_every_token(option, whole):
    for loss in ("grpo", "cispo"):
        with pytest.raises(
            ConfigError, match=rf"sampling\.{option} must be [01] with algorithm\.loss = '{loss}'.*found {whole}"
        ):
            override(config(), {"algorithm.loss": loss, f"sampling.{option}": whole})
    assert getattr(config(sampling={option: whole}).sampling, option) == whole
    assert config(sampling={"stop": ["</answer>", 7]}, algorithm={"loss": "grpo"}).sampling.stop == ("</answer>", 7)
