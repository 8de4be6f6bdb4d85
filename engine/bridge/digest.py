"""A 64-bit digest of a tensor's bits, computed where the tensor lives, equal on every device and dtype-exact.

It detects faults (a flipped bit, two swapped values, a stale or misplaced slice); it is not a defence against an
adversary. Each word is mixed with its position (splitmix64's finalizer, one to one), then words are summed modulo
2**64: a change within one word always shows, any other with near certainty.
"""

from __future__ import annotations

import torch

_POSITION = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_LOW_35, _LOW_32 = (1 << 35) - 1, (1 << 32) - 1
_CHUNK = 1 << 20  # words digested at a time, so that the workspace stays at a few tens of MiB
_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_digest(tensor: torch.Tensor) -> torch.Tensor:
    """Digest of any dense tensor, as an int64 scalar on its device; two tensors of equal bits and order agree."""
    words = tensor.detach().contiguous().view(-1).view(_WORD[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _CHUNK):
        z = words[start : start + _CHUNK].to(torch.int64)
        position = torch.arange(start + 1, start + 1 + z.numel(), device=z.device, dtype=torch.int64)
        z = (z ^ (position * _POSITION)) * _MIX_1
        z = (z ^ (z >> 29 & _LOW_35)) * _MIX_2  # the masks make the shifts logical: arithmetic ones are not one to one
        total += (z ^ (z >> 32 & _LOW_32)).sum()
    return total
