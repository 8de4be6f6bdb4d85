"""One weight sync as one member sees it: trainer ranks send their buckets, engine ranks place them and prove it. It follows
a ShardPlan over a Transport, knows neither megatron nor vLLM, and decides nothing about versions.

Both sides keep as many messages under way as the transport has room for, and need staging memory for at most two buckets.
What is contiguous in both shards needs none: it is sent from the parameter and received into it. While messages travel,
others are packed, placed and digested. At the end every sender tells every engine rank it sent to what the digests must be.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from engine.bridge.checksum import BlockDigests, ShardDigest, weights_for
from engine.bridge.shard_plan import Bucket, Message, Role, ShardOffset, ShardPlan, Transfer
from engine.bridge.transports.base import Deadline, Pending, Transport, TransportError
from engine.core.errors import UndeliveredError, WeightSyncError
from engine.models.sharding import matrix_slice

STAGED = 2  # buckets of a member in staging memory at once


class Shards(Protocol):
    """The live parameters of an engine rank."""

    def __getitem__(self, parameter: str) -> torch.Tensor:
        """The tensor to write into: a contiguous matrix or vector."""
        ...

    def may_begin(self, parameter: str) -> bool:
        """Whether there is room to receive into it now; it is not asked of a message that is the only one under way."""
        ...

    def complete(self, parameter: str) -> None:
        """Told when the last element of a parameter has been written and digested."""
        ...


def engine_parameters(plan: ShardPlan, target: int) -> tuple[str, ...]:
    """The parameters of the engines' tensor rank `target`, in the order of their digests."""
    found = {t.target.parameter: None for b in plan.buckets if b.target == target for t in b.transfers}
    return tuple(found)


class Sender:
    """A trainer rank's side of every sync that follows one plan."""

    def __init__(self, plan: ShardPlan, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self._plan, self._dtype = plan, dtype
        self._messages = [message for message, role in plan.messages_of(rank) if role is Role.SEND]
        buckets = [message.bucket for message in self._messages]
        self._columns = weights_for(buckets, device)
        self._staging = _Staging(buckets, plan.dtype_bytes, device)
        targets = {bucket.target for bucket in buckets}
        self._parameters = {target: engine_parameters(plan, target) for target in targets}

    @torch.no_grad()
    def send(self, shards: Mapping[str, torch.Tensor], transport: Transport, deadline: Deadline) -> None:
        """Sends this rank's part of one version from its shards. WeightSyncError names what was not delivered, or a shard
        that is not of the agreed type."""
        # Types are read from the stored tensors: indexing megatron's Weights would dequantize them.
        kept: Mapping[str, torch.Tensor] = getattr(shards, "kept", shards)
        for name, shard in kept.items():
            if shard.dtype != self._dtype:
                raise WeightSyncError(f"trainer parameter {name} must be {self._dtype}; found {shard.dtype}: publish one type")
        under_way = _UnderWay(self._plan, transport.depth, deadline)
        digests = BlockDigests(self._columns)
        sums: dict[tuple[tuple[int, ...], int], ShardDigest] = {}
        known: dict[int, list[int]] = {}  # of buckets that have gone to another node
        for message in self._messages:
            key = tuple(sorted(message.path)), message.bucket.target
            held = _looked_up(message.bucket, shards)
            if key not in sums:
                sums[key] = ShardDigest(self._parameters[key[1]], digests)
            if id(message.bucket) not in known:  # first: what follows finds it in the processor's cache
                known[id(message.bucket)] = [digests.put(t.target, block) for t, block in _blocks(message.bucket, held)]
                if self._plan.source.fp8_parameters:
                    digests.flush()  # what was dequantized for this bucket has no memory of its own
            for t, part in zip(message.bucket.transfers, known[id(message.bucket)], strict=True):
                sums[key].add(t.target.parameter, part)
            under_way.make_room(message.bucket)
            buffer = self._pack(message.bucket, held)
            first = self._plan.receivers(message)[0]
            under_way.add(message, transport.send(buffer, first, registered=True))
        under_way.finish()
        tails = []
        for (engines, target), digest in sums.items():
            expected = digest.sums()
            for engine in engines:
                named = f"the digest for tensor rank {target} of engine {engine}".__str__
                tails.append((named, transport.send(expected, self._plan.member(engine, target))))
        for named, tail in tails:
            _finish(tail, deadline, named)

    def _pack(self, bucket: Bucket, shards: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if not bucket.packed:
            return next(_blocks(bucket, shards))[1]
        buffer = self._staging.next(bucket, self._dtype)
        for part, (_, block) in zip(_parts(buffer, bucket), _blocks(bucket, shards), strict=True):
            part.copy_(block)
        return buffer


class Receiver:
    """An engine rank's side of every sync that follows one plan."""

    def __init__(self, plan: ShardPlan, member: int, dtype: torch.dtype, device: torch.device) -> None:
        self._plan, self._dtype = plan, dtype
        self.member, self.num_members = member, plan.num_members
        self._target = (member - plan.trainer_size) % plan.target.tp_size
        self._work = plan.messages_of(member)
        buckets = [message.bucket for message, _ in self._work]
        self._columns = weights_for(buckets, device)
        self._staging = _Staging(buckets, plan.dtype_bytes, device)
        self._parameters = engine_parameters(plan, self._target)
        self._extents = _extents(buckets)
        self._senders = sorted({message.source for message, _ in self._work})

    @torch.no_grad()
    def receive(self, shards: Shards, transport: Transport, deadline: Deadline) -> None:
        """Receives one version into the live shards and verifies it. WeightSyncError names the message that did not come,
        or the parameters that differ."""
        digests = BlockDigests(self._columns)
        held = ShardDigest(self._parameters, digests)
        whole: list[str] = []  # parameters that are complete, and not digested yet
        missing = Counter({name: extent.num_elements for name, extent in self._extents.items()})
        posted: deque[tuple[Message, Role, torch.Tensor, Pending]] = deque()
        forwards = _UnderWay(self._plan, transport.depth, deadline)
        waiting = deque(self._work)

        def post_ahead() -> None:
            while waiting and len(posted) < transport.depth:
                message, role = waiting[0]
                if message.bucket.packed and sum(other.bucket.packed for other, *_ in posted) == STAGED:
                    return
                if posted and not message.bucket.packed and not shards.may_begin(message.bucket.transfers[0].target.parameter):
                    return
                from_engine = role is Role.RECEIVE_FROM_ENGINE
                if from_engine and any(earlier is Role.RECEIVE_AND_FORWARD for _, earlier, *_ in posted):
                    return  # what this one passes on comes first: see Transport
                source = self._plan.receivers(message)[0] if from_engine else message.source
                if message.bucket.packed:
                    forwards.finish()  # staging memory may still be on its way to another engine
                buffer = self._buffer(message.bucket, shards)
                posted.append((message, role, buffer, transport.receive(buffer, source, registered=not from_engine)))
                waiting.popleft()

        for _ in self._work:
            post_ahead()
            message, role, buffer, pending = posted.popleft()
            _finish(pending, deadline, partial(describe, self._plan, message))
            if role is Role.RECEIVE_AND_FORWARD:
                forwards.make_room(message.bucket)
                forwards.add(message, *(transport.send(buffer, peer) for peer in self._plan.receivers(message)[1:]))
            self._place(message.bucket, buffer, shards)
            post_ahead()
            for name in self._completed(message.bucket, missing):
                extent = self._extents[name]
                block = matrix_slice(shards[name], 0, 0, extent.rows, extent.cols)
                held.add(name, digests.put(ShardOffset(name, 0, 0), block))
                whole.append(name)
            if not digests.is_pending:
                _complete(shards, whole)
        digests.flush()
        _complete(shards, whole)
        forwards.finish()
        self._verify(held, transport, deadline)

    def _buffer(self, bucket: Bucket, shards: Shards) -> torch.Tensor:
        if bucket.packed:
            return self._staging.next(bucket, self._dtype)
        (t,) = bucket.transfers
        return matrix_slice(shards[t.target.parameter], t.target.row, t.target.col, t.rows, t.cols)

    def _place(self, bucket: Bucket, buffer: torch.Tensor, shards: Shards) -> None:
        if not bucket.packed:
            return
        for part, t in zip(_parts(buffer, bucket), bucket.transfers, strict=True):
            matrix_slice(shards[t.target.parameter], t.target.row, t.target.col, t.rows, t.cols).copy_(part)

    def _completed(self, bucket: Bucket, missing: Counter[str]) -> list[str]:
        """The parameters that this bucket was the last of, which are digested as they now stand in the engine."""
        found = []
        for t in bucket.transfers:
            name = t.target.parameter
            missing[name] -= t.rows * t.cols
            if missing[name] == 0:
                found.append(name)
        return found

    def _verify(self, held: ShardDigest, transport: Transport, deadline: Deadline) -> None:
        expected = torch.zeros_like(held.sums())
        for source in self._senders:
            part = torch.empty_like(expected)
            _finish(transport.receive(part, source), deadline, f"the digest of trainer rank {source}".__str__)
            expected += part
        if wrong := held.differing(expected):
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            names = ", ".join(dict.fromkeys(self._extents[wrong[0]].names))
            raise WeightSyncError(
                f"engine parameter {wrong[0]}{more} (from {names}) must hold the trainer's bits after a sync; found other "
                f"ones: the sync is repeated in full"
            )


def _complete(shards: Shards, names: list[str]) -> None:
    """Tells that these have been written and digested, each once."""
    while names:
        shards.complete(names.pop(0))


def describe(plan: ShardPlan, message: Message) -> str:
    """A message in words: which bucket, which tensors, from whom to whom."""
    names = list(dict.fromkeys(t.name for t in message.bucket.transfers))
    more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    engines = ", ".join(str(engine) for engine in message.path)
    return (
        f"bucket {message.index + 1} of {len(plan.messages)} ({names[0]}{more}) from trainer rank {message.source} to "
        f"tensor rank {message.bucket.target} of engine {engines}"
    )


@dataclass
class _Extent:
    """How far a parameter of an engine rank is covered: what lies beyond is vocabulary padding."""

    rows: int = 0
    cols: int = 0
    num_elements: int = 0
    names: list[str] = field(default_factory=list)

    def cover(self, t: Transfer) -> None:
        self.rows, self.cols = max(self.rows, t.target.row + t.rows), max(self.cols, t.target.col + t.cols)
        self.num_elements += t.rows * t.cols
        self.names.append(t.name)


def _extents(buckets: list[Bucket]) -> dict[str, _Extent]:
    extents: dict[str, _Extent] = {}
    for bucket in buckets:
        for t in bucket.transfers:
            extents.setdefault(t.target.parameter, _Extent()).cover(t)
    for name, extent in extents.items():
        assert extent.num_elements == extent.rows * extent.cols, (name, extent)
    return extents


class _Staging:
    """Memory for STAGED buckets, used in turn."""

    def __init__(self, buckets: list[Bucket], dtype_bytes: int, device: torch.device) -> None:
        largest = max((bucket.num_bytes for bucket in buckets if bucket.packed), default=0)
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(STAGED)]
        self._turn = 0

    def next(self, bucket: Bucket, dtype: torch.dtype) -> torch.Tensor:
        """Room for a bucket, as elements; whoever used it STAGED buckets ago must be done with it."""
        self._turn = (self._turn + 1) % STAGED
        return self._slots[self._turn][: bucket.num_bytes].view(dtype)


class _UnderWay:
    """Messages being sent, oldest first: at most `depth`, of them STAGED from staging memory."""

    def __init__(self, plan: ShardPlan, depth: int, deadline: Deadline) -> None:
        self._plan, self._depth, self._deadline = plan, depth, deadline
        self._queue: deque[tuple[Message, tuple[Pending, ...]]] = deque()

    def add(self, message: Message, *sendings: Pending) -> None:
        """One for each member that the message is sent to."""
        self._queue.append((message, sendings))

    def make_room(self, bucket: Bucket) -> None:
        """Waits until this bucket may be under way too."""
        while len(self._queue) >= self._depth or (
            bucket.packed and sum(message.bucket.packed for message, _ in self._queue) >= STAGED
        ):
            self._finish_one()

    def finish(self) -> None:
        """Waits for all of them."""
        while self._queue:
            self._finish_one()

    def _finish_one(self) -> None:
        message, sendings = self._queue.popleft()
        for pending in sendings:
            _finish(pending, self._deadline, partial(describe, self._plan, message))


def _finish(pending: Pending, deadline: Deadline, name: Callable[[], str]) -> None:
    try:
        pending.wait(deadline)
    except TransportError as error:
        raise UndeliveredError(f"{name()} was not delivered: {error}") from error


def _looked_up(bucket: Bucket, shards: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters that a bucket is of, each fetched once: one in FP8 is dequantized at every access."""
    return {name: shards[name] for name in dict.fromkeys(t.source.parameter for t in bucket.transfers)}


def _blocks(bucket: Bucket, shards: Mapping[str, torch.Tensor]) -> Iterator[tuple[Transfer, torch.Tensor]]:
    """A bucket's slices where they lie in the sender's shards."""
    for t in bucket.transfers:
        yield t, matrix_slice(shards[t.source.parameter], t.source.row, t.source.col, t.rows, t.cols)


def _parts(buffer: torch.Tensor, bucket: Bucket) -> list[torch.Tensor]:
    """A packed bucket's slices, as views of it."""
    sizes = [t.rows * t.cols for t in bucket.transfers]
    return [part.view(t.rows, t.cols) for part, t in zip(buffer.split(sizes), bucket.transfers, strict=True)]
