"""Imports megatron-core without what a trainer process would only load and never use. It changes neither arithmetic nor what a
machine with a GPU runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

UNUSED = ("wandb",)  # imported by megatron-core wherever it is installed; a trainer's figures go through our own sinks


def import_trainer() -> None:
    """Imports this room, and with it megatron-core, for the first time in a process."""
    with lean():
        import_module("engine.megatron.policy")


@contextmanager
def lean() -> Iterator[None]:
    """While entered, modules of UNUSED count as not installed; and where torch is a build without CUDA, torch.compile gives a
    function back as it is. megatron-core applies it to functions at import, of which a trainer on CPUs calls none; the first
    call of torch.compile alone loads a thousand modules of the compiler, some four seconds of a core."""
    import torch

    compiler: Any = torch
    modules: Any = sys.modules
    compile_ = compiler.compile
    if torch.version.cuda is None:
        compiler.compile = _uncompiled
    absent = [name for name in UNUSED if name not in modules]
    modules.update(dict.fromkeys(absent))  # None: an import raises ModuleNotFoundError
    try:
        yield
    finally:
        compiler.compile = compile_
        for name in absent:
            del modules[name]


def _uncompiled(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    return function if function is not None else (lambda decorated: decorated)
