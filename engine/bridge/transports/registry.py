"""The transports by name."""

from __future__ import annotations

import torch.distributed as dist

from engine.bridge.transports.base import UNMET, Kind, Rendezvous, Transport, TransportError, first_line
from engine.bridge.transports.gloo import Gloo
from engine.bridge.transports.nccl import Nccl


def open_transport(kind: Kind, store: dist.Store, member: int, meeting: Rendezvous) -> Transport:
    """Joins the members of this epoch; collective over all of them. TransportError when they do not come in time."""
    epoch = dist.PrefixStore(f"epoch {meeting.epoch}", store)
    try:
        if kind == "ipc":
            from engine.bridge.transports.ipc import Ipc

            return Ipc(epoch, member, meeting)
        return (Gloo if kind == "gloo" else Nccl)(epoch, member, meeting)
    except RuntimeError as error:
        raise TransportError(f"member {member} {UNMET}: {first_line(error)}") from error
