"""How bytes get from one member of a weight sync to another: what every transport must be able to do, and how its messages
are waited for. It knows buffers and members, not tensors or models. Nothing is pickled, and every wait has a deadline.

A transport carries the messages of a pair of members in the order in which both name them. After `close` every wait for that
member fails soon, so that one failure reaches whoever depends on it; so does its death, but over NCCL, where only the
deadline tells.
"""

from __future__ import annotations

import datetime
import os
import shutil
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from engine.config.transport import Setting

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


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


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the members meet. A new epoch is a new transport over the same store: the old one may be broken."""

    host: str
    port: int
    num_members: int
    timeout_seconds: float
    epoch: int = 0


class Transport(ABC):
    """Point-to-point messages between numbered members. One of your own is a class that extends this, and
    `sync.transport` names it.

    A transport may run all messages of a member one after another. So trainers name theirs in the plan's order, and an engine
    names none that another engine passes on before it has named all earlier ones that it passes on itself.
    """

    preference: ClassVar[int]  # the lowest that fits is what sync.transport = 'auto' takes; for those of the engine
    reads_in_place: ClassVar[bool] = False  # receivers map the sender's memory, and pass nothing on to other engines
    depth: int  # messages that a member may have under way

    @classmethod
    @abstractmethod
    def fits(cls, setting: Setting) -> str | None:
        """None where it can carry weight syncs, else why not: what follows "sync.transport = 'name'" in a sentence."""

    @classmethod
    def open(cls, store: dist.Store, member: int, meeting: Rendezvous) -> Self:
        """Joins the members of `meeting`; collective over all of them. `store` is this epoch's alone. RuntimeError when they do
        not come in time."""
        return cls(store, member, meeting)

    @abstractmethod
    def __init__(self, store: dist.Store, member: int, meeting: Rendezvous) -> None: ...

    @abstractmethod
    def send(self, buffer: torch.Tensor, peer: int, *, registered: bool = False) -> Pending:
        """Starts sending a contiguous buffer. `registered`: its memory, a parameter's or staging memory, is used again and
        again, so that a transport may let the receiver map it and read it where it lies, until the message is waited for."""

    @abstractmethod
    def receive(self, buffer: torch.Tensor, peer: int, *, registered: bool = False) -> Pending:
        """Starts filling a contiguous buffer of the size that the peer sends; `registered` as the peer says."""

    @abstractmethod
    def close(self) -> None:
        """Gives up whatever is under way, here and at the peers."""


SHARED_FOLDER = "/dev/shm"  # where torch puts memory that processes of a machine share


def room_for(num_bytes: int) -> bool:
    """Whether this machine's shared memory can be written and has room for so much more."""
    return os.access(SHARED_FOLDER, os.W_OK) and num_bytes < shutil.disk_usage(SHARED_FOLDER).free


def own_address(meeting: Rendezvous) -> str:
    """The address of this machine on the interface that leads to the rendezvous."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((meeting.host, meeting.port))
        return str(probe.getsockname()[0])


class Started:
    """A gloo work; waiting for it past the deadline takes its connection down."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, deadline: Deadline) -> None:
        """TransportError when it is not delivered by then."""
        try:
            self._work.wait(datetime.timedelta(seconds=deadline.remaining()))
        except RuntimeError as error:
            raise TransportError(first_line(error)) from error


class _Refused:
    """A message that could not be started: its connection is closed."""

    def __init__(self, error: RuntimeError) -> None:
        self._error = error

    def wait(self, deadline: Deadline) -> None:
        raise TransportError(first_line(self._error)) from self._error


def started(call: Callable[[], Any], pending: Callable[[Any], Pending] = lambda work: Started(work)) -> Pending:
    """The message that `call` starts, waited for as `pending` does; one that could not start says so when it is waited for."""
    try:
        work = call()
    except RuntimeError as error:
        return _Refused(error)
    return pending(work)


def first_line(error: Exception) -> str:
    """torch's words without the path of its source and its advice."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    line = line.split("] ", 1)[1] if line.startswith("[") and "] " in line else line
    return line.split(". This is typically")[0]
