"""A transport that the engine does not have, in a file of its own: named by the configuration, asked whether it fits, opened by
every member, and its messages arrive. Nothing in engine/ knows of it.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.bridge.setup import channel
from engine.bridge.transports.base import Deadline, Rendezvous, Transport
from engine.bridge.transports.registry import choose, kind_of, open_transport
from engine.bridge.transports.rendezvous import join_store, listen, serve_store
from engine.capacity.transfer import _transport
from engine.config.load import RunConfig, load_config
from engine.config.transport import TRANSPORTS, Setting, setting
from engine.core.errors import ConfigError
from tests.builders import spec

POST = '''
"""Messages by way of the store: slow, and enough to prove that anything may carry them."""

import torch

from engine.bridge.transports.base import Transport


class Done:
    def __init__(self, act):
        self._act = act

    def wait(self, deadline):
        self._act()


class Post(Transport):
    depth = 4

    def __init__(self, store, member, meeting):
        self._store, self._member, self._sent, self._received = store, member, {}, {}
        store.set(f"here {member}", "1")
        store.wait([f"here {other}" for other in range(meeting.num_members)])

    @classmethod
    def fits(cls, setting):
        return None if setting.device == "cpu" and setting.nodes < 3 else f"is for two CPUs; found {setting.nodes} nodes"

    def send(self, buffer, peer, *, registered=False):
        number = self._sent[peer] = self._sent.get(peer, 0) + 1
        content = bytes(buffer.view(-1).view(torch.uint8).tolist())
        self._store.set(f"{self._member} {peer} {number}", content)
        return Done(lambda: None)

    def receive(self, buffer, peer, *, registered=False):
        number = self._received[peer] = self._received.get(peer, 0) + 1

        def take():
            content = self._store.get(f"{peer} {self._member} {number}")
            buffer.view(-1).view(torch.uint8).copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))

        return Done(take)

    def close(self):
        pass
'''
HOST = "127.0.0.1"


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "post.py").write_text(POST, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return "post.py:Post"


def configured(name: str, *overrides: str) -> RunConfig:
    Path("run.toml").write_text('[run]\ndirectory="r"\nsteps=1\n[model]\npath="m"\n[data]\ntrain="d"\n', encoding="utf-8")
    return load_config("run.toml", [f"sync.transport={name}", *overrides])


def test_the_rules_the_bridge_and_the_planner_ask_it(name: str, tmp_path: Path) -> None:
    config = configured(name)
    choice = choose(name, setting(config, "cpu"))
    assert choice.name == f"{tmp_path / 'post.py'}:Post", "so that a process elsewhere finds it"
    assert _transport(spec(config), [0, 1]) is kind_of(name)
    assert channel([0, 1, 0], kind_of(name), None) == (((0, 2), (1,)), ())
    with pytest.raises(ConfigError, match=r"^sync\.transport = 'post\.py:Post' is for two CPUs; found 3 nodes: use 'auto'$"):
        configured(name, "cluster.nodes=3")
    with pytest.raises(ConfigError, match=r"sync\.transport = 'post.py:Post' is for two CPUs.* takes nccl here"):
        choose(name, setting(config, "cuda"))


def test_its_messages_arrive(name: str) -> None:
    server, port = listen(HOST)
    stores = [serve_store(server, HOST, 2, 20.0), join_store(HOST, port, 2, 20.0)]
    ends: dict[int, Transport] = {}

    def join(member: int) -> None:
        ends[member] = open_transport(name, stores[member], member, Rendezvous(HOST, port, 2, 20.0))

    threads = [threading.Thread(target=join, args=(member,)) for member in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    into = torch.empty(3)
    receiving = ends[1].receive(into, 0)
    ends[0].send(torch.arange(3.0), 1, registered=True).wait(Deadline(5.0))
    receiving.wait(Deadline(5.0))
    assert torch.equal(into, torch.arange(3.0))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("carrier", r"sync\.transport must be one of auto, gloo, ipc, nccl, or your own as path/to/file\.py:Name"),
        ("post.py:Done", r"sync\.transport must name a class that extends engine\.bridge\.transports\.base\.Transport"),
        ("gone.py:Post", r"sync\.transport must name a file that exists; found none at gone\.py"),
    ],
)
def test_what_is_no_transport_is_refused_with_the_configuration(name: str, asked: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        configured(asked)


def test_each_of_the_engines_own_has_its_place() -> None:
    """'auto' has one order, and the first that fits is found in every setting with a device."""
    kinds: list[Any] = [kind_of(name) for name in TRANSPORTS.names]
    assert sorted(kind.preference for kind in kinds) == [0, 1, 2]
    for device in ("cpu", "cuda"):
        for colocated in (True, False):
            for nodes in (1, 2):
                assert choose("auto", Setting(device, colocated, nodes)).reason == ""
