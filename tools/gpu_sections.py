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
    """One thing to prove. `command` follows the interpreter; in it {json} and {junit} are where its figures go, {kept} is a
    folder that outlives the call, {report} the report so far."""

    name: str
    proves: str
    command: tuple[str, ...]
    seconds: float  # its deadline, if the budget leaves as much
    call: int = 1  # in which call it belongs
    beside: str = ""  # the section before it that it runs beside
    after: str = ""  # a section without whose success it cannot be tried
    files: tuple[str, ...] = ()  # in the repository; without one of these things the section is not run
    modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Call:
    """What one loan of a machine proves: the seconds it takes at most, and which files of an offline stack it brings."""

    proves: str
    seconds: float
    carry: tuple[str, ...] = ()


# An offline machine is lent for fifteen minutes in all, start included, and takes 64 MiB a call beside the checkout
CALLS = {
    1: Call("what is known least: memory shared by processes, engines, whole steps", 470, ("*_stack_*.tar.xz",)),
    2: Call("the whole engine, and its weight sync", 310, ("ray*.tar.xz", "*.whl")),
    3: Call("what the kernels, the layers and FP8 are worth", 330, ("*_stack_*.tar.xz",)),
}
ORDERED = (
    ("CUDA_DEVICE_MAX_CONNECTIONS", "1"),
)  # megatron's tensor parallelism orders its kernels by it; engines do not want it
SLOW_TE_TESTS = "stays_near or both_layer or curve_is or adamw or small_moments or zero"  # about half of their time
CALIBRATION = ("-m", "tools.gpu_calibration", "{report}", "--output", "{kept}/calibration.json", "--json", "{json}")

# What nothing is known of comes first: a budget that ends early loses the end of a call. What is timed runs alone; tests of
# what is right run while an engine compiles on the host.
SECTIONS = (
    Section(
        "extension",
        "our CUDA kernels build",
        ("setup.py", "build_ext", "--inplace"),
        60,
        modules=("torch", "setuptools"),
        programs=("nvcc",),
    ),
    Section(
        "probe",
        "a process maps another's memory on the GPU; what one that spins leaves to another",
        ("-m", "tools.gpu_probe", "--json", "{json}"),
        45,
        modules=TRAINER,
    ),
    Section(
        "colocated",
        "trainer and engine in turn on one GPU",
        (*PYTEST, COLOCATED_TESTS),
        125,
        after="probe",
        files=(COLOCATED_TESTS,),
        modules=("pytest", "tensorboard", *TRAINER, *VLLM),
    ),
    Section(
        "generation",
        "an engine of 8B's shape: start, equal seeds, tokens a second, sleep and wake",
        ("-m", "tools.bench_generation", "--json", "{json}"),
        160,
        modules=(*TRAINER, *VLLM),
    ),
    Section(
        "transformer_engine",
        "the trainer with Transformer Engine's layers computes what it does with megatron's",
        (*PYTEST, TE_TESTS, "-k", f"not ({SLOW_TE_TESTS})"),
        100,
        beside="generation",
        files=(TE_TESTS,),
        modules=("pytest", *TRAINER, *TRANSFORMER_ENGINE),
        environment=ORDERED,
    ),
    Section(
        "transformer_engine_slow",
        "the same: curves, AdamW, small moments",
        (*PYTEST, TE_TESTS, "-k", SLOW_TE_TESTS),
        100,
        beside="generation",
        files=(TE_TESTS,),
        modules=("pytest", *TRAINER, *TRANSFORMER_ENGINE),
        environment=ORDERED,
    ),
    Section(
        "kernel_tests",
        "our kernels are right on a GPU",
        (*PYTEST, "tests/gpu/test_kernels_gpu.py"),
        90,
        beside="generation",
        after="extension",
        modules=("pytest", "transformers"),
    ),
    Section("ceilings", "what this GPU can do at all", ("-m", "tools.bench_ceilings", "--json", "{json}"), 20),
    Section(
        "steps",
        "whole trainer steps on 8B's layers and vocabulary: tokens a second, MFU, memory",
        ("-m", "tools.bench_steps_gpu", "{kept}/model_2800", "--json", "{json}"),
        125,
        modules=(*TRAINER, *TRANSFORMER_ENGINE),
        environment=ORDERED,
    ),
    Section("calibration", "the planner's constants from these figures", CALIBRATION, 20, modules=TRAINER),
    Section(
        "machine",
        "driver, versions, the kernels load",
        ("-m", "engine.cli", "doctor", "--json", "{json}"),
        40,
        call=2,
        modules=("ray", "math_verify", *TRAINER),
    ),
    Section(
        "quickstart",
        "the whole engine with vLLM on one GPU",
        ("tools/quickstart.py", "--single-device", "--json", "{json}"),
        200,
        call=2,
        modules=("ray", "math_verify", "tensorboard", *TRAINER, *VLLM),
    ),
    Section(
        "sync",
        "a weight sync over CUDA IPC against a copy of as many bytes",
        ("-m", "tools.bench_sync_gpu", "--repeats", "3", "--json", "{json}"),
        130,
        call=2,
        after="probe",
        modules=(*TRAINER, *VLLM),
    ),
    Section("calibration_sync", "the planner's constants with the sync's", CALIBRATION, 20, call=2, modules=TRAINER),
    Section(
        "generation_fp8",
        "the same engine with FP8 weights",
        ("-m", "tools.bench_generation", "--quantization", "fp8", "--json", "{json}"),
        160,
        call=3,
        modules=(*TRAINER, *VLLM),
    ),
    Section(
        "kernels",
        "our kernels against eager, compiled and other libraries' ones",
        ("-m", "tools.bench_ops", "--device", "cuda", "--json", "{json}"),
        90,
        call=3,
        after="extension",
        modules=TRAINER,
    ),
    Section(
        "layers",
        "tokens a second and MFU of 8B's layers, every precision; optimizers",
        ("-m", "tools.bench_layers", "--json", "{json}"),
        110,
        call=3,
        modules=TRAINER,
        environment=ORDERED,
    ),
    Section(
        "fp8_curve",
        "FP8 trains as bf16 does",
        ("-m", "tools.fp8_curve", "--json", "{json}"),
        110,
        call=3,
        modules=(*TRAINER, *TRANSFORMER_ENGINE),
        environment=ORDERED,
    ),
)
