"""Where the members of a weight sync meet: a key-value store on one interface. It moves no weights."""

from __future__ import annotations

import datetime
import socket

import torch.distributed as dist


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
