"""A transport between members on one machine: a sender copies into a window that the receiver has mapped too, and gloo carries
only the words "filled" and "emptied". A window is two slots of anonymous shared memory, or of a GPU's memory by CUDA IPC
(unverified on a GPU): so it also joins a trainer and an engine on one GPU, which NCCL cannot, or on two of one machine.

The copy goes through memory twice, once on each side; in return nothing passes through a socket. A window stays for as long
as the channel: two slots of the largest message of its pair, rounded up to a power of two, beside the staging memory. What
lies in memory that the sender lends for as long as the channel (a GPU's parameters) passes through no window: the receiver
copies it from where it is.
"""

from __future__ import annotations

import base64
import json
import os
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from engine.bridge.transport import Deadline, Gloo, Pending, Rendezvous, TransportError, first_line

SLOTS = 2
FILLED, EMPTIED = 0, 1  # lanes of words
PAGE = 1 << 20  # the least size of a slot
LENT = -1  # in the place of a slot: what was filled is part of a lent storage


class Ipc:
    """See the head of this file; the interface is transport.Transport's."""

    depth = SLOTS

    def __init__(
        self, store: dist.Store, member: int, meeting: Rendezvous, lasting: Iterable[torch.Tensor] = ()
    ) -> None:
        """`lasting`: tensors whose memory stays as it is while a message from it is under way; it is held until `close`."""
        self._store, self._member = store, member
        self._words = Gloo(dist.PrefixStore("words", store), member, meeting)
        self._outgoing: dict[int, _Window] = {}
        self._incoming: dict[int, _Window] = {}
        self._sent: dict[int, deque[Pending]] = {}  # gloo drops a word whose handle is dropped before the peer asked for it
        self._old: list[_Window] = []
        storages = [tensor.untyped_storage() for tensor in lasting if can_lend(tensor)]
        self._lent = {storage.data_ptr(): storage for storage in storages}
        self._told: list[int] = []  # where those begin that have been named to the peers, by number
        self._borrowed: dict[tuple[int, int], torch.Tensor] = {}  # by peer and number

    def send(self, buffer: torch.Tensor, peer: int) -> Pending:
        """Says where the buffer lies, or copies it into the next slot, which is free: a member has no more than SLOTS messages
        under way."""
        data = buffer.view(-1).view(torch.uint8)
        lent = data.untyped_storage().data_ptr() in self._lent
        word = self._lend(data) if lent else self._fill(data, peer)
        filled = self._words.send(word, peer, FILLED)
        return _Emptied(filled, self._words.receive(torch.empty(1, dtype=torch.int64), peer, EMPTIED), word)

    def _lend(self, data: torch.Tensor) -> torch.Tensor:
        start = data.untyped_storage().data_ptr()
        if start not in self._told:
            self._store.set(f"lent {self._member} {len(self._told)}", json.dumps(handle(self._lent[start])))
            self._told.append(start)
        _settle(data.device)
        return torch.tensor([self._told.index(start), LENT, data.data_ptr() - start])

    def _fill(self, data: torch.Tensor, peer: int) -> torch.Tensor:
        window = self._outgoing.get(peer)
        if window is None or window.slot_bytes < data.numel():
            number = 0
            if window is not None:
                self._old.append(window)  # the peer may not have mapped it yet
                number = window.number + 1
            window = self._outgoing[peer] = _Window.make(data, number)
            self._store.set(f"window {self._member} {peer} {number}", window.told())
        slot = window.next()
        window.memory[slot, : data.numel()].copy_(data)
        _settle(window.memory.device)
        return torch.tensor([window.number, slot, 0])

    def receive(self, buffer: torch.Tensor, peer: int) -> Pending:
        """The copy out of the slot, or of what is lent, is made by `wait`."""
        word = torch.empty(3, dtype=torch.int64)
        return _Filled(self, self._words.receive(word, peer, FILLED), word, buffer.view(-1).view(torch.uint8), peer)

    def empty(self, word: torch.Tensor, data: torch.Tensor, peer: int) -> None:
        """Copies what the peer has filled or lent, and says so."""
        number, slot, start = word.tolist()
        source = self._borrow(peer, number) if slot == LENT else self._window(peer, number)[slot]
        data.copy_(source[start : start + data.numel()])
        for tensor in (source, data):  # a copy between two GPUs runs on a stream of the source's
            _settle(tensor.device)
        words = self._sent.setdefault(peer, deque(maxlen=SLOTS + 1))
        words.append(self._words.send(torch.zeros(1, dtype=torch.int64), peer, EMPTIED))

    def _window(self, peer: int, number: int) -> torch.Tensor:
        window = self._incoming.get(peer)
        if window is None or window.number != number:
            told = self._store.get(f"window {peer} {self._member} {number}")
            window = self._incoming[peer] = _Window.find(bytes(told), number)
        return window.memory

    def _borrow(self, peer: int, number: int) -> torch.Tensor:
        if (peer, number) not in self._borrowed:
            told = json.loads(bytes(self._store.get(f"lent {peer} {number}")))
            self._borrowed[peer, number] = opened(told)
        return self._borrowed[peer, number]

    def close(self) -> None:
        """Gives up whatever is under way, and the windows."""
        self._words.close()
        for window in (*self._outgoing.values(), *self._old):
            window.close()
        self._outgoing.clear()
        self._old.clear()
        self._incoming.clear()
        self._borrowed.clear()
        self._lent.clear()


class _Window:
    """Memory [SLOTS, slot_bytes] uint8 of one direction of a pair, and how the other side finds it."""

    def __init__(self, memory: torch.Tensor, number: int, file: int | None = None) -> None:
        self.memory, self.number, self._file, self._turn = memory, number, file, 0

    @property
    def slot_bytes(self) -> int:
        return self.memory.size(1)

    def next(self) -> int:
        self._turn = (self._turn + 1) % SLOTS
        return self._turn

    @staticmethod
    def make(data: torch.Tensor, number: int) -> _Window:
        """A new window with room for `data`, where the data is."""
        slot_bytes = max(PAGE, 1 << (data.numel() - 1).bit_length())  # so that it is outgrown a few times only
        if data.is_cuda:
            return _Window(torch.empty(SLOTS, slot_bytes, dtype=torch.uint8, device=data.device), number)
        file = os.memfd_create("semion")  # anonymous: a killed process leaves nothing behind
        os.ftruncate(file, SLOTS * slot_bytes)
        return _Window(_mapped(file, SLOTS * slot_bytes).view(SLOTS, slot_bytes), number, file)

    def told(self) -> str:
        """What the receiver needs to map it, as JSON."""
        shared = handle(self.memory.untyped_storage()) if self._file is None else file_handle(self._file)
        return json.dumps(shared | {"slot_bytes": self.slot_bytes})

    @staticmethod
    def find(told: bytes, number: int) -> _Window:
        """The peer's window, mapped here."""
        known: dict[str, Any] = json.loads(told)
        return _Window(opened(known).view(SLOTS, int(known["slot_bytes"])), number)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class _Emptied:
    """A message that is in its slot until the peer has copied it."""

    def __init__(self, filled: Pending, emptied: Pending, word: torch.Tensor) -> None:
        self._filled, self._emptied, self._word = filled, emptied, word

    def wait(self, deadline: Deadline) -> None:
        self._filled.wait(deadline)
        self._emptied.wait(deadline)


class _Filled:
    """A message that `wait` copies out of its slot."""

    def __init__(self, channel: Ipc, filled: Pending, word: torch.Tensor, data: torch.Tensor, peer: int) -> None:
        self._channel, self._filled, self._word, self._data, self._peer = channel, filled, word, data, peer

    def wait(self, deadline: Deadline) -> None:
        self._filled.wait(deadline)
        try:
            self._channel.empty(self._word, self._data, self._peer)
        except (RuntimeError, OSError) as error:
            raise TransportError(f"the peer's shared memory cannot be used: {first_line(error)}") from error


def can_lend(tensor: torch.Tensor) -> bool:
    """Whether another process can be told where the tensor lies; a CPU's ordinary memory has no name."""
    return tensor.is_cuda


def handle(storage: torch.UntypedStorage) -> dict[str, Any]:
    """How another process finds a storage on a GPU: torch's IPC handle, and which GPU it is whatever its number there."""
    device, *fields = storage._share_cuda_()
    coded = [base64.b64encode(field).decode() if isinstance(field, bytes) else field for field in fields]
    return {"gpu": str(torch.cuda.get_device_properties(device).uuid), "cuda": coded}


def file_handle(file: int) -> dict[str, Any]:
    """The same for an open file in memory."""
    found = os.fstat(file)
    return {"path": f"/proc/{os.getpid()}/fd/{file}", "inode": found.st_ino, "num_bytes": found.st_size}


def opened(told: dict[str, Any]) -> torch.Tensor:
    """What a handle names, mapped here as bytes; OSError where it is gone, or on a GPU that this process does not see."""
    if "path" in told:
        file = os.open(told["path"], os.O_RDWR)
        try:
            found = os.fstat(file)
            if (found.st_ino, found.st_size) != (told["inode"], told["num_bytes"]):
                raise OSError(f"{told['path']} is another file now")  # the peer has closed it
            return _mapped(file, found.st_size)
        finally:
            os.close(file)
    uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    if told["gpu"] not in uuids:
        raise OSError(f"GPU {told['gpu']} is not visible here: every process of the machine must see all its GPUs")
    device = uuids.index(told["gpu"])
    fields = [base64.b64decode(field) if isinstance(field, str) else field for field in told["cuda"]]
    storage = torch.UntypedStorage._new_shared_cuda(device, *fields)
    return torch.empty(0, dtype=torch.uint8, device=f"cuda:{device}").set_(storage)


def _mapped(file: int, num_bytes: int) -> torch.Tensor:
    return torch.from_file(f"/proc/self/fd/{file}", shared=True, size=num_bytes, dtype=torch.uint8)


def _settle(device: torch.device) -> None:
    """A GPU's copy must be done before the other side is told of it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
