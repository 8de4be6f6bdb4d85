"""A weight sync from end to end without processes and without vLLM: that every engine shard comes out as the layout says,
how much memory and how many messages that takes, what is said when bits change or somebody is silent, and the terms that
members share. The plan itself is tested in test_bridge_plan.py, real connections in test_transport.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.bridge.checksum import BlockDigests
from engine.bridge.exchange import STAGED
from engine.bridge.sender import REASON_BYTES, Failure, most_telling
from engine.bridge.shard_plan import Bucket, Message
from engine.bridge.terms import SyncTerms
from engine.core.errors import EngineLostError, UndeliveredError, WeightSyncError
from engine.models.base import Llama3Scaling
from engine.models.sharding import EngineLayout, TrainerLayout
from tests.unit.bridge.memory_transport import InOrder, Network
from tests.unit.bridge.world import Case, World, small_shape

ONE_NODE, TWO_NODES, UNEVEN_NODES = ((0, 1, 2),), ((0,), (1,)), ((1, 2), (0,))
EVERYTHING = 1 << 30
TWO_STAGES = TrainerLayout(tp_size=2, pp_size=2)
VIRTUAL = TrainerLayout(tp_size=1, pp_size=2, vpp_size=2)
UNEVEN = TrainerLayout(tp_size=2, pp_size=2, first_stage_layers=1, spec="transformer_engine")

CASES = {
    "one to one": Case(),
    "one to four, more ranks than kv heads": Case(engine=EngineLayout(4)),
    "four ranks on one kv head to one": Case(small_shape(kv_heads=1), TrainerLayout(4)),
    "four to two on one node": Case(trainer=TrainerLayout(4), engine=EngineLayout(2), nodes=ONE_NODE),
    "two stages and replicas to two nodes": Case(trainer=TWO_STAGES, dp_size=2, nodes=TWO_NODES),
    "virtual stages, tied": Case(small_shape(num_layers=4, tied=True), VIRTUAL, engine=EngineLayout(2), nodes=UNEVEN_NODES),
    "uneven stages": Case(small_shape(num_layers=3, tied=True), UNEVEN, 2, nodes=ONE_NODE),
    "whole tensors on every rank": Case(trainer=TWO_STAGES, engine=EngineLayout(2, whole=True), nodes=TWO_NODES),
    "a bucket a row": Case(trainer=TrainerLayout(2), engine=EngineLayout(2), bucket_bytes=1, nodes=ONE_NODE),
    "one bucket, all packed": Case(dtype="bfloat16", bucket_bytes=EVERYTHING, unpacked_bytes=EVERYTHING, nodes=ONE_NODE),
    "one bucket, hardly anything packed": Case(dtype="bfloat16", bucket_bytes=EVERYTHING, unpacked_bytes=1, nodes=ONE_NODE),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any mixture of the above."""
    pick: Callable = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    trainer = pick(TrainerLayout(), TrainerLayout(2), TrainerLayout(4), TWO_STAGES, VIRTUAL, UNEVEN)
    num_layers = 4 if trainer is VIRTUAL else pick(2, 4)
    return Case(
        small_shape(kv_heads=pick(1, 2, 4), tied=pick(True, False), num_layers=num_layers),
        trainer,
        pick(1, 2),
        EngineLayout(pick(1, 2, 4), whole=pick(False, False, True)),
        pick(((0,),), ONE_NODE, TWO_NODES, UNEVEN_NODES),
        pick(40, 300, 3000, EVERYTHING),
        pick(1, 64, 300, EVERYTHING),
        pick("bfloat16", "float32"),
    )


# -- what arrives


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_engine_holds_what_the_layout_says_version_after_version(case: Case) -> None:
    world = World(case)
    for version in (1, 2):
        world.load(version)
        for live in world.live.values():
            live.completed.clear()
        assert world.sync() == {}
        world.check()


@given(cases())
@settings(max_examples=20, deadline=None)
def test_any_layout_any_bucket(case: Case) -> None:
    world = World(case)
    assert world.sync() == {}
    world.check()


@pytest.mark.parametrize("at_once_bytes", [300, EVERYTHING])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_digests_may_be_computed_many_at_a_time(case: Case, at_once_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: parameters are completed after their digests, each once, and a flipped bit still shows."""
    made = BlockDigests.__init__

    def patient(self: BlockDigests, columns: torch.Tensor) -> None:
        made(self, columns)
        self._at_once_bytes = at_once_bytes

    monkeypatch.setattr(BlockDigests, "__init__", patient)
    world = World(case)
    assert world.sync() == {}
    world.check()
    sender = next(rank for rank in world.trainers if world.plan.messages_of(rank))

    def flip(content: torch.Tensor, bucket: Bucket) -> torch.Tensor:
        content.view(-1).view(torch.uint8)[0] ^= 1
        return content

    _, said = changed_sync(case, Change(sender, 0, flip))
    assert any("must hold the trainer's bits" in sentence for sentence in said.values())


# -- what it takes


@given(cases(), st.sampled_from([1, 3]))
@settings(max_examples=12, deadline=None)
def test_two_buckets_of_memory_and_as_many_messages_under_way_as_the_transport_carries(case: Case, depth: int) -> None:
    """Whatever is sent or received lies in a shard or in one of two slots, each as large as the member's largest packed
    bucket; of an engine that passes messages on, as many may be coming in as going out."""
    world, network = World(case), Network(World(case).plan.num_members, depth=depth)
    assert world.sync(network) == {}
    for member, transport in enumerate(network.members):
        side = world.senders.get(member) or world.receivers[member]
        slots = side._staging._slots
        buckets = [message.bucket for message, _ in world.plan.messages_of(member)]
        largest = max((bucket.num_bytes for bucket in buckets if bucket.packed), default=0)
        assert [slot.nbytes for slot in slots] == [largest] * STAGED
        shards = world.held[member] if member in world.senders else world.live[member].shards
        known = {tensor.untyped_storage().data_ptr() for tensor in (*slots, *shards.values())}
        assert transport.storages <= known
        assert transport.most_receiving <= transport.depth
        assert transport.most_sending <= transport.depth
        assert transport.most_sends <= transport.depth or member not in world.senders


# -- messages that run one after another on each member, as over NCCL


def syncs_in_order(case: Case, depth: int) -> None:
    """A whole sync over such a network."""
    world = World(case)
    assert world.sync(InOrder(len(world.members), depth)) == {}
    world.check()


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_nobody_waits_in_a_circle(case: Case, depth: int) -> None:
    syncs_in_order(case, depth)


@given(cases(), st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_nobody_waits_in_a_circle_in_any_layout(case: Case, depth: int) -> None:
    syncs_in_order(case, depth)


# -- what is said when bits change


@dataclass(frozen=True)
class Change:
    """What becomes of one message's bytes on the way, given the parts of its transfers."""

    sender: int
    number: int  # of this sender's messages
    make: Callable[[torch.Tensor, Bucket], torch.Tensor]

    def alter(self, world: World) -> Callable[[int, int, torch.Tensor], torch.Tensor]:
        """For a Network."""
        bucket, chosen = self.message(world).bucket, (self.sender, self.number)
        return lambda member, number, content: self.make(content.clone(), bucket) if (member, number) == chosen else content

    def message(self, world: World) -> Message:
        """The one that is changed."""
        return world.plan.messages_of(self.sender)[self.number][0]


def parts(content: torch.Tensor, bucket: Bucket) -> list[torch.Tensor]:
    """The content of each transfer."""
    return list(content.view(-1).split([t.rows * t.cols for t in bucket.transfers]))


def changed_sync(case: Case, change: Change) -> tuple[World, dict[int, str]]:
    """A sync with one change on the way."""
    world = World(case)
    return world, world.sync(Network(world.plan.num_members, change.alter(world)))


def check_blamed(world: World, message: Message, said: dict[int, str], indices: list[int]) -> None:
    """Exactly the message's receivers complain, and name one of these transfers by the engine's and the original name."""
    assert said.keys() == set(world.plan.receivers(message))
    transfers = [message.bucket.transfers[i] for i in indices]
    for words in said.values():
        found = re.match(
            r"engine parameter (\S+)( and \d+ more)? \(from (.+)\) must hold the trainer's bits after a sync; found other "
            r"ones: the sync is repeated in full$",
            words,
        )
        assert found, words
        assert any(t.target.parameter == found[1] and t.name in found[3].split(", ") for t in transfers), words


CHANGED = [
    Case(trainer=TrainerLayout(2), engine=EngineLayout(2), nodes=ONE_NODE),
    Case(small_shape(tied=True), TWO_STAGES, 2, EngineLayout(1), UNEVEN_NODES, dtype="bfloat16"),
    Case(engine=EngineLayout(1, whole=True), bucket_bytes=EVERYTHING, unpacked_bytes=EVERYTHING),
]


@given(st.sampled_from(CHANGED), st.data())
@settings(max_examples=15, deadline=None)
def test_one_flipped_bit_is_noticed_and_named(case: Case, data: st.DataObject) -> None:
    world = World(case)
    sender = data.draw(st.sampled_from([rank for rank in world.trainers if world.plan.messages_of(rank)]))
    number = data.draw(st.integers(0, len(world.plan.messages_of(sender)) - 1))
    bit = data.draw(st.integers(0, 8 * world.plan.messages_of(sender)[number][0].bucket.num_bytes - 1))

    def flip(content: torch.Tensor, bucket: Bucket) -> torch.Tensor:
        content.view(-1).view(torch.uint8)[bit // 8] ^= 1 << bit % 8
        return content

    change = Change(sender, number, flip)
    world, said = changed_sync(case, change)
    bucket = change.message(world).bucket
    ends = torch.tensor([t.rows * t.cols * world.plan.dtype_bytes for t in bucket.transfers]).cumsum(0)
    check_blamed(world, change.message(world), said, [int((ends <= bit // 8).sum())])


@given(st.sampled_from(CHANGED), st.data())
@settings(max_examples=10, deadline=None)
def test_a_transfer_that_is_left_out_is_noticed_and_named(case: Case, data: st.DataObject) -> None:
    """What then lies in its place is what the message before left there, or nothing."""
    world = World(case)
    sender = data.draw(st.sampled_from([rank for rank in world.trainers if world.plan.messages_of(rank)]))
    number = data.draw(st.integers(0, len(world.plan.messages_of(sender)) - 1))
    index = data.draw(st.integers(0, len(world.plan.messages_of(sender)[number][0].bucket.transfers) - 1))

    def leave_out(content: torch.Tensor, bucket: Bucket) -> torch.Tensor:
        parts(content, bucket)[index].zero_()
        return content

    change = Change(sender, number, leave_out)
    world, said = changed_sync(case, change)
    check_blamed(world, change.message(world), said, [index])


@pytest.mark.parametrize("case", CHANGED)
def test_two_transfers_in_each_others_place_are_noticed_and_named(case: Case) -> None:
    world = World(case)
    found = []
    for sender in world.trainers:
        for number, (message, _) in enumerate(world.plan.messages_of(sender)):
            sizes = [t.rows * t.cols for t in message.bucket.transfers]
            found += [(sender, number, a, b) for b, n in enumerate(sizes) for a in range(b) if sizes[a] == n]
    assert found, "there must be transfers of one size in a bucket"
    for sender, number, a, b in (found[0], found[-1]):

        def swap(content: torch.Tensor, bucket: Bucket, a: int = a, b: int = b) -> torch.Tensor:
            one, other = parts(content, bucket)[a], parts(content, bucket)[b]
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)
            return content

        change = Change(sender, number, swap)
        changed, said = changed_sync(case, change)
        check_blamed(changed, change.message(changed), said, [a, b])


def test_the_sync_after_a_changed_one_is_good() -> None:
    """Nothing of a failure stays in senders and receivers: with new transports the same ones succeed."""
    world = World(CHANGED[0])
    change = Change(1, 0, lambda content, bucket: torch.zeros_like(content))
    assert world.sync(Network(world.plan.num_members, change.alter(world)))
    for live in world.live.values():
        live.completed.clear()
    assert world.sync() == {}
    world.check()


def test_a_trainers_parameter_of_another_type_is_named() -> None:
    world = World(CHANGED[0])
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    world.held[0][name] = world.held[0][name].bfloat16()
    network = Network(world.plan.num_members)
    said = world.sync(network, seconds=0.3)
    assert said[0] == f"trainer parameter {name} must be torch.float32; found torch.bfloat16: publish one type"
    assert network.members[0].storages == set(), "nothing was sent before the types were known"


# -- what is said when somebody is silent

BUCKET = r"bucket \d+ of \d+ \(\S+( and \d+ more tensors)?\) from trainer rank \d+ to tensor rank \d+ of engine [\d, ]+"
DIGEST = r"the digest (of trainer rank \d+|for tensor rank \d+ of engine \d+)"
SENTENCE = re.compile(rf"({BUCKET}|{DIGEST}) was not delivered: (timed out|the connection is closed)")


@pytest.mark.parametrize("case", CHANGED)
@given(data=st.data())
@settings(max_examples=3, deadline=None)
def test_a_silent_member_ends_every_wait_in_words(case: Case, data: st.DataObject) -> None:
    """Whoever has a message with it fails; nobody waits for ever; and nobody claims that bits differ."""
    world = World(case)
    silent = data.draw(st.sampled_from(world.members))
    said = world.sync(seconds=0.3, silent=[silent])
    assert all(SENTENCE.fullmatch(words) for words in said.values()), said
    messages = [message for message, _ in world.plan.messages_of(silent)]
    if silent in world.trainers:
        waiting = {member for message in messages for member in world.plan.receivers(message)}
    else:
        waiting = {message.source for message in messages if world.plan.receivers(message)[0] == silent}
    assume(waiting)
    assert waiting <= said.keys()
    assert any(re.match(BUCKET, said[member]) for member in waiting)


def test_the_sentence_names_bucket_tensor_and_ranks() -> None:
    world = World(Case(trainer=TrainerLayout(2), bucket_bytes=EVERYTHING, unpacked_bytes=EVERYTHING, nodes=ONE_NODE))
    said = world.sync(seconds=1.0, silent=[1])
    (lost,) = (message for message in world.plan.messages if message.source == 1)
    assert said[world.plan.receivers(lost)[0]] == (
        f"bucket {lost.index + 1} of 2 ({lost.bucket.transfers[0].name} and {len({t.name for t in lost.bucket.transfers}) - 1} "
        f"more tensors) from trainer rank 1 to tensor rank 0 of engine {', '.join(map(str, lost.path))} was not delivered: "
        f"timed out"
    )


def test_a_causes_words_win_over_its_echoes() -> None:
    echo = Failure("trainer rank 0: bucket 1 was not delivered: timed out", echo=True)
    other_echo = Failure("engine 1: member 3 did not meet the others: gone", echo=True)
    cause = Failure("engine 0: a parameter must hold the trainer's bits, a message was not delivered")
    assert most_telling([]) is None
    assert most_telling([echo, other_echo, cause]) == cause
    assert most_telling([other_echo, echo]) == other_echo
    assert most_telling([cause, Failure("engine 2: another cause"), echo]) == cause
    for failure in (echo, cause):
        assert Failure.from_bytes(failure.to_bytes()) == failure
    assert Failure.from_bytes(b"") is None
    long = Failure("ä" * REASON_BYTES, echo=True)
    assert Failure.from_bytes(long.to_bytes()) == Failure("ä" * ((REASON_BYTES - 1) // 2), echo=True)


def test_an_echo_stays_one_on_its_way_out_of_another_process() -> None:
    error = EngineLostError("worker 0: bucket 1 was not delivered")
    error.echo = True
    assert copy.copy(error).echo  # by __reduce_ex__, as pickle does
    assert not EngineLostError("worker 0: gone").echo
    assert UndeliveredError("bucket 1 was not delivered").echo
    assert not WeightSyncError("lm_head.weight differs").echo


# -- terms

SCALING = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)


@pytest.mark.parametrize("scaling", [None, SCALING])
def test_terms_survive_the_way_through_json(scaling: Llama3Scaling | None) -> None:
    terms = replace(CASES["uneven stages"].terms, shape=replace(small_shape(num_layers=3), rope_scaling=scaling))
    again = SyncTerms.from_json(terms.to_json())
    assert again == terms
    assert again.plan().digest == terms.plan().digest
    assert again.torch_dtype is torch.float32


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[:-1],
        lambda text: text.replace('"gloo"', "3"),
        lambda text: text.replace('"num_layers":2', '"num_layers":"two"'),
        lambda text: text.replace('"dp_size":1,', ""),
    ],
)
def test_other_text_is_no_terms(spoil: Callable[[str], str]) -> None:
    text = Case().terms.to_json()
    assert spoil(text) != text
    with pytest.raises(ValidationError):
        SyncTerms.from_json(spoil(text))
