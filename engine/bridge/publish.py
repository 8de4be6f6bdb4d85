"""The trainer's side of a weight sync: every stage leader streams its stage's full tensors, bucket by bucket, to all
engines at once. Every trainer rank calls `publish` at the same step; only rank 0 talks to the pool.

The tensor-parallel shards of a bucket are gathered on the stage leader first; no rank ever holds more than a bucket.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from engine.bridge.channel import BucketManifest, Channel, Rendezvous, join_store, listen, serve_store
from engine.bridge.digest import tensor_digest
from engine.errors import WeightSyncError
from engine.llama.layout import ExportBucket


class Source(Protocol):
    """What has weights: megatron's Policy."""

    def gather(self, bucket: ExportBucket) -> list[tuple[str, torch.Tensor]] | None:
        """Full tensors on the bucket's stage leader, None elsewhere; collective over the stage's tensor-parallel ranks."""
        ...


class Place(Protocol):
    """Where this rank stands among the trainer ranks: megatron's Topology."""

    @property
    def rank(self) -> int:
        """Among all trainer ranks."""
        ...

    @property
    def pp_rank(self) -> int:
        """Pipeline stage."""
        ...

    @property
    def is_stage_leader(self) -> bool:
        """Whether this rank sends what its stage holds."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    def stage_leaders(self) -> tuple[int, ...]:
        """Rank of every stage's leader."""
        ...


class Engines(Protocol):
    """The pool, as far as a sync needs it."""

    def open_channel(self, first_rank: int, info: dict[str, Any]) -> list[Any]:
        """See Pool.open_channel."""
        ...

    def receive(self, version: int, buckets: list[Any]) -> list[Any]:
        """See Pool.receive."""
        ...

    def commit(self, version: int, futures: Any, timeout_seconds: float) -> None:
        """See Pool.commit."""
        ...

    def raise_failure(self, version: int, futures: Any) -> None:
        """See Pool.raise_failure."""
        ...

    def wait(self, futures: Any, what: str) -> None:
        """See Pool.wait."""
        ...


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One finished sync."""

    version: int
    seconds: float
    num_bytes: int  # of weights, once
    num_messages: int


class Publisher:
    """Sends versions of the policy to the pool."""

    def __init__(
        self,
        source: Source,
        place: Place,
        plan: tuple[ExportBucket, ...],
        dtype: torch.dtype,
        *,
        host: str,
        num_engines: int,
        timeout_seconds: float,
        pool: Engines | None,
    ) -> None:
        """Opens the channel; collective over the trainer ranks. `pool` is rank 0's, None elsewhere; `host` is the
        address rank 0 listens on, and no other."""
        self._source, self._place, self._pool = source, place, pool
        self._plan, self._timeout = plan, timeout_seconds
        leaders = place.stage_leaders()
        name = str(dtype).removeprefix("torch.")
        self._manifests = [
            BucketManifest(bucket.stage, name, tuple(t.name for t in bucket.tensors), tuple(t.shape for t in bucket.tensors))
            for bucket in plan
        ]
        self._channel = self._open(host, len(leaders), num_engines)

    def _open(self, host: str, num_leaders: int, num_engines: int) -> Channel | None:
        port = torch.zeros(1, dtype=torch.int64, device=self._place.device)
        server = None
        if self._place.rank == 0:
            server, port[0] = listen(host)
        dist.broadcast(port, 0)
        if not self._place.is_stage_leader:
            return None
        meeting = Rendezvous(host, int(port), num_leaders + num_engines, self._timeout)
        if server is None:
            return Channel(join_store(meeting), self._place.pp_rank, meeting)
        assert self._pool is not None
        store = serve_store(server, host, meeting.world_size, self._timeout)
        info = {
            "host": host,
            "port": meeting.port,
            "world_size": meeting.world_size,
            "timeout_seconds": self._timeout,
        }
        joining = self._pool.open_channel(num_leaders, info)
        channel = Channel(store, self._place.pp_rank, meeting)
        self._pool.wait(joining, "open_channel")
        return channel

    def publish(self, version: int) -> SyncReport:
        """Sends the policy's weights as `version`; returns when every engine has verified and serves them.

        Raises WeightSyncError when an engine fails or is late; the pool then serves no version.
        """
        started = time.monotonic()
        receiving = None
        if self._pool is not None:
            manifest = [
                (m.source, m.dtype, list(m.names), [list(shape) for shape in m.shapes]) for m in self._manifests
            ]
            receiving = self._pool.receive(version, manifest)
        for index, (bucket, message) in enumerate(zip(self._plan, self._manifests, strict=True)):
            try:
                self._send(bucket, message)
            except RuntimeError as error:
                if self._pool is not None:
                    self._pool.raise_failure(version, receiving)  # an engine's own reason says more than a broken message
                what = f"bucket {index + 1} of {len(self._plan)} ({message.names[0]} ...)"
                raise WeightSyncError(f"{what} was not delivered within {self._timeout} s: {error}") from error
        if self._pool is not None:
            assert receiving is not None
            self._pool.commit(version, receiving, self._timeout)
        num_bytes = sum(m.num_bytes for m in self._manifests)
        return SyncReport(version, time.monotonic() - started, num_bytes, len(self._plan))

    def _send(self, bucket: ExportBucket, message: BucketManifest) -> None:
        tensors = self._source.gather(bucket)
        if self._channel is None:
            return
        buffer = message.buffer(self._place.device)
        if tensors is not None:
            views, digests = message.views(buffer)
            for view, digest, (_, tensor) in zip(views, digests, tensors, strict=True):
                view.copy_(tensor)
                digest.copy_(tensor_digest(view))
        self._channel.broadcast(buffer, message.source)


def stream_to_first_rank(
    source: Source, place: Place, plan: tuple[ExportBucket, ...], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every full tensor in plan order on rank 0, nothing elsewhere; collective, and to be drained on every rank."""
    leaders = place.stage_leaders()
    for bucket in plan:
        tensors = source.gather(bucket)
        leader = leaders[bucket.stage]
        for index, meta in enumerate(bucket.tensors):
            if place.rank == leader == 0:
                assert tensors is not None
                yield meta.name, tensors[index][1]
            elif place.rank == leader:
                assert tensors is not None
                dist.send(tensors[index][1].contiguous(), 0)
            elif place.rank == 0:
                received = torch.empty(meta.shape, dtype=dtype, device=place.device)
                dist.recv(received, leader)
                yield meta.name, received
