"""The bridge without vLLM: what a digest notices, what a message holds, and a publisher that sends over a real gloo
channel to engines that are threads of this process, in the right order and with the right words when it fails.
"""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, example, given
from hypothesis import strategies as st

from engine.bridge import digest as digest_module
from engine.bridge.channel import DIGEST_BYTES, BucketManifest, Channel, Rendezvous, join_store
from engine.bridge.digest import tensor_digest
from engine.bridge.publish import Publisher, stream_to_first_rank
from engine.errors import InferenceError, WeightSyncError
from engine.inference.pool import Pool
from engine.llama.layout import ExportBucket, TensorMeta

DTYPES = [torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.int64]


# -- digest


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Digests in chunks of 7 words, so that small tensors span several."""
    monkeypatch.setattr(digest_module, "_CHUNK", 7)


@st.composite
def tensors(draw, min_bytes=0):
    """Random bits as a tensor of one of the dtypes, NaNs and all."""
    dtype = draw(st.sampled_from(DTYPES))
    words = draw(st.integers(-(-min_bytes // dtype.itemsize), 24))
    data = draw(st.binary(min_size=words * dtype.itemsize, max_size=words * dtype.itemsize))
    return torch.tensor(list(data), dtype=torch.uint8).view(dtype)


@given(tensors(min_bytes=1), st.integers(0))
def test_any_flipped_bit_changes_the_digest(tensor, bit):
    changed = tensor.clone()
    place = bit % (8 * tensor.nbytes)
    changed.view(torch.uint8)[place // 8] ^= 1 << place % 8
    assert tensor_digest(changed) != tensor_digest(tensor)


def complement_partner(word: int, position: int) -> int:
    """The 64-bit word that mixes to the complement of what `word` mixes to, before the first shift."""
    size = 1 << 64
    mask = position * digest_module._POSITION % size
    other = (-pow(digest_module._MIX_1, -1, size) - (word ^ mask)) % size ^ mask
    return other - size if other >= size // 2 else other


@given(tensors(min_bytes=1), st.integers(0), st.binary(min_size=8, max_size=8))
def test_any_change_within_one_word_changes_the_digest(tensor, place, data):
    word = torch.tensor(list(data[: tensor.itemsize]), dtype=torch.uint8)
    changed = tensor.clone()
    bytes_of_word = changed.view(torch.uint8).view(-1, tensor.itemsize)[place % tensor.numel()]
    assume(not torch.equal(bytes_of_word, word))
    bytes_of_word.copy_(word)
    assert tensor_digest(changed) != tensor_digest(tensor)


@given(st.integers(-(1 << 63), (1 << 63) - 1))
def test_mixing_a_word_is_one_to_one(word):
    """An arithmetic shift would mix a word and this partner of it to the same."""
    pair = [torch.tensor([word]), torch.tensor([complement_partner(word, 1)])]
    assert tensor_digest(pair[0]) != tensor_digest(pair[1])


@given(tensors(min_bytes=16), st.integers(0), st.integers(0))
def test_two_swapped_values_change_the_digest(tensor, first, second):
    words = tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])
    i, j = first % words.numel(), second % words.numel()
    assume(words[i] != words[j])
    swapped = words.clone()
    swapped[i], swapped[j] = words[j], words[i]
    assert tensor_digest(swapped.view(tensor.dtype)) != tensor_digest(tensor)


@given(tensors(), st.integers(1, 24))
def test_equal_bits_have_one_digest_however_they_lie_in_memory(tensor, chunk):
    """A strided view, a column, and chunks of any size give what the plain tensor gives."""
    expected = tensor_digest(tensor)
    assert (expected.dtype, expected.shape) == (torch.int64, ())
    wide = tensor.new_zeros(tensor.numel(), 3)
    wide[:, 1] = tensor
    assert tensor_digest(wide[:, 1]) == expected
    assert tensor_digest(tensor.view(1, -1).t()) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest_module, "_CHUNK", chunk)
        assert tensor_digest(tensor) == expected


def test_a_digest_depends_on_the_order_of_a_matrix_and_on_its_zeros():
    matrix = torch.arange(6.0).view(2, 3)
    assert tensor_digest(matrix) != tensor_digest(matrix.t())
    assert len({int(tensor_digest(torch.zeros(count))) for count in range(5)}) == 5
    assert tensor_digest(torch.tensor([0.0])) != tensor_digest(torch.tensor([-0.0]))


# -- messages


@given(
    st.sampled_from([torch.int8, torch.bfloat16, torch.float32]),
    st.lists(st.lists(st.integers(0, 5), min_size=0, max_size=3), min_size=1, max_size=5),
)
@example(torch.bfloat16, [[3], [1, 1], [5]])  # 18 bytes: not a multiple of 8
@example(torch.int8, [[]])
def test_a_message_gives_back_every_tensor_and_digest(dtype, shapes):
    """Odd sizes, scalars, empty tensors; the message is only bytes in between, and nothing overlaps."""
    name = str(dtype).removeprefix("torch.")
    manifest = BucketManifest(0, name, tuple(map(str, range(len(shapes)))), tuple(map(tuple, shapes)))
    generator = torch.Generator().manual_seed(0)
    made = [(100 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]
    message = manifest.buffer(torch.device("cpu"))
    views, digests = manifest.views(message)
    digests.copy_(torch.arange(len(shapes)) - (1 << 40))
    for view, tensor in zip(views, made, strict=True):
        view.copy_(tensor)
    arrived = manifest.buffer(torch.device("cpu"))
    arrived.copy_(message)
    received, received_digests = manifest.views(arrived)
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(received, made, strict=True))
    assert torch.equal(received_digests, torch.arange(len(shapes)) - (1 << 40))
    assert manifest.num_bytes == sum(tensor.nbytes for tensor in made)
    assert 0 <= message.numel() - manifest.num_bytes - DIGEST_BYTES * len(shapes) < DIGEST_BYTES


# -- publishing

PLAN = (
    ExportBucket(0, (TensorMeta("embed", (5, 3)), TensorMeta("norm", (3,)))),
    ExportBucket(0, (TensorMeta("head", (7, 3)),)),
)


@dataclass(frozen=True)
class OneRank:
    """The place of rank 0 of one pipeline stage."""

    rank: int = 0
    pp_rank: int = 0
    is_stage_leader: bool = True

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def stage_leaders(self) -> tuple[int, ...]:
        return (0,)


class Weights:
    """A source of weights that counts what it was asked for."""

    def __init__(self, events: list[str]) -> None:
        torch.manual_seed(0)
        self.tensors = {meta.name: torch.randn(meta.shape).bfloat16() for bucket in PLAN for meta in bucket.tensors}
        self.events = events

    def gather(self, bucket: ExportBucket) -> list[tuple[str, torch.Tensor]]:
        self.events.append(f"gather {bucket.tensors[0].name}")
        return [(meta.name, self.tensors[meta.name]) for meta in bucket.tensors]


class ThreadEngine:
    """An engine's side of the channel on a thread of its own; `after` is called when everything has arrived."""

    def __init__(self, events: list[str], after: Any = lambda: None, listening: bool = True) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.events, self.after, self.listening = events, after, listening
        self.weights: dict[str, torch.Tensor] = {}

    def call(self, method: str, *arguments: Any) -> Any:
        self.events.append(method)
        future: Future[Any] = self.thread.submit(getattr(self, method), *arguments)
        return future

    def open_channel(self, info: dict[str, Any]) -> None:
        meeting = Rendezvous(info["host"], info["port"], info["world_size"], info["timeout_seconds"])
        self.channel = Channel(join_store(meeting), info["rank"], meeting)

    def receive(self, version: int, buckets: list[Any]) -> int:
        for source, dtype, names, shapes in buckets if self.listening else []:
            manifest = BucketManifest(source, dtype, tuple(names), tuple(map(tuple, shapes)))
            message = manifest.buffer(torch.device("cpu"))
            self.channel.broadcast(message, source)
            views, digests = manifest.views(message)
            assert torch.equal(torch.stack([tensor_digest(view) for view in views]), digests)
            self.weights |= dict(zip(names, views, strict=True))
        self.after()
        self.events.append("verified")
        return version

    def submit(self, requests: list[Any]) -> None:
        raise AssertionError("an engine in doubt must not be asked")


@pytest.fixture
def sync(monkeypatch):
    """Makes (publisher, pool, weights, events) with engines on threads; everything is closed at the end."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    threads: list[ThreadPoolExecutor] = []

    def make(*engines: ThreadEngine, events: list[str], timeout_seconds: float = 20.0):
        threads.extend(engine.thread for engine in engines)
        pool, weights = Pool(engines, 20.0), Weights(events)
        options: dict[str, Any] = {"host": "127.0.0.1", "num_engines": len(engines), "timeout_seconds": timeout_seconds}
        return Publisher(weights, OneRank(), PLAN, torch.bfloat16, pool=pool, **options), pool, weights

    yield make
    for thread in threads:
        thread.shutdown(wait=True)
    dist.destroy_process_group()


def test_a_published_version_reaches_every_engine_bit_for_bit(sync):
    events: list[str] = []
    engines = [ThreadEngine(events), ThreadEngine(events)]
    publisher, pool, weights = sync(*engines, events=events)
    for version in (0, 3):
        events.clear()
        weights.tensors["head"] += version
        report = publisher.publish(version)
        assert (report.version, report.num_messages) == (version, 2)
        assert report.num_bytes == 2 * (15 + 3 + 21)
        assert 0 < report.seconds < 20
        assert pool.version == version
        for engine in engines:
            assert engine.weights.keys() == weights.tensors.keys()
            assert all(torch.equal(engine.weights[name], tensor) for name, tensor in weights.tensors.items())
        expected = ["receive", "receive", "gather embed", "gather head", "verified", "verified"]
        assert events == expected, "engines are told first, buckets follow in the plan's order, commit comes last"


def test_no_version_is_served_while_a_sync_is_under_way(sync):
    events: list[str] = []
    publisher, pool, weights = sync(ThreadEngine(events), events=events)
    seen: list[type[Exception]] = []
    gather = weights.gather

    def watching(bucket):
        with pytest.raises(InferenceError, match="no weight version is committed") as caught:
            pool.submit([])
        seen.append(caught.type)
        return gather(bucket)

    weights.gather = watching
    publisher.publish(1)
    assert len(seen) == len(PLAN)
    assert pool.version == 1


def test_an_engine_that_finds_a_difference_fails_the_sync(sync):
    events: list[str] = []

    def differs() -> None:
        raise WeightSyncError("tensor head differs from the trainer's")

    publisher, pool, _ = sync(ThreadEngine(events), ThreadEngine(events, after=differs), events=events)
    with pytest.raises(WeightSyncError, match="engine 1 did not verify version 2: tensor head differs"):
        publisher.publish(2)
    with pytest.raises(InferenceError):
        pool.submit([])


def test_an_engine_that_is_late_with_its_proof_fails_the_sync(sync):
    events: list[str] = []
    release = threading.Event()
    late = ThreadEngine(events, after=lambda: release.wait(10))
    publisher, pool, _ = sync(late, events=events, timeout_seconds=0.5)
    with pytest.raises(WeightSyncError, match=r"engine 0 did not verify version 2 within sync\.timeout_seconds = 0\.5"):
        publisher.publish(2)
    release.set()
    with pytest.raises(InferenceError):
        pool.submit([])


def test_an_engine_that_does_not_listen_fails_the_sync_naming_the_bucket(sync):
    """It answers that it has the weights, having read nothing: the sending side notices."""
    events: list[str] = []
    publisher, pool, _ = sync(ThreadEngine(events, listening=False), events=events, timeout_seconds=0.5)
    with pytest.raises(WeightSyncError, match=r"bucket 1 of 2 \(embed \.\.\.\) was not delivered within 0\.5 s"):
        publisher.publish(2)
    with pytest.raises(InferenceError):
        pool.submit([])


@pytest.mark.parametrize(("rank", "names"), [(0, ["embed", "norm", "head"]), (1, [])])
def test_the_policy_streams_to_the_first_rank_in_the_plans_order(rank, names):
    """Rank 1, a tensor-parallel peer of the stage's leader, yields nothing but takes part in every gather."""
    events: list[str] = []
    weights = Weights(events)
    streamed = list(stream_to_first_rank(weights, OneRank(rank, 0, rank == 0), PLAN, torch.bfloat16))
    assert [name for name, _ in streamed] == names
    assert all(torch.equal(tensor, weights.tensors[name]) for name, tensor in streamed)
    assert events == ["gather embed", "gather head"]
