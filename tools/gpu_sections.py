"""What tools/gpu_check proves: its sections, in order, with what each runs and needs. It runs nothing, and needs the standard
library alone.
"""

from __future__ import annotations

from dataclasses import dataclass

TE_TESTS, COLOCATED_TESTS = "tests/parallel/test_transformer_engine.py", "tests/gpu/test_colocated_gpu.py"
TRAINER = ("megatron.core", "pydantic", "transformers", "rich", "psutil")
TRANSFORMER_ENGINE = ("transformer_engine", "onnxscript", "onnx_ir", "onnx", "ml_dtypes", "einops")
VLLM = ("vllm", "aiohttp", "cloudpickle", "msgpack", "PIL", "prometheus_client", "cpuinfo", "sentencepiece", "tiktoken")
PYTEST = ("-m", "pytest", "-v", "-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider", "--junitxml={junit}")


@dataclass(frozen=True)
class Section:
    """One thing to prove. `command` follows the interpreter; {json} and {junit} are where its figures go."""

    name: str
    proves: str
    command: tuple[str, ...]
    seconds: float  # its deadline, if the budget leaves as much
    files: tuple[str, ...] = ()  # in the repository; without one of these things the section is not run
    modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()


# Cheap and valuable first: a budget that ends early loses the end of this list.
SECTIONS = (
    Section("extension", "our CUDA kernels build", ("setup.py", "build_ext", "--inplace"), 60, programs=("nvcc",)),
    Section(
        "machine",
        "driver, versions, the kernels load",
        ("-m", "engine.cli", "doctor", "--json", "{json}"),
        40,
        modules=("pydantic", "rich"),
    ),
    Section(
        "kernel_tests",
        "our kernels are right on a GPU",
        (*PYTEST, "tests/gpu/test_kernels_gpu.py"),
        90,
        modules=("pytest", "transformers"),
    ),
    Section(
        "transformer_engine",
        "the trainer with Transformer Engine's layers computes what it does with megatron's",
        (*PYTEST, TE_TESTS),
        160,
        files=(TE_TESTS,),
        modules=("pytest", *TRAINER, *TRANSFORMER_ENGINE),
    ),
    Section("ceilings", "what this GPU can do at all", ("-m", "tools.bench_ceilings", "--json", "{json}"), 30),
    Section(
        "kernels",
        "our kernels against eager and megatron",
        ("-m", "tools.bench_ops", "--device", "cuda", "--json", "{json}"),
        60,
        modules=TRAINER,
    ),
    Section(
        "layers",
        "tokens a second and MFU of 8B's layers, every precision; optimizers",
        ("-m", "tools.bench_layers", "--json", "{json}"),
        110,
        modules=TRAINER,
    ),
    Section(
        "fp8_curve",
        "FP8 trains as bf16 does",
        ("-m", "tools.fp8_curve", "--json", "{json}"),
        110,
        modules=(*TRAINER, *TRANSFORMER_ENGINE),
    ),
    Section(
        "sync",
        "a weight sync over CUDA IPC against a copy of as many bytes",
        ("-m", "tools.bench_sync_gpu", "--json", "{json}"),
        200,
        modules=(*TRAINER, *VLLM),
    ),
    Section(
        "colocated",
        "trainer and engine in turn on one GPU",
        (*PYTEST, COLOCATED_TESTS),
        150,
        files=(COLOCATED_TESTS,),
        modules=("pytest", "tensorboard", *TRAINER, *VLLM),
    ),
    Section(
        "quickstart",
        "the whole engine with vLLM on one GPU",
        ("tools/quickstart.py", "--single-device", "--json", "{json}"),
        300,
        modules=("ray", "math_verify", "tensorboard", *TRAINER, *VLLM),
    ),
)
