"""A world for weight syncs under faults: a real Publisher on two trainer ranks, the real Pool, and engines that are the real
VllmEngine and Inbox over a small module with vLLM's parameters in place of vLLM, whose "decoding" answers with a digest of
the weights it has at that moment. Trainer rank 0 is the test's own process; the others are forked by a clean server.

A fault is armed once in one member: it happens at the n-th message of that member, before, during or after it.
"""

from __future__ import annotations

import hashlib
import os
import queue
import signal
import threading
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist

from engine.bridge.host_group import HostGroup
from engine.bridge.sender import Publisher
from engine.bridge.terms import SyncTerms
from engine.bridge.transports import base as transport
from engine.capacity.kv_cache import KvCache
from engine.config.load import RunConfig
from engine.core.errors import EngineLostError
from engine.inference.receiver import Inbox, SyncWorker
from engine.inference.vllm_engine import VllmEngine
from engine.models import sharding as layout
from engine.models.base import ModelShape
from engine.models.sharding import EngineLayout, TrainerLayout
from tests import builders

os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])  # the server of forks imports this file once
FORK = get_context("forkserver")
FORK.set_forkserver_preload([__name__])
SHAPE = ModelShape(
    num_layers=2,
    hidden=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_hidden=96,
    vocab_size=8203,  # a shard of the embedding is over a mebibyte, and padded on both sides
    tied=False,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    max_positions=64,
)
TRAINERS, ENGINES, HOST = 2, 2, "127.0.0.1"
TERMS = SyncTerms(
    shape=SHAPE,
    dtype="float32",
    trainer=TrainerLayout(tp_size=TRAINERS),
    dp_size=1,
    engine=EngineLayout(1),
    nodes=((0, 1),),
    bucket_bytes=1 << 20,
    transport="gloo",
)


def whole_tensors(version: int) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors of a version; version 0 is the seed model."""
    draw = torch.Generator().manual_seed(version)
    return {name: torch.randn(shape, generator=draw) for name, shape in layout.tensors(SHAPE).items()}


def filled(which: layout.Layout, tp_rank: int, version: int) -> dict[str, torch.Tensor]:
    """A rank's shards of a version, padding zero."""
    shards = {name: torch.zeros(shape) for name, shape in layout.shard_shapes(SHAPE, which, tp_rank).items()}
    whole = whole_tensors(version)
    for p in layout.shard_slices(SHAPE, which, tp_rank):
        source = layout.matrix_slice(whole[p.name], p.row, p.col, p.rows, p.cols)
        layout.matrix_slice(shards[p.parameter], p.shard_row, p.shard_col, p.rows, p.cols).copy_(source)
    return shards


def fingerprint(shards: dict[str, torch.Tensor]) -> int:
    """Of all bits of an engine's shards, by an independent method; 31 bits, as a token has."""
    told = hashlib.sha256()
    for name in sorted(shards):
        told.update(shards[name].numpy().tobytes())
    return int.from_bytes(told.digest()[:4]) >> 1


@dataclass(frozen=True)
class Fault:
    """What goes wrong, once."""

    kind: str  # abort, kill, stop, flip, drop; of a trainer also swap, dtype
    message: int  # of this member's messages, in its own order
    phase: str = "during"  # before, during, after


class FaultyTransport:
    """The real gloo transport, with one fault."""

    def __init__(self, real: transport.Transport, fault: Fault) -> None:
        self._real, self._fault, self._count, self.depth = real, fault, 0, real.depth

    def close(self) -> None:
        """Passes it on."""
        self._real.close()

    def send(self, buffer: torch.Tensor, peer: int, **kind: Any) -> Any:
        """Passes it on, but for the fault."""
        return self._carry(partial(self._real.send, **kind), buffer, peer)

    def receive(self, buffer: torch.Tensor, peer: int, **kind: Any) -> Any:
        """Passes it on, but for the fault."""
        return self._carry(partial(self._real.receive, **kind), buffer, peer)

    def _carry(self, act: Any, buffer: torch.Tensor, peer: int) -> Any:
        number, self._count = self._count, self._count + 1
        fault = self._fault
        if number != fault.message:
            return act(buffer, peer)
        if fault.kind == "drop":
            return SimpleNamespace(wait=lambda deadline: None)
        if fault.kind == "flip":
            changed = buffer.clone()
            changed.view(-1).view(torch.uint8)[changed.nbytes // 2] ^= 4
            return act(changed, peer)
        if fault.phase == "before":
            strike(fault.kind)
        pending = act(buffer, peer)
        if fault.phase == "during":
            strike(fault.kind)

        def wait(deadline: transport.Deadline) -> None:
            pending.wait(deadline)
            strike(fault.kind)

        return SimpleNamespace(wait=wait) if fault.phase == "after" else pending


def strike(kind: str) -> None:
    """The fault happens here."""
    if kind == "abort":
        raise transport.TransportError("a fault of the test")
    os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)


class Arm:
    """Makes the next transport that this process uses a faulty one."""

    def __init__(self, owner: Any, attribute: str) -> None:
        self._owner, self._attribute = owner, attribute

    def __call__(self, fault: Fault) -> None:
        real = getattr(self._owner, self._attribute)
        assert real is not None, "the channel must be open before a fault is armed in it"
        setattr(self._owner, self._attribute, FaultyTransport(real, fault))


# -- engines


class FakeLlm:
    """What VllmEngine needs of vLLM: one worker with a real Inbox, and decoding of one token."""

    def __init__(self) -> None:
        self.model = torch.nn.Module()
        for name, tensor in filled(TERMS.engine, 0, 0).items():
            owner = self.model
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, torch.nn.Module())
                owner = cast(torch.nn.Module, getattr(owner, part))
            owner.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
        parallel = SimpleNamespace(rank=0, tensor_parallel_size=1)
        config = SimpleNamespace(parallel_config=parallel, model_config=None)
        self.inbox = Inbox(None, config, torch.device("cpu"), self.model)  # type: ignore[arg-type, call-arg]
        self.worker = SimpleNamespace(
            start_weight_update=lambda: None,
            finish_weight_update=lambda: None,
            update_weights=self.inbox.update_weights,
            device=torch.device("cpu"),
            model_runner=SimpleNamespace(model=self.model, get_model=lambda: self.model, kv_caches=[], sampler=None),
        )
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=False))
        self.llm_engine = self
        self.turns: list[str] = []  # how it was told to sleep and to wake
        self._waiting: list[str] = []

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[str]:
        """Calls the worker."""
        return [getattr(SyncWorker, method)(self.worker, *args)]

    def sleep(self, level: int) -> None:
        """Notes it; the worker gives the weights' pages back."""
        self.turns.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        """Notes it."""
        self.turns += [f"wake {tag}" for tag in tags]

    def reset_prefix_cache(self) -> bool:
        """There is none."""
        return True

    def add_request(self, request_id: str, prompt: Any, parameters: Any) -> None:
        """Queues it."""
        self._waiting.append(request_id)

    def step(self) -> list[Any]:
        """Answers all: the token is a fingerprint of the weights as they are now."""
        token = fingerprint({name: p.data for name, p in self.model.named_parameters()})
        outputs = [
            SimpleNamespace(
                token_ids=[token],
                logprobs=SimpleNamespace(token_ids=[token], logprobs=[0.0]),
                finish_reason="stop",
            )
            for _ in self._waiting
        ]
        done = [
            SimpleNamespace(finished=True, request_id=name, outputs=[output])
            for name, output in zip(self._waiting, outputs, strict=True)
        ]
        self._waiting = []
        return done


class TestEngine(VllmEngine):
    """The real engine's bookkeeping over FakeLlm."""

    __test__ = False

    def __init__(self, config: RunConfig, index: int) -> None:
        super().__init__(config, index, KvCache(1, 1, 1, 1, 0))

    def _load(self) -> None:
        self._llm: Any = FakeLlm()
        self._end_ids, self._stop_texts = [0], list[str]()
        self._tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "")
        self.arm = Arm(self._llm.inbox, "_transport")


def engine_config(*, packed_weights: bool = False) -> RunConfig:
    """Of engines that load no model and are waited for no longer than these tests are."""
    inference = {"timeout_seconds": 10.0, "threads": 1, "packed_weights": packed_weights}
    return builders.config(Path("nowhere"), inference=inference)


def engine_process(pipe: Connection, index: int) -> None:
    """Answers calls one after another."""
    torch.set_num_threads(1)
    engine = TestEngine(engine_config(), index)
    while True:
        try:
            number, method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((number, getattr(engine, method)(*arguments), None))
        except Exception as error:
            pipe.send((number, None, error))


class Handle:
    """An engine in another process; calls are answered in order, from any thread."""

    def __init__(self, index: int) -> None:
        self.index, self._lock, self._number = index, threading.Lock(), 0
        self.restarts = -1
        self.restart()

    def restart(self) -> None:
        """Kills the process, if there is one, and starts another."""
        with self._lock:  # nobody may ask on one pipe and wait for the other's answer
            if self.restarts >= 0:
                self.stop()
            self.restarts += 1
            self._pipe, theirs = FORK.Pipe()
            self._answers: dict[int, queue.Queue[Any]] = {}
            self.process = FORK.Process(target=engine_process, args=(theirs, self.index), daemon=True)
            self.process.start()
            theirs.close()
            threading.Thread(target=self._listen, args=(self._pipe, self._answers), daemon=True).start()

    def stop(self) -> None:
        """Kills the process."""
        self.process.kill()
        self.process.join()

    def call(self, method: str, *arguments: Any) -> Any:
        """See EngineHandle."""
        with self._lock:
            self._number += 1
            answer: queue.Queue[Any] = queue.Queue()
            self._answers[self._number] = answer
            try:
                self._pipe.send((self._number, method, arguments))
            except OSError:
                answer.put((None, EngineLostError(f"engine {self.index} is gone")))

        def result(timeout_seconds: float) -> Any:
            try:
                value, error = answer.get(timeout=timeout_seconds)
            except queue.Empty:
                raise TimeoutError(method) from None
            if error is not None:
                raise error
            return value

        return SimpleNamespace(result=result)

    def _listen(self, pipe: Connection, answers: dict[int, queue.Queue[Any]]) -> None:
        while True:
            try:
                number, value, error = pipe.recv()
            except (EOFError, OSError):
                for answer in list(answers.values()):
                    answer.put((None, EngineLostError(f"engine {self.index} is gone")))
                return
            answers.pop(number).put((value, error))


# -- trainer ranks


@dataclass
class World:
    """A trainer rank's place and its weights."""

    rank: int
    parameters: dict[str, torch.Tensor]
    world_size: int = TRAINERS
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    host: HostGroup = field(default_factory=lambda: HostGroup(None, 0, 1, patience_seconds=60.0))


def open_publisher(rank: int, store: str, timeout_seconds: float, transport: Any, pool: Any) -> tuple[World, Publisher]:
    """Joins the trainer ranks and opens the bridge."""
    dist.init_process_group("gloo", store=dist.FileStore(store, TRAINERS), rank=rank, world_size=TRAINERS)
    host = HostGroup(dist.FileStore(store + " of words", TRAINERS), rank, TRAINERS, patience_seconds=60.0)
    world = World(rank, filled(TERMS.trainer, rank, 0), host=host)
    nodes = tuple((engine,) for engine in range(ENGINES)) if transport == "ipc" else TERMS.nodes  # as a run has it
    terms = replace(TERMS, transport=transport, nodes=nodes)
    return world, Publisher(world, world, terms, host=HOST, timeout_seconds=timeout_seconds, pool=pool)


def arm_trainer(world: World, publisher: Publisher, fault: Fault) -> None:
    """Faults of what a trainer rank sends, for one attempt, or of its transport."""
    if fault.kind == "dtype":
        name = "output_layer.weight"
        world.parameters[name] = world.parameters[name].bfloat16()
    elif fault.kind == "swap":
        sender: Any = publisher._sender
        send = sender.send
        original = list(sender._messages)
        whole = [i for i, message in enumerate(original) if not message.bucket.packed]
        one, other = whole[0], next(i for i in whole if original[i].bucket.transfers[0].name == "lm_head.weight")

        def swapped(*arguments: Any) -> None:
            sender._messages[one], sender._messages[other] = original[other], original[one]
            sender.send = send
            try:
                send(*arguments)
            finally:
                sender._messages[:] = original

        sender.send = swapped
    else:
        Arm(publisher, "_transport")(fault)


def trainer_process(pipe: Connection, rank: int, store: str, timeout_seconds: float, transport: str) -> None:
    """A trainer rank that publishes when told: (version, fault or None) -> nothing, or the error's words."""
    torch.set_num_threads(1)
    world, publisher = open_publisher(rank, store, timeout_seconds, transport, None)
    pipe.send("ready")
    while True:
        version, fault = pipe.recv()
        world.parameters = filled(TERMS.trainer, rank, version)
        if fault is not None:
            arm_trainer(world, publisher, fault)
        try:
            publisher.publish(version)
            pipe.send("")
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
