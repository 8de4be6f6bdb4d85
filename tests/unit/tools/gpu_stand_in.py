"""A pytest plugin that runs tests/gpu/test_kernels_gpu.py where there is no GPU: "cuda" means the CPU, whose kernels the
operators then are, and what takes gigabytes is made small. It shows that the file has no mistake of its own, and nothing of
what kernels compute on a GPU.

    python -m pytest -p tests.unit.tools.gpu_stand_in tests/gpu/test_kernels_gpu.py
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

SMALL: dict[str, Any] = {
    "GIGABYTE": (40, 1_256),
    "BEYOND": (67, 1_256),
    "HEAD": (96, 64, 1_256),
    "ROWS": 900,
    "DIGESTED": 1 << 12,
}
WIDE = 128_256  # columns of a parameter that would take minutes
ONLY_ON_A_GPU = {
    "test_lm_head_never_waits_and_refuses_wrong_coefficients_by_nan": "a CPU says at once what a GPU makes NaN",
    "test_on_another_stream_and_in_a_graph": "a graph replays launches",
    "test_on_the_tensors_device_whichever_is_current": "it wants two GPUs",
    "test_mistakes_are_named": "two devices are told apart",
}


def pytest_configure() -> None:
    """Before any test is imported: its marks ask whether there is a GPU."""
    import engine.ops  # the CPU half alone: with a GPU it would load the other too
    from engine.megatron import cpu_device

    assert engine.ops.__doc__
    cpu_device.install()
    nothing = {"memory_allocated": 0, "max_memory_allocated": 0, "reset_peak_memory_stats": None, "device_count": 1}
    for name, value in nothing.items():
        assert callable(getattr(torch.cuda, name))
        setattr(torch.cuda, name, lambda *_, found=value: found)
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.get_device_properties = lambda *_: SimpleNamespace(name="stand-in", total_memory=139 << 30, multi_processor_count=132)
    cuda.stream = nullcontext


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Shrinks what is large, and skips what only a GPU has."""
    for item in items:
        for name, value in SMALL.items():
            assert hasattr(item.module, name)
            setattr(item.module, name, value)
        why = ONLY_ON_A_GPU.get(item.function.__name__)
        if why is None and WIDE in getattr(getattr(item, "callspec", None), "params", {}).values():
            why = "of that width it takes minutes on a CPU"
        if why is not None:
            item.add_marker(pytest.mark.skip(reason=why))
    assert not items or ONLY_ON_A_GPU.keys() <= {item.function.__name__ for item in items}, "named here and not there"
