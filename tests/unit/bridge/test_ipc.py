"""The transport of one machine between two members in threads of this process: registered buffers are read where they lie,
control messages are few, small things go by gloo, and whatever cannot be mapped is said in words.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.bridge.transports import base
from engine.bridge.transports.base import Deadline, Rendezvous, TransportError, room_for
from engine.bridge.transports.ipc import Ipc, handle, opened
from engine.bridge.transports.rendezvous import join_store, listen, serve_store

HOST, LONG = "127.0.0.1", 20.0


@pytest.fixture
def ends() -> Iterator[tuple[Ipc, Ipc]]:
    """Two members."""
    server, port = listen(HOST)
    stores = [serve_store(server, HOST, 2, LONG), join_store(HOST, port, 2, LONG)]
    found: dict[int, Ipc] = {}

    def join(member: int) -> None:
        found[member] = Ipc(stores[member], member, Rendezvous(HOST, port, 2, LONG))

    threads = [threading.Thread(target=join, args=(member,)) for member in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    yield found[0], found[1]
    for end in found.values():
        end.close()


def carry(ends: tuple[Ipc, Ipc], buffer: torch.Tensor, *, registered: bool, before: float | None = None) -> torch.Tensor:
    """What the other end receives; `before`: written over the buffer between the two sides."""
    into = torch.empty_like(buffer)
    receiving = ends[1].receive(into, 0, registered=registered)
    sending = ends[0].send(buffer, 1, registered=registered)
    if before is not None:
        buffer.fill_(before)
    receiving.wait(Deadline(LONG))
    sending.wait(Deadline(LONG))
    return into


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("registered", [True, False])
def test_messages_arrive_bit_for_bit(ends: tuple[Ipc, Ipc], dtype: torch.dtype, registered: bool) -> None:
    kept = torch.arange(1000).to(dtype)
    for part in (kept, kept[10:20], kept[999:], kept.view(10, 100)[3:7]):
        assert torch.equal(carry(ends, part, registered=registered), part)


def test_registered_memory_is_read_where_it_lies(ends: tuple[Ipc, Ipc]) -> None:
    parameter, digest = torch.ones(100), torch.ones(100)
    assert carry(ends, parameter, registered=True, before=2.0).eq(2.0).all(), "it was copied on the way"
    assert parameter.untyped_storage().is_shared()
    assert carry(ends, digest, registered=False).eq(1.0).all()
    assert not digest.untyped_storage().is_shared()


def test_a_storage_is_announced_once_whatever_is_sent_of_it(ends: tuple[Ipc, Ipc]) -> None:
    """Parameters that are views of one buffer, as under the distributed optimizer; and again at the next sync."""
    buffer = torch.arange(3000.0)
    weights = [buffer[:1000], buffer[1000:1500], buffer[1500:]]
    for _ in range(2):
        for weight in weights:
            assert torch.equal(carry(ends, weight, registered=True), weight)
        weights[1].mul_(-1)
    assert (len(ends[0]._regions), len(ends[1]._mapped)) == (1, 1)


@pytest.mark.parametrize("ahead", [1, 3, Ipc.depth])
def test_many_buffers_need_few_control_messages(ends: tuple[Ipc, Ipc], ahead: int) -> None:
    """Two syncs of 150 messages, each end with as many under way as it has room for; a digest comes after them."""
    parameters = torch.arange(150 * 20).view(150, 20)
    arrived = torch.zeros_like(parameters)
    flushes = 0

    def send() -> None:
        nonlocal flushes
        under_way: deque[Any] = deque()
        for row in parameters:
            if len(under_way) == ahead:
                under_way.popleft().wait(Deadline(LONG))
            under_way.append(ends[0].send(row, 1, registered=True))
        while under_way:
            under_way.popleft().wait(Deadline(LONG))
        flushes = ends[0]._outboxes[1].num_flushed
        ends[0].send(parameters.sum(0), 1).wait(Deadline(LONG))

    for sync in (1, 2):
        parameters.mul_(sync)
        sending = threading.Thread(target=send)
        sending.start()
        posted: deque[Any] = deque()
        for row in arrived:
            if len(posted) == ahead:
                posted.popleft().wait(Deadline(LONG))
            posted.append(ends[1].receive(row, 0, registered=True))
        while posted:
            posted.popleft().wait(Deadline(LONG))
        total = torch.zeros(20, dtype=torch.int64)
        ends[1].receive(total, 0).wait(Deadline(LONG))
        sending.join(LONG)
        assert not sending.is_alive()
        assert torch.equal(arrived, parameters)
        assert torch.equal(total, parameters.sum(0))
    assert flushes <= {1: 2 * 150, 3: 2 * 75, Ipc.depth: 2 * 10}[ahead]


def test_room_is_what_shared_memory_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.shutil, "disk_usage", lambda folder: SimpleNamespace(free=400))
    assert room_for(399)
    assert not room_for(400)


def test_a_late_peer_ends_both_kinds_of_wait(ends: tuple[Ipc, Ipc]) -> None:
    with pytest.raises(TransportError, match="Timed out"):
        ends[1].receive(torch.empty(3), 0, registered=True).wait(Deadline(0.1))
    with pytest.raises(TransportError):
        ends[0].send(torch.ones(3), 1, registered=True).wait(Deadline(5.0))  # the other has taken its connection down


def test_a_closed_peer_ends_both_kinds_of_wait(ends: tuple[Ipc, Ipc]) -> None:
    carry(ends, torch.ones(3), registered=True)
    waiting = [ends[1].receive(torch.empty(3), 0, registered=True), ends[1].receive(torch.empty(3), 0)]
    ends[0].close()
    for pending in waiting:
        with pytest.raises(TransportError):
            pending.wait(Deadline(LONG))


@pytest.mark.parametrize(
    ("change", "words"), [({"inode": 1}, "is another file now"), ({"path": "/proc/self/fd/99999"}, "No such file")]
)
def test_memory_that_is_not_there_any_more_is_said_in_words(ends: tuple[Ipc, Ipc], change: dict[str, Any], words: str) -> None:
    parameter = torch.ones(100)
    carry(ends, parameter, registered=True)
    ends[1]._mapped.clear()
    told = json.loads(ends[0]._store.get("memory 0 0"))
    ends[0]._store.set("memory 0 0", json.dumps(told | change))
    receiving = ends[1].receive(torch.empty(100), 0, registered=True)
    ends[0].send(parameter, 1, registered=True)
    with pytest.raises(TransportError, match=f"shared memory cannot be used: .*{words}"):
        receiving.wait(Deadline(LONG))


GPUS = ["GPU-a", "GPU-b", "GPU-c"]  # as the receiver numbers them


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """GPUs without memory; with what torch was asked to open a handle."""
    asked: list[tuple[Any, ...]] = []

    def refuse(*fields: Any) -> None:
        asked.append(fields)
        raise RuntimeError("no memory here")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(GPUS))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=GPUS[index]))
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", refuse)
    return asked


def test_a_gpus_memory_is_found_by_the_gpus_uuid(gpus: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender's number of it, 0, is another one here; torch's handles survive JSON."""
    fields = (b"\xffhandle", 4096, 512, b"counter", 3, b"event", True)
    sender: Any = SimpleNamespace(_share_cuda_=lambda: (0, *fields), device=torch.device("cuda"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{'cab'[index]}"))
        told = json.loads(json.dumps(handle(sender)))
    with pytest.raises(RuntimeError, match="no memory here"):
        opened(told)
    assert gpus == [(2, *fields)]


def test_a_gpu_that_is_not_visible_is_named(gpus: list[tuple[Any, ...]]) -> None:
    with pytest.raises(OSError, match=r"^GPU GPU-d is not visible here: every process of the machine must see all"):
        opened({"gpu": "GPU-d", "cuda": []})
    assert gpus == []
