"""How bytes get from one member of a weight sync to another: the rendezvous, and transports behind one small protocol. It
knows buffers and members, not tensors or models. Nothing is pickled, and every wait has a deadline.

A transport carries the messages of a pair of members in the order in which both name them. After `close` every wait for that
member fails soon, so that one failure reaches whoever depends on it; so does its death, but over NCCL, where only the
deadline tells.
"""

from __future__ import annotations

import datetime
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

Kind = Literal["gloo", "nccl", "ipc"]
LANES = 3  # of a pair over gloo, each with an order of its own
FAILED, POLL_SECONDS = "failed", 0.25  # a word in the store, and how often it is looked for
UNMET = "did not meet the others"  # in the words of every failure to open a transport


class TransportError(Exception):
    """A message was not delivered: the peer is gone, late, or has given up."""


class Deadline:
    """A moment by which a whole sync must be over."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, never less than a millisecond: a wait without any would be one without end."""
        return max(1e-3, self._end - time.monotonic())


class Pending(Protocol):
    """A message under way; its buffer must be left alone until `wait` returns, which also tells that it could not start."""

    def wait(self, deadline: Deadline) -> None:
        """TransportError when it is not delivered by then."""
        ...


class Transport(Protocol):
    """Point-to-point messages between numbered members.

    A transport may run all messages of a member one after another. So trainers name theirs in the plan's order, and an engine
    names none that another engine passes on before it has named all earlier ones that it passes on itself.
    """

    depth: int  # messages that a member may have under way

    def send(self, buffer: torch.Tensor, peer: int, *, lasting: bool = False) -> Pending:
        """Starts sending a contiguous buffer. `lasting`: its memory, a parameter's or staging memory, is used again and again,
        so that a transport may let the receiver map it and read it where it lies, until the message is waited for."""
        ...

    def receive(self, buffer: torch.Tensor, peer: int, *, lasting: bool = False) -> Pending:
        """Starts filling a contiguous buffer of the size that the peer sends; `lasting` as the peer says."""
        ...

    def close(self) -> None:
        """Gives up whatever is under way, here and at the peers."""
        ...


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the members meet. A new epoch is a new transport over the same store: the old one may be broken."""

    host: str
    port: int
    num_members: int
    timeout_seconds: float
    epoch: int = 0


def listen(host: str) -> tuple[socket.socket, int]:
    """A listening socket on a free port of `host` only: a rendezvous never opens other interfaces."""
    server = socket.create_server((host, 0))
    return server, server.getsockname()[1]


def serve_store(server: socket.socket, host: str, world_size: int, timeout_seconds: float) -> dist.TCPStore:
    """The key-value store of a rendezvous on an already bound socket, which it takes over."""
    port = server.getsockname()[1]
    return dist.TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=datetime.timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        master_listen_fd=server.detach(),
    )


def join_store(host: str, port: int, world_size: int, timeout_seconds: float) -> dist.TCPStore:
    """The same store, from a member that does not serve it."""
    timeout = datetime.timedelta(seconds=timeout_seconds)
    return dist.TCPStore(host, port, world_size, timeout=timeout, wait_for_workers=False)


def own_address(meeting: Rendezvous) -> str:
    """The address of this machine on the interface that leads to the rendezvous."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((meeting.host, meeting.port))
        return str(probe.getsockname()[0])


def open_transport(kind: Kind, store: dist.Store, member: int, meeting: Rendezvous) -> Transport:
    """Joins the members of this epoch; collective over all of them. TransportError when they do not come in time."""
    epoch = dist.PrefixStore(f"epoch {meeting.epoch}", store)
    try:
        if kind == "ipc":
            from engine.bridge.shared_memory import Ipc

            return Ipc(epoch, member, meeting)
        return (Gloo if kind == "gloo" else Nccl)(epoch, member, meeting)
    except RuntimeError as error:
        raise TransportError(f"member {member} {UNMET}: {first_line(error)}") from error


class Gloo:
    """CPU buffers over TCP, on one interface."""

    depth = 8

    def __init__(self, store: dist.Store, member: int, meeting: Rendezvous) -> None:
        options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = datetime.timedelta(seconds=meeting.timeout_seconds)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address(meeting))]
        self._group: Any = dist.ProcessGroupGloo(store, member, meeting.num_members, options)
        self._sent: Counter[tuple[int, int]] = Counter()
        self._received: Counter[tuple[int, int]] = Counter()

    def send(self, buffer: torch.Tensor, peer: int, lane: int = 0, *, lasting: bool = False) -> Pending:
        """See Transport. Messages of another lane (below LANES) have an order of their own."""
        self._sent[peer, lane] += 1
        tag = self._sent[peer, lane] * LANES + lane
        return _start(lambda: self._group.send([buffer], peer, tag))

    def receive(self, buffer: torch.Tensor, peer: int, lane: int = 0, *, lasting: bool = False) -> Pending:
        """See Transport."""
        self._received[peer, lane] += 1
        tag = self._received[peer, lane] * LANES + lane
        return _start(lambda: self._group.recv([buffer], peer, tag))

    def close(self) -> None:
        """See Transport. gloo's `abort` leaves connections open; a wait that times out closes all that still are."""
        for peer in range(self._group.size()):
            if peer != self._group.rank():
                with suppress(RuntimeError):  # this peer's connection is closed already
                    self._group.recv([torch.empty(1)], peer, 0).wait(datetime.timedelta(milliseconds=1))


class Nccl:
    """GPU buffers over NCCL; each message is a group of one. While one bucket travels on NCCL's own stream the next is packed,
    or the last one placed and digested, on the caller's.

    All messages of a member run one after another on one stream, in the order in which it names them. That is the plan's
    order, but that an engine names the next message of a trainer before it passes the last one on. Trainers only send, in
    the plan's order; so of all messages not yet run the first in the plan is never behind one whose sender waits for it, and
    nobody waits in a circle (tests/unit/test_bridge.py). A peer's failure is noticed by a word in the store. Unverified on a
    GPU.
    """

    depth = 2

    def __init__(self, store: dist.Store, member: int, meeting: Rendezvous) -> None:
        _gather(store, member, meeting)  # building a communicator has no deadline: so nobody begins before all are here
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._store = store
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = datetime.timedelta(seconds=meeting.timeout_seconds)
        handling = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # an error is ours to report; torch would end the process
        try:
            self._group: Any = dist.ProcessGroupNCCL(store, member, meeting.num_members, options)
        finally:
            os.environ.pop("TORCH_NCCL_ASYNC_ERROR_HANDLING")
            if handling is not None:
                os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = handling
        self._group.eager_connect_single_device(self._device)

    def send(self, buffer: torch.Tensor, peer: int, *, lasting: bool = False) -> Pending:
        """See Transport."""
        return _start(lambda: grouped(self._group, lambda: self._group.send([buffer], peer, 0)), self._failed)

    def receive(self, buffer: torch.Tensor, peer: int, *, lasting: bool = False) -> Pending:
        """See Transport."""
        return _start(lambda: grouped(self._group, lambda: self._group.recv([buffer], peer, 0)), self._failed)

    def close(self) -> None:
        """See Transport."""
        with suppress(RuntimeError):  # the store may be gone: then the others know
            self._store.set(FAILED, "1")
        self._group.abort()

    def _failed(self) -> bool:
        return self._store.check([FAILED])


def grouped(group: Any, start: Callable[[], Any]) -> Any:
    """Starts a message inside a group, where it uses the communicator of all members; alone it would make one for the pair.
    The group is closed whatever happens: left open, it would swallow every later call of this thread."""
    group._start_coalescing()
    try:
        start()
    finally:
        work = group._end_coalescing()
    return work


def _gather(store: dist.Store, member: int, meeting: Rendezvous) -> None:
    """Waits until every member has come. RuntimeError when one does not within the meeting's time."""
    store.set(f"here {member}", "1")
    everybody = [f"here {other}" for other in range(meeting.num_members)]
    store.wait(everybody, datetime.timedelta(seconds=meeting.timeout_seconds))


class _Started:
    """A gloo work; waiting for it past the deadline takes its connection down."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, deadline: Deadline) -> None:
        try:
            self._work.wait(datetime.timedelta(seconds=deadline.remaining()))
        except RuntimeError as error:
            raise TransportError(first_line(error)) from error


class _Polled:
    """An NCCL work. Its own wait would only order streams; this one holds the host until the buffer is free."""

    def __init__(self, work: Any, failed: Callable[[], bool]) -> None:
        self._work, self._failed = work, failed

    def wait(self, deadline: Deadline) -> None:
        asked = time.monotonic()
        try:
            while not self._work.is_completed():
                if deadline.remaining() <= 1e-3:
                    raise TransportError("timed out")
                if time.monotonic() - asked > POLL_SECONDS:
                    asked = time.monotonic()
                    if self._failed():
                        raise TransportError("another member has given up")
                time.sleep(1e-4)
            self._work.wait()
        except RuntimeError as error:
            raise TransportError(first_line(error)) from error


class _Refused:
    """A message that could not be started: its connection is closed."""

    def __init__(self, error: RuntimeError) -> None:
        self._error = error

    def wait(self, deadline: Deadline) -> None:
        raise TransportError(first_line(self._error)) from self._error


def _start(call: Callable[[], Any], failed: Callable[[], bool] | None = None) -> Pending:
    try:
        work = call()
    except RuntimeError as error:
        return _Refused(error)
    return _Started(work) if failed is None else _Polled(work, failed)


def first_line(error: Exception) -> str:
    """torch's words without the path of its source and its advice."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    line = line.split("] ", 1)[1] if line.startswith("[") and "] " in line else line
    return line.split(". This is typically")[0]
