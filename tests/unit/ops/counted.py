"""What a GPU would be asked to do, counted without one: operators run on fake tensors of a GPU, and every launch, byte and
floating-point operation is added up. A time made of them is arithmetic at named rates, not a measurement. No tests.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

BYTES_PER_SECOND, FLOPS_PER_SECOND = 4.3e12, 790e12  # an H200's device copy and bf16 products, measured elsewhere
HOST_WAITS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero", "aten::item"}
WITHOUT_LAUNCH = {
    "prim::device",
    "aten::empty",
    "aten::empty_like",
    "aten::new_empty",
    "aten::empty_strided",
    "aten::new_empty_strided",
}


class Counted(TorchDispatchMode):
    """Counts what runs inside: use it inside a FakeTensorMode."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.host_waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()  # from the host: by "blocking", for which the host waits, and "queued"
        self.num_bytes = self.flops = 0
        self.seconds = 0.0  # each operator at its own limit, one after another

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in HOST_WAITS:
            self.host_waits[name] += 1
        self._count_copy(name, args, kwargs)
        if func is torch.ops.aten.addmm.dtype_out:  # torch has no fake of it
            result = kwargs["out"]
            assert result.dtype == args[3] == torch.float32 and result is args[0], "accumulates in place, in float32"
        else:
            result = func(*args, **kwargs)
        if func.is_view or name in WITHOUT_LAUNCH or name in HOST_WAITS:
            return result
        self.launches[name] += 1
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        written = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        if name == "semion::log_prob_backward":
            written = [args[-1]]
        num_bytes = sum(x.numel() * x.element_size() for x in _once(tensors, self._unread(func, args, kwargs)))
        num_bytes += sum(x.numel() * x.element_size() for x in _once(written, []))
        flops = 0
        if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = args[-2:] if name == "aten::mm" else args[1:3]
            flops = 2 * a.size(0) * a.size(1) * b.size(1)
        self.num_bytes, self.flops = self.num_bytes + num_bytes, self.flops + flops
        self.seconds += max(num_bytes / BYTES_PER_SECOND, flops / FLOPS_PER_SECOND)
        return result

    def _count_copy(self, name: str, args: Any, kwargs: Any) -> None:
        """A copy from the host's memory to the device, or from there, for which the host always waits."""
        if name == "aten::_to_copy":
            source, target, queued = args[0].device, kwargs.get("device") or args[0].device, kwargs.get("non_blocking", False)
        elif name == "aten::copy_":
            source, target = args[1].device, args[0].device
            queued = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        else:
            return
        if source.type == "cpu" and target.type == "cuda":
            self.copies["queued" if queued else "blocking"] += 1
        elif source.type == "cuda" and target.type == "cpu":
            self.host_waits[name] += 1

    @staticmethod
    def _unread(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
        """Arguments that are only written."""
        if func is torch.ops.aten.addmm.dtype_out:
            return [args[0]] if kwargs.get("beta") == 0 else []
        names = [argument.name for argument in func._schema.arguments]
        if func._schema.name in ("aten::copy_", "aten::zero_", "aten::fill_"):
            return [args[0]]
        if func._schema.name == "aten::addmm_":
            return [args[0]] if kwargs.get("beta") == 0 else []
        if func._schema.name == "semion::log_prob_backward":
            return []
        return [kwargs["out"]] if "out" in names and "out" in kwargs else []


def _once(tensors: list[torch.Tensor], without: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each tensor once, by where it lies."""

    def place(x: torch.Tensor) -> tuple[int, ...]:
        return x.untyped_storage()._cdata, int(x.storage_offset()), x.numel()

    left_out = {place(x) for x in without}
    return list({place(x): x for x in tensors if place(x) not in left_out}.values())
