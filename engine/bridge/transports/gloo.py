"""CPU buffers over TCP by gloo."""

from __future__ import annotations

import datetime
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from engine.bridge.transports.base import Pending, Rendezvous, Transport, own_address, started
from engine.config.transport import Setting

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

NUM_TAGS = 3  # of a pair of members; messages of one tag keep their order


class Gloo(Transport):
    """CPU buffers over TCP, on one interface."""

    preference = 2
    depth = 8

    @classmethod
    def fits(cls, setting: Setting) -> str | None:
        """Wherever the weights are in the host's memory."""
        return "moves the host's memory, and the weights are on a GPU" if setting.device != "cpu" else None

    def __init__(self, store: dist.Store, member: int, meeting: Rendezvous) -> None:
        import torch.distributed as dist

        options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = datetime.timedelta(seconds=meeting.timeout_seconds)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address(meeting))]
        self._group: Any = dist.ProcessGroupGloo(store, member, meeting.num_members, options)
        self._sent: Counter[tuple[int, int]] = Counter()
        self._received: Counter[tuple[int, int]] = Counter()

    def send(self, buffer: torch.Tensor, peer: int, tag: int = 0, *, registered: bool = False) -> Pending:
        """Starts sending over TCP. Messages of each `tag` (below NUM_TAGS) have an order of their own."""
        self._sent[peer, tag] += 1
        number = self._sent[peer, tag] * NUM_TAGS + tag
        return started(lambda: self._group.send([buffer], peer, number))

    def receive(self, buffer: torch.Tensor, peer: int, tag: int = 0, *, registered: bool = False) -> Pending:
        """Starts receiving over TCP, in the order of the tag."""
        self._received[peer, tag] += 1
        number = self._received[peer, tag] * NUM_TAGS + tag
        return started(lambda: self._group.recv([buffer], peer, number))

    def close(self) -> None:
        """Closes every connection. gloo's `abort` leaves connections open; a wait that times out closes all that still are."""
        import torch

        for peer in range(self._group.size()):
            if peer != self._group.rank():
                with suppress(RuntimeError):  # this peer's connection is closed already
                    self._group.recv([torch.empty(1)], peer, 0).wait(datetime.timedelta(milliseconds=1))
