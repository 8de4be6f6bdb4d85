"""The plan of a weight sync, carried out on index arrays: every element of every Hugging Face tensor is a number, trainer
shards are filled with them, all messages run in order, and every engine's shards must hold what the layout says, once.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.bridge import plan as plan_module
from engine.bridge.plan import UNPACKED_BYTES, plan
from engine.bridge.shard_plan import Role, ShardPlan
from engine.models import checks
from engine.models import sharding as layout
from engine.models.base import ModelShape
from engine.models.sharding import EngineLayout, TrainerLayout
from tests.unit.bridge import plain_order
from tests.unit.models.test_sharding import Tensors, fill, model_of

Nodes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Case:
    """What a plan is made of; `plan(*case.arguments)`."""

    shape: ModelShape
    dtype_bytes: int
    source: TrainerLayout
    dp_size: int
    target: EngineLayout
    nodes: Nodes
    bucket_bytes: int
    senders: Nodes = ()

    @property
    def arguments(self) -> tuple:
        return tuple(getattr(self, field.name) for field in fields(self))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Trainers of TP 1 to 8, PP 1 to 4 (even, uneven, virtual), DP 1 to 3; engines of TP 1 to 8, on one to three nodes."""
    tp_size, engine_size = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    fitting = [n for n in range(1, 17) if all(n % size == 0 or size % n == 0 for size in (tp_size, engine_size))]
    kv_heads = draw(st.sampled_from(fitting))
    heads = math.lcm(tp_size, engine_size, kv_heads) * draw(st.integers(1, 2))
    head_dim = draw(st.integers(1, 2))
    if (heads + 2 * kv_heads) * head_dim % tp_size:
        head_dim = tp_size
    pp_size = draw(st.integers(1, 4))
    virtual = 1 if pp_size == 1 else draw(st.integers(1, 2))
    first = last = None
    if pp_size > 1:
        first, last = (draw(st.none() | st.integers(1, 2).map(lambda n: n * virtual)) for _ in range(2))
    if virtual > 1 and pp_size == 2:
        last = None
    between = pp_size - (first is not None) - (last is not None)
    vocab_size = draw(st.integers(1, 200))
    if engine_size not in (1, 2, 4, 8):
        vocab_size = 64 * engine_size - draw(st.integers(0, 63))  # or vLLM could not cut the padded rows
    shape = ModelShape(
        num_layers=(first or 0) + (last or 0) + between * virtual * draw(st.integers(1, 2)),
        hidden=draw(st.integers(1, 3)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_hidden=math.lcm(tp_size, engine_size) * draw(st.integers(1, 2)),
        vocab_size=vocab_size,
        rope_theta=1e4,
        rope_scaling=None,
        norm_eps=1e-5,
        tied=draw(st.booleans()),
        max_positions=16,
    )
    local = TrainerLayout(tp_size, pp_size, virtual, first, last)
    in_fp8 = replace(local, spec="transformer_engine", fp8_parameters=True)
    engines = draw(st.permutations(range(draw(st.integers(1, 4)))))
    cuts = sorted({0, len(engines), *draw(st.lists(st.integers(0, len(engines)), max_size=2))})
    return Case(
        shape,
        draw(st.sampled_from([2, 4, UNPACKED_BYTES // 16])),  # the last: 16 elements are enough to travel alone
        draw(st.sampled_from([local, replace(local, spec="transformer_engine"), in_fp8])),
        draw(st.integers(1, 3)),
        EngineLayout(engine_size, whole=draw(st.integers(0, 3)) == 0),
        tuple(tuple(engines[a:b]) for a, b in pairwise(cuts)),
        draw(st.sampled_from([20, 100, 4096, 1 << 20, 1 << 40])),
    )


@st.composite
def divided(draw: st.DrawFn) -> Case:
    """The same, where every node is served by replicas of its own alone: at least one, of each shard of the policy."""
    case = draw(cases())
    dp_size = max(case.dp_size, len(case.nodes))
    others = draw(st.lists(st.integers(0, len(case.nodes) - 1), min_size=dp_size, max_size=dp_size))
    homes = [node if node < len(case.nodes) else others[node] for node in draw(st.permutations(range(dp_size)))]
    ranks = range(case.source.tp_size * case.source.pp_size * dp_size)
    on = [tuple(r for r in ranks if homes[r // case.source.tp_size % dp_size] == node) for node in range(len(case.nodes))]
    return replace(case, dp_size=dp_size, senders=tuple(on))


@st.composite
def overlapping(draw: st.DrawFn) -> Case:
    """The same, where nodes may be served by some of the same replicas and by others besides."""
    case = draw(cases())
    dp_size = draw(st.integers(2, 4))
    ranks = range(case.source.tp_size * case.source.pp_size * dp_size)
    able = [draw(st.sets(st.integers(0, dp_size - 1), min_size=1)) for _ in case.nodes]
    on = [tuple(r for r in ranks if r // case.source.tp_size % dp_size in replicas) for replicas in able]
    return replace(case, dp_size=dp_size, senders=tuple(on))


class Cluster:
    """All shards of a trainer and of its engines as index arrays."""

    def __init__(self, case: Case, made: ShardPlan) -> None:
        self.case, self.plan, self.model = case, made, model_of(case.shape)
        model_ranks = [(pp, tp) for pp in range(case.source.pp_size) for tp in range(case.source.tp_size)]
        self.held = {(pp, tp): fill(case.shape, case.source, self.model, tp, pp) for pp, tp in model_ranks}
        sizes = [layout.shard_shapes(case.shape, case.target, rank) for rank in range(case.target.tp_size)]
        self.live: dict[int, Tensors] = {}
        self.written: dict[int, Tensors] = {}
        for engine in range(sum(map(len, case.nodes))):
            for rank, shapes_ in enumerate(sizes):
                for shards in (self.live, self.written):
                    empty = {name: torch.zeros(size, dtype=torch.int64) for name, size in shapes_.items()}
                    shards[made.member(engine, rank)] = empty

    def carry_out(self) -> None:
        """Every message from its source's shards into every receiver's; a receiver fed by an engine gets its bytes."""
        for message in self.plan.messages:
            model_rank, axes = message.bucket.model_rank, self.case.source
            assert message.source // axes.tp_size // self.case.dp_size == model_rank[0]
            assert message.source % axes.tp_size == model_rank[1]
            for t in message.bucket.transfers:
                offset = (t.source.row, t.source.col, t.rows, t.cols)
                sent = layout.matrix_slice(self.held[model_rank][t.source.parameter], *offset)
                for member in self.plan.receivers(message):
                    offset = (t.target.row, t.target.col, t.rows, t.cols)
                    place = layout.matrix_slice(self.live[member][t.target.parameter], *offset)
                    assert place.shape == sent.shape == (t.rows, t.cols)
                    place.copy_(sent)
                    layout.matrix_slice(self.written[member][t.target.parameter], *offset).add_(1)

    def check(self) -> None:
        """Every engine shard holds what the layout says, each element written once, padding never."""
        for engine in range(sum(map(len, self.case.nodes))):
            for rank in range(self.case.target.tp_size):
                wanted = fill(self.case.shape, self.case.target, self.model, rank)
                member = self.plan.member(engine, rank)
                for name, values in wanted.items():
                    assert torch.equal(self.live[member][name], values)
                    assert torch.equal(self.written[member][name], (values != 0).long())


@given(cases() | divided())
@settings(max_examples=40, deadline=None)
def test_every_element_arrives_once_in_its_place(case: Case) -> None:
    checks.check_layout(case.shape, case.source)
    checks.check_engine_layout(case.shape, case.target)
    cluster = Cluster(case, plan(*case.arguments))
    cluster.carry_out()
    cluster.check()


@given(cases())
@settings(max_examples=30, deadline=None)
def test_buckets_keep_their_limits(case: Case) -> None:
    """At most bucket_bytes or a single row; unpacked ones contiguous in both shards; nothing large and contiguous packed, but
    everything where the source's matrices are made for a look; and two packed buckets of a flow never fit into one."""
    made = plan(*case.arguments)
    targets = [layout.shard_shapes(case.shape, case.target, rank) for rank in range(case.target.tp_size)]
    flows: dict = {}
    for bucket in made.buckets:
        sizes = [t.rows * t.cols * case.dtype_bytes for t in bucket.transfers]
        assert bucket.num_bytes == sum(sizes) > 0
        single_row = len(sizes) == 1 and bucket.transfers[0].rows == 1
        assert bucket.num_bytes <= case.bucket_bytes or single_row
        sources = layout.shard_shapes(case.shape, case.source, bucket.model_rank[1], bucket.model_rank[0])
        for t, size in zip(bucket.transfers, sizes, strict=True):
            shards = (sources[t.source.parameter], targets[bucket.target][t.target.parameter])
            contiguous = all(t.cols == (shape[1] if len(shape) == 2 else 1) for shape in shards)
            lies_there = contiguous and not case.source.fp8_parameters
            assert lies_there or bucket.packed
            assert not (lies_there and bucket.packed and size >= UNPACKED_BYTES)
        assert bucket.packed or len(bucket.transfers) == 1
        if bucket.packed:
            flows.setdefault((bucket.model_rank, bucket.target), []).append(bucket)
    for packed in flows.values():
        for one, following in pairwise(packed):
            first = following.transfers[0]
            assert one.num_bytes + first.cols * case.dtype_bytes > case.bucket_bytes or (
                one.num_bytes + first.rows * first.cols * case.dtype_bytes > case.bucket_bytes
            )


@given(cases() | divided())
@settings(max_examples=30, deadline=None)
def test_one_copy_enters_a_node_and_the_entry_goes_round(case: Case) -> None:
    made = plan(*case.arguments)
    entries: dict[tuple[tuple[int, ...], int], list[int]] = {}
    copies: Counter[tuple[int, tuple[int, ...]]] = Counter()
    for index, message in enumerate(made.messages):
        assert message.index == index
        (node,) = (node for node in case.nodes if set(message.path) == set(node))
        assert len(message.path) == len(node)
        copies[id(message.bucket), node] += 1
        entries.setdefault((node, message.bucket.target), []).append(message.path[0])
    assert set(copies.values()) <= {1}
    assert len(copies) == len(made.buckets) * len(case.nodes)
    for (node, _), entered in entries.items():
        counts = [entered.count(engine) for engine in node]
        assert max(counts) - min(counts) <= 1


@given(cases() | divided())
@settings(max_examples=40, deadline=None)
def test_replicas_send_equal_shares(case: Case) -> None:
    """To within the largest bucket, model_rank by model_rank, of those that serve the same node."""
    made = plan(*case.arguments)
    axes = case.source
    for model_rank in {bucket.model_rank for bucket in made.buckets}:
        ranks = [(model_rank[0] * case.dp_size + dp) * axes.tp_size + model_rank[1] for dp in range(case.dp_size)]
        for together in case.senders or (ranks,):
            sent = {rank: 0 for rank in ranks if rank in together}
            for message in made.messages:
                if message.source in sent:
                    sent[message.source] += message.bucket.num_bytes
            assert max(sent.values()) - min(sent.values()) <= max(bucket.num_bytes for bucket in made.buckets)


@given(divided())
@settings(max_examples=40, deadline=None)
def test_a_node_with_senders_of_its_own_is_sent_to_by_no_other(case: Case) -> None:
    """By the messages; that they are all that its engines need, once, is the first test's. Without that the plan is another,
    unless there is but one node."""
    made = plan(*case.arguments)
    for message in made.messages:
        (node,) = (number for number, engines in enumerate(case.nodes) if set(message.path) == set(engines))
        assert message.source in case.senders[node]
    free = plan(*replace(case, senders=()).arguments)
    assert set(made.buckets) == set(free.buckets)
    assert len(case.nodes) > 1 or (made, made.digest) == (free, free.digest)


@given(cases())
@settings(max_examples=20, deadline=None)
def test_naming_all_ranks_as_senders_changes_nothing(case: Case) -> None:
    made = plan(*case.arguments)
    everybody = tuple(range(made.trainer_size))
    again = plan(*replace(case, senders=(everybody,) * len(case.nodes)).arguments)
    assert (again, again.digest) == (made, made.digest)


def test_a_node_that_lacks_a_shard_is_no_plan() -> None:
    """TP 2 over two nodes: the second node's replica without its second rank."""
    with pytest.raises(AssertionError, match=r"no sender to node 1 holds model-parallel rank \(0, 1\)"):
        plan(LLAMA_8B, 2, TrainerLayout(2), 2, EngineLayout(1), ((0,), (1,)), 64 << 20, ((0, 1), (2,)))


@given(cases() | divided())
@settings(max_examples=30, deadline=None)
def test_streams_advance_together(case: Case) -> None:
    """The k-th bucket of every flow comes before any (k + 1)-th."""
    seen: Counter[tuple] = Counter()
    rounds = []
    for message in plan(*case.arguments).messages:
        flow = (message.bucket.model_rank, message.bucket.target, frozenset(message.path))
        rounds.append(seen[flow])
        seen[flow] += 1
    assert rounds == sorted(rounds)


@given(cases() | divided())
@settings(max_examples=20, deadline=None)
def test_every_member_finds_its_part(case: Case) -> None:
    """Members are numbered without gaps; a message has one sender, one entry, and engines behind it."""
    made = plan(*case.arguments)
    num_engines = sum(map(len, case.nodes))
    assert made.num_members == made.trainer_size + num_engines * case.target.tp_size
    members = [made.member(e, rank) for e in range(num_engines) for rank in range(case.target.tp_size)]
    assert members == list(range(made.trainer_size, made.num_members))
    roles: dict[int, dict[int, Role]] = {}
    for member in range(made.num_members):
        part = made.messages_of(member)
        assert [message.index for message, _ in part] == sorted({message.index for message, _ in part})
        for message, role in part:
            roles.setdefault(message.index, {})[member] = role
    for message in made.messages:
        entry, *others = made.receivers(message)
        expected = {message.source: Role.SEND, entry: Role.RECEIVE_AND_FORWARD if others else Role.RECEIVE}
        assert roles[message.index] == expected | dict.fromkeys(others, Role.RECEIVE_FROM_ENGINE)


@given(cases(), st.data())
@settings(max_examples=20, deadline=None)
def test_equal_inputs_give_equal_plans_and_others_another_digest(case: Case, data: st.DataObject) -> None:
    made = plan(*case.arguments)
    copied = Case(*(replace(a) if hasattr(a, "__dataclass_fields__") else a for a in case.arguments))
    again = plan(*copied.arguments)
    assert (again, again.digest) == (made, made.digest)
    changed: dict[str, Any] = data.draw(
        st.sampled_from(
            [
                {"dp_size": case.dp_size + 1},
                {"dtype_bytes": case.dtype_bytes * 2},
                {"nodes": (*case.nodes, (sum(map(len, case.nodes)),))},
                {"shape": replace(case.shape, hidden=case.shape.hidden + 1)},
            ]
        )
    )
    assert plan(*replace(case, **changed).arguments).digest != made.digest


LLAMA_8B = ModelShape(32, 4096, 32, 8, 128, 14336, 128256, 5e5, None, 1e-5, False, 131072)
EXAMPLE = (LLAMA_8B, 2, TrainerLayout(2, 2), 2, EngineLayout(1), ((0, 1, 2, 3),), 64 << 20)


def test_another_process_makes_the_same_plan() -> None:
    """With another hash seed, without torch."""
    code = (
        "import sys; from engine.models.base import ModelShape\n"
        "from engine.bridge.plan import plan; from engine.models.sharding import EngineLayout, TrainerLayout\n"
        "shape = ModelShape(32, 4096, 32, 8, 128, 14336, 128256, 5e5, None, 1e-5, False, 131072)\n"
        "print(plan(shape, 2, TrainerLayout(2, 2), 2, EngineLayout(1), ((0, 1, 2, 3),), 64 << 20).digest)\n"
        "assert 'torch' not in sys.modules\n"
    )
    digests = set()
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[3])}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout.strip())
    assert digests == {plan(*EXAMPLE).digest}


def test_8b_from_two_by_two_to_one() -> None:
    """Figures that can be checked by hand: 8,030,261,248 parameters of 2 bytes, once into the node; the model-parallel ranks
    of the first stage send the embedding and 16 layers; norms take turns between the tensor ranks."""
    made = plan(*EXAMPLE)
    assert made.num_bytes == 2 * 8_030_261_248
    sent: Counter[int] = Counter()
    for message in made.messages:
        sent[message.source] += message.bucket.num_bytes
    assert max(sent.values()) - min(sent.values()) <= 64 << 20
    norms = Counter(b.model_rank for b in made.buckets for t in b.transfers if "layernorm" in t.name)
    assert set(norms.values()) == {16}
    neighbours = [(a.source, a.path[0]) for a in made.messages[:100]]
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in pairwise(neighbours))


@pytest.mark.parametrize(("tp_size", "engine_size"), [(2, 4), (4, 4), (8, 4), (8, 1), (2, 1), (1, 8)])
def test_what_many_hold_is_sent_by_one_and_in_turns(tp_size: int, engine_size: int) -> None:
    """Norms: by each tensor rank as often, and along flows that exist anyway; a tied embedding: half by either end."""
    shape = replace(LLAMA_8B, tied=True)
    made = plan(shape, 2, TrainerLayout(tp_size, 2), 1, EngineLayout(engine_size), ((0,),), 64 << 20)
    norms: Counter[tuple[int, int]] = Counter()
    embedding: Counter[int] = Counter()
    matrices = set()
    for bucket in made.buckets:
        for t in bucket.transfers:
            if "layernorm" in t.name:
                norms[bucket.model_rank] += 1
            elif "embed" in t.name:
                embedding[bucket.model_rank[0]] += t.rows
            else:
                matrices.add((bucket.model_rank, bucket.target))
    assert len(norms) == 2 * tp_size
    assert max(norms.values()) == min(norms.values())
    assert abs(embedding[0] - embedding[1]) <= tp_size * engine_size
    assert {(b.model_rank, b.target) for b in made.buckets for t in b.transfers if "layernorm" in t.name} <= matrices


@given(st.one_of(cases(), divided(), overlapping()))
@settings(max_examples=150, deadline=None)
def test_the_order_is_that_of_looking_at_every_replica_for_every_message(case: Case) -> None:
    """Message for message, whoever may send to whom."""
    fast = plan(*case.arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_order", plain_order.order)
        plain = plan(*case.arguments)
    assert fast.messages == plain.messages and fast.digest == plain.digest


@given(st.one_of(cases(), divided()))
@settings(max_examples=30, deadline=None)
def test_no_message_looks_at_every_replica_where_nodes_have_the_same_or_others(case: Case) -> None:
    """Else a plan's time grows with the square of the GPUs."""

    def scanned(*_: object) -> None:
        raise AssertionError("every replica was looked at")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module._Overlapping, "send", scanned)
        patch.setattr(plan_module._Overlapping, "take", scanned)
        plan(*case.arguments)
