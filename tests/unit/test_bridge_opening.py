"""What carries a weight sync: by device, placement, machines, and the room in shared memory."""

from __future__ import annotations

import logging

import pytest

from engine.bridge.opening import choose_transport
from engine.config import RunConfig
from engine.errors import ConfigError


def config(**tables: dict[str, object]) -> RunConfig:
    base = {"run": {"directory": "r", "steps": 1}, "model": {"path": "m"}, "data": {"train": "d"}}
    return RunConfig.model_validate(base | tables)


@pytest.mark.parametrize(
    ("device", "placement", "nodes", "room", "asked", "chosen"),
    [
        ("cpu", "disaggregated", 1, True, "auto", "ipc"),
        ("cpu", "disaggregated", 1, False, "auto", "gloo"),
        ("cpu", "disaggregated", 1, True, "gloo", "gloo"),
        ("cpu", "disaggregated", 2, True, "auto", "gloo"),
        ("cpu", "colocated", 1, True, "auto", "ipc"),
        ("cuda", "disaggregated", 1, False, "auto", "nccl"),
        ("cuda", "disaggregated", 2, True, "nccl", "nccl"),
        ("cuda", "colocated", 1, False, "auto", "ipc"),
    ],
)
def test_each_place_has_its_transport(
    device: str, placement: str, nodes: int, room: bool, asked: str, chosen: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = config(inference={"placement": placement}, cluster={"nodes": nodes}, sync={"transport": asked})
    with caplog.at_level(logging.WARNING):
        assert choose_transport(made, device, has_room=room, num_bytes=3 << 20) == chosen
    short = device == "cpu" and not room
    assert ("over gloo: through the machine's memory, faster, they need 3 MiB" in caplog.text) is short


@pytest.mark.parametrize(
    ("device", "placement", "asked", "room", "words"),
    [
        ("cpu", "disaggregated", "ipc", False, "needs 5 MiB of shared memory .* or use 'gloo'"),
        ("cpu", "disaggregated", "nccl", True, "one of auto, ipc, gloo on cpu .* found 'nccl': use 'auto'"),
        ("cuda", "disaggregated", "ipc", True, "one of auto, nccl on cuda .* found 'ipc'"),
        ("cuda", "colocated", "gloo", True, "one of auto, ipc on cuda with inference.placement = 'colocated'"),
    ],
)
def test_what_cannot_carry_it_is_refused(device: str, placement: str, asked: str, room: bool, words: str) -> None:
    made = config(inference={"placement": placement}, sync={"transport": asked})
    with pytest.raises(ConfigError, match=f"sync.transport .*{words}"):
        choose_transport(made, device, has_room=room, num_bytes=5 << 20)
