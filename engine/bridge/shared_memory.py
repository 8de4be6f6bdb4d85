"""A transport between members on one machine: a sender copies into a window that the receiver has mapped too, and gloo carries
only the words "filled" and "emptied". A window is two slots of anonymous shared memory, or of a GPU's memory by CUDA IPC
(unverified on a GPU): so it also joins a trainer and an engine on one GPU, which NCCL cannot.

The copy goes through memory twice, once on each side; in return nothing passes through a socket. A window stays for as long
as the channel: two slots of the largest message of its pair, rounded up to a power of two, beside the staging memory.
"""

from __future__ import annotations

import base64
import json
import os
from collections import deque
from typing import Any

import torch
import torch.distributed as dist

from engine.bridge.transport import Deadline, Gloo, Pending, Rendezvous, TransportError, first_line

SLOTS = 2
FILLED, EMPTIED = 0, 1  # lanes of words
PAGE = 1 << 20  # the least size of a slot


class Ipc:
    """See the head of this file; the interface is transport.Transport's."""

    depth = SLOTS

    def __init__(self, store: dist.Store, member: int, meeting: Rendezvous) -> None:
        self._store, self._member = store, member
        self._words = Gloo(dist.PrefixStore("words", store), member, meeting)
        self._outgoing: dict[int, _Window] = {}
        self._incoming: dict[int, _Window] = {}
        self._sent: dict[int, deque[Pending]] = {}  # gloo drops a word whose handle is dropped before the peer asked for it
        self._old: list[_Window] = []

    def send(self, buffer: torch.Tensor, peer: int) -> Pending:
        """Copies the buffer into the next slot, which is free: a member has no more than SLOTS messages under way."""
        data = buffer.view(-1).view(torch.uint8)
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
        _settle(data.device)
        word = torch.tensor([window.number, slot])
        filled = self._words.send(word, peer, FILLED)
        return _Emptied(filled, self._words.receive(torch.empty(1, dtype=torch.int64), peer, EMPTIED), word)

    def receive(self, buffer: torch.Tensor, peer: int) -> Pending:
        """The copy out of the slot is made by `wait`."""
        word = torch.empty(2, dtype=torch.int64)
        return _Filled(self, self._words.receive(word, peer, FILLED), word, buffer.view(-1).view(torch.uint8), peer)

    def empty(self, word: torch.Tensor, data: torch.Tensor, peer: int) -> None:
        """Copies a filled slot of the peer's window and says so."""
        number, slot = word.tolist()
        window = self._incoming.get(peer)
        if window is None or window.number != number:
            told = self._store.get(f"window {peer} {self._member} {number}")
            window = self._incoming[peer] = _Window.find(bytes(told), number, data.device)
        data.copy_(window.memory[slot, : data.numel()])
        _settle(data.device)
        words = self._sent.setdefault(peer, deque(maxlen=SLOTS + 1))
        words.append(self._words.send(torch.zeros(1, dtype=torch.int64), peer, EMPTIED))

    def close(self) -> None:
        """Gives up whatever is under way, and the windows."""
        self._words.close()
        for window in (*self._outgoing.values(), *self._old):
            window.close()
        self._outgoing.clear()
        self._old.clear()
        self._incoming.clear()


def slot_size(num_bytes: int) -> int:
    """Bytes of the slots of a window made for a message of that size: a power of two, outgrown a few times only."""
    return max(PAGE, 1 << (num_bytes - 1).bit_length())


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
        slot_bytes = slot_size(data.numel())
        if data.is_cuda:
            return _Window(torch.empty(SLOTS, slot_bytes, dtype=torch.uint8, device=data.device), number)
        file = os.memfd_create("semion")  # anonymous: a killed process leaves nothing behind
        os.ftruncate(file, SLOTS * slot_bytes)
        return _Window(_mapped(file, slot_bytes), number, file)

    def told(self) -> str:
        """What the receiver needs to map it, as JSON."""
        if self._file is not None:
            path, inode = f"/proc/{os.getpid()}/fd/{self._file}", os.fstat(self._file).st_ino
            return json.dumps({"path": path, "inode": inode, "slot_bytes": self.slot_bytes})
        shared = self.memory.untyped_storage()._share_cuda_()
        fields = [base64.b64encode(f).decode() if isinstance(f, bytes) else f for f in shared]
        return json.dumps({"cuda": fields, "slot_bytes": self.slot_bytes})

    @staticmethod
    def find(told: bytes, number: int, device: torch.device) -> _Window:
        """The peer's window, mapped here."""
        known: dict[str, Any] = json.loads(told)
        slot_bytes = int(known["slot_bytes"])
        if "path" in known:
            file = os.open(known["path"], os.O_RDWR)
            try:
                found = os.fstat(file)
                if (found.st_ino, found.st_size) != (known["inode"], SLOTS * slot_bytes):
                    raise OSError(f"{known['path']} is another file now")  # the peer has closed its window
                return _Window(_mapped(file, slot_bytes), number)
            finally:
                os.close(file)
        fields = [base64.b64decode(f) if isinstance(f, str) else f for f in known["cuda"]]
        fields[0] = device.index  # the peer's number of the same GPU means nothing here
        storage = torch.UntypedStorage._new_shared_cuda(*fields)
        flat = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
        return _Window(flat.view(SLOTS, slot_bytes), number)

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


def _mapped(file: int, slot_bytes: int) -> torch.Tensor:
    path = f"/proc/self/fd/{file}"
    return torch.from_file(path, shared=True, size=SLOTS * slot_bytes, dtype=torch.uint8).view(SLOTS, slot_bytes)


def _settle(device: torch.device) -> None:
    """A GPU's copy must be done before the other side is told of it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
