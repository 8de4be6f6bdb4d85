"""The size of a KV cache and what it holds: bytes of a token, whole requests, and what 'auto' comes to. A pure function of the
model's sizes, the configuration and the memory of a GPU; it looks at no device and allocates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config.options import RewardModel, size_bytes
from engine.core.errors import ConfigError
from engine.models.base import ModelShape

MIB, GIB = 1 << 20, 1 << 30
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}  # of an element
LEAST_BLOCK, BLOCK = 16, 32  # tokens that vLLM keeps together: at least, and as counted here
CPU_BYTES = GIB  # of 'auto' on CPUs at most: nobody's memory is filled by a default
FREE_SHARE = 0.05  # of a GPU, that 'auto' leaves to what the estimate does not see


@dataclass(frozen=True, slots=True)
class KvCache:
    """The KV cache of each rank of an engine. Its size on a GPU is known where the GPU's is; on a CPU it is known here."""

    token_bytes: int  # of one token on a rank
    request_tokens: int  # prompt and completion at full length
    max_concurrent: int  # requests decoded together
    asked_bytes: int | None  # None: as much as is needed, or is left
    beside_bytes: int  # what the engine's GPU holds beside it while it samples, by the estimate

    @property
    def request_bytes(self) -> int:
        """Of one request at full length, in whole blocks."""
        return _blocks(self.request_tokens) * BLOCK * self.token_bytes

    @property
    def least_bytes(self) -> int:
        """Less than this cannot hold one request, whatever vLLM's blocks are."""
        return -(-self.request_tokens // LEAST_BLOCK) * LEAST_BLOCK * self.token_bytes

    @property
    def needed_bytes(self) -> int:
        """So that no request that may run has to wait for another: vLLM keeps one block to itself."""
        return self.max_concurrent * self.request_bytes + BLOCK * self.token_bytes

    def num_bytes(self, gpu_bytes: int | None) -> int:
        """Its size on a GPU with so much memory, or with None on a CPU: what was asked for, or what is needed and there is.
        'auto' is never less than one request; whether a GPU then has room is for the estimate to say."""
        if self.asked_bytes is not None:
            return self.asked_bytes
        room = CPU_BYTES if gpu_bytes is None else int(gpu_bytes * (1 - FREE_SHARE)) - self.beside_bytes
        one = self.request_bytes + BLOCK * self.token_bytes
        return max(one, min(self.needed_bytes, room))

    def holds(self, num_bytes: int) -> int:
        """Requests at full length that fit into so many bytes together, of those that may run together."""
        blocks = num_bytes // (BLOCK * self.token_bytes) - 1
        whole = blocks // _blocks(self.request_tokens)
        return min(self.max_concurrent, max(whole, int(num_bytes >= self.least_bytes)))

    def told(self, num_bytes: int) -> str:
        """Its size and what it holds, for people."""
        count = self.holds(num_bytes)
        size = f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:,.0f} MiB"
        return f"{size}, holds {count} request{'s' if count != 1 else ''} of {self.request_tokens} tokens at full length"


def require_one_request(section: str, cache: KvCache | None) -> None:
    """ConfigError where the KV cache of a section's engine was given a size that does not hold one request at full length."""
    if cache is None or cache.asked_bytes is None or cache.asked_bytes >= cache.least_bytes:
        return
    option = "max_model_tokens" if section == "inference" else "max_tokens"
    raise ConfigError(
        f"{section}.kv_cache must hold one request of {section}.{option} = {cache.request_tokens} tokens; found "
        f"{cache.asked_bytes / MIB:g} MiB for {cache.least_bytes / MIB:.1f}: raise it to '{-(-cache.least_bytes // MIB)} MiB', "
        f"set 'auto', or lower {section}.{option}"
    )


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


def reward_cache(shape: ModelShape, options: RewardModel) -> KvCache:
    """Of each rank of the reward model's engine. It keeps no conversation from one forward to the next, and one of n >= BLOCK
    tokens takes less than 2n in whole blocks: two forwards' tokens hold whatever runs together, on any device."""
    token_bytes = kv_bytes_per_token(shape, options.tensor_parallel, options.dtype)
    asked = size_bytes(options.kv_cache)
    if asked is None:
        asked = (2 * options.batched_tokens + BLOCK) * token_bytes
    return KvCache(token_bytes, options.max_tokens, -(-options.batched_tokens // options.max_tokens), asked, 0)


def item_bytes(dtype: str) -> int:
    """Bytes of an element of a model.dtype, or of what a KV cache is stored in."""
    return ITEM_BYTES[dtype]


def kv_bytes_per_token(shape: ModelShape, tp_size: int, dtype: str) -> int:
    """Bytes that one token takes in the KV cache of a rank of an engine: keys and values of every layer. Ranks in excess of the
    key-value heads hold one each."""
    itemsize = item_bytes(dtype)
    return 2 * shape.num_layers * max(1, shape.num_kv_heads // tp_size) * shape.head_dim * itemsize
