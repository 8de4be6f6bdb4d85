"""The pool with engines that are lists of calls: how requests are dealt and completions put back in order, what an error
or a late engine becomes, and that a weight version counts only when every engine has verified it.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InferenceError, WeightSyncError
from engine.inference.pool import Pool, Usage
from engine.inference.sampling import SampleRequest
from engine.types import Completion


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

    A completion is one token, the request's seed; its text is the seed in decimal.
    """

    def __init__(self, version: int = 0, failing: dict[str, Exception] | None = None, seconds: float = 1.0) -> None:
        self.version, self.failing, self.seconds = version, failing or {}, seconds
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

    def describe(self) -> dict[str, str]:
        return {"vllm": "fake"}

    def submit(self, requests: list[SampleRequest]) -> None:
        self.held |= {request.request_id: request for request in requests}

    def collect(self, request_ids: list[str]) -> tuple[list[Completion], dict[str, float]]:
        found = [self.completion(self.held.pop(request_id)) for request_id in request_ids]
        return found, {"seconds": self.seconds, "tokens": float(len(found))}

    def completion(self, request: SampleRequest) -> Completion:
        return Completion(
            prompt_id=request.prompt_id,
            sample_index=request.sample_index,
            seed=request.seed,
            version=self.version,
            token_ids=(request.seed,),
            log_probs=(-0.5,),
            text=str(request.seed),
            finish_reason="stop",
        )

    def open_channel(self, info: dict[str, Any]) -> None:
        self.info = info

    def receive(self, version: int, buckets: list[Any]) -> int:
        self.version = version
        return version

    def log_probs(self, sequences: list[list[int]]) -> list[list[float]]:
        return [[-float(token) for token in sequence] for sequence in sequences]


def requests(count: int, step: int = 0) -> list[SampleRequest]:
    return [SampleRequest(f"{step}:{i}", f"p{i}", i, 1000 * step + i, (1,), 1.0, 1.0, 8) for i in range(count)]


@given(st.integers(1, 5), st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_requests_are_dealt_by_position_and_completions_come_back_in_order(num_engines, sizes):
    """Engine i of n gets positions i, i + n, ... of every step; each step's completions are in its requests' order."""
    engines = [FakeEngine(seconds=float(i)) for i in range(num_engines)]
    pool = Pool(engines, 5.0)
    steps = [requests(size, step) for step, size in enumerate(sizes)]
    tickets = pool.submit(steps)
    for index, engine in enumerate(engines):
        assert engine.methods == ["submit"] + ["collect"] * len(steps), "all is submitted before anything is collected"
        assert engine.calls[0][1][0] == [request for step in steps for request in step[index::num_engines]]
        assert [arguments[0] for _, arguments in engine.calls[1:]] == [
            [request.request_id for request in step[index::num_engines]] for step in steps
        ]
    for step, ticket in zip(steps, tickets, strict=True):
        completions, usage = pool.gather(ticket)
        assert [completion.seed for completion in completions] == [request.seed for request in step]
        assert usage == Usage(num_tokens=len(step), busy_seconds=num_engines - 1), "tokens add up, time is the longest"


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
    ],
)
def test_a_late_engine_is_named_with_the_limit(method, what, ask):
    late = FakeEngine(failing={method: TimeoutError()})
    with pytest.raises(InferenceError, match=f"engine 2 did not answer '{what}' within inference.timeout_seconds = 7.5"):
        ask(Pool([FakeEngine(), FakeEngine(), late], 7.5))
    assert {tuple(answer.limits) for answer in late.answers} <= {(7.5,), ()}, "the limit named is the one waited for"


def test_every_engine_answers_for_itself():
    pool = Pool([FakeEngine(), FakeEngine()], 5.0)
    assert pool.describe() == {"vllm": "fake"}
    assert pool.log_probs([[1, 2], [3]]) == [[[-1.0, -2.0], [-3.0]]] * 2


def test_engines_join_the_channel_after_the_trainers_ranks():
    engines = [FakeEngine() for _ in range(3)]
    pool = Pool(engines, 5.0)
    pool.wait(pool.open_channel(2, {"host": "h", "port": 1}), "open_channel")
    assert [engine.info for engine in engines] == [{"host": "h", "port": 1, "rank": rank} for rank in (2, 3, 4)]


def test_a_version_is_served_when_all_engines_have_verified_it_and_not_before():
    engines = [FakeEngine(), FakeEngine()]
    pool = Pool(engines, 5.0)
    assert pool.version == 0, "engines start with the seed model"
    receiving = pool.receive(4, ["bucket"])
    assert all(engine.calls == [("receive", (4, ["bucket"]))] for engine in engines)
    with pytest.raises(InferenceError, match="no weight version is committed"):
        assert pool.version
    with pytest.raises(InferenceError, match="no weight version is committed"):
        pool.submit([requests(1)])
    assert all("submit" not in engine.methods for engine in engines), "an engine in doubt is never asked"
    pool.commit(4, receiving, 3.0)
    assert [answer.limits for engine in engines for answer in engine.answers] == [[3.0], [3.0]]
    assert pool.version == 4
    assert {completion.version for completion in pool.generate(requests(4))[0]} == {4}


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (TimeoutError(), r"engine 1 did not verify version 4 within sync\.timeout_seconds = 3\.0"),
        (WeightSyncError("tensor lm_head.weight differs"), "engine 1 did not verify version 4: tensor lm_head.weight differs"),
        (InferenceError("its process died"), "engine 1 did not verify version 4: its process died"),
    ],
)
def test_a_sync_that_one_engine_fails_leaves_no_version(error, sentence):
    """The others hold the new weights, yet nothing is asked of anybody until a later sync succeeds."""
    engines = [FakeEngine(), FakeEngine(failing={"receive": error}), FakeEngine()]
    pool = Pool(engines, 5.0)
    with pytest.raises(WeightSyncError, match=sentence):
        pool.commit(4, pool.receive(4, []), 3.0)
    with pytest.raises(InferenceError, match="no weight version is committed"):
        pool.submit([requests(1)])
    engines[1].failing.clear()
    pool.commit(5, pool.receive(5, []), 3.0)
    assert pool.version == 5


def test_an_engine_that_verified_another_version_is_a_broken_invariant():
    pool = Pool([FakeEngine()], 5.0)
    with pytest.raises(AssertionError):
        pool.commit(5, pool.receive(4, []), 3.0)
    with pytest.raises(InferenceError):
        assert pool.version
