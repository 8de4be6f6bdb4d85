"""GPU buffers over NCCL (unverified on a GPU)."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

from engine.bridge.transports.base import Deadline, Pending, Rendezvous, Transport, TransportError, first_line, started
from engine.config.transport import Setting

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

FAILED, POLL_SECONDS = "failed", 0.25  # a key in the store, and how often it is looked for
MISSING_NAMED = 8  # members that did not come, told by name


class Nccl(Transport):
    """GPU buffers over NCCL; each message is a group of one. While one bucket travels on NCCL's own stream the next is packed,
    or the last one placed and digested, on the caller's.

    All messages of a member run one after another on one stream, in the order in which it names them. That is the plan's
    order, but that an engine names the next message of a trainer before it passes the last one on. Trainers only send, in
    the plan's order; so of all messages not yet run the first in the plan is never behind one whose sender waits for it, and
    nobody waits in a circle (tests/unit/bridge/test_bridge.py). A peer's failure is noticed by a key in the store. Unverified
    on a GPU.
    """

    preference = 1
    depth = 2

    @classmethod
    def fits(cls, setting: Setting) -> str | None:
        """Where every member has a GPU of its own."""
        if setting.colocated:
            return "cannot join a trainer and an engine on one GPU; found inference.placement = 'colocated'"
        return None if setting.device == "cuda" else f"moves the memory of GPUs, and the weights are on a {setting.device}"

    def __init__(self, store: dist.Store, member: int, meeting: Rendezvous) -> None:
        import torch
        import torch.distributed as dist

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

    def send(self, buffer: torch.Tensor, peer: int, *, registered: bool = False) -> Pending:
        """Starts sending on NCCL's own stream."""
        return started(lambda: grouped(self._group, lambda: self._group.send([buffer], peer, 0)), self._pending)

    def receive(self, buffer: torch.Tensor, peer: int, *, registered: bool = False) -> Pending:
        """Starts receiving on NCCL's own stream."""
        return started(lambda: grouped(self._group, lambda: self._group.recv([buffer], peer, 0)), self._pending)

    def close(self) -> None:
        """Tells the others by the store, and aborts the communicator."""
        with suppress(RuntimeError):  # the store may be gone: then the others know
            self._store.set(FAILED, "1")
        self._group.abort()

    def _pending(self, work: Any) -> Pending:
        return _Polled(work, self._failed)

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
    """Waits until every member has come; each asks the store for four keys at most, however many members there are.
    RuntimeError when one does not come within the meeting's time."""
    store.set(_here(member), "1")
    if int(store.add("come", 1)) == meeting.num_members:
        store.set("all here", "1")
    try:
        store.wait(["all here"], datetime.timedelta(seconds=meeting.timeout_seconds))
    except RuntimeError as error:
        late = meeting.num_members - int(store.add("come", 0))
        who = ""
        if member == 0:  # one member alone looks for who is missing, so that a failure asks for no more than N keys either
            missing = (other for other in range(meeting.num_members) if not store.check([_here(other)]))
            named = [str(other) for other in islice(missing, MISSING_NAMED)]
            who = f" (member {', '.join(named)}{' and others' if late > len(named) else ''})"
        raise RuntimeError(
            f"{late} of {meeting.num_members} members{who} did not come within sync.timeout_seconds = "
            f"{meeting.timeout_seconds:g}"
        ) from error


def _here(member: int) -> str:
    return f"here {member}"


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
