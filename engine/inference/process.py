"""What the process of an engine is given before vLLM is imported there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from engine.config.load import RunConfig
from engine.inference.nvcc import SWITCHED_OFF

OURS = "SEMION_ENGINE"  # set in the processes of an engine of ours
ENGINES_FOLDER = "SEMION_ENGINES_FOLDER"  # names the folder of engines' temporary files, where the command removes it
ENVIRONMENT = {
    OURS: "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core runs in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
# On GPUs, unless the environment says 0: else vLLM chooses by what is installed.
MODEL_RUNNER = ("VLLM_USE_V2_MODEL_RUNNER", "1")
LONGEST_FOLDER = 64  # characters: vLLM makes sockets there, whose whole path may have 107


def prepare_process(config: RunConfig) -> None:
    """What an engine's process needs before vLLM is imported there, the policy's or the reward model's: its environment, and a
    folder for temporary files. What vLLM would compile for itself is off where the environment says nothing of it."""
    os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(config.inference.threads))
    for name, value in SWITCHED_OFF.items():
        os.environ.setdefault(name, value)
    folder = os.environ.get(ENGINES_FOLDER, "")
    if 0 < len(folder) <= LONGEST_FOLDER:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.tempdir = os.environ["TMPDIR"] = folder  # here, and in the workers that vLLM starts
