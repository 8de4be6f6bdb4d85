"""In-flight weight updates with engines that decode numbers, step by step and a few at a time as a real one does: what is asked
in which order, where an engine stops, which version each token is of, and that neither a checkpoint's files nor other ways of
cutting a run change a token. tests/e2e/test_in_flight.py does the same with a real one.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.load import RunConfig
from engine.core.arrays import LogProbs, TokenIds
from engine.core.errors import DataError, InferenceError
from engine.core.types import Completion
from engine.data.mixture import Mixture
from engine.inference.pool import Pool
from engine.inference.sampling import Part, Sampled, SampleRequest
from engine.rollouts.ahead import AHEAD, Ahead, read_ahead
from engine.rollouts.ledger import RolloutLedger
from engine.rollouts.paused import PAUSED, pending, read_paused
from engine.rollouts.replay import LedgerSource
from engine.rollouts.source import RolloutSource
from engine.rollouts.writer import RolloutFile, RolloutWriter
from tests.unit.inference.test_pool import Answer, FakeEngine, requests
from tests.unit.rollouts.test_rollouts import PROMPTS, Parity, run_config

STEPS = 6
PAUSED_BY = ("steps_so_far", "pause")  # where all engines are as fast


@dataclass
class Hesitant(Answer):
    """An answer that comes only when it has been asked for a few times."""

    left: int = 0

    def result(self, timeout_seconds: float) -> Any:
        if self.left:
            self.left -= 1
            raise TimeoutError
        return super().result(timeout_seconds)


class DecodingEngine(FakeEngine):
    """Decodes up to `slots` requests at once, first come, first served. A request has seed % 7 + 1 tokens, each a function of
    what the engine was seeded with, of its place and of the version. The call after its part of what is due is answered when it
    has been asked `hesitates` times; asked to go on, it decodes as far as chance has it."""

    def __init__(self, slots: int = 5, hesitates: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.slots, self.hesitates, self.tokens = slots, hesitates, dict[str, list[int]]()
        self.num_steps, self.lengths, self.ended_at = 0, list[dict[str, int]](), dict[str, int]()
        self.num_taken_back = 0

    def call(self, method: str, *arguments: Any) -> Answer:
        answer = super().call(method, *arguments)
        if method == "steps_so_far" and self.hesitates:
            self.answers[-1] = answer = Hesitant(answer.value, answer.error, left=self.hesitates)
        return answer

    def submit(self, asked: list[SampleRequest], version: int) -> None:
        assert version == self.version
        if not self.held:
            self.num_steps, self.lengths, self.ended_at = 0, [{}], {}
        super().submit(asked, version)
        self.tokens |= {request.request_id: [] for request in asked}
        self.lengths[self.num_steps] |= {request.request_id: 0 for request in asked}

    def collect(self, request_ids: list[str], num_open: int = 0) -> tuple[list[Completion | None], dict[str, float]]:
        left = [one for one in request_ids if one in self.held]
        while sum(not self._done(one) for one in left) > num_open:
            self._decode()
        ended = {one: self._completion(one) for one in left if self._done(one)}
        num_tokens = sum(len(one.token_ids) for one in ended.values())
        return [ended.get(one) for one in request_ids], {"seconds": self.seconds, "tokens": float(num_tokens)}

    def steps_so_far(self) -> int:
        return self.num_steps

    def go_on(self, seconds: float) -> bool:
        for _ in range(random.SystemRandom().randrange(4)):
            self._decode()
        return any(not self._done(one) for one in self.held)

    def pause(self, num_steps: int) -> list[Part]:
        while self.num_steps < num_steps and any(not self._done(one) for one in self.held):
            self._decode()
        lengths = self.lengths[min(num_steps, self.num_steps)]
        self.num_taken_back += sum(len(self.tokens[one]) - lengths.get(one, 0) for one in self.held if one in lengths)
        parts: list[Part] = []
        for request_id in list(self.held):
            if self.ended_at.get(request_id, num_steps + 1) <= num_steps:
                parts.append(self._completion(request_id))
            else:
                tokens = self.tokens[request_id][: lengths[request_id]]
                parts.append(self.held.pop(request_id).paused(tokens, [-0.5] * len(tokens), self.version))
        return parts

    def _decode(self) -> None:
        running = [one for one in self.held if not self._done(one)][: self.slots]
        if not running:
            return
        self.num_steps += 1
        for request_id in running:
            request, tokens = self.held[request_id], self.tokens[request_id]
            tokens.append((request.engine_seed + 31 * len(tokens) + self.version) % 1000)
            if self._done(request_id):
                self.ended_at[request_id] = self.num_steps
        self.lengths.append({one: len(self.tokens[one]) for one in self.held})

    def receive(self, version: int, call: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
        assert not self.held, "a sync finds the engine empty"
        return super().receive(version, call)

    def _done(self, request_id: str) -> bool:
        request = self.held[request_id]
        return len(request.sampled.token_ids) + len(self.tokens[request_id]) == request.seed % 7 + 1

    def _completion(self, request_id: str) -> Completion:
        request, tokens = self.held.pop(request_id), self.tokens[request_id]
        sampled = request.sampled.followed_by(tokens, [-0.5] * len(tokens), self.version)
        plain = super().completion(request)
        return replace(
            plain, version=sampled.spans[0][0], **{n: getattr(sampled, n) for n in ("token_ids", "log_probs", "spans")}
        )


def in_flight(lookahead: int = 2, **changes: dict[str, Any]) -> RunConfig:
    sync = {"sync_interval": 1, "lookahead": lookahead, "in_flight": True}
    return run_config(**{"run": {"steps": STEPS, "seed": 3}, "sync": sync, "algorithm": {"samples_per_prompt": 3}} | changes)


def mixture(config: RunConfig) -> Mixture:
    return Mixture(config.data.sources, (PROMPTS,), config.run.seed)


class Run:
    """A run's source over engines of its own, as the loop calls both."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        num_engines: int = 2,
        start: int = 0,
        ahead: Ahead | None = None,
        hesitates: Sequence[int] = (),
    ) -> None:
        self.config = config
        self.engines = [DecodingEngine(hesitates=count) for count in hesitates or [0] * num_engines]
        self.pool = Pool(self.engines, 5.0)
        self.records = RolloutWriter(RolloutFile(folder / f"{start}.jsonl"))
        self.source = RolloutSource(config, mixture(config), self.pool, Parity(), self.records, ahead=ahead)
        self.metrics: list[dict[str, float]] = []

    def steps(self, first: int, last: int) -> None:
        schedule = self.config.schedule
        for step in range(first, last):
            for due in schedule.completes(step):
                self.source.finish(due)
            assert self.pool.unverified(step, self.pool.receive(step, {}), 5.0) == {}
            self.pool.commit(step)
            if sampled := schedule.samples(step):
                self.source.open(schedule.opens(step), sampled.stop)
            self.metrics.append(self.source.next(step).metrics)
        self.records.settle()

    def kept(self, step: int) -> Ahead:
        for due in self.config.schedule.completes(step):
            self.source.drain(due)
        return self.source.ahead(self.config.schedule.in_flight(step))

    def close(self) -> None:
        self.source.close()
        self.records.close()


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Any]:
    runs: list[Run] = []

    def make(config: RunConfig, **options: Any) -> Run:
        runs.append(Run(config, tmp_path, **options))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def untimed(metrics: Sequence[dict[str, float]]) -> str:
    return repr([{k: v for k, v in row.items() if "seconds" not in k and "idle" not in k} for row in metrics])


def test_each_token_is_of_a_version_of_the_schedule_and_staleness_counts_tokens(begin, tmp_path):
    run = begin(in_flight())
    run.steps(0, STEPS)
    ledger, schedule = rows(tmp_path / "0.jsonl"), run.config.schedule
    assert len(ledger) == STEPS * 4 * 3
    for row in ledger:
        versions = [version for version, _ in row["spans"]]
        assert versions == sorted(set(versions)) and set(versions) <= set(schedule.versions(row["step"]))
        assert row["version"] == versions[0] and sum(count for _, count in row["spans"]) == row["num_tokens"]
        assert row["num_tokens"] == row["seed"] % 7 + 1, "a pause makes no response longer or shorter"
    assert any(len(row["spans"]) > 1 for row in ledger)
    for step, metrics in enumerate(run.metrics):
        own = [row for row in ledger if row["step"] == step]
        ages = [step - version for row in own for version, count in row["spans"] for _ in range(count)]
        assert metrics["staleness"] == sum(ages) / len(ages) and metrics["staleness_max"] == max(ages)
        assert metrics["updated_in_flight"] == sum(len(row["spans"]) > 1 for row in own) / len(own)


def test_what_was_paused_goes_on_first_in_its_order_and_engines_stop_behind_what_is_due(begin):
    """Of each engine: one submission a sync, whose requests are in the order of steps; then what is due is collected, step by
    step, and the rest paused. Nothing of that looks at the time."""
    run = begin(in_flight())
    run.steps(0, STEPS)
    for engine in run.engines:
        calls = [(method, arguments) for method, arguments in engine.calls if method != "receive"]
        asked = [arguments[0] for method, arguments in calls if method == "submit"]
        assert len(asked) == STEPS - 1, "before the last step nothing is open"
        for interval, submitted in enumerate(asked):
            steps = [int(request.request_id.split(":")[1]) for request in submitted]
            assert steps == sorted(steps)
            assert set(steps) <= set(range(interval + (interval > 0), min(interval + 3, STEPS)))
        methods = [method for method, arguments in calls if method != "collect" or arguments[1] == 0]
        assert methods == [
            *("submit", "collect", "collect", *PAUSED_BY), *("submit", "collect", *PAUSED_BY) * (STEPS - 3),
            *("submit", "collect"),
        ]  # fmt: skip
    resumed = [r for engine in run.engines for method, a in engine.calls if method == "submit" for r in a[0] if r.sampled.spans]
    assert resumed and all(request.engine_seed != request.seed for request in resumed)


@pytest.mark.parametrize("hesitates", [(0, 4, 9), (9, 0, 4), (3, 3, 0)])
def test_engines_decode_on_until_the_last_has_done_its_part_and_pause_at_one_step(begin, tmp_path, hesitates):
    """However far they have come by then: what they decoded beyond it is taken back, so the ledger is that of engines of which
    none ever waits."""
    whole = begin(in_flight(), num_engines=3)
    whole.steps(0, STEPS)
    other = begin(in_flight(), start=100, hesitates=hesitates)
    other.steps(0, STEPS)
    assert rows(tmp_path / "100.jsonl") == rows(tmp_path / "0.jsonl")
    assert untimed(other.metrics) == untimed(whole.metrics)
    paused = [[arguments for method, arguments in engine.calls if method == "pause"] for engine in other.engines]
    assert paused[0] == paused[1] == paused[2] and len(paused[0]) == STEPS - 2
    assert any("go_on" in engine.methods for engine in other.engines)
    assert sum(engine.num_taken_back for engine in other.engines) > 0


@pytest.mark.parametrize("lookahead", [2, 4])
@pytest.mark.parametrize("cut", range(1, STEPS))
def test_a_run_goes_on_from_its_files_as_if_nothing_had_happened(begin, tmp_path, cut, lookahead):
    config = in_flight(lookahead)
    whole, first = begin(config, num_engines=3), begin(config, num_engines=3, start=100)
    whole.steps(0, STEPS)
    first.steps(0, cut)
    kept = first.kept(cut)
    assert kept.kept == config.schedule.in_flight(cut)
    kept.write(tmp_path)
    known = read_ahead(tmp_path / AHEAD, mixture(config), config).steps
    held = read_paused(tmp_path / PAUSED, mixture(config), config) if kept.paused else {}
    assert list(held) == [step for step in kept.kept if step >= (kept.first_paused or STEPS)]
    assert held == kept.paused
    second = begin(config, num_engines=3, start=cut, ahead=Ahead(known, held))
    second.steps(cut, STEPS)
    assert rows(tmp_path / "100.jsonl") + rows(tmp_path / f"{cut}.jsonl") == rows(tmp_path / "0.jsonl")
    assert untimed(first.metrics + second.metrics) == untimed(whole.metrics)


def test_paused_samples_of_other_data_or_options_are_refused(begin, tmp_path):
    config = in_flight()
    run = begin(config)
    run.steps(0, 2)
    run.kept(2).write(tmp_path)
    file = tmp_path / PAUSED
    with pytest.raises(DataError, match=r"paused, step 3: must hold the 24 samples that this run asks for"):
        read_paused(file, mixture(config), in_flight(algorithm={"samples_per_prompt": 6}))
    hot = in_flight(algorithm={"loss": "grpo", "samples_per_prompt": 3}, sampling={"temperature": 0.5})
    with pytest.raises(DataError, match=r"log-probs must be of temperature 0\.5, .* found 1\.0"):
        read_paused(file, mixture(config), hot)
    lines = file / "00000003.jsonl"
    row, *others = lines.read_text().splitlines()
    for changed, said in (
        ({"seed": "x"}, r"`seed` must be as a checkpoint has it \(input should be a valid integer\); found"),
        ({"num_tokens": 99}, r"`row` must be as a checkpoint has it \(.*must be of `num_tokens` tokens\); found"),
    ):
        lines.write_text("\n".join([json.dumps(json.loads(row) | changed), *others]) + "\n")
        with pytest.raises(DataError, match=rf"00000003\.jsonl, line 1: {said}"):
            read_paused(file, mixture(config), config)


def test_what_older_checkpoints_hold_as_one_file_of_json_is_read_to_the_same_bits(begin, tmp_path):
    """With the tokens and log-probs in each row, complete ones and paused ones."""
    config = in_flight()
    run = begin(config)
    run.steps(0, 2)
    kept = run.kept(2)
    kept.write(tmp_path)
    for name in (AHEAD, PAUSED):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            ledger = RolloutLedger(tmp_path / name)
            for step in ledger.steps:
                for _, row in ledger.with_columns(step):
                    numbers = {name: list(row[name]) for name in ("token_ids", "log_probs")}
                    file.write(json.dumps({key: value for key, value in row.items() if key != "num_tokens"} | numbers) + "\n")
    assert read_ahead(tmp_path / "ahead.jsonl", mixture(config), config).steps == kept.steps
    assert read_paused(tmp_path / "paused.jsonl", mixture(config), config) == kept.paused


@pytest.mark.parametrize(("name", "read"), [(AHEAD, read_ahead), (PAUSED, read_paused)])
@pytest.mark.parametrize("suffix", ["jsonl", "arrows"])
def test_what_a_checkpoint_keeps_that_ends_early_is_refused(begin, tmp_path, name, read, suffix):
    """Cut in its last step, of rows or of columns: a checkpoint's digests say so before, this is who reads without them."""
    config = in_flight()
    run = begin(config)
    run.steps(0, 2)
    run.kept(2).write(tmp_path)
    file = next((tmp_path / name).glob(f"*.{suffix}"))
    os.truncate(file, file.stat().st_size - 9)
    with pytest.raises(DataError, match=rf"{name}/.*(must be one list a rollout|must hold the tokens of step)"):
        read(tmp_path / name, mixture(config), config)


def test_a_ledger_of_updates_in_flight_is_replayed_with_its_versions(begin, tmp_path):
    run = begin(in_flight())
    run.steps(0, STEPS)
    offline = {"sync_interval": "never", "lookahead": 0, "in_flight": False}
    path = tmp_path / "0.jsonl"
    config = in_flight(sync=offline, data={"prompts_per_step": 4, "replay": str(path)})
    replayed = LedgerSource(config, RolloutLedger(path), mixture(config), 1000)
    for step, metrics in enumerate(run.metrics):
        found = replayed.next(step).metrics
        assert {name: found[name] for name in ("staleness", "staleness_max", "updated_in_flight")} == {
            name: metrics[name] for name in ("staleness", "staleness_max", "updated_in_flight")
        }


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([[0, 1], [0, 1]], "rise from `version`"),
        ([[1, 2]], "rise from `version`"),
        ([[0, 1]], "add up to `num_tokens`"),
        ([[0, 0], [1, 2]], r"must be \[version, tokens\]"),
        ([[0, 1, 1]], r"must be \[version, tokens\]"),
    ],
)
def test_a_ledgers_spans_must_be_what_they_say(tmp_path, spans, said):
    row = {"step": 3, "version": 0, "prompt_id": "p", "sample_index": 0, "seed": 1, "reward": 1.0, "status": "ok"}
    row |= {"finish_reason": "stop", "num_tokens": 2, "token_ids": [1, 2], "log_probs": [-1.0, -1.0]}
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(row | {"spans": spans}) + "\n")
    with pytest.raises(DataError, match=f"line 1: `spans` must be as a ledger has it .*{said}"):
        RolloutLedger(tmp_path / "rollouts.jsonl").read(3)


@settings(deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_the_pool_puts_what_engines_paused_back_in_its_order(num_engines, sizes, data):
    """Whatever part of the batches is due, and although requests of one prompt go to one engine."""
    num_completed = data.draw(st.integers(0, len(sizes)))
    pool = Pool([DecodingEngine(slots=2) for _ in range(num_engines)], 5.0)
    batches = [requests(size, step) for step, size in enumerate(sizes)]
    tickets, paused = pool.submit_and_pause(batches, num_completed)
    found = [completion.seed for ticket in tickets for completion in pool.gather(ticket)[0]]
    assert found == [request.seed for batch in batches[:num_completed] for request in batch]
    assert (paused is None) is (num_completed == len(sizes))
    rest = [request for batch in batches[num_completed:] for request in batch]
    assert [part.seed for part in pool.paused(paused)] == [request.seed for request in rest] if paused else not rest


def test_an_engine_that_pauses_late_is_named():
    pool = Pool([DecodingEngine(), DecodingEngine(failing={"pause": TimeoutError()})], 7.5)
    _, paused = pool.submit_and_pause([requests(2), requests(2, 1)], 1)
    assert paused is not None
    with pytest.raises(InferenceError, match=r"engine 1 did not answer 'pause' within inference\.timeout_seconds = 7\.5"):
        pool.paused(paused)


@pytest.mark.parametrize(("seconds", "stopped", "error"), [(0.01, False, InferenceError), (60.0, True, CancelledError)])
def test_an_engine_that_is_late_with_its_part_is_named_and_who_stops_waits_no_longer(seconds, stopped, error):
    pool = Pool([DecodingEngine(), DecodingEngine(hesitates=10**6)], seconds)
    _, paused = pool.submit_and_pause([requests(2), requests(2, 1)], 1)
    assert paused is not None
    with pytest.raises(error) as caught:
        pool.paused(paused, lambda: stopped)
    assert stopped or str(caught.value).startswith("engine 1 did not complete its part before a pause within 0.02 s, which")


def test_a_steps_tokens_are_those_of_its_responses_however_they_came(begin, tmp_path):
    """Also of those that were complete when engines paused, which no call of collect hands over."""
    run = begin(in_flight(), hesitates=(0, 5, 2))
    run.steps(0, STEPS)
    counted = [metrics["generation_tokens"] for metrics in run.metrics]
    ledger = rows(tmp_path / "0.jsonl")
    assert counted == [sum(row["num_tokens"] for row in ledger if row["step"] == step) for step in range(STEPS)]


def test_what_follows_is_seeded_by_what_is_there():
    """Every number of tokens gives another seed, and none gives the sample's own."""
    begun = [requests(1)[0].paused(range(count), [-1.0] * count, 2) for count in range(4)]
    assert begun[0] == requests(1)[0] and begun[0].engine_seed == begun[0].seed
    assert len({request.engine_seed for request in begun}) == 4
    twice = begun[3].paused([7], [-0.5], 4).paused([], [], 6).paused([8, 9], [-0.25, -0.125], 6)
    log_probs = LogProbs.of([-1.0, -1.0, -1.0, -0.5, -0.25, -0.125])
    assert twice.sampled == Sampled(TokenIds.of([0, 1, 2, 7, 8, 9]), log_probs, ((2, 3), (4, 1), (6, 2)))
    assert begun[3].paused([7], [-0.5], 2).sampled.spans == ((2, 4),)


def test_a_step_that_was_complete_when_it_was_paused_asks_engines_for_nothing():
    config = in_flight()
    asked = pending(0, mixture(config), config)
    done = [FakeEngine().completion(request) for request in asked.asked]
    whole = asked.with_found(done)
    assert len(asked.unfinished) == 12 and whole.unfinished == [] and whole.with_found([]) == whole
