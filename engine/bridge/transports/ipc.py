"""A transport between members on one machine: the receiver maps the sender's memory and copies out of it, one copy in all. gloo
carries the control messages about it, many at a time: where buffers are posted, and that they have been copied; and whatever is
too small to be worth it.
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
from engine.bridge.transports.gloo import NUM_TAGS, Gloo
from engine.config.transport import Setting

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

POSTED, ACKNOWLEDGED, INLINE = range(NUM_TAGS)  # two kinds of control message, and data too small for them
BATCH = 32  # buffers that one control message names at most


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
        self._control = Gloo(dist.PrefixStore("control", store), member, meeting)
        self._regions: dict[int, _Region] = {}  # own storages that peers may map, by address
        self._mapped: dict[tuple[int, int], torch.Tensor] = {}  # peers' regions, by their numbers
        self._outboxes: dict[int, _Outbox] = {}
        self._inboxes: dict[int, _Inbox] = {}

    def send(self, buffer: torch.Tensor, peer: int, *, registered: bool = False) -> Pending:
        """Posts where a registered buffer lies, at the latest when the message is waited for. Anything else goes by gloo, from
        the host."""
        data = _bytes_of(buffer)
        if not registered:
            return self._control.send(data.cpu(), peer, INLINE)
        region, offset = self._place(data)
        outbox = self._outboxes.setdefault(peer, _Outbox(self._control, peer, data.device))
        return _Posted(self, outbox, outbox.put(region.number, offset))

    def receive(self, buffer: torch.Tensor, peer: int, *, registered: bool = False) -> Pending:
        """A registered buffer is copied by `wait`."""
        data = _bytes_of(buffer)
        if not registered:
            return _Inline(self._control, data, peer)
        inbox = self._inboxes.setdefault(peer, _Inbox(self._control, peer))
        inbox.expect()
        return _Copying(self, inbox, data, peer)

    def copy_from(self, number: int, offset: int, data: torch.Tensor, peer: int) -> None:
        """Copies from where the peer's message lies."""
        if (peer, number) not in self._mapped:
            self._mapped[peer, number] = opened(json.loads(self._store.get(f"memory {peer} {number}")))
        data.copy_(self._mapped[peer, number][offset : offset + data.numel()], non_blocking=True)

    def flush_others(self, outbox: _Outbox) -> None:
        """Posts to every other peer what is held back for it. Called before a member waits for one peer: that one may wait for
        another sender first, and so on round to whoever waits for what is held back here."""
        for other in self._outboxes.values():
            if other is not outbox and other.held:
                other.flush()

    def finish_copies(self, data: torch.Tensor, peer: int) -> None:
        """Waits until every copy from this peer is made, between two GPUs too."""
        for device in {data.device, *(region.device for (other, _), region in self._mapped.items() if other == peer)}:
            _synchronize(device)

    def close(self) -> None:
        """Gives up whatever is under way, and other members' memory."""
        self._control.close()
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


def opened(where: dict[str, Any]) -> torch.Tensor:
    """A peer's storage, mapped here: [bytes] uint8. OSError where it is gone, or on a GPU that this process does not see."""
    import torch

    if "path" in where:
        file = os.open(where["path"], os.O_RDWR)
        try:
            if os.fstat(file).st_ino != where["inode"]:
                raise OSError(f"{where['path']} is another file now")  # the peer has closed its memory
            return torch.from_file(f"/proc/self/fd/{file}", shared=True, size=where["num_bytes"], dtype=torch.uint8)
        finally:
            os.close(file)
    uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    if where["gpu"] not in uuids:
        raise OSError(f"GPU {where['gpu']} is not visible here: every process of the machine must see all its GPUs")
    device = uuids.index(where["gpu"])  # numbers differ between processes
    fields = [base64.b64decode(field) if isinstance(field, str) else field for field in where["cuda"]]
    storage = torch.UntypedStorage._new_shared_cuda(device, *fields)
    return torch.empty(0, dtype=torch.uint8, device=f"cuda:{device}").set_(storage)


@dataclass(slots=True)
class _Batch:
    """A control message under way, and its acknowledgement."""

    end: int  # number of the buffer after the last that it names
    posted: Pending
    acknowledged: Pending
    buffers: tuple[torch.Tensor, torch.Tensor]


@dataclass(slots=True)
class _Outbox:
    """What is posted to one peer. The first buffer is posted alone and then more and more together, so that the peer begins at
    once and control messages are few."""

    control: Gloo
    peer: int
    device: torch.device  # of what is sent
    held: list[tuple[int, int]] = field(default_factory=list)  # back, to be posted with more
    batches: deque[_Batch] = field(default_factory=deque)
    together: int = 1
    num_put: int = 0
    num_flushed: int = 0
    num_acknowledged: int = 0

    def put(self, number: int, offset: int) -> int:
        """One more buffer: where it lies. How many there are then."""
        if self.num_acknowledged == self.num_put:
            self.together = 1
        self.held.append((number, offset))
        self.num_put += 1
        if len(self.held) >= self.together:
            self.flush()
        return self.num_put

    def flush(self) -> None:
        """Posts what is held back. Work on the GPU that fills it must be done by then."""
        import torch

        _synchronize(self.device)
        places, answer = torch.zeros(1 + 2 * BATCH, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
        places[0] = len(self.held)
        places[1 : 1 + 2 * len(self.held)] = torch.tensor(self.held).flatten()
        posted = self.control.send(places, self.peer, POSTED)
        acknowledged = self.control.receive(answer, self.peer, ACKNOWLEDGED)
        self.batches.append(_Batch(self.num_put, posted, acknowledged, (places, answer)))
        self.num_flushed += 1
        self.held.clear()
        self.together = min(BATCH, 2 * self.together)

    def await_acknowledged(self, count: int, deadline: Deadline) -> None:
        """Waits until the peer has copied the first `count` buffers."""
        while self.num_acknowledged < count:
            if not self.batches:
                self.flush()
            batch = self.batches[0]
            batch.posted.wait(deadline)
            batch.acknowledged.wait(deadline)
            self.num_acknowledged = batch.end
            self.batches.popleft()


@dataclass(frozen=True, slots=True)
class _Posted:
    """A posted buffer that its receiver has yet to copy."""

    transport: Ipc
    outbox: _Outbox
    count: int

    def wait(self, deadline: Deadline) -> None:
        if self.outbox.num_acknowledged < self.count:
            self.transport.flush_others(self.outbox)
            self.outbox.await_acknowledged(self.count, deadline)


@dataclass(slots=True)
class _Inbox:
    """What one peer has posted."""

    control: Gloo
    peer: int
    posted: deque[tuple[int, int]] = field(default_factory=deque)
    num_expected: int = 0  # buffers, posted or not
    receiving: tuple[Pending, torch.Tensor] | None = None  # the next control message
    answers: deque[Pending] = field(default_factory=lambda: deque(maxlen=4))  # gloo drops a message whose handle is dropped

    def expect(self) -> None:
        """One more buffer is wanted."""
        self.num_expected += 1
        self._listen()

    def next(self, deadline: Deadline) -> tuple[int, int]:
        """Where the next buffer lies."""
        self._listen()
        if not self.posted:
            assert self.receiving is not None
            pending, message = self.receiving
            pending.wait(deadline)
            self.receiving = None
            count, *places = message.tolist()
            self.posted.extend(zip(places[: 2 * count : 2], places[1 : 2 * count : 2], strict=True))
        self.num_expected -= 1
        return self.posted.popleft()

    def acknowledge(self) -> None:
        """Tells the peer that all it has posted is copied."""
        import torch

        self.answers.append(self.control.send(torch.zeros(1, dtype=torch.int64), self.peer, ACKNOWLEDGED))

    def _listen(self) -> None:
        import torch

        if self.receiving is None and self.num_expected > len(self.posted):
            message = torch.empty(1 + 2 * BATCH, dtype=torch.int64)
            self.receiving = self.control.receive(message, self.peer, POSTED), message


@dataclass(frozen=True, slots=True)
class _Copying:
    """A message that `wait` copies."""

    transport: Ipc
    inbox: _Inbox
    data: torch.Tensor
    peer: int

    def wait(self, deadline: Deadline) -> None:
        number, offset = self.inbox.next(deadline)
        try:
            self.transport.copy_from(number, offset, self.data, self.peer)
            if not self.inbox.posted:
                self.transport.finish_copies(self.data, self.peer)
                self.inbox.acknowledge()
        except (RuntimeError, OSError) as error:
            raise TransportError(f"the peer's shared memory cannot be used: {first_line(error)}") from error


class _Inline:
    """A message by gloo, which `wait` copies to where it belongs."""

    def __init__(self, control: Gloo, data: torch.Tensor, peer: int) -> None:
        import torch

        self._data, self._host = data, torch.empty(data.shape, dtype=data.dtype)
        self._pending = control.receive(self._host, peer, INLINE)

    def wait(self, deadline: Deadline) -> None:
        self._pending.wait(deadline)
        self._data.copy_(self._host)


def _bytes_of(buffer: torch.Tensor) -> torch.Tensor:
    import torch

    return buffer.view(-1).view(torch.uint8)


def _synchronize(device: torch.device) -> None:
    """Waits for a GPU's work, which must be done before the other side is told of it."""
    import torch

    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
