"""What a plan of weight syncs is: slices of trainer shards and where they go in engine shards, buckets, messages and their one
order, and which part each member takes. Records and questions to them; plan.py makes them, exchange.py carries them out.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import astuple, dataclass
from enum import Enum

from engine.models.sharding import EngineLayout, TrainerLayout

ModelRank = tuple[int, int]  # a model-parallel rank of the trainer: (pipeline rank, tensor rank)


@dataclass(frozen=True, slots=True)
class ShardOffset:
    """Where in a shard: row and column in the parameter's matrix, a vector [n] being [n, 1]."""

    parameter: str
    row: int
    col: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """A slice [rows, cols] of the Hugging Face tensor `name`, from a trainer's shard into an engine's."""

    name: str
    rows: int
    cols: int
    source: ShardOffset
    target: ShardOffset


@dataclass(frozen=True, slots=True)
class Bucket:
    """What one message carries: its transfers' slices one after another, each row by row."""

    model_rank: ModelRank  # of the trainer that holds it
    target: int  # tensor rank of the engines that need it
    transfers: tuple[Transfer, ...]
    num_bytes: int
    packed: bool  # False: one transfer, contiguous in both shards, which needs no staging memory


@dataclass(frozen=True, slots=True)
class Message:
    """One sending of a bucket into one node."""

    bucket: Bucket
    index: int  # in the global order
    source: int  # trainer rank
    path: tuple[int, ...]  # the node's engines: the first receives from the source and passes it to the others


class Role(Enum):
    """What a member does in a message."""

    SEND = "send"
    RECEIVE = "receive"  # from the trainer, for itself alone
    RECEIVE_AND_FORWARD = "receive and forward"
    RECEIVE_FROM_ENGINE = "receive from engine"


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One weight sync: all messages in the one order in which every member takes its part of them."""

    messages: tuple[Message, ...]
    source: TrainerLayout
    dp_size: int
    target: EngineLayout
    nodes: tuple[tuple[int, ...], ...]  # engines by node
    dtype_bytes: int

    @property
    def trainer_size(self) -> int:
        """Number of trainer ranks, the first members of the channel."""
        return self.source.tp_size * self.source.pp_size * self.dp_size

    @property
    def num_members(self) -> int:
        """Trainer ranks and all ranks of all engines."""
        return self.trainer_size + sum(map(len, self.nodes)) * self.target.tp_size

    @property
    def num_bytes(self) -> int:
        """Bytes that leave the trainer: one copy for every node."""
        return sum(message.bucket.num_bytes for message in self.messages)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Every bucket once, in the order of its first sending."""
        return tuple({id(message.bucket): message.bucket for message in self.messages}.values())

    @property
    def digest(self) -> str:
        """SHA-256 of all that members must agree on, in hexadecimal; equal in every process that has the same plan."""
        buckets = self.buckets
        number = {id(bucket): index for index, bucket in enumerate(buckets)}
        order = array("q")
        for message in self.messages:
            order.extend((number[id(message.bucket)], message.source, *message.path))
        sizes = (astuple(self.source), self.dp_size, astuple(self.target), self.nodes, self.dtype_bytes)
        return hashlib.sha256(repr((sizes, buckets)).encode() + order.tobytes()).hexdigest()

    def member(self, engine: int, tp_rank: int) -> int:
        """The number of an engine's tensor rank in the channel."""
        return self.trainer_size + engine * self.target.tp_size + tp_rank

    def receivers(self, message: Message) -> tuple[int, ...]:
        """Members that receive the message, the one that passes it on first."""
        return tuple(self.member(engine, message.bucket.target) for engine in message.path)

    def role(self, message: Message, member: int) -> Role | None:
        """What the member does in the message, if anything."""
        if member < self.trainer_size:
            return Role.SEND if member == message.source else None
        engine, tp_rank = divmod(member - self.trainer_size, self.target.tp_size)
        if tp_rank != message.bucket.target or engine not in message.path:
            return None
        if engine != message.path[0]:
            return Role.RECEIVE_FROM_ENGINE
        return Role.RECEIVE_AND_FORWARD if len(message.path) > 1 else Role.RECEIVE

    def messages_of(self, member: int) -> tuple[tuple[Message, Role], ...]:
        """The messages in which a member takes part, in order, with its role."""
        roles = ((message, self.role(message, member)) for message in self.messages)
        return tuple((message, role) for message, role in roles if role is not None)
