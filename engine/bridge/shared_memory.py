"""A transport between members on one machine: the receiver maps memory of the sender and copies out of it; gloo carries only
the words "here it is" and "taken". A sender's lasting memory, parameters and staging, is read where it lies: one copy in all.
Anything else, such as what an engine passes on, goes through a window, two slots of memory of the transport's own. On a CPU
lasting memory moves into shared memory (/dev/shm) at the first sync; where that has no room, it takes the window too. On a GPU
it is CUDA IPC (unverified on a GPU): so this also joins a trainer and an engine on one GPU, which NCCL cannot.

A window stays for as long as the channel: two slots of its pair's largest such message, rounded up to a power of two,
beside the staging memory.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
from collections import deque
from typing import Any

import torch
import torch.distributed as dist

from engine.bridge.transport import Deadline, Gloo, Pending, Rendezvous, TransportError, first_line

log = logging.getLogger(__name__)
SHARED_FOLDER = "/dev/shm"  # where torch puts shared memory
SLOTS = 2
GIVEN, TAKEN = 0, 1  # lanes of words
PAGE = 1 << 20  # the least size of a slot


class Ipc:
    """See the head of this file; the interface is transport.Transport's."""

    depth = SLOTS

    def __init__(self, store: dist.Store, member: int, meeting: Rendezvous) -> None:
        self._store, self._member = store, member
        self._words = Gloo(dist.PrefixStore("words", store), member, meeting)
        self._windows: dict[int, _Window] = {}  # by peer
        self._old: list[_Window] = []  # outgrown; the peer may not have mapped them yet
        self._lasting: dict[int, _Region] = {}  # by address
        self._mapped: dict[tuple[int, int], torch.Tensor] = {}  # of peers, by their numbers
        self._num_regions = 0
        self._sent: dict[int, deque[Pending]] = {}  # gloo drops a word whose handle is dropped before the peer asked for it

    def send(self, buffer: torch.Tensor, peer: int, *, lasting: bool = False) -> Pending:
        """Tells the peer where a lasting buffer is, or copies it into the window's next slot, which is free: a member has no
        more than SLOTS messages under way."""
        data = _bytes_of(buffer)
        region, offset = self._place(data) if lasting and _can_be_shared(data) else self._fill(data, peer)
        for device in {data.device, region.storage.device}:  # a digest on the host may go through a window on a GPU
            _settle(device)
        word = torch.tensor([region.number, offset])
        given = self._words.send(word, peer, GIVEN)
        return _Given(given, self._words.receive(torch.empty(1, dtype=torch.int64), peer, TAKEN), word)

    def receive(self, buffer: torch.Tensor, peer: int) -> Pending:
        """The copy is made by `wait`."""
        word = torch.empty(2, dtype=torch.int64)
        return _Taking(self, self._words.receive(word, peer, GIVEN), word, _bytes_of(buffer), peer)

    def take(self, word: torch.Tensor, data: torch.Tensor, peer: int) -> None:
        """Copies what the word tells of, and says so."""
        number, offset = word.tolist()
        if (peer, number) not in self._mapped:
            self._mapped[peer, number] = opened(json.loads(self._store.get(f"memory {peer} {number}")))
        source = self._mapped[peer, number]
        data.copy_(source[offset : offset + data.numel()])
        for tensor in (source, data):  # a copy between two GPUs runs on a stream of the source's
            _settle(tensor.device)
        words = self._sent.setdefault(peer, deque(maxlen=SLOTS + 1))
        words.append(self._words.send(torch.zeros(1, dtype=torch.int64), peer, TAKEN))

    def close(self) -> None:
        """Gives up whatever is under way, the windows, and other members' memory."""
        self._words.close()
        for window in (*self._windows.values(), *self._old):
            window.region.close()
        self._windows.clear()
        self._old.clear()
        self._lasting.clear()
        self._mapped.clear()

    def _place(self, data: torch.Tensor) -> tuple[_Region, int]:
        """The region that is the buffer's whole storage, and where in it the buffer begins."""
        storage = data.untyped_storage()
        offset = data.data_ptr() - storage.data_ptr()
        region = self._lasting.get(storage.data_ptr())
        if region is None:
            region = _Region(storage)
            self._announce(region)
            self._lasting[storage.data_ptr()] = region  # its address now: it has moved, if it was not shared before
        return region, offset

    def _fill(self, data: torch.Tensor, peer: int) -> tuple[_Region, int]:
        window = self._windows.get(peer)
        if window is None or window.slot_bytes < data.numel():
            if window is not None:
                self._old.append(window)
            window = self._windows[peer] = _Window.make(data)
            self._announce(window.region)
        return window.region, window.fill(data)

    def _announce(self, region: _Region) -> None:
        region.number = self._num_regions
        self._num_regions += 1
        self._store.set(f"memory {self._member} {region.number}", region.told())


def slot_size(num_bytes: int) -> int:
    """Bytes of the slots of a window made for a message of that size: a power of two, outgrown a few times only."""
    return max(PAGE, 1 << (num_bytes - 1).bit_length())


class _Region:
    """A whole storage that other members can map: kept here, so that its address stays its own. `file` holds it where torch
    did not make it."""

    def __init__(self, storage: torch.UntypedStorage, file: int | None = None) -> None:
        self.storage, self._file, self.number = storage, file, -1

    def told(self) -> str:
        """What a peer needs to map it, as JSON; a CPU's storage moves into shared memory."""
        if self.storage.device.type != "cpu":
            return json.dumps(handle(self.storage))
        file = self._file if self._file is not None else self.storage._share_fd_cpu_()[0]
        path, inode = f"/proc/{os.getpid()}/fd/{file}", os.fstat(file).st_ino
        return json.dumps({"path": path, "inode": inode, "bytes": self.storage.nbytes()})

    def close(self) -> None:
        """Whoever has not mapped it yet will not find it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class _Window:
    """Slots that a sender fills in turn."""

    def __init__(self, region: _Region, slots: torch.Tensor) -> None:
        self.region, self.slot_bytes = region, slots.size(1)
        self._slots, self._turn = slots, 0

    @staticmethod
    def make(data: torch.Tensor) -> _Window:
        """A window with room for `data`, where the data is; on a CPU anonymous, so that a killed process leaves nothing."""
        slot_bytes = slot_size(data.numel())
        file = None
        if data.is_cuda:
            memory = torch.empty(SLOTS * slot_bytes, dtype=torch.uint8, device=data.device)
        else:
            file = os.memfd_create("semion")
            os.ftruncate(file, SLOTS * slot_bytes)
            memory = _mapped(file, SLOTS * slot_bytes)
        return _Window(_Region(memory.untyped_storage(), file), memory.view(SLOTS, slot_bytes))

    def fill(self, data: torch.Tensor) -> int:
        """Copies the data into the next slot; where in the region that begins."""
        self._turn = (self._turn + 1) % SLOTS
        self._slots[self._turn, : data.numel()].copy_(data)
        return self._turn * self.slot_bytes


def handle(storage: torch.UntypedStorage) -> dict[str, Any]:
    """How another process finds a storage on a GPU: torch's IPC handle, and which GPU it is whatever its number there."""
    device, *fields = storage._share_cuda_()
    coded = [base64.b64encode(field).decode() if isinstance(field, bytes) else field for field in fields]
    return {"gpu": str(torch.cuda.get_device_properties(device).uuid), "cuda": coded}


def opened(told: dict[str, Any]) -> torch.Tensor:
    """A peer's region, mapped here: [bytes] uint8. OSError where it is gone, or on a GPU that this process does not see."""
    if "path" in told:
        file = os.open(told["path"], os.O_RDWR)
        try:
            if os.fstat(file).st_ino != told["inode"]:
                raise OSError(f"{told['path']} is another file now")  # the peer has closed its memory
            return _mapped(file, told["bytes"])
        finally:
            os.close(file)
    uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    if told["gpu"] not in uuids:
        raise OSError(f"GPU {told['gpu']} is not visible here: every process of the machine must see all its GPUs")
    device = uuids.index(told["gpu"])  # numbers differ between processes
    fields = [base64.b64decode(field) if isinstance(field, str) else field for field in told["cuda"]]
    storage = torch.UntypedStorage._new_shared_cuda(device, *fields)
    return torch.empty(0, dtype=torch.uint8, device=f"cuda:{device}").set_(storage)


class _Given:
    """A message that its receiver has yet to copy."""

    def __init__(self, given: Pending, taken: Pending, word: torch.Tensor) -> None:
        self._given, self._taken, self._word = given, taken, word

    def wait(self, deadline: Deadline) -> None:
        self._given.wait(deadline)
        self._taken.wait(deadline)


class _Taking:
    """A message that `wait` copies."""

    def __init__(self, channel: Ipc, given: Pending, word: torch.Tensor, data: torch.Tensor, peer: int) -> None:
        self._channel, self._given, self._word, self._data, self._peer = channel, given, word, data, peer

    def wait(self, deadline: Deadline) -> None:
        self._given.wait(deadline)
        try:
            self._channel.take(self._word, self._data, self._peer)
        except (RuntimeError, OSError) as error:
            raise TransportError(f"the peer's shared memory cannot be used: {first_line(error)}") from error


def _mapped(file: int, num_bytes: int) -> torch.Tensor:
    return torch.from_file(f"/proc/self/fd/{file}", shared=True, size=num_bytes, dtype=torch.uint8)


def _can_be_shared(data: torch.Tensor) -> bool:
    """Whether the storage is in shared memory, or that has room for it: past its end torch would not fail but be killed."""
    storage = data.untyped_storage()
    if data.is_cuda or storage.is_shared() or storage.nbytes() < shutil.disk_usage(SHARED_FOLDER).free:
        return True
    log.warning("%s has no room for %d bytes: weight syncs copy it once more", SHARED_FOLDER, storage.nbytes())
    return False


def _bytes_of(buffer: torch.Tensor) -> torch.Tensor:
    return buffer.view(-1).view(torch.uint8)


def _settle(device: torch.device) -> None:
    """A GPU's copy must be done before the other side is told of it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
