"""Packaging of the distribution `semion`: the package `engine`, the command `semion`, and vLLM's plugin entry point.
It lists no requirements: the versions that belong together are pinned in requirements/ and nowhere else.
"""

from setuptools import Extension, find_packages, setup

# The kernels of csrc/ come here: the CPU half always, the CUDA half where nvcc is present.
EXTENSIONS: list[Extension] = []

setup(
    name="semion",
    version="0.1.0",
    description="RL post-training for Llama: one number moves a run from offline to semi-online to online",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["engine", "engine.*"]),
    ext_modules=EXTENSIONS,
    entry_points={
        "console_scripts": ["semion = engine.cli:main"],
        "vllm.general_plugins": ["semion = engine.bridge.receive:register"],
    },
)
