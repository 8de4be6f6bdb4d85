"""Trainer ranks and engine ranks of one weight sync as threads: the real Sender and Receiver with real shards over a
MemoryTransport. What an engine must hold is taken from the layout's slices, never from the plan.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
import torch

from engine.bridge import plan as plan_module
from engine.bridge.exchange import Receiver, Sender
from engine.bridge.terms import SyncTerms
from engine.bridge.transports.base import Deadline
from engine.core.errors import WeightSyncError
from engine.models import checks
from engine.models import sharding as layout
from engine.models.base import ModelShape
from engine.models.sharding import EngineLayout, Layout, TrainerLayout
from tests.unit.bridge.memory_transport import Network

Tensors = dict[str, torch.Tensor]
CPU = torch.device("cpu")
PADDING = 77  # the bytes of engine shards before the first sync, and of the trainers' padding


def small_shape(*, kv_heads: int = 2, tied: bool = False, num_layers: int = 2) -> ModelShape:
    """Four or more heads, an odd vocabulary."""
    return ModelShape(
        num_layers=num_layers,
        hidden=8,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=4,
        ffn_hidden=16,
        vocab_size=67,
        rope_theta=1e4,
        rope_scaling=None,
        norm_eps=1e-5,
        tied=tied,
        max_positions=16,
    )


@dataclass(frozen=True)
class Case:
    """One sync's terms, and the size from which contiguous transfers travel unpacked."""

    shape: ModelShape = field(default_factory=small_shape)
    trainer: TrainerLayout = field(default_factory=TrainerLayout)
    dp_size: int = 1
    engine: EngineLayout = field(default_factory=EngineLayout)
    nodes: tuple[tuple[int, ...], ...] = ((0,),)
    bucket_bytes: int = 600
    unpacked_bytes: int = 256
    dtype: str = "float32"
    senders: tuple[tuple[int, ...], ...] = ()

    @property
    def terms(self) -> SyncTerms:
        """As the bridge wants them."""
        layouts = (self.shape, self.dtype, self.trainer, self.dp_size, self.engine)
        return SyncTerms(*layouts, self.nodes, self.bucket_bytes, "gloo", self.senders)


def random_model(shape: ModelShape, dtype: torch.dtype, seed: int) -> Tensors:
    """Every Hugging Face tensor with random bits."""
    draw = torch.Generator().manual_seed(seed)
    sizes = {name: torch.Size(size) for name, size in layout.tensors(shape).items()}
    room = {n: torch.randint(256, (s.numel() * dtype.itemsize,), generator=draw, dtype=torch.uint8) for n, s in sizes.items()}
    return {name: room[name].view(dtype).view(size) for name, size in sizes.items()}


def cut(shape: ModelShape, which: Layout, model: Tensors, *ranks: int) -> Tensors:
    """The shards of a rank, (tensor rank, pipeline rank) or an engine's tensor rank."""
    dtype = next(iter(model.values())).dtype
    shards = blank(shape, which, dtype, *ranks)
    for p in layout.shard_slices(shape, which, *ranks):
        source = layout.matrix_slice(model[p.name], p.row, p.col, p.rows, p.cols)
        layout.matrix_slice(shards[p.parameter], p.shard_row, p.shard_col, p.rows, p.cols).copy_(source)
    return shards


def blank(shape: ModelShape, which: Layout, dtype: torch.dtype, *ranks: int) -> Tensors:
    """The shards of a rank before anything was written."""
    sizes = {name: torch.Size(size) for name, size in layout.shard_shapes(shape, which, *ranks).items()}
    return {
        name: torch.full((size.numel() * dtype.itemsize,), PADDING, dtype=torch.uint8).view(dtype).view(size)
        for name, size in sizes.items()
    }


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """NaNs and signed zeros included."""
    return torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


class Live:
    """An engine's shards, which note what is completed and what they then held."""

    def __init__(self, shards: Tensors) -> None:
        self.shards = shards
        self.completed: list[tuple[str, torch.Tensor]] = []

    def __getitem__(self, parameter: str) -> torch.Tensor:
        return self.shards[parameter]

    def may_begin(self, parameter: str) -> bool:
        """See Shards."""
        return True

    def complete(self, parameter: str) -> None:
        """See Shards."""
        self.completed.append((parameter, self.shards[parameter].clone()))


class World:
    """All members of one plan."""

    def __init__(self, case: Case) -> None:
        self.case, self.dtype = case, case.terms.torch_dtype
        checks.check_layout(case.shape, case.trainer)
        checks.check_engine_layout(case.shape, case.engine)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan_module, "UNPACKED_BYTES", case.unpacked_bytes)
            self.plan = case.terms.plan()
        self.trainers, self.members = range(self.plan.trainer_size), range(self.plan.num_members)
        self.engines = self.members[len(self.trainers) :]
        self.senders = {rank: Sender(self.plan, rank, self.dtype, CPU) for rank in self.trainers}
        self.receivers = {member: Receiver(self.plan, member, self.dtype, CPU) for member in self.engines}
        self.held: dict[int, Tensors] = {}
        self.live = {member: Live(self._blank(member)) for member in self.engines}
        self.load(1)

    def load(self, version: int) -> None:
        """Gives the trainer ranks a version."""
        self.model = random_model(self.case.shape, self.dtype, version)
        for rank in self.trainers:
            self.held[rank] = cut(self.case.shape, self.case.trainer, self.model, *self._cell(rank))

    def _cell(self, rank: int) -> tuple[int, int]:
        tp_size = self.case.trainer.tp_size
        return rank % tp_size, rank // tp_size // self.case.dp_size

    def _blank(self, member: int) -> Tensors:
        return blank(self.case.shape, self.case.engine, self.dtype, self.tp_rank(member))

    def tp_rank(self, member: int) -> int:
        """Of an engine's member."""
        return (member - len(self.trainers)) % self.case.engine.tp_size

    def sync(self, network: Network | None = None, *, seconds: float = 20.0, silent: Iterable[int] = ()) -> dict[int, str]:
        """Every member but the silent ones takes its part, and closes its transport when it fails, as the bridge does;
        the words of those that failed."""
        network = network or Network(len(self.members))
        said: dict[int, str] = {}
        broken: list[BaseException] = []
        deadline = Deadline(seconds)

        def run(member: int) -> None:
            transport = network.members[member]
            try:
                if member in self.senders:
                    self.senders[member].send(self.held[member], transport, deadline)
                else:
                    self.receivers[member].receive(self.live[member], transport, deadline)
                assert transport.num_under_way == 0, "a member is done before its messages are"
            except WeightSyncError as error:
                said[member] = str(error)
                transport.close()
            except BaseException as error:
                broken.append(error)
                transport.close()
                raise

        quiet = set(silent)
        threads = [threading.Thread(target=run, args=(m,), daemon=True) for m in self.members if m not in quiet]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a member waits for ever"
        if broken:
            raise broken[0]
        return said

    def check(self) -> None:
        """Every engine rank holds what the layout says, padding as it was, and was told once of each parameter."""
        for member, live in self.live.items():
            wanted = cut(self.case.shape, self.case.engine, self.model, self.tp_rank(member))
            assert live.shards.keys() == wanted.keys()
            for name, tensor in wanted.items():
                assert same_bits(live.shards[name], tensor), (member, name)
            covered = {p.parameter for p in layout.shard_slices(self.case.shape, self.case.engine, self.tp_rank(member))}
            assert sorted(name for name, _ in live.completed) == sorted(covered), "all but those that are only padding"
            assert all(same_bits(seen, wanted[name]) for name, seen in live.completed), "told too early"
