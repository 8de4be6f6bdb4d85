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
from engine.ops import block_digests, column_weights

AT_ONCE_BYTES = 256 << 20  # of blocks that a GPU digests in one go: their launch costs a twentieth of their reading


class BlockDigests:
    """The digests of a sync's slices, in the order in which they were put. On a CPU each is computed at once, while it is in
    the caches; on a GPU many together, so that small slices do not cost a launch each. Until then a slice must stay as it is.
    """

    def __init__(self, columns: torch.Tensor, *, at_once_bytes: float | None = None) -> None:
        """`columns`: column_weights of the widest parameter, on the device of what will be digested. `at_once_bytes`: of slices
        that wait to be digested together; unset: 0 on a CPU, AT_ONCE_BYTES on a GPU."""
        self._columns = columns
        usual = 0 if columns.is_cpu else AT_ONCE_BYTES
        self._at_once_bytes = usual if at_once_bytes is None else at_once_bytes
        self._pending: list[tuple[ShardOffset, torch.Tensor]] = []
        self._num_bytes = self._num_put = 0
        self._found: list[torch.Tensor] = []

    @property
    def is_pending(self) -> bool:
        """Whether something that was put has not been digested yet."""
        return bool(self._pending)

    def put(self, offset: ShardOffset, block: torch.Tensor) -> int:
        """The number of the digest of a slice [rows, cols] that lies there."""
        self._pending.append((offset, block))
        self._num_bytes += block.nbytes
        if self._num_bytes >= self._at_once_bytes:
            self.flush()
        self._num_put += 1
        return self._num_put - 1

    def flush(self) -> None:
        """Digests what was put."""
        if not self._pending:
            return
        offsets = [offset for offset, _ in self._pending]
        places = {
            "rows": [o.row for o in offsets],
            "cols": [o.col for o in offsets],
            "seeds": [_seed(o.parameter) for o in offsets],
        }
        self._found.append(block_digests([block for _, block in self._pending], columns=self._columns, **places))
        self._pending, self._num_bytes = [], 0

    def all(self) -> torch.Tensor:
        """Of everything that was put [N] int64."""
        self.flush()
        return torch.cat([self._columns.new_empty(0), *self._found])


class ShardDigest:
    """Sums of the parameters of one engine rank, in an order that both sides know: [number of parameters] int64."""

    def __init__(self, parameters: Sequence[str], digests: BlockDigests) -> None:
        self._index = {name: i for i, name in enumerate(parameters)}
        self._digests = digests
        self._places: list[int] = []
        self._parts: list[int] = []

    def add(self, parameter: str, part: int) -> None:
        """Adds a slice's digest, by its number, to its parameter's."""
        self._places.append(self._index[parameter])
        self._parts.append(part)

    def sums(self) -> torch.Tensor:
        """What has been added so far."""
        parts = self._digests.all()
        total = torch.zeros(len(self._index), dtype=torch.int64, device=parts.device)
        places, numbers = (torch.tensor(x, dtype=torch.int64, device=parts.device) for x in (self._places, self._parts))
        return total.index_add_(0, places, parts[numbers])

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
