"""What carries a weight sync: by device, placement, machines, and the room in shared memory."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.bridge import setup as opening
from engine.bridge.host_group import HostGroup
from engine.bridge.setup import channel
from engine.bridge.transports.registry import Choice, choose, kind_of
from engine.config.placement import Colocation
from engine.config.transport import Setting, setting
from engine.core.errors import ConfigError
from engine.models.sharding import shard_shapes, trainer_layout
from tests.builders import config, spec
from tests.unit.bridge.world import small_shape


@pytest.mark.parametrize(
    ("device", "placement", "nodes", "room", "asked", "chosen"),
    [
        ("cpu", "disaggregated", 1, True, "auto", "ipc"),
        ("cpu", "disaggregated", 1, False, "auto", "gloo"),
        ("cpu", "disaggregated", 1, True, "gloo", "gloo"),
        ("cpu", "disaggregated", 2, True, "auto", "gloo"),
        ("cpu", "colocated", 1, True, "auto", "ipc"),
        ("cpu", "colocated", 2, True, "auto", "ipc"),
        ("cpu", "colocated", 2, False, "auto", "gloo"),
        ("cpu", "colocated", 2, True, "gloo", "gloo"),
        ("cuda", "disaggregated", 1, False, "auto", "nccl"),
        ("cuda", "disaggregated", 2, True, "nccl", "nccl"),
        ("cuda", "colocated", 1, False, "auto", "ipc"),
        ("cuda", "colocated", 2, False, "ipc", "ipc"),
    ],
)
def test_each_place_has_its_transport(device: Any, placement: str, nodes: int, room: bool, asked: str, chosen: str) -> None:
    made = config(inference={"placement": placement}, cluster={"nodes": nodes}, sync={"transport": asked})
    choice = choose(asked, setting(made, device, has_room=room, needed_bytes=3 << 20))
    assert choice.name == chosen
    short = device == "cpu" and not room
    told = "weight syncs go over gloo: ipc would be faster, but it needs 3 MiB of shared memory (/dev/shm), which has less"
    assert choice.reason.startswith(told) if short else not choice.reason


@pytest.mark.parametrize(
    ("device", "placement", "asked", "room", "words"),
    [
        ("cpu", "disaggregated", "ipc", False, "'ipc' needs 5 MiB of shared memory .* use 'auto', which takes gloo here"),
        ("cpu", "disaggregated", "nccl", True, "'nccl' moves the memory of GPUs.* on a cpu: use 'auto', which takes ipc"),
        ("cuda", "disaggregated", "ipc", True, "'ipc' joins GPUs only where inference.placement = 'colocated'.* takes nccl"),
        ("cuda", "colocated", "gloo", True, "'gloo' moves the host's memory.* on a GPU: use 'auto', which takes ipc here"),
    ],
)
def test_what_cannot_carry_it_is_refused(device: Any, placement: str, asked: str, room: bool, words: str) -> None:
    made = config(inference={"placement": placement}, sync={"transport": asked})
    with pytest.raises(ConfigError, match=f"sync.transport = {words}"):
        choose(asked, setting(made, device, has_room=room, needed_bytes=5 << 20))


def test_engines_on_several_machines_are_not_read_in_place() -> None:
    """Where the configuration cannot know it: two machines of Ray that count as one node."""
    several = Setting("cpu", colocated=False, nodes=1, engines_on_one_machine=False)
    assert choose("auto", several) == Choice("gloo")
    with pytest.raises(ConfigError, match=r"sync\.transport = 'ipc' needs all engines on one machine; found several: use"):
        choose("ipc", several)


TURNS = Colocation(ranks=(0, 2, 0, 2), engines=(0, 0, 2), nearest=((0,), (2,), (1, 3)))  # node 1 has neither


@pytest.mark.parametrize(
    ("machines", "transport", "turns", "nodes", "senders"),
    [
        ([0, 1, 0], "nccl", None, ((0, 2), (1,)), ()),
        ([0, 0, 0], "ipc", None, ((0,), (1,), (2,)), ()),
        ([0, 0, 1], "ipc", TURNS, ((0,), (1,), (2,)), TURNS.nearest),
        ([0, 0, 0], "ipc", TURNS, ((0,), (1,), (2,)), TURNS.nearest),  # two nodes of Ray on one machine
        ([0, 0, 1], "gloo", TURNS, ((0, 1), (2,)), ((0, 2), (1, 3))),
    ],
)
def test_who_passes_on_to_whom_and_who_may_send(machines, transport, turns, nodes, senders) -> None:
    assert channel(machines, kind_of(transport), turns) == (nodes, senders)


@pytest.mark.parametrize(
    ("free_mebibytes", "transport", "nodes"), [(3, "ipc", ((0,), (1,), (2,))), (1, "gloo", ((0, 2), (1,)))]
)
def test_a_bridge_over_two_nodes_is_told_who_serves_whom(
    free_mebibytes: int, transport: str, nodes: tuple, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Rank 0 of three, the first two on node 0. Its own node's memory must have room for what its ranks share: two buckets of a
    mebibyte, and the weights; the others' ranks are not in this process."""
    made = config(
        inference={"placement": "colocated", "engines": 3},
        trainer={"data_parallel": 3},
        cluster={"nodes": 2, "gpus_per_node": 2},
        sync={"bucket_mebibytes": 1},
    )
    run = replace(spec(made), colocation=Colocation((0, 0, 1), (0, 1, 0), nearest=((0,), (2,), (1,))))
    monkeypatch.setattr(opening, "room_for", lambda num_bytes: num_bytes < free_mebibytes << 20)
    monkeypatch.setattr(opening, "Publisher", lambda policy, place, terms, **known: terms)
    shapes = shard_shapes(small_shape(), trainer_layout(made.trainer), 0, 0)
    policy: Any = SimpleNamespace(shape=small_shape(), parameters={name: torch.zeros(size) for name, size in shapes.items()})
    place: Any = SimpleNamespace(
        rank=0, dp_size=3, device=torch.device("cpu"), host=HostGroup(None, 0, 1, patience_seconds=1.0)
    )
    pool: Any = SimpleNamespace(nodes=lambda: ((0, 1, 2),))
    with caplog.at_level(logging.WARNING):
        terms: Any = opening.open_publisher(run, policy, place, "127.0.0.1", pool)
    assert (terms.transport, terms.nodes) == (transport, nodes)
    assert ("ipc would be faster" in caplog.text) is (transport == "gloo")
    assert terms.senders == (((0,), (2,), (1,)) if transport == "ipc" else ((0, 1), (2,)))
    assert {message.source for message in terms.plan().messages if message.path == (1,)} == {2}
    assert type(terms).from_json(terms.to_json()) == terms
