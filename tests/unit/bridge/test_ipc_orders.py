"""The real transport of one machine under the real senders and receivers, all in threads of this process: with several senders
and several receivers, words that are held back to travel together must not make members wait in a circle.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from engine.bridge.transports.base import Rendezvous
from engine.bridge.transports.ipc import Ipc
from engine.bridge.transports.rendezvous import join_store, listen, serve_store
from engine.models.sharding import EngineLayout, TrainerLayout
from tests.unit.bridge.world import Case, World, small_shape

HOST, LONG = "127.0.0.1", 20.0
STAGES = TrainerLayout(tp_size=1, pp_size=2)
ALONE = ((0,), (1,))  # every engine takes what it needs by itself


class Counted(Ipc):
    """With what World asks of a network's members."""

    num_under_way = 0


def members_of(count: int) -> dict[int, Counted]:
    """All members' ends."""
    server, port = listen(HOST)
    stores = [serve_store(server, HOST, count, LONG), *(join_store(HOST, port, count, LONG) for _ in range(1, count))]
    found: dict[int, Counted] = {}

    def join(member: int) -> None:
        found[member] = Counted(stores[member], member, Rendezvous(HOST, port, count, LONG))

    threads = [threading.Thread(target=join, args=(member,)) for member in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    return found


@pytest.mark.parametrize(
    "case",
    [
        Case(trainer=STAGES, nodes=ALONE),
        Case(trainer=TrainerLayout(2), nodes=ALONE),
        Case(dp_size=2, nodes=((0,), (1,), (2,))),
        Case(small_shape(num_layers=8), STAGES, engine=EngineLayout(2), bucket_bytes=200, unpacked_bytes=100),
        Case(small_shape(num_layers=8), TrainerLayout(2, 2), dp_size=2, nodes=ALONE, bucket_bytes=200, unpacked_bytes=100),
        Case(trainer=STAGES, dp_size=2, nodes=((0,), (1,), (2,)), senders=((0, 2), (0, 2), (1, 3))),
    ],
    ids=["stages", "tensor ranks", "replicas, three engines", "stages to tensor ranks", "all of them", "two nodes"],
)
def test_nobody_waits_in_a_circle(case: Case) -> None:
    world = World(case)
    members = members_of(len(world.members))
    network: Any = SimpleNamespace(members=members)
    try:
        assert world.sync(network, seconds=5.0) == {}
        world.check()
    finally:
        for member in members.values():
            member.close()
