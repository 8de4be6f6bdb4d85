"""What to try where an engine does not start, by the words of what vLLM said: for the policy's engines and the reward model's,
which differ in what can be set. It looks at nothing and starts nothing."""

from __future__ import annotations

from engine.config.load import RunConfig
from engine.inference.nvcc import SWITCHED_OFF
from engine.inference.process import MODEL_RUNNER

MEMORY = ("memory", "kv cache")
NVCC = ("flashinfer", "nvcc", "deep_gemm", "deepgemm", "ninja", "cuda_home")
ATTENTION = ("attention", "flashinfer", "nvcc", "kernel image", "backend")
COMPILATION = ("compil", "inductor", "dynamo", "triton", "graph", "captur")

_SWITCHES = " and ".join(f"{name}={value}" for name, value in SWITCHED_OFF.items())
TOOLKIT = f"leave {_SWITCHES} as engines have them, or put nvcc of CUDA 13 in PATH (what vLLM compiles of its own)"
RUNNER = f"set {MODEL_RUNNER[0]}=0 in the environment (vLLM's older model runner)"


def policy_advice(why: str, config: RunConfig, *, on_gpu: bool) -> str:
    """To add to why an engine of the policy did not start: the likely causes' fixes first, then what else may help."""
    eager = "set inference.vllm.enforce_eager = true (no compilation and no CUDA graphs)"
    attention = "set inference.vllm.attention_backend = 'FLASH_ATTN' or 'TRITON_ATTN'"
    causes = {
        "lower inference.kv_cache or inference.max_concurrent": MEMORY,
        attention: ATTENTION,
        TOOLKIT: NVCC,
        eager: COMPILATION,
    }
    given = ["remove what [inference.vllm] sets"] if config.inference.vllm else []
    return _told(why, given, causes, [eager, attention, RUNNER], on_gpu=on_gpu)


def reward_advice(why: str, config: RunConfig, *, on_gpu: bool) -> str:
    """To add to why the reward model's engine did not start; it takes no arguments of vLLM's."""
    room = "lower reward_model.kv_cache or reward_model.max_tokens"
    causes = {room if config.reward_model.tensor_parallel > 1 else f"{room}, or raise reward_model.tensor_parallel": MEMORY}
    return _told(why, [], causes | {TOOLKIT: (*NVCC, *ATTENTION)}, [RUNNER], on_gpu=on_gpu)


def _told(why: str, first: list[str], causes: dict[str, tuple[str, ...]], always: list[str], *, on_gpu: bool) -> str:
    """On a CPU only what concerns memory is worth trying."""
    lower = why.lower()
    likely = [fix for fix, words in causes.items() if any(word in lower for word in words)]
    possible = [*likely, *always] if on_gpu else [fix for fix in likely if causes[fix] is MEMORY]
    fixes = list(dict.fromkeys([*first, *possible]))
    return f"; try, in this order: {', or '.join(fixes)}" if fixes else ""
