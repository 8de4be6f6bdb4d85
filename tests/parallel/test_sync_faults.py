"""A weight sync is a transaction: whatever fails, wherever, no engine ever answers with anything but the whole of the
version it names, the sync says so within its timeout or repeats itself, and the next one succeeds. At the end of the file
one engine alone, in this process: what it refuses, and what it makes of its workers' words."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from engine.core.arrays import TokenIds
from engine.core.errors import EngineLostError, InferenceError, WeightSyncError
from engine.inference.pool import Pool
from engine.inference.process import ENVIRONMENT
from engine.inference.sampling import SampleRequest
from engine.inference.sleep import release_pages
from tests.parallel import sync_world
from tests.parallel.pool import WorkerPool
from tests.parallel.sync_world import ENGINES, FORK, TERMS, Fault, Handle, filled, fingerprint, trainer_process

TIMEOUT = 3.0
EXTRA = 2.0  # what may pass beyond the timeout before everybody has failed
PLAN = TERMS.plan()
SENT = sum(message.source == 1 for message in PLAN.messages)  # by trainer rank 1
TAKEN = len(PLAN.messages)  # by each engine, and as many sent on by the two together


@dataclass
class Answers:
    """What clients were told while versions came and went."""

    right: int = 0
    refused: int = 0
    wrong: int = 0


class Clients:
    """Ask both engines all the time, for the version that is being published and the one before it."""

    def __init__(self, engines: list[Handle], version: int) -> None:
        self.answers = Answers()
        self._expected: dict[int, int] = {}
        self._engines, self._stopping = engines, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.expect(version)

    def expect(self, version: int) -> None:
        """From now on this version is asked for too."""
        self._expected[version] = fingerprint(filled(TERMS.engine, 0, version))

    def __enter__(self) -> Clients:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(30)

    def _run(self) -> None:
        count = 0
        while not self._stopping.is_set():
            for engine in self._engines:
                for version in list(self._expected)[-2:]:
                    count += 1
                    self._ask(engine, version, str(count))

    def _ask(self, engine: Handle, version: int, name: str) -> None:
        request = SampleRequest(name, "p", 0, 1, TokenIds.of([1]), 1.0, 1.0, 1)
        try:
            submitted, collected = engine.call("submit", [request], version), engine.call("collect", [name])
            submitted.result(20)
            ((completion,), _) = collected.result(20)
        except (InferenceError, TimeoutError):
            self.answers.refused += 1
            return
        if completion.version == version and list(completion.token_ids) == [self._expected[version]]:
            self.answers.right += 1
        else:
            self.answers.wrong += 1


class Cluster:
    """Two engines, a pool, and two trainer ranks, of which this process is the first."""

    def __init__(self, folder: Path, transport: str = "gloo") -> None:
        self.engines = [Handle(index) for index in range(ENGINES)]
        self.pool = Pool(self.engines, 20.0)
        self.pipe, theirs = FORK.Pipe()
        store = str(folder / "store")
        self.trainer = FORK.Process(target=trainer_process, args=(theirs, 1, store, TIMEOUT, transport), daemon=True)
        self.trainer.start()
        self.world, self.publisher = sync_world.open_publisher(0, store, TIMEOUT, transport, self.pool)
        assert self.pipe.poll(60) and self.pipe.recv() == "ready"
        self.version = 0

    def publish(self, fault: Fault | None = None) -> tuple[int, float]:
        """The next version, with a fault in trainer rank 1; (attempts, seconds)."""
        self.version += 1
        self.world.parameters = filled(TERMS.trainer, 0, self.version)
        self.pipe.send((self.version, fault))
        started = time.monotonic()
        try:
            report = self.publisher.publish(self.version)
        finally:
            seconds = time.monotonic() - started
            said = self.pipe.recv() if self.pipe.poll(TIMEOUT + 20) else "nothing"
        assert said == "", said
        return report.attempts, seconds

    def arm(self, engine: int, fault: Fault) -> None:
        """Arms a fault in an engine."""
        self.engines[engine].call("arm", fault).result(5)

    def check(self) -> None:
        """Every engine serves the last version, bit for bit."""
        assert self.pool.version == self.version
        expected = fingerprint(filled(TERMS.engine, 0, self.version))
        requests = [SampleRequest(f"check {i}", "p", i, 1, TokenIds.of([1]), 1.0, 1.0, 1) for i in range(ENGINES)]
        completions, _ = self.pool.generate(requests)
        assert [list(c.token_ids) for c in completions] == [[expected]] * ENGINES

    def close(self) -> None:
        """Ends all processes."""
        self.trainer.kill()
        for engine in self.engines:
            engine.stop()
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def cluster(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One for all faults that it survives, at version 1."""
    workers.close()  # of the files before this one
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    assert made.publish()[0] == 1
    yield made
    made.close()


@pytest.fixture
def no_cluster(request: pytest.FixtureRequest) -> None:
    """There may be one world of trainer ranks in a process: the shared one has ended."""
    if dist.is_initialized():
        request.getfixturevalue("cluster").close()


def test_an_abort_before_in_or_after_any_message_of_any_member_is_repeated(cluster: Cluster) -> None:
    """Every message of trainer rank 1 and of both engines, while clients ask; then 1,000 requests have been answered."""
    cases: list[tuple[int | None, Fault]] = []
    cases += [(None, Fault("abort", i, phase)) for i in range(SENT) for phase in ("before", "during", "after")]
    cases += [(e, Fault("abort", i, "during")) for e in range(ENGINES) for i in range(TAKEN)]
    cases += [(0, Fault("abort", i, phase)) for i in (0, TAKEN - 1) for phase in ("before", "after")]
    with Clients(cluster.engines, cluster.version) as clients:
        for engine, fault in cases:
            clients.expect(cluster.version + 1)
            if engine is not None:
                cluster.arm(engine, fault)
            attempts, seconds = cluster.publish(fault if engine is None else None)
            assert attempts == 2, (engine, fault)
            assert seconds < TIMEOUT + EXTRA, (engine, fault, seconds)
            cluster.check()
        deadline = time.monotonic() + 60
        while clients.answers.right < 1000 and time.monotonic() < deadline:
            time.sleep(0.1)
    assert clients.answers.right >= 1000
    assert clients.answers.refused > 0, "clients must have met engines in doubt"
    assert clients.answers.wrong == 0


@pytest.mark.parametrize("fault", [Fault("flip", 0), Fault("flip", SENT - 1), Fault("drop", 1), Fault("swap", 0)], ids=str)
def test_what_is_altered_on_the_way_is_noticed_and_sent_again(cluster: Cluster, fault: Fault) -> None:
    """A flipped bit, a message that never goes, two tensors of one shape in each other's place."""
    attempts, seconds = cluster.publish(fault)
    assert attempts == 2
    assert seconds < TIMEOUT + EXTRA
    cluster.check()


@pytest.mark.parametrize("index", [0, TAKEN // 2, TAKEN - 1])
@pytest.mark.parametrize("engine", range(ENGINES))
def test_a_killed_engine_is_replaced_and_brought_up_to_date(cluster: Cluster, engine: int, index: int) -> None:
    restarts = cluster.engines[engine].restarts
    with Clients(cluster.engines, cluster.version) as clients:
        clients.expect(cluster.version + 1)
        cluster.arm(engine, Fault("kill", index))
        assert cluster.publish()[0] == 2
    cluster.check()
    assert cluster.engines[engine].restarts == restarts + 1
    assert clients.answers.wrong == 0


def test_engines_that_sleep_refuse_everybody_and_wake_with_every_bit_sent(cluster: Cluster) -> None:
    """Their weights are lost in between: what they then serve is what the sync brought."""
    with Clients(cluster.engines, cluster.version) as clients:
        for _ in range(3):
            while True:
                with suppress(InferenceError):  # a client's request may be in flight
                    cluster.pool.sleep()
                    break
            with pytest.raises(InferenceError, match="the engines sleep"):
                assert cluster.pool.version
            clients.expect(cluster.version + 1)
            assert cluster.publish()[0] == 1
            cluster.check()
    assert clients.answers.wrong == 0


def test_an_engine_that_is_lost_asleep_is_replaced_by_the_next_sync(cluster: Cluster) -> None:
    cluster.pool.sleep()
    restarts = cluster.engines[1].restarts
    cluster.engines[1].process.kill()
    assert cluster.publish()[0] == 2
    cluster.check()
    assert cluster.engines[1].restarts == restarts + 1


def test_a_stopped_engine_is_noticed_at_the_timeout_and_replaced(cluster: Cluster) -> None:
    cluster.arm(1, Fault("stop", 1))
    attempts, seconds = cluster.publish()
    assert attempts == 2
    assert TIMEOUT <= seconds < 2 * (TIMEOUT + EXTRA)
    cluster.check()


def test_a_wrong_type_fails_every_rank_in_words_and_the_next_sync_succeeds(cluster: Cluster) -> None:
    with pytest.raises(WeightSyncError, match=r"output_layer\.weight must be torch\.float32; found torch\.bfloat16"):
        cluster.publish(Fault("dtype", 0))
    with pytest.raises(InferenceError, match="no weight version is committed"):
        assert cluster.pool.version
    request = SampleRequest("r", "p", 0, 1, TokenIds.of([1]), 1.0, 1.0, 1)
    with pytest.raises(InferenceError, match="its last weight sync failed"):
        cluster.engines[0].call("submit", [request], cluster.version - 1).result(5)
    assert cluster.publish()[0] == 1
    cluster.check()


def test_a_plan_that_is_not_the_trainers_is_refused(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cluster.publisher, "_digest", "0" * 64)
        with pytest.raises(WeightSyncError, match="the plan must be the trainer's, 000000000000"):
            cluster.publish()
    assert cluster.publish()[0] == 1
    cluster.check()


@pytest.mark.parametrize("kind", ["kill", "stop"])
@pytest.mark.usefixtures("no_cluster")
def test_a_lost_trainer_rank_ends_the_sync_with_an_error(tmp_path: Path, kind: str) -> None:
    """Nothing is committed, and nobody waits for ever."""
    cluster = Cluster(tmp_path)
    cluster.publish()
    cluster.pipe.send((2, Fault(kind, SENT // 2)))
    cluster.world.parameters = filled(TERMS.trainer, 0, 2)
    started = time.monotonic()
    with pytest.raises(WeightSyncError, match="a trainer rank is gone, or late"):
        cluster.publisher.publish(2)
    assert time.monotonic() - started < TIMEOUT + EXTRA + 0.5
    with pytest.raises(InferenceError, match="no weight version is committed"):
        assert cluster.pool.version
    cluster.close()


@pytest.mark.usefixtures("no_cluster")
def test_shared_memory_carries_versions_and_survives_faults_too(tmp_path: Path) -> None:
    """Sound, altered on the way, an engine killed: as over gloo."""
    cluster = Cluster(tmp_path, "ipc")
    try:
        assert [cluster.publish()[0] for _ in range(3)] == [1, 1, 1]
        cluster.check()
        assert cluster.publish(Fault("flip", 1))[0] == 2
        cluster.check()
        for phase in ("before", "during", "after"):
            assert cluster.publish(Fault("abort", 2, phase))[0] == 2
        cluster.arm(1, Fault("kill", 3))
        assert cluster.publish()[0] == 2
        cluster.check()
    finally:
        cluster.close()


# -- one engine alone

CALL: dict[str, Any] = {"engine": 0}


class Workers:
    """What an engine's workers say to the next calls; by default that they have received a version."""

    def __init__(self) -> None:
        self.said: list[tuple[str, bool, str]] = [("", False, ""), ("", False, "")]
        self.calls: list[tuple[Any, ...]] = []

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[tuple[str, bool, str]]:
        self.calls.append((method, *args))
        return self.said


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[sync_world.TestEngine, Workers]]:
    """Makes an engine of this process, and its workers."""

    def make(*, packed_weights: bool = False) -> tuple[sync_world.TestEngine, Workers]:
        for name in (*ENVIRONMENT, "OMP_NUM_THREADS"):
            monkeypatch.setenv(name, "1")  # so that what the engine sets is unset afterwards
        engine, workers = sync_world.TestEngine(sync_world.engine_config(packed_weights=packed_weights), 3), Workers()
        monkeypatch.setattr(engine._llm, "collective_rpc", workers.collective_rpc)
        return engine, workers

    return make


def request(name: str) -> SampleRequest:
    return SampleRequest(name, "p", 0, 1, TokenIds.of([1]), 1.0, 1.0, 1)


@pytest.mark.parametrize("asked", [-1, 1, 5])
def test_an_engine_answers_for_its_own_version_only(alone: Any, asked: int) -> None:
    engine, _ = alone()
    with pytest.raises(InferenceError, match=f"engine 3 must serve version {asked} to answer; it serves version 0"):
        engine.submit([request("r")], asked)
    with pytest.raises(InferenceError, match="engine 3 was never given request r"):
        engine.collect(["r"])
    engine.submit([request("r")], 0)
    ((completion,), _) = engine.collect(["r"])
    assert completion.version == 0


def test_an_engine_in_doubt_answers_nobody_until_it_has_verified_a_version(alone: Any) -> None:
    engine, workers = alone()
    workers.said = [("", False, ""), ("bucket 1 was not delivered", True, "")]
    with pytest.raises(WeightSyncError, match=r"^worker 1: bucket 1 was not delivered$") as caught:
        engine.receive(1, CALL)
    assert caught.value.echo, "nothing but what follows from a failure elsewhere"
    workers.said = [("lm_head.weight differs", False, ""), ("bucket 1 was not delivered", True, "")]
    with pytest.raises(WeightSyncError, match="differs; worker 1: ") as caught:
        engine.receive(1, CALL)
    assert not caught.value.echo
    for asked in (0, 1):
        with pytest.raises(InferenceError, match=f"must serve version {asked} to answer; it serves no version: its last"):
            engine.submit([request("r")], asked)
    workers.said = [("", False, "0a"), ("", False, "0b")]
    assert engine.receive(2, CALL) == (2, ("0a", "0b")), "what each worker multiplies with"
    assert workers.calls == [("semion_receive", CALL)] * 3
    engine.submit([request("r")], 2)
    ((completion,), _) = engine.collect(["r"])
    assert completion.version == 2


def test_an_engine_with_requests_in_flight_receives_nothing(alone: Any) -> None:
    """They would be decoded with two versions; the one it serves it goes on serving."""
    engine, workers = alone()
    engine.submit([request("r"), request("s")], 0)
    with pytest.raises(InferenceError, match="engine 3 has 2 requests in flight at a weight sync"):
        engine.receive(1, CALL)
    assert workers.calls == []
    completions, _ = engine.collect(["r", "s"])
    assert [completion.version for completion in completions] == [0, 0]
    assert engine.receive(1, CALL) == (1, ("", ""))


def test_an_engine_that_sleeps_says_so_and_wakes_its_weights_before_and_its_cache_after_a_sync(alone: Any) -> None:
    """Nothing is woken twice, also where the first attempt failed."""
    engine, workers = alone()
    engine.submit([request("r")], 0)
    with pytest.raises(InferenceError, match="engine 3 has 1 requests in flight and cannot sleep"):
        engine.sleep()
    engine.collect(["r"])
    engine.sleep()
    assert (engine._llm.turns, workers.calls) == (["sleep 2"], [("semion_release",)])
    for ask in (lambda: engine.submit([request("s")], 0), lambda: engine.log_probs([[1, 2]])):
        with pytest.raises(InferenceError, match=r"engine 3 must serve .*; .*it sleeps until the next weight sync"):
            ask()
    workers.said = [("", False, ""), ("bucket 1 was not delivered", False, "")]
    with pytest.raises(WeightSyncError):
        engine.receive(2, CALL)
    assert engine._llm.turns == ["sleep 2", "wake weights"], "the cache's memory is not needed yet"
    with pytest.raises(InferenceError, match="its last weight sync failed"):
        engine.submit([request("s")], 2)
    workers.said = [("", False, "")] * 2
    assert [engine.receive(2, CALL)[0], engine.receive(3, CALL)[0]] == [2, 3]
    assert engine._llm.turns == ["sleep 2", "wake weights", "wake kv_cache"]
    engine.submit([request("s")], 3)


def test_pages_are_given_back_and_only_whole_ones_of_the_tensor() -> None:
    """What lies beside it keeps its bits; its own whole pages read as zeros and can be written again."""
    page = mmap.PAGESIZE
    area = torch.from_numpy(np.frombuffer(mmap.mmap(-1, 8 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON), np.uint8))
    area.fill_(7)
    inner = torch.frombuffer(area.numpy()[page // 2 : -page // 2], dtype=torch.uint8)
    release_pages(inner[page:])
    kept = torch.cat([area[:page], area[-page:]])
    assert (kept == 7).all()
    assert not area[page:-page].any()
    release_pages(torch.full((100,), 7, dtype=torch.uint8))
    inner.fill_(9)
    assert (inner == 9).all()


def test_what_several_workers_say_is_told_together(alone: Any) -> None:
    engine, workers = alone()
    workers.said = [("no room", False, ""), ("", False, ""), ("no time", False, "")]
    with pytest.raises(WeightSyncError, match=r"^worker 0: no room; worker 2: no time$"):
        engine.receive(1, CALL)


def test_an_engine_that_repacks_its_weights_is_lost_by_a_failure(alone: Any) -> None:
    """vLLM may be anywhere in its reload: only a new process helps, and the pool makes one of a lost engine."""
    engine, workers = alone(packed_weights=True)
    workers.said = [("the digest differs", False, "")]
    with pytest.raises(EngineLostError, match=r"^worker 0: the digest differs$"):
        engine.receive(1, CALL)
    with pytest.raises(InferenceError, match="it serves no version"):
        engine.submit([request("r")], 1)
