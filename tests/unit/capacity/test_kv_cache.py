"""What a KV cache holds and what 'auto' comes to, by hand and as properties."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.bridge.exchange import STAGED
from engine.capacity.kv_cache import BLOCK, CPU_BYTES, GIB, MIB, KvCache, require_one_request, reward_cache
from engine.capacity.memory import H200_BYTES, STAGING_BUCKETS, Channel, estimate
from engine.capacity.transfer import Machine, plan_run, verdict
from engine.config.load import load_config
from engine.config.options import size_bytes
from engine.core.errors import ConfigError
from engine.models.config_file import read_shape
from engine.run.spec import Spec
from tests.builders import config, spec

ROOT = Path(__file__).parents[3]
LLAMA_8B = read_shape(ROOT / "configs" / "models" / "llama-3.1-8b")


def of_8b(name: str, *overrides: str) -> Spec:
    path = ROOT / "configs" / "scale" / f"llama-3.1-{name}.toml"
    return spec(load_config(path, ["inference.kv_cache=auto", *overrides]), LLAMA_8B)


def cache_of(name: str, *overrides: str) -> KvCache:
    found = of_8b(name, *overrides).kv_cache
    assert found is not None
    return found


def test_a_request_of_8b_by_hand():
    """128 KiB a token: 384 MiB a request of 3072 tokens, 256 of them and one block that vLLM keeps to itself."""
    cache = cache_of("8b-4x4")
    assert (cache.token_bytes, cache.request_bytes) == (128 << 10, 384 * MIB)
    assert cache.needed_bytes == 256 * 384 * MIB + BLOCK * (128 << 10)
    assert cache.num_bytes(H200_BYTES) == cache.needed_bytes, "an engine with a GPU of its own has room for all"
    assert cache.holds(cache.needed_bytes) == 256
    assert cache.holds(GIB) == 2, "what the old fixed size of 1 GiB held"
    assert cache.told(GIB) == "1.0 GiB, holds 2 requests of 3072 tokens at full length"


def test_a_smaller_gpu_has_what_is_left():
    """Beside it an engine holds weights, a forward, a sampler and the constants; 5 % of the GPU stay free."""
    resolved = of_8b("8b-4x4")
    cache, gpu = resolved.kv_cache, 79 * GIB
    assert cache is not None
    assert cache.num_bytes(gpu) == int(gpu * 0.95) - cache.beside_bytes
    assert 0 < cache.holds(cache.num_bytes(gpu)) < 256
    engine = estimate(resolved, Channel(128 * MIB, 128 * MIB), gpu).devices[1]
    assert engine.num_bytes == int(gpu * 0.95), "all that the estimate counts is counted"


def test_colocated_the_trainer_is_beside_it():
    resolved = of_8b("8b-colocated")
    assert resolved.kv_cache is not None
    apart = cache_of("8b-colocated", "inference.placement=disaggregated")
    sampling = estimate(resolved, Channel(128 * MIB, 128 * MIB)).devices[1]
    assert resolved.kv_cache.beside_bytes > apart.beside_bytes + 45 * GIB, "all that it keeps but its gradients"
    assert sampling.num_bytes <= int(H200_BYTES * 0.95)
    alone = spec(resolved.config, LLAMA_8B, parts=("engines",)).kv_cache
    assert alone is not None and alone.beside_bytes < apart.beside_bytes, "an evaluation has no trainer, and stages nothing"


def test_a_cpu_takes_what_tiny_models_need_and_never_more_than_a_gibibyte():
    tiny = spec(config(inference={"max_model_tokens": 128}, data={"train": "unused", "max_prompt_tokens": 64})).kv_cache
    large = cache_of("8b-4x4", "model.dtype=float32", "trainer.layers=local")
    assert tiny is not None
    assert tiny.num_bytes(None) == tiny.needed_bytes < 64 * MIB
    assert large.num_bytes(None) == CPU_BYTES


@given(
    token=st.integers(1, 1 << 20),
    length=st.integers(1, 200_000),
    concurrent=st.integers(1, 1000),
    beside=st.integers(0, 1 << 38),
    gpu=st.integers(1 << 30, 1 << 38) | st.none(),
)
def test_auto_holds_at_least_one_request_and_never_more_than_may_run(token, length, concurrent, beside, gpu):
    cache = KvCache(token, length, concurrent, None, beside)
    size = cache.num_bytes(gpu)
    assert cache.least_bytes <= size <= cache.needed_bytes
    assert 1 <= cache.holds(size) <= concurrent
    assert cache.holds(cache.needed_bytes) == concurrent
    require_one_request("inference", cache)


def test_equal_configurations_resolve_equally():
    assert of_8b("8b-colocated").kv_cache == of_8b("8b-colocated").kv_cache


def test_a_plan_refuses_less_than_one_request_and_tells_what_is_held():
    with pytest.raises(ConfigError, match=r"kv_cache must hold one request of .* 3072 tokens; found 64"):
        plan_run(of_8b("8b-4x4", "inference.kv_cache=64 MiB"), Machine())
    told = verdict(plan_run(of_8b("8b-4x4"), Machine())["memory"])
    assert "each engine's KV cache: 96.0 GiB, holds 256 requests of 3072 tokens at full length, of 256 that may run" in told


def test_the_reward_models_cache_holds_what_it_judges_at_a_time():
    """Two forwards' tokens: conversations of at least a block take less than twice their tokens."""
    judged = config(reward_model={"path": "rm", "dtype": "bfloat16"}, data={"train": "unused", "reward": "model"})
    cache = reward_cache(LLAMA_8B, judged.reward_model)
    assert cache.num_bytes(None) == cache.num_bytes(H200_BYTES) == (2 * 8192 + BLOCK) * (128 << 10)


def test_sizes_are_written_with_their_unit():
    assert [size_bytes(text) for text in ("24 GiB", "24GiB", "512 MiB", "0.5 GiB", "auto")] == [
        *(24 * GIB, 24 * GIB, 512 * MIB, 512 * MIB, None)
    ]
    for wrong in (1024, "1024", "1 GB", "0 MiB", "much", True):
        with pytest.raises(ValueError, match=r"inference\.kv_cache must be 'auto' or a size with its unit"):
            config(inference={"kv_cache": wrong})


def test_as_many_buckets_are_staged_as_the_bridge_has():
    assert STAGING_BUCKETS == STAGED
