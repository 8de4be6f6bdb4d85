"""A network of members that are threads of one test: a Transport over memory that holds both sides to its rules. A message
is delivered only when somebody waits for it, as late as a real one may be, and a buffer that is touched before its wait
returns, or that is not of the size its peer expects, is an AssertionError. `InOrder` runs them as NCCL does: one after
another on each member. It knows nothing of plans.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from engine.bridge.transports.base import Deadline, Transport, TransportError
from engine.config.transport import Setting

Alter = Callable[[int, int, torch.Tensor], torch.Tensor]  # (sending member, number of its message, content) -> what arrives


@dataclass
class Post:
    """One end of a message: the buffer, and the content it must have until its wait returns."""

    buffer: torch.Tensor
    content: torch.Tensor


@dataclass
class Message:
    """The n-th from one member to another, as far as the two have come to it."""

    send: Post | None = None
    receive: Post | None = None
    number: int = 0  # among all messages of the sender
    delivered: bool = False


@dataclass
class Pair:
    """All messages from one member to another."""

    changed: threading.Condition
    messages: list[Message] = field(default_factory=list)
    num_sent: int = 0
    num_received: int = 0

    def message(self, index: int) -> Message:
        """The message of that number, whoever asks first."""
        while len(self.messages) <= index:
            self.messages.append(Message())
        return self.messages[index]


class Network:
    """All members; `alter` may change what arrives."""

    def __init__(self, num_members: int, alter: Alter | None = None, depth: int = 3) -> None:
        self.depth = depth
        self.lock = threading.Lock()
        self.alter = alter or (lambda member, number, content: content)
        self.closed: set[int] = set()
        self.members = [MemoryTransport(self, number) for number in range(num_members)]
        numbers = range(num_members)
        self.pairs = {(one, other): Pair(threading.Condition(self.lock)) for one in numbers for other in numbers}

    def posted(self, member: int, peer: int, message: Message) -> None:
        """Told of every end of a message."""

    def ready(self, message: Message) -> bool:
        """Whether a wait for it may return."""
        return message.send is not None and message.receive is not None

    def deliver(self, sender: int, message: Message) -> None:
        """Moves a message whose ends are both there, once."""
        if message.delivered:
            return
        assert message.send is not None and message.receive is not None
        sent, received = message.send, message.receive
        assert (sent.buffer.dtype, sent.buffer.numel()) == (received.buffer.dtype, received.buffer.numel()), "sizes differ"
        check_untouched(sent)
        check_untouched(received)
        received.buffer.view(-1).copy_(self.alter(sender, message.number, sent.content).view(-1))
        received.content = received.buffer.clone()
        message.delivered = True


class InOrder(Network):
    """All messages of a member run one after another, in the order in which it names them, whether or not anybody waits."""

    def __init__(self, num_members: int, depth: int) -> None:
        super().__init__(num_members, depth=depth)
        self._streams: list[deque[tuple[int, int, Message]]] = [deque() for _ in self.members]

    def posted(self, member: int, peer: int, message: Message) -> None:
        """Runs what now stands first on both of its members."""
        self._streams[member].append((member, peer, message))
        while any(self._run_first(stream) for stream in self._streams):
            pass

    def _run_first(self, stream: deque[tuple[int, int, Message]]) -> bool:
        if not stream:
            return False
        member, peer, message = stream[0]
        other = self._streams[peer]
        if not other or other[0][2] is not message:
            return False
        stream.popleft()
        other.popleft()
        sends = any(sent is message for sent in self.pairs[member, peer].messages)
        self.deliver(member if sends else peer, message)
        for pair in self.pairs.values():
            pair.changed.notify_all()
        return True

    def ready(self, message: Message) -> bool:
        """Whether it has run."""
        return message.delivered


class MemoryTransport(Transport):
    """One member's Transport. It counts what is under way: sends, different buffers being sent, and receives."""

    def __init__(self, network: Network, member: int) -> None:
        self._network, self._member = network, member
        self.depth = network.depth
        self._num_sends = 0
        self._sending: list[int] = []  # addresses of buffers
        self._num_receiving = 0
        self.most_sends = self.most_sending = self.most_receiving = 0
        self.storages: set[int] = set()  # of all weights that were ever posted

    @classmethod
    def fits(cls, setting: Setting) -> str | None:
        """Anywhere: nobody asks."""
        return None

    def send(self, buffer: torch.Tensor, peer: int, *, registered: bool = False) -> PendingMessage:
        """See Transport."""
        with self._network.lock:
            pair = self._network.pairs[self._member, peer]
            message = pair.message(pair.num_sent)
            pair.num_sent += 1
            message.send, message.number = self._post(buffer), self._num_sends
            self._num_sends += 1
            self._sending.append(buffer.data_ptr())
            self._count(buffer)
            self._network.posted(self._member, peer, message)
            pair.changed.notify_all()
        return PendingMessage(self, peer, self._member, pair, message, message.send)

    def receive(self, buffer: torch.Tensor, peer: int, *, registered: bool = False) -> PendingMessage:
        """See Transport."""
        with self._network.lock:
            pair = self._network.pairs[peer, self._member]
            message = pair.message(pair.num_received)
            pair.num_received += 1
            message.receive = self._post(buffer)
            self._num_receiving += 1
            self._count(buffer)
            self._network.posted(self._member, peer, message)
            pair.changed.notify_all()
        return PendingMessage(self, peer, peer, pair, message, message.receive)

    def close(self) -> None:
        """See Transport."""
        with self._network.lock:
            self._network.closed.add(self._member)
            for pair in self._network.pairs.values():
                pair.changed.notify_all()

    @property
    def num_under_way(self) -> int:
        """Messages that nobody has waited for."""
        return len(self._sending) + self._num_receiving

    def _post(self, buffer: torch.Tensor) -> Post:
        assert buffer.is_contiguous()
        return Post(buffer, buffer.clone())

    def _count(self, buffer: torch.Tensor) -> None:
        if buffer.dtype != torch.int64:  # digests are few and small, and go all at once
            self.storages.add(buffer.untyped_storage().data_ptr())
            self.most_sends = max(self.most_sends, len(self._sending))
            self.most_sending = max(self.most_sending, len(set(self._sending)))
            self.most_receiving = max(self.most_receiving, self._num_receiving)

    def finish(self, message: PendingMessage, deadline: Deadline) -> None:
        """Waits for one end of a message and for no longer than the deadline."""
        network = self._network
        with network.lock:
            while not network.ready(message.message):
                if {message.peer, self._member} & network.closed:
                    raise TransportError("the connection is closed")
                if deadline.remaining() <= 1e-3:
                    raise TransportError("timed out")
                message.pair.changed.wait(deadline.remaining())
            network.deliver(message.sender, message.message)
            check_untouched(message.post)
            if message.sender == self._member:
                self._sending.remove(message.post.buffer.data_ptr())
            else:
                self._num_receiving -= 1


@dataclass(frozen=True)
class PendingMessage:
    """One end of a message under way."""

    owner: MemoryTransport
    peer: int
    sender: int
    pair: Pair
    message: Message
    post: Post

    def wait(self, deadline: Deadline) -> None:
        """See Pending."""
        self.owner.finish(self, deadline)


def check_untouched(post: Post) -> None:
    """A buffer holds, bit for bit, what it did when it was posted or filled."""
    same = torch.equal(post.buffer.reshape(-1).view(torch.uint8), post.content.reshape(-1).view(torch.uint8))
    assert same, "a buffer was changed before its message was waited for"
