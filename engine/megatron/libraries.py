"""Which library does what in the trainer: the configuration says it, and never what happens to be installed. megatron-core
takes Transformer Engine's kernels, or else apex's, wherever it can import them; this module names the chosen ones instead, and
refuses an option whose library or device is not here. It builds no model and no optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from engine.config.options import Optimizer, Trainer
from engine.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

INSTALL_TE = "install requirements/gpu.txt"
INSTALL_APEX = "build NVIDIA's apex from source with APEX_CPP_EXT=1 APEX_CUDA_EXT=1"
HOPPER = (9, 0)  # the first whose FP8 products take every recipe


@dataclass(frozen=True)
class Kernels:
    """One library's AdamW, and its functions on lists of tensors: apply, norm, scale."""

    adam: type[torch.optim.Optimizer]
    apply: Callable[..., Any]
    norm: Callable[..., Any]
    scale: Callable[..., Any]


def check_libraries(trainer: Trainer, optimizer: Optimizer) -> None:
    """ConfigError naming the first option whose library, or the GPU it runs on, is not on this machine."""
    import torch

    wanted = check_installed(trainer, optimizer)
    for option, otherwise in wanted.items() if not torch.cuda.is_available() else ():
        raise ConfigError(f"{option} needs a GPU; torch found none: run on a machine with one, or {otherwise}")
    if trainer.fp8 != "none" and (capability := torch.cuda.get_device_capability()) < HOPPER:
        raise ConfigError(
            f"trainer.fp8 needs a GPU of compute capability {HOPPER[0]}.{HOPPER[1]} or more; found "
            f"{capability[0]}.{capability[1]}: run on one, or set it to 'none'"
        )


def check_installed(trainer: Trainer, optimizer: Optimizer) -> dict[str, str]:
    """What to do instead, by option, for every option that needs a library of a GPU. ConfigError naming the first whose library
    is not on this machine."""
    te, apex = ("Transformer Engine", "transformer_engine", INSTALL_TE), ("apex", "amp_C", INSTALL_APEX)
    asked = [
        (trainer.uses_te, "trainer.layers = 'transformer_engine'", te, "use 'local'"),
        (optimizer.implementation == "te", "optimizer.implementation = 'te'", te, "use 'torch'"),
        (optimizer.implementation == "apex", "optimizer.implementation = 'apex'", apex, "use 'torch'"),
        (optimizer.offload_share > 0, "optimizer.offload_share", te, "set it to 0"),  # megatron-core asks for its version
    ]
    for wanted, option, (library, module, install), otherwise in asked:
        if wanted and find_spec(module) is None:
            raise ConfigError(f"{option} needs {library}; found no module {module}: {install}, or {otherwise}")
    return {option: otherwise for wanted, option, _, otherwise in asked if wanted}


@contextmanager
def chosen_kernels(implementation: str) -> Iterator[None]:
    """While entered, megatron-core's optimizers use the kernels of optimizer.implementation and no others.

    megatron-core 0.16.1 binds them at import, by what is installed, as names of four modules, and offers no argument: this
    is the one place that sets those names. Both what builds an optimizer and what runs one must be inside.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as mixed_precision

    kernels = _kernels(implementation)
    chosen: list[tuple[Any, str, Any]] = [
        (optimizer, "Adam", kernels.adam),
        (optimizer, "USING_PYTORCH_OPTIMIZER", False),  # which would take torch's, not fused, by itself
        (distrib_optimizer, "Adam", kernels.adam),
        (mixed_precision, "multi_tensor_applier", kernels.apply),
        (mixed_precision, "multi_tensor_scale_impl", kernels.scale),
        (clip_grads, "multi_tensor_applier", kernels.apply),
        (clip_grads, "l2_norm_impl", kernels.norm),
        (clip_grads, "multi_tensor_scale_impl", kernels.scale),
    ]
    before = [getattr(module, name) for module, name, _ in chosen]
    try:
        for module, name, value in chosen:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(chosen, before, strict=True):
            setattr(module, name, value)


def _kernels(implementation: str) -> Kernels:
    if implementation == "te":
        from transformer_engine.pytorch import optimizers as te

        from engine.megatron.te_adam import TeAdam

        return Kernels(TeAdam, te.multi_tensor_applier, te.multi_tensor_l2norm, te.multi_tensor_scale)
    if implementation == "apex":
        import amp_C
        from apex.multi_tensor_apply import multi_tensor_applier
        from apex.optimizers import FusedAdam

        return Kernels(FusedAdam, multi_tensor_applier, amp_C.multi_tensor_l2norm, amp_C.multi_tensor_scale)
    from megatron.core import utils

    from engine.megatron.torch_adam import TorchAdam

    return Kernels(TorchAdam, utils.local_multi_tensor_applier, l2_norm, utils.local_multi_tensor_scale)


def l2_norm(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], per_tensor: bool, *more: Any
) -> tuple[torch.Tensor, None]:
    """(norm [1] float32 of all elements of all tensors, None), as megatron-core asks for it.

    On a CPU it is megatron-core's own, to the bit. That one makes a GPU's host wait for every tensor; here the norms of the
    tensors are a few launches for all of them, each summed in float32 or wider, and the host waits for nothing.
    """
    import torch
    from megatron.core import utils

    tensors = [tensor for tensor_list in tensor_lists for tensor in tensor_list]
    if all(tensor.is_cpu for tensor in tensors):
        found: tuple[torch.Tensor, None] = utils.local_multi_tensor_l2_norm(chunk_size, noop_flag, tensor_lists, per_tensor)
        return found
    by_type: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    norms = [
        norm.to(torch.float32)
        for dtype, alike in by_type.items()
        for norm in torch._foreach_norm(alike, 2, dtype=torch.promote_types(dtype, torch.float32))
    ]
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None
