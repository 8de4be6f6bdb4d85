"""Tensors of the host on their way to a device: any number of them in one block of pinned memory and one copy, for which the
host does not wait. A copy from memory that is not pinned would make it wait until the device has done all that it was given
before, so that the device is idle while the host prepares what comes next. It computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

ALIGNMENT = 64  # bytes: as far as any kernel asks of the place of a tensor


def to_device(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """These tensors on `device`, in their order; what is there already stays as it is, so on a CPU they are all themselves.

    On a GPU what lies in the host's memory becomes views of one block on the device, which lives as long as one of them. The
    copy takes its place in the current stream. The pinned block may be let go at once: torch gives its memory to nobody else
    before the copy has read it.
    """
    places: dict[int, tuple[int, int]] = {}
    size = 0
    if device.type != "cpu":
        for index, tensor in enumerate(tensors):
            if tensor.is_cpu:
                places[index] = size, size + tensor.nbytes
                size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    if not places:
        return list(tensors)
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    block = torch.empty(size, dtype=torch.uint8, device=device)
    for index, (start, end) in places.items():
        _part(pinned, start, end, tensors[index]).copy_(tensors[index])
    block.copy_(pinned, non_blocking=True)
    return [_part(block, *places[index], tensor) if index in places else tensor for index, tensor in enumerate(tensors)]


def _part(block: torch.Tensor, start: int, end: int, like: torch.Tensor) -> torch.Tensor:
    """These bytes of a block as a tensor of the same type and shape as another."""
    return block[start:end].view(like.dtype).view(like.shape)
