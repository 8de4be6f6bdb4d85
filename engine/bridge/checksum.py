"""The proof that an engine holds what the trainer sent: one 64-bit digest for every parameter of an engine's shard, added
up from the slices that make it. Senders add what they send, where it will lie; the receiver digests what its live
parameter then holds. They agree only if every element arrived once, in its place, bit for bit. It moves nothing.

It finds faults (a flipped bit, swapped rows or tensors, a missing or stale slice); it is no defence against an adversary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch

from engine.bridge.shard_plan import Bucket, ShardOffset
from engine.ops import block_digest, column_weights


class ShardDigest:
    """Sums of the parameters of one engine rank, in an order that both sides know: [number of parameters] int64."""

    def __init__(self, parameters: Sequence[str], columns: torch.Tensor) -> None:
        """`columns`: column_weights of the widest parameter, on the device of what will be digested."""
        self._index = {name: i for i, name in enumerate(parameters)}
        self._columns = columns
        self._places: list[int] = []
        self._parts: list[torch.Tensor] = []

    def digest(self, offset: ShardOffset, block: torch.Tensor) -> torch.Tensor:
        """[1] int64: what a slice [rows, cols] adds that lies there."""
        return block_digest(block, row=offset.row, col=offset.col, seed=_seed(offset.parameter), columns=self._columns)

    def add(self, parameter: str, part: torch.Tensor) -> None:
        """Adds a slice's digest to its parameter's."""
        self._places.append(self._index[parameter])
        self._parts.append(part)

    def sums(self) -> torch.Tensor:
        """What has been added so far."""
        total = torch.zeros(len(self._index), dtype=torch.int64, device=self._columns.device)
        if self._parts:
            total.index_add_(0, torch.tensor(self._places, device=total.device), torch.cat(self._parts))
        return total

    def differing(self, expected: torch.Tensor) -> list[str]:
        """The parameters whose sums are not the expected ones."""
        wrong = (self.sums() != expected).tolist()
        return [name for name, i in self._index.items() if wrong[i]]


def weights_for(buckets: Sequence[Bucket], device: torch.device) -> torch.Tensor:
    """The column weights that all slices of these buckets need, at their destinations."""
    widths = [t.target.col + t.cols for bucket in buckets for t in bucket.transfers]
    return column_weights(max(widths, default=0), device)


@lru_cache(maxsize=1 << 16)
def _seed(parameter: str) -> int:
    return int.from_bytes(hashlib.blake2b(parameter.encode(), digest_size=8).digest())
