"""What the process of an engine is given before vLLM is imported there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from engine.config.load import RunConfig

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
LONGEST_FOLDER = 64  # characters: vLLM makes sockets there, whose whole path may have 107


def prepare_process(config: RunConfig) -> None:
    """What an engine's process needs before vLLM is imported there: its environment, and a folder for temporary files."""
    os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(config.inference.threads))
    folder = os.environ.get(ENGINES_FOLDER, "")
    if 0 < len(folder) <= LONGEST_FOLDER:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.tempdir = os.environ["TMPDIR"] = folder  # here, and in the workers that vLLM starts
