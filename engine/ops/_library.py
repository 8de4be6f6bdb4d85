"""Loads the kernels of csrc/ into torch.ops.semion. There is no way around them: a missing library is an error here, and
the plain twins are for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.core.errors import SemionError


def load() -> None:
    """Loads the CPU half, and the CUDA half where torch sees a GPU. SemionError if a library was not built."""
    for half in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        path = Path(__file__).with_name(f"_semion_{half}.so")
        if not path.exists():
            raise SemionError(f"engine/ops/{path.name} must be built from csrc; found none: run tools/environment.sh")
        torch.ops.load_library(path)
