"""The process group between trainer stage leaders and inference engines, and the buckets that cross it. It knows bytes,
not models: what a bucket holds is told by its manifest.

A bucket on the wire is one message: the tensors' bytes one after another, then one 8-byte digest for each tensor.
"""

from __future__ import annotations

import datetime
import math
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

DIGEST_BYTES = 8


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the members of a channel meet."""

    host: str
    port: int
    world_size: int
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class BucketManifest:
    """What one message holds: full Hugging Face tensors of one dtype, sent by member `source` of the channel."""

    source: int
    dtype: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The tensors' dtype."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype), self.dtype
        return dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors, digests apart."""
        return sum(math.prod(shape) for shape in self.shapes) * self.torch_dtype.itemsize

    def buffer(self, device: torch.device) -> torch.Tensor:
        """An empty message [num_bytes + 8 * tensors] uint8, its digests on an 8-byte boundary."""
        padded = -(-self.num_bytes // DIGEST_BYTES) * DIGEST_BYTES
        return torch.empty(padded + DIGEST_BYTES * len(self.names), dtype=torch.uint8, device=device)

    def views(self, buffer: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(tensors with their shapes, digests [tensors] int64), all of them views of the message."""
        sizes = [math.prod(shape) * self.torch_dtype.itemsize for shape in self.shapes]
        tensors, offset = [], 0
        for shape, size in zip(self.shapes, sizes, strict=True):
            tensors.append(buffer[offset : offset + size].view(self.torch_dtype).view(shape))
            offset += size
        digests = buffer[buffer.numel() - DIGEST_BYTES * len(self.names) :].view(torch.int64)
        return tensors, digests


def listen(host: str) -> tuple[socket.socket, int]:
    """A listening socket on a free port of `host` only: a rendezvous never opens other interfaces."""
    server = socket.create_server((host, 0))
    return server, server.getsockname()[1]


def serve_store(server: socket.socket, host: str, world_size: int, timeout_seconds: float) -> dist.TCPStore:
    """The key-value store of a rendezvous on an already bound socket, which it takes over."""
    port = server.getsockname()[1]
    return dist.TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=datetime.timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        master_listen_fd=server.detach(),
    )


def join_store(meeting: Rendezvous) -> dist.TCPStore:
    """The same store, from a member that does not serve it."""
    timeout = datetime.timedelta(seconds=meeting.timeout_seconds)
    return dist.TCPStore(meeting.host, meeting.port, meeting.world_size, timeout=timeout, wait_for_workers=False)


class Channel:
    """A gloo group of stage leaders (members 0 .. leaders - 1) and engine workers, for broadcasts of whole buckets."""

    def __init__(self, store: dist.Store, rank: int, meeting: Rendezvous) -> None:
        self.rank = rank
        timeout = datetime.timedelta(seconds=meeting.timeout_seconds)
        self._store = store
        self._group: Any = dist.ProcessGroupGloo(dist.PrefixStore("channel", store), rank, meeting.world_size, timeout)

    def broadcast(self, buffer: torch.Tensor, source: int) -> None:
        """Sends (as `source`) or fills (as anyone else) one message; RuntimeError when a member is gone or late."""
        self._group.broadcast(buffer, source).wait()
