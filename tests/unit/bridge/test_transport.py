"""Real gloo connections on the loopback interface between two members in threads of this process: where they listen, that
messages keep their order, that a member which closes or never comes ends the other's wait at once, and in which words.
"""

from __future__ import annotations

import datetime
import socket
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from engine.bridge.transports.base import Deadline, Rendezvous, Transport, TransportError, first_line, own_address
from engine.bridge.transports.nccl import _gather, grouped
from engine.bridge.transports.registry import open_transport
from engine.bridge.transports.rendezvous import join_store, listen, serve_store

HOST, LONG = "127.0.0.1", 20.0  # seconds; nothing here may wait for so long


class Meeting:
    """A store, and transports over it."""

    def __init__(self, num_members: int) -> None:
        server, self.port = listen(HOST)
        self.num_members = num_members
        self.stores: list[dist.TCPStore] = [serve_store(server, HOST, num_members, LONG)]
        self.stores += [join_store(HOST, self.port, num_members, LONG) for _ in range(1, num_members)]

    def rendezvous(self, seconds: float = LONG, epoch: int = 0) -> Rendezvous:
        return Rendezvous(HOST, self.port, self.num_members, seconds, epoch)

    def open(self, epoch: int = 0) -> list[Transport]:
        """All members' ends."""
        found: dict[int, Transport] = {}

        def join(member: int) -> None:
            found[member] = open_transport("gloo", self.stores[member], member, self.rendezvous(epoch=epoch))

        threads = [threading.Thread(target=join, args=(member,)) for member in range(self.num_members)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
        return [found[member] for member in range(self.num_members)]


@pytest.fixture
def ends() -> Iterator[list[Transport]]:
    """Three members of one meeting."""
    opened = Meeting(3).open()
    yield opened
    for transport in opened:
        transport.close()


def test_the_rendezvous_listens_on_the_given_address_only() -> None:
    server, port = listen(HOST)
    with server:
        assert server.getsockname() == (HOST, port)
        with socket.create_connection((HOST, port), timeout=5):
            pass
        # 127.0.0.2 is this machine too: a server on every interface would answer there
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5)


def test_a_member_listens_on_the_interface_that_leads_to_the_rendezvous() -> None:
    assert own_address(Rendezvous(HOST, 29500, 2, LONG)) == HOST
    assert own_address(Rendezvous("127.0.0.2", 29500, 2, LONG)) in (HOST, "127.0.0.2")


def test_messages_of_a_pair_keep_their_order_and_pairs_do_not_mix(ends: list[Transport]) -> None:
    """Several are under way at once, waited for in another order than they were posted in."""
    into = [torch.zeros(3), torch.zeros(5), torch.zeros(3)]
    received = [ends[0].receive(into[0], 1), ends[0].receive(into[1], 1), ends[0].receive(into[2], 2)]
    sent = [
        ends[2].send(torch.full((3,), 30.0), 0),
        ends[1].send(torch.full((3,), 10.0), 0),
        ends[1].send(torch.full((5,), 20.0), 0),
    ]
    for pending in reversed((*received, *sent)):
        pending.wait(Deadline(LONG))
    assert [tensor.tolist() for tensor in into] == [[10.0] * 3, [20.0] * 5, [30.0] * 3]


def failure(transport: Transport, peer: int, *, sends: bool = False) -> str:
    """What waiting for a message says."""
    buffer = torch.zeros(3)
    pending = transport.send(buffer, peer) if sends else transport.receive(buffer, peer)
    with pytest.raises(TransportError) as caught:
        pending.wait(Deadline(LONG))
    return str(caught.value)


def test_close_ends_every_wait_for_the_member(ends: list[Transport]) -> None:
    """Waits under way, whether or not the two have ever exchanged anything, and those that begin later."""
    buffer, met = torch.zeros(3), torch.ones(3)
    arriving = ends[1].receive(buffer, 0)
    ends[0].send(met, 1).wait(Deadline(LONG))
    arriving.wait(Deadline(LONG))
    waiting = [ends[1].receive(buffer, 0), ends[2].receive(torch.zeros(3), 0)]
    closing = threading.Timer(0.1, ends[0].close)
    closing.start()
    for pending in waiting:
        with pytest.raises(TransportError, match="closed by peer"):  # and not "timed out"
            pending.wait(Deadline(LONG))
    closing.join()
    assert "closed by peer" in failure(ends[1], 0)
    assert "closed by peer" in failure(ends[2], 0, sends=True), "a message that cannot start is told by its wait"
    assert "closure" in failure(ends[0], 1)
    ends[0].close()


def test_the_others_go_on_without_the_member_that_closed(ends: list[Transport]) -> None:
    ends[0].close()
    arrived = torch.zeros(3)
    receiving = ends[1].receive(arrived, 2)
    ends[2].send(torch.ones(3), 1).wait(Deadline(LONG))
    receiving.wait(Deadline(LONG))
    assert arrived.tolist() == [1.0] * 3


def test_a_silent_member_is_late_at_the_deadline(ends: list[Transport]) -> None:
    with pytest.raises(TransportError, match="Timed out"):
        ends[0].receive(torch.zeros(3), 1).wait(Deadline(0.1))


def test_a_new_epoch_is_a_new_transport_over_the_same_store() -> None:
    meeting = Meeting(2)
    for transport in meeting.open(0):
        transport.close()
    one, other = meeting.open(1)
    arrived = torch.zeros(2)
    receiving = other.receive(arrived, 0)
    one.send(torch.ones(2), 1).wait(Deadline(LONG))
    receiving.wait(Deadline(LONG))
    assert arrived.tolist() == [1.0, 1.0]
    one.close()


def test_who_does_not_come_is_missed_in_words() -> None:
    meeting = Meeting(2)
    with pytest.raises(TransportError, match="member 0 did not meet the others: "):
        open_transport("gloo", meeting.stores[0], 0, meeting.rendezvous(0.2))


def test_a_deadline_is_never_a_wait_without_end() -> None:
    over = Deadline(0.0)
    assert (over.seconds, over.remaining()) == (0.0, 1e-3)
    assert 0 < Deadline(5.0).remaining() <= 5.0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("[/builds/gloo/transport/tcp/pair.cc:551] Connection closed by peer", "Connection closed by peer"),
        ("[pair.cc:5] Timed out waiting 99ms. This is typically due to a slow rank.\nadvice", "Timed out waiting 99ms"),
        ("plain words\nand a trace", "plain words"),
        ("", "RuntimeError"),
    ],
)
def test_torchs_words_without_its_sources_and_advice(error: str, words: str) -> None:
    assert first_line(RuntimeError(error)) == words


def test_a_message_is_a_group_of_one_and_a_refused_one_leaves_no_group_open() -> None:
    """As an NCCL backend has it: both calls take nothing, and what is left open swallows the thread's later calls."""
    calls: list[str] = []

    class Backend:
        def _start_coalescing(self) -> None:
            calls.append("start")

        def _end_coalescing(self) -> str:
            calls.append("end")
            return "work"

    def refuse() -> None:
        raise RuntimeError("connection closed")

    assert grouped(Backend(), lambda: calls.append("send")) == "work"
    with pytest.raises(RuntimeError, match="connection closed"):
        grouped(Backend(), refuse)
    assert calls == ["start", "send", "end", "start", "end"]


class Counting:
    """A member's connection to a real store, and how many keys it asked for."""

    def __init__(self, store: dist.TCPStore) -> None:
        self._store, self.num_keys = store, 0

    def set(self, key: str, value: str) -> None:
        self.num_keys += 1
        self._store.set(key, value)

    def add(self, key: str, amount: int) -> int:
        self.num_keys += 1
        return int(self._store.add(key, amount))

    def check(self, keys: list[str]) -> bool:
        self.num_keys += len(keys)
        return bool(self._store.check(keys))

    def wait(self, keys: list[str], timeout: datetime.timedelta) -> None:
        self.num_keys += len(keys)
        self._store.wait(keys, timeout)


def gathered(meeting: Meeting, come: range, seconds: float) -> tuple[dict[int, str], list[int]]:
    """(What members were told that did not meet all others, the keys that each asked for), of those that come."""
    stores, told = [Counting(store) for store in meeting.stores], dict[int, str]()

    def join(member: int) -> None:
        try:
            _gather(stores[member], member, meeting.rendezvous(seconds))  # type: ignore[arg-type]
        except RuntimeError as error:
            told[member] = str(error)

    threads = [threading.Thread(target=join, args=(member,)) for member in come]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not any(thread.is_alive() for thread in threads)
    return told, [stores[member].num_keys for member in come]


@pytest.mark.parametrize("num_members", [2, 64])
def test_members_over_nccl_meet_with_as_many_keys_each_whatever_their_number(num_members: int) -> None:
    told, num_keys = gathered(Meeting(num_members), range(num_members), LONG)
    assert not told
    assert sorted(num_keys) == [*[3] * (num_members - 1), 4], "one of them has said that all are here"


def test_who_does_not_come_over_nccl_is_named_by_one_member_alone() -> None:
    """Of sixteen members three stay away; their neighbours ask for no key more than they must."""
    told, num_keys = gathered(Meeting(16), range(13), 0.3)
    late = "3 of 16 members{} did not come within sync.timeout_seconds = 0.3"
    assert told == {member: late.format(" (member 13, 14, 15)" if member == 0 else "") for member in range(13)}
    assert num_keys == [4 + 16, *[4] * 12]
