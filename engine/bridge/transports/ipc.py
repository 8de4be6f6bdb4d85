"""A transport between members on one machine: the receiver maps the sender's memory and copies out of it, one copy in all. gloo
carries only control messages about it, many at a time: "they are here" and "taken"; and whatever is too small to be worth it.
On a CPU registered memory, parameters and staging, moves into shared memory (/dev/shm) when it is first sent from. On a GPU it
is CUDA IPC (unverified on a GPU): so this also joins a trainer and an engine on one GPU, which NCCL cannot. Memory handles are
valid only on the machine that made them: members on other machines may be there, as long as the plan has nobody send to
another machine (its `senders`).
"""

from __future__ import annotations

import base64
import json
import os
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.bridge.transports.base import SHARED_FOLDER, Deadline, Pending, Rendezvous, Transport, TransportError, first_line
from engine.bridge.transports.gloo import LANES, Gloo
from engine.config.transport import Setting

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

HERE, TAKEN, SMALL = range(LANES)  # lanes of words, and of what is too small for them
BATCH = 32  # words that travel together at most


class Ipc(Transport):
    """Receivers map a sender's registered buffers and copy out of them; see the head of this file."""

    preference = 0
    reads_in_place = True
    depth = 2 * BATCH

    @classmethod
    def fits(cls, setting: Setting) -> str | None:
        """On one machine, or where each has its engines to itself; on GPUs only where engines share the trainer's."""
        if setting.nodes > 1 and not setting.colocated:
            found = f"found cluster.nodes = {setting.nodes}"
            return f"shares the memory of a machine, where disaggregated engines may not be; {found}"
        if not setting.engines_on_one_machine and not setting.colocated:
            return "needs all engines on one machine; found several"
        if setting.device == "cuda" and not setting.colocated:
            return "joins GPUs only where inference.placement = 'colocated'; found 'disaggregated'"
        if setting.device == "cpu" and not setting.has_room:
            return (
                f"needs {setting.needed_bytes >> 20} MiB of shared memory ({SHARED_FOLDER}), which has less (docker run "
                f"--shm-size gives a container more)"
            )
        return None

    def __init__(self, store: dist.Store, member: int, meeting: Rendezvous) -> None:
        import torch.distributed as dist

        self._store, self._member = store, member
        self._words = Gloo(dist.PrefixStore("words", store), member, meeting)
        self._regions: dict[int, _Region] = {}  # own storages that peers may map, by address
        self._mapped: dict[tuple[int, int], torch.Tensor] = {}  # peers' regions, by their numbers
        self._outboxes: dict[int, _Outbox] = {}
        self._inboxes: dict[int, _Inbox] = {}

    def send(self, buffer: torch.Tensor, peer: int, *, registered: bool = False) -> Pending:
        """Tells the peer where a registered buffer lies, at the latest when the message is waited for. Anything else goes by
        gloo, from the host."""
        data = _bytes_of(buffer)
        if not registered:
            return self._words.send(data.cpu(), peer, SMALL)
        region, offset = self._place(data)
        outbox = self._outboxes.setdefault(peer, _Outbox(self._words, peer, data.device))
        return _Given(self, outbox, outbox.put(region.number, offset))

    def receive(self, buffer: torch.Tensor, peer: int, *, registered: bool = False) -> Pending:
        """A registered buffer is copied by `wait`."""
        data = _bytes_of(buffer)
        if not registered:
            return _Landing(self._words, data, peer)
        inbox = self._inboxes.setdefault(peer, _Inbox(self._words, peer))
        inbox.expect()
        return _Taking(self, inbox, data, peer)

    def take(self, number: int, offset: int, data: torch.Tensor, peer: int) -> None:
        """Copies from where the peer's message lies."""
        if (peer, number) not in self._mapped:
            self._mapped[peer, number] = opened(json.loads(self._store.get(f"memory {peer} {number}")))
        data.copy_(self._mapped[peer, number][offset : offset + data.numel()], non_blocking=True)

    def tell_others(self, outbox: _Outbox) -> None:
        """Tells every other peer of what waits to be told. Before a member waits for one: that one may wait for another
        sender first, and so on round to whoever waits for these words."""
        for other in self._outboxes.values():
            if other is not outbox and other.waiting:
                other.flush()

    def settle(self, data: torch.Tensor, peer: int) -> None:
        """Waits until every copy from this peer is made, between two GPUs too."""
        for device in {data.device, *(region.device for (other, _), region in self._mapped.items() if other == peer)}:
            _settle(device)

    def close(self) -> None:
        """Gives up whatever is under way, and other members' memory."""
        self._words.close()
        self._regions.clear()
        self._mapped.clear()

    def _place(self, data: torch.Tensor) -> tuple[_Region, int]:
        """The region that is the buffer's whole storage, and where in it the buffer begins."""
        storage = data.untyped_storage()
        offset = data.data_ptr() - storage.data_ptr()
        region = self._regions.get(storage.data_ptr())
        if region is None:
            region = _Region(storage, len(self._regions))
            self._store.set(f"memory {self._member} {region.number}", json.dumps(handle(storage)))
            self._regions[storage.data_ptr()] = region  # its address now: it has moved, if it was not shared before
        return region, offset


@dataclass(frozen=True, slots=True)
class _Region:
    """A storage that peers know by this number. It is kept here, so that its address stays its own."""

    storage: torch.UntypedStorage
    number: int


def handle(storage: torch.UntypedStorage) -> dict[str, Any]:
    """How another process finds a storage: a file of shared memory, into which a CPU's moves; or torch's IPC handle, and which
    GPU it is whatever its number there."""
    import torch

    if storage.device.type == "cpu":
        file = storage._share_fd_cpu_()[0]
        return {"path": f"/proc/{os.getpid()}/fd/{file}", "inode": os.fstat(file).st_ino, "num_bytes": storage.nbytes()}
    device, *fields = storage._share_cuda_()
    coded = [base64.b64encode(field).decode() if isinstance(field, bytes) else field for field in fields]
    return {"gpu": str(torch.cuda.get_device_properties(device).uuid), "cuda": coded}


def opened(told: dict[str, Any]) -> torch.Tensor:
    """A peer's storage, mapped here: [bytes] uint8. OSError where it is gone, or on a GPU that this process does not see."""
    import torch

    if "path" in told:
        file = os.open(told["path"], os.O_RDWR)
        try:
            if os.fstat(file).st_ino != told["inode"]:
                raise OSError(f"{told['path']} is another file now")  # the peer has closed its memory
            return torch.from_file(f"/proc/self/fd/{file}", shared=True, size=told["num_bytes"], dtype=torch.uint8)
        finally:
            os.close(file)
    uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    if told["gpu"] not in uuids:
        raise OSError(f"GPU {told['gpu']} is not visible here: every process of the machine must see all its GPUs")
    device = uuids.index(told["gpu"])  # numbers differ between processes
    fields = [base64.b64decode(field) if isinstance(field, str) else field for field in told["cuda"]]
    storage = torch.UntypedStorage._new_shared_cuda(device, *fields)
    return torch.empty(0, dtype=torch.uint8, device=f"cuda:{device}").set_(storage)


@dataclass(slots=True)
class _Batch:
    """Words on their way, and the answer that all of them are taken."""

    end: int  # number of the message after the last of them
    here: Pending
    taken: Pending
    buffers: tuple[torch.Tensor, torch.Tensor]


@dataclass(slots=True)
class _Outbox:
    """What one peer is told. The first words travel alone and then more and more together, so that the peer begins at once and
    words are few."""

    words: Gloo
    peer: int
    device: torch.device  # of what is sent
    waiting: list[tuple[int, int]] = field(default_factory=list)
    batches: deque[_Batch] = field(default_factory=deque)
    together: int = 1
    num_put: int = 0
    num_flushed: int = 0
    num_taken: int = 0

    def put(self, number: int, offset: int) -> int:
        """One more message: where it lies. How many there are then."""
        if self.num_taken == self.num_put:
            self.together = 1
        self.waiting.append((number, offset))
        self.num_put += 1
        if len(self.waiting) >= self.together:
            self.flush()
        return self.num_put

    def flush(self) -> None:
        """Tells the peer of what waits to be told; what lies there must be done on its GPU."""
        import torch

        _settle(self.device)
        word, answer = torch.zeros(1 + 2 * BATCH, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
        word[0] = len(self.waiting)
        word[1 : 1 + 2 * len(self.waiting)] = torch.tensor(self.waiting).flatten()
        here = self.words.send(word, self.peer, HERE)
        self.batches.append(_Batch(self.num_put, here, self.words.receive(answer, self.peer, TAKEN), (word, answer)))
        self.num_flushed += 1
        self.waiting.clear()
        self.together = min(BATCH, 2 * self.together)

    def await_taken(self, count: int, deadline: Deadline) -> None:
        """Waits until the peer has taken the first `count` messages."""
        while self.num_taken < count:
            if not self.batches:
                self.flush()
            batch = self.batches[0]
            batch.here.wait(deadline)
            batch.taken.wait(deadline)
            self.num_taken = batch.end
            self.batches.popleft()


@dataclass(frozen=True, slots=True)
class _Given:
    """A message that its receiver has yet to copy."""

    channel: Ipc
    outbox: _Outbox
    count: int

    def wait(self, deadline: Deadline) -> None:
        if self.outbox.num_taken < self.count:
            self.channel.tell_others(self.outbox)
            self.outbox.await_taken(self.count, deadline)


@dataclass(slots=True)
class _Inbox:
    """What one peer has told."""

    words: Gloo
    peer: int
    told: deque[tuple[int, int]] = field(default_factory=deque)
    num_expected: int = 0  # messages, told or not
    posted: tuple[Pending, torch.Tensor] | None = None
    answers: deque[Pending] = field(default_factory=lambda: deque(maxlen=4))  # gloo drops a word whose handle is dropped

    def expect(self) -> None:
        """One more message is wanted."""
        self.num_expected += 1
        self._post()

    def next(self, deadline: Deadline) -> tuple[int, int]:
        """Where the next message lies."""
        self._post()
        if not self.told:
            assert self.posted is not None
            pending, word = self.posted
            pending.wait(deadline)
            self.posted = None
            count, *places = word.tolist()
            self.told.extend(zip(places[: 2 * count : 2], places[1 : 2 * count : 2], strict=True))
        self.num_expected -= 1
        return self.told.popleft()

    def answer(self) -> None:
        """Says that all it was told of is taken."""
        import torch

        self.answers.append(self.words.send(torch.zeros(1, dtype=torch.int64), self.peer, TAKEN))

    def _post(self) -> None:
        import torch

        if self.posted is None and self.num_expected > len(self.told):
            word = torch.empty(1 + 2 * BATCH, dtype=torch.int64)
            self.posted = self.words.receive(word, self.peer, HERE), word


@dataclass(frozen=True, slots=True)
class _Taking:
    """A message that `wait` copies."""

    channel: Ipc
    inbox: _Inbox
    data: torch.Tensor
    peer: int

    def wait(self, deadline: Deadline) -> None:
        number, offset = self.inbox.next(deadline)
        try:
            self.channel.take(number, offset, self.data, self.peer)
            if not self.inbox.told:
                self.channel.settle(self.data, self.peer)
                self.inbox.answer()
        except (RuntimeError, OSError) as error:
            raise TransportError(f"the peer's shared memory cannot be used: {first_line(error)}") from error


class _Landing:
    """A message by gloo, which `wait` brings to where it belongs."""

    def __init__(self, words: Gloo, data: torch.Tensor, peer: int) -> None:
        import torch

        self._data, self._host = data, torch.empty(data.shape, dtype=data.dtype)
        self._pending = words.receive(self._host, peer, SMALL)

    def wait(self, deadline: Deadline) -> None:
        self._pending.wait(deadline)
        self._data.copy_(self._host)


def _bytes_of(buffer: torch.Tensor) -> torch.Tensor:
    import torch

    return buffer.view(-1).view(torch.uint8)


def _settle(device: torch.device) -> None:
    """A GPU's work must be done before the other side is told of it."""
    import torch

    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
