"""The pool with engines that are lists of calls: how requests are dealt and completions put back in order, what an error
or a late engine becomes, that a weight version is served only when it is committed, and who is replaced after a failure.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.arrays import TokenIds
from engine.core.errors import EngineLostError, InferenceError, WatchdogError, WeightSyncError
from engine.core.types import Completion
from engine.inference.pool import Pool, Usage, deal, open_after
from engine.inference.sampling import SampleRequest
from tests.rollouts import make_completion


@dataclass
class Answer:
    """A call that has ended: with a value, or with the error to raise when somebody asks."""

    value: Any = None
    error: Exception | None = None
    limits: list[float] = field(default_factory=list)  # what those who waited were ready to wait

    def result(self, timeout_seconds: float) -> Any:
        self.limits.append(timeout_seconds)
        if self.error is not None:
            raise self.error
        return self.value


class FakeEngine:
    """Answers every call at once, as VllmEngine would in the order of the calls; `failing` maps a method to its error.

    A completion is one token, the last 31 bits of the request's seed; its text is the seed in decimal.
    """

    def __init__(
        self, version: int = 0, failing: dict[str, Exception] | None = None, seconds: float = 1.0, host: str = "here"
    ) -> None:
        self.version, self.failing, self.seconds, self.host = version, failing or {}, seconds, host
        self.digests: tuple[str, ...] = ("",)  # of its workers
        self.restarts = 0
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.answers: list[Answer] = []
        self.held: dict[str, SampleRequest] = {}

    @property
    def methods(self) -> list[str]:
        return [method for method, _ in self.calls]

    def call(self, method: str, *arguments: Any) -> Answer:
        self.calls.append((method, arguments))
        self.answers.append(Answer(getattr(self, method)(*arguments), self.failing.get(method)))
        return self.answers[-1]

    def restart(self) -> None:
        self.restarts += 1
        self.version = 0

    def describe(self) -> dict[str, str]:
        return {"host": self.host, "vllm": "fake"}

    def submit(self, requests: list[SampleRequest], version: int) -> None:
        self.held |= {request.request_id: request for request in requests}

    def collect(self, request_ids: list[str], num_open: int = 0) -> tuple[list[Completion | None], dict[str, float]]:
        left = [request_id for request_id in request_ids if request_id in self.held]
        ended = self.ended(left, len(left) - num_open)
        found = [self.completion(self.held.pop(one)) if one in ended else None for one in request_ids]
        return found, {"seconds": self.seconds, "tokens": float(len(ended))}

    def ended(self, left: list[str], count: int) -> list[str]:
        """So many of these that end first: as they were asked for."""
        return left[:count]

    def completion(self, request: SampleRequest) -> Completion:
        return make_completion(
            prompt_id=request.prompt_id,
            sample_index=request.sample_index,
            seed=request.seed,
            version=self.version,
            token_ids=(request.seed % 2**31,),
            log_probs=(-0.5,),
            text=str(request.seed),
            finish_reason="stop",
        )

    def receive(self, version: int, call: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
        self.version = version
        return version, self.digests

    def sleep(self) -> None:
        self.version = -1

    def log_probs(self, sequences: list[list[int]]) -> list[list[float]]:
        return [[-float(token) for token in sequence] for sequence in sequences]


def requests(count: int, step: int = 0) -> list[SampleRequest]:
    return [SampleRequest(f"{step}:{i}", f"p{i}", i, 1000 * step + i, TokenIds.of([1]), 1.0, 1.0, 8) for i in range(count)]


def pool_at(version: int, *engines: FakeEngine) -> Pool:
    """A pool whose engines have all received this version."""
    pool = Pool(engines, 5.0)
    assert pool.unverified(version, pool.receive(version, {}), 5.0) == {}
    pool.commit(version)
    return pool


@given(st.integers(1, 5), st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_requests_are_dealt_and_completions_come_back_in_order(num_engines, sizes):
    """Each engine is given its part of every step, and then asked for it step by step, until half of it is there, half of the
    rest, and at last all; each step's completions are in its requests' order, and each of them arrives once."""
    engines = [FakeEngine(seconds=float(i)) for i in range(num_engines)]
    pool = Pool(engines, 5.0)
    steps = [requests(size, step) for step, size in enumerate(sizes)]
    shares = deal(steps, num_engines)
    tickets = pool.submit(steps)
    for index, engine in enumerate(engines):
        own = [[step[place] for place in share[index]] for step, share in zip(steps, shares, strict=True)]
        asked = [([request.request_id for request in step], left) for step in own for left in open_after(len(step))]
        assert engine.methods == ["submit"] + ["collect"] * len(asked), "all is submitted before anything is collected"
        assert engine.calls[0][1][0] == [request for step in own for request in step]
        assert [arguments for _, arguments in engine.calls[1:]] == asked
    for place, (step, ticket) in enumerate(zip(steps, tickets, strict=True)):
        arrived: list[tuple[int, Completion]] = []
        completions, usage = pool.gather(ticket, partial(add, arrived))
        assert [completion.seed for completion in completions] == [request.seed for request in step]
        assert sorted(arrived, key=lambda pair: pair[0]) == list(enumerate(completions))
        longest = max(i * len(open_after(len(own))) for i, own in enumerate(shares[place]))
        assert usage == Usage(num_tokens=len(step), busy_seconds=longest), "tokens add up, time is the longest"


def add(arrived: list[tuple[int, Completion]], ended: dict[int, Completion]) -> None:
    arrived += ended.items()


def test_half_of_what_is_left_is_handed_over_at_a_time():
    assert [open_after(count) for count in (0, 1, 2, 5, 64)] == [[0], [0], [1, 0], [2, 1, 0], [32, 16, 8, 4, 2, 1, 0]]


def grouped(num_prompts: int, samples: int, step: int) -> list[SampleRequest]:
    """As a step asks: the samples of a prompt one after another."""
    return [
        SampleRequest(f"{step}:{p}:{i}", f"p{p}", i, 0, TokenIds.of([p]), 1.0, 1.0, 8)
        for p in range(num_prompts)
        for i in range(samples)
    ]


@given(st.integers(1, 9), st.integers(1, 8), st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_a_prompt_is_dealt_to_one_engine_as_far_as_all_have_as_much_to_do(num_engines, samples, sizes):
    """After every step no engine has more than its part of all requests so far, rounded up. Of a step at most as many prompts
    are cut as there are engines, and one only where whole prompts do not come out even; all are asked for, in their order."""
    batches = [grouped(size, samples, step) for step, size in enumerate(sizes)]
    loads, num_requests = [0] * num_engines, 0
    for batch, share in zip(batches, deal(batches, num_engines), strict=True):
        assert sorted(place for places in share for place in places) == list(range(len(batch)))
        assert all(places == sorted(places) for places in share)
        num_requests += len(batch)
        loads = [load + len(places) for load, places in zip(loads, share, strict=True)]
        assert max(loads) <= -(-num_requests // num_engines)
        homes = [{engine for engine in range(num_engines) if place in share[engine]} for place in range(len(batch))]
        prompts = [set.union(*homes[first : first + samples]) for first in range(0, len(batch), samples)]
        assert sum(len(engines) - 1 for engines in prompts) < num_engines
    assert deal(batches, 1) == [[list(range(len(batch)))] for batch in batches], "one engine is asked as if nothing were dealt"


@given(st.integers(1, 9), st.integers(1, 8), st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_each_prompt_goes_to_the_engine_with_the_fewest_requests(num_engines, samples, sizes):
    """The first of them, looked for engine by engine."""
    loads, num_dealt, engine, wanted = [0] * num_engines, 0, 0, []
    for size in sizes:
        share: list[list[int]] = [[] for _ in range(num_engines)]
        num_dealt += size * samples
        most = -(-num_dealt // num_engines)
        for place in range(size * samples):
            if place % samples == 0 or loads[engine] == most:
                engine = min(range(num_engines), key=loads.__getitem__)
            share[engine].append(place)
            loads[engine] += 1
        wanted.append(share)
    assert deal([grouped(size, samples, step) for step, size in enumerate(sizes)], num_engines) == wanted


def test_how_a_step_is_dealt_number_by_number():
    """Six prompts of four samples on four engines: four whole prompts, and the last two are shared by all. Two prompts on three
    engines: no engine waits while another samples eight."""
    six = deal([grouped(6, 4, 0)], 4)[0]
    assert six == [[0, 1, 2, 3, 16, 17], [4, 5, 6, 7, 18, 19], [8, 9, 10, 11, 20, 21], [12, 13, 14, 15, 22, 23]]
    assert deal([grouped(2, 4, 0)], 3)[0] == [[0, 1, 2], [3, 7], [4, 5, 6]]
    assert deal([grouped(2, 2, 0), grouped(2, 2, 1)], 3) == [[[0, 1], [2, 3], []], [[2], [3], [0, 1]]]


def test_the_engines_idle_share_is_what_their_work_leaves_of_the_time():
    pool = Pool([FakeEngine(seconds=0.0), FakeEngine(seconds=1e9)], 5.0)
    assert pool.idle_share() is None, "there is nothing to compare with"
    assert pool.idle_share() == 1.0
    pool.generate(requests(2))
    assert pool.idle_share() == 0.0
    assert pool.idle_share() == 1.0, "counted from call to call"


def test_steps_may_be_gathered_in_any_order():
    pool = Pool([FakeEngine(), FakeEngine()], 5.0)
    steps = [requests(3, 0), requests(4, 1)]
    first, second = pool.submit(steps)
    assert [c.seed for c in pool.gather(second)[0]] == [r.seed for r in steps[1]]
    assert [c.seed for c in pool.gather(first)[0]] == [r.seed for r in steps[0]]


def test_an_error_of_a_submission_surfaces_when_gathering():
    """Not the one that follows from it, "never given request ..."."""
    consequence = InferenceError("engine 1 was never given request 0:1")
    failing = FakeEngine(failing={"submit": InferenceError("prompt too long"), "collect": consequence})
    pool = Pool([FakeEngine(), failing], 5.0)
    (ticket,) = pool.submit([requests(4)])
    with pytest.raises(InferenceError, match="prompt too long"):
        pool.gather(ticket)


@pytest.mark.parametrize(
    ("method", "what", "ask"),
    [
        ("describe", "start", lambda pool: pool.describe()),
        ("submit", "submit", lambda pool: pool.generate(requests(3))),
        ("collect", "collect", lambda pool: pool.generate(requests(3))),
        ("log_probs", "log_probs", lambda pool: pool.log_probs([[1]])),
        ("sleep", "sleep", lambda pool: pool.sleep()),
    ],
)
def test_a_late_engine_is_named_with_the_limit(method, what, ask):
    late = FakeEngine(failing={method: TimeoutError()})
    with pytest.raises(InferenceError, match=f"engine 2 did not answer '{what}' within inference.timeout_seconds = 7.5"):
        ask(Pool([FakeEngine(), FakeEngine(), late], 7.5))
    assert {tuple(answer.limits) for answer in late.answers} <= {(7.5,), ()}, "the limit named is the one waited for"


def test_every_engine_answers_for_itself():
    pool = Pool([FakeEngine(host="a"), FakeEngine(host="b")], 5.0)
    assert pool.describe() == [{"host": "a", "vllm": "fake"}, {"host": "b", "vllm": "fake"}]
    assert pool.log_probs([[1, 2], [3]]) == [[[-1.0, -2.0], [-3.0]]] * 2


@pytest.mark.parametrize("name", ["vllm", "model_runner", "attention", "scheduling"])
def test_engines_that_run_in_another_way_are_refused(name):
    """Their tokens are others at equal seeds; the machine may be another."""

    class Running(FakeEngine):
        ways: ClassVar = {"model_runner": "V2", "attention": "FLASH_ATTN", "scheduling": "asynchronous"}

        def describe(self) -> dict[str, str]:
            return super().describe() | self.ways

    class Other(Running):
        ways = Running.ways | {name: "another"}

    assert len(Pool([Running(), Running()], 5.0).describe()) == 2
    with pytest.raises(InferenceError, match=rf"engine 1 must run as the others do, whose {name} is .*; found another: give"):
        Pool([Running(), Other(), Running()], 5.0).describe()


def test_an_engine_that_comes_back_running_in_another_way_is_refused():
    class Changing(FakeEngine):
        def describe(self) -> dict[str, str]:
            return super().describe() | {"attention": f"after {self.restarts} restarts"}

    engines = [Changing(), Changing(failing={"receive": LOST})]
    pool = Pool(engines, 5.0)
    pool.describe()
    pool.unverified(1, pool.receive(1, {}), 5.0)
    with pytest.raises(InferenceError, match="engine 1 must run as the others do, whose attention is after 0 restarts"):
        pool.replace_lost()


def test_engines_must_have_loaded_the_same_bits_into_fp8():
    class Quantized(FakeEngine):
        loaded = "0a 0b"

        def describe(self) -> dict[str, str]:
            return super().describe() | {"quantized": self.loaded}

    engines = [Quantized(), Quantized(), Quantized()]
    assert [one["quantized"] for one in Pool(engines, 5.0).describe()] == ["0a 0b"] * 3
    engines[2].loaded = "0a 0c"
    with pytest.raises(WeightSyncError, match=r"engine 2 must have loaded what the others did: .* 0a 0b; found 0a 0c: look at"):
        Pool(engines, 5.0).describe()


@pytest.mark.parametrize(
    ("hosts", "nodes"),
    [("a", ((0,),)), ("aaa", ((0, 1, 2),)), ("abc", ((0,), (1,), (2,))), ("baba", ((0, 2), (1, 3)))],
)
def test_engines_of_one_machine_are_a_node(hosts, nodes):
    assert Pool([FakeEngine(host=host) for host in hosts], 5.0).nodes() == nodes


def test_a_version_is_served_when_it_is_committed_and_not_before():
    engines = [FakeEngine(), FakeEngine()]
    pool = Pool(engines, 5.0)
    assert pool.version == 0, "engines start with the seed model"
    futures = pool.receive(4, {"epoch": 1})
    assert [engine.calls for engine in engines] == [[("receive", (4, {"epoch": 1, "engine": i}))] for i in range(2)]
    assert pool.unverified(4, futures, 3.0) == {}
    with pytest.raises(InferenceError, match="no weight version is committed"):
        assert pool.version
    with pytest.raises(InferenceError, match="no weight version is committed"):
        pool.submit([requests(1)])
    assert all("submit" not in engine.methods for engine in engines), "an engine in doubt is never asked"
    pool.commit(4)
    assert pool.version == 4
    assert {completion.version for completion in pool.generate(requests(4))[0]} == {4}
    assert all(arguments[1] == 4 for engine in engines for method, arguments in engine.calls if method == "submit")


def test_the_time_for_all_engines_is_one():
    engines = [FakeEngine() for _ in range(3)]
    pool = Pool(engines, 5.0)
    pool.unverified(4, pool.receive(4, {}), 3.0)
    (limits,) = zip(*(engine.answers[0].limits for engine in engines), strict=True)
    assert 3.0 >= limits[0] >= limits[1] >= limits[2] > 2.0, "what one engine has used is not waited for again"


LATE, LOST, FAILED = TimeoutError(), EngineLostError("the process of engine 1 ended"), WeightSyncError("lm_head.weight differs")
REASONS = [
    (LATE, "no answer within 3 s", True),
    (LOST, "the process of engine 1 ended", True),
    (FAILED, "lm_head.weight differs", False),
    (InferenceError("engine 1 has 2 requests in flight"), "engine 1 has 2 requests in flight", False),
    (WatchdogError("engine 1 failed with RuntimeError: cancelled"), "engine 1 failed with RuntimeError: cancelled", True),
]


def said(doubtful):
    return {engine: str(error) for engine, error in doubtful.items()}


@pytest.mark.parametrize(("error", "reason", "restarted"), REASONS)
def test_an_engine_that_did_not_verify_is_in_doubt_and_replaced_only_when_lost(error, reason, restarted):
    """The others hold the new weights, yet nothing is asked of anybody until a later sync is committed."""
    engines = [FakeEngine(), FakeEngine(failing={"receive": error}), FakeEngine()]
    pool = Pool(engines, 5.0)
    assert said(pool.unverified(4, pool.receive(4, {}), 3.0)) == {1: reason}
    pool.replace_lost()
    assert [engine.restarts for engine in engines] == [0, int(restarted), 0]
    assert ("describe" in engines[1].methods) is restarted, "it is waited for until it is up"
    with pytest.raises(InferenceError, match="no weight version is committed"):
        pool.submit([requests(1)])
    engines[1].failing.clear()
    assert pool.unverified(4, pool.receive(4, {}), 3.0) == {}
    pool.commit(4)
    assert {completion.version for completion in pool.generate(requests(6))[0]} == {4}
    pool.replace_lost()
    assert [engine.restarts for engine in engines] == [0, int(restarted), 0], "nobody is lost twice"


def test_engines_that_rest_serve_nothing_until_a_version_is_committed():
    """All are told before any is waited for. One that is gone by then is left to the next sync, which replaces it."""
    engines = [FakeEngine(), FakeEngine(failing={"sleep": LOST}), FakeEngine()]
    pool = pool_at(2, *engines)
    pool.sleep()
    assert [engine.methods[-1] for engine in engines] == ["sleep"] * 3
    with pytest.raises(InferenceError, match="or the engines sleep"):
        pool.submit([requests(1)])
    engines[1].failing = {"receive": LOST}
    assert set(pool.unverified(4, pool.receive(4, {}), 3.0)) == {1}
    pool.replace_lost()
    assert [engine.restarts for engine in engines] == [0, 1, 0]
    engines[1].failing.clear()
    assert pool.unverified(4, pool.receive(4, {}), 3.0) == {}
    pool.commit(4)
    assert {completion.version for completion in pool.generate(requests(6))[0]} == {4}


def test_an_engine_whose_quantized_weights_are_not_the_others_is_in_doubt_and_takes_the_version_again():
    engines = [FakeEngine(), FakeEngine(), FakeEngine()]
    for engine in engines:
        engine.digests = ("0a", "0b")
    engines[1].digests = ("0a", "0c")
    pool = Pool(engines, 5.0)
    ((engine, why),) = said(pool.unverified(4, pool.receive(4, {}), 3.0)).items()
    assert engine == 1 and "digests 0a, 0b; found 0a, 0c" in why
    pool.replace_lost()
    assert [engine.restarts for engine in engines] == [0, 0, 0], "it is not lost"
    engines[1].digests = engines[0].digests
    assert pool.unverified(4, pool.receive(4, {}), 3.0) == {}


def test_an_engine_that_cannot_sleep_ends_the_run():
    refusal = InferenceError("engine 0 has 2 requests in flight and cannot sleep")
    with pytest.raises(InferenceError, match="in flight"):
        Pool([FakeEngine(failing={"sleep": refusal})], 5.0).sleep()


def test_the_word_of_every_engine_is_heard():
    engines = [FakeEngine(failing={"receive": error}) for error, _, _ in REASONS]
    pool = Pool([*engines, FakeEngine()], 5.0)
    expected = dict(enumerate(reason for _, reason, _ in REASONS))
    assert said(pool.unverified(4, pool.receive(4, {}), 3.0)) == expected
    pool.replace_lost()
    assert [engine.restarts for engine in engines] == [int(restarted) for _, _, restarted in REASONS]


def test_all_lost_engines_start_side_by_side():
    order: list[str] = []

    class Watched(FakeEngine):
        def restart(self) -> None:
            order.append("restart")

        def describe(self) -> dict[str, str]:
            order.append("describe")
            return super().describe()

    pool = Pool([Watched(failing={"receive": LATE}) for _ in range(2)], 5.0)
    pool.unverified(4, pool.receive(4, {}), 3.0)
    pool.replace_lost()
    assert order == ["restart", "restart", "describe", "describe"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (TimeoutError(), r"engine 1 did not answer 'start again' within inference\.timeout_seconds = 5\.0"),
        (InferenceError("engine 1 could not start from seed: no memory"), "could not start from seed: no memory"),
    ],
)
def test_an_engine_that_does_not_start_again_ends_the_run(error, sentence):
    engines = [FakeEngine(), FakeEngine(failing={"receive": LOST, "describe": error})]
    pool = Pool(engines, 5.0)
    pool.unverified(4, pool.receive(4, {}), 3.0)
    with pytest.raises(InferenceError, match=sentence):
        pool.replace_lost()


@pytest.mark.parametrize("error", [AssertionError("a broken invariant"), ZeroDivisionError()])
def test_what_is_nobodys_to_mend_is_no_reason(error):
    pool = Pool([FakeEngine(failing={"receive": error})], 5.0)
    with pytest.raises(type(error)):
        pool.unverified(4, pool.receive(4, {}), 3.0)


def test_an_engine_that_verified_another_version_is_a_broken_invariant():
    pool = Pool([FakeEngine()], 5.0)
    with pytest.raises(AssertionError):
        pool.unverified(5, pool.receive(4, {}), 3.0)
    with pytest.raises(InferenceError):
        assert pool.version
